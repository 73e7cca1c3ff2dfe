"""From budgets to slots: what the device tier is made of, and how much of it fits in bytes.

Knows sizes only; `DeviceTier` allocates what is planned here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from arkcache.config import NO_LIMIT, CacheConfig
from arkcache.errors import ConfigError
from arkcache.formats import PageLayout
from arkcache.kernels.torch_pages import PagePacker
from arkcache.pages import Ids
from arkcache.tiering.device import Geometry, TierPlan

LEAST_STREAMED, MOST_STREAMED = 1024, 8192
"""Tokens of a streaming block, unless the settings say how many. On a CPU the least is as fast as
any; on a GPU longer blocks are fewer launches and longer copies, and take memory."""


@dataclass(frozen=True)
class Planner:
    """Plans the device tier of a manager.

    Args:
        config: the settings.
        num_layers, num_kv_heads, head_dim, value_dim, dtype, device: of the manager.
        backend: "torch" or "triton", whose slots hold pages as the host tier does.
    """

    config: CacheConfig
    num_layers: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    backend: str = "torch"

    @cached_property
    def packers(self) -> list[PagePacker]:
        """Of the pages' first format and, if there is one, of the coarse one.

        Raises `ConfigError` where groups do not divide the values.
        """
        coarse = self.config.coarse_format
        formats = [self.config.format, *([] if coarse is None else [coarse])]
        sizes = (self.config.page_size, self.head_dim, self.value_dim, self.dtype.itemsize)
        return [PagePacker(PageLayout(one, *sizes), self.dtype) for one in formats]

    def selected(self, layer: int, most: int) -> Ids:
        """Pages that each KV head of a layer may select [num_kv_heads], at most `most`."""
        pages = [self.config.selected_pages(layer, head) for head in range(self.num_kv_heads)]
        return np.minimum(np.array(pages, dtype=np.int64), most)

    def plan(self, batch: int, most: int) -> TierPlan:
        """The device tier for so many sequences, whose heads select at most `most` pages."""
        config = self.config
        geometry = Geometry(
            batch, self.num_kv_heads, self.head_dim, self.value_dim, self.dtype, self.device
        )
        slots = tuple(
            config.num_sink_pages
            + int(np.ceil(self.selected(layer, most).max() * config.device_pool_factor))
            for layer in range(self.num_layers)
            if config.budget_of(layer) is not None
        )
        packed = config.packed_slots
        if packed is None:
            packed = self.device.type != "cpu" and config.coarse_format is None
        packed = (packed and not config.format.is_raw) or self.backend == "triton"
        return TierPlan(
            geometry,
            slots,
            config.page_size,
            config.window_tokens,
            self._stream_block_tokens(geometry),
            self.packers[0] if packed else None,
            num_stream_blocks=1 if self.device.type == "cpu" else 2,
        )

    def _stream_block_tokens(self, geometry: Geometry) -> int:
        """Tokens of a streaming block of so many sequences: whole pages, one at least."""
        config, page_size = self.config, self.config.page_size
        tokens = config.stream_block_tokens
        if tokens is None:
            tokens = LEAST_STREAMED
            if self.device.type != "cpu":
                tokens = max(tokens, MOST_STREAMED // geometry.batch)
                if config.device_bytes is not None:
                    per_token = geometry.num_rows * (geometry.head_dim + geometry.value_dim)
                    limit = config.device_bytes // (8 * 2 * per_token * geometry.dtype.itemsize)
                    tokens = min(tokens, limit)
        return max(tokens // page_size, 1) * page_size

    def pages_that_fit(self, batch: int) -> int:
        """The most pages that every KV head may select within `device_bytes`.

        Raises `ConfigError` where not even one fits.
        """
        limit = self.config.device_bytes
        if limit is None:
            return NO_LIMIT
        fits, too_many = 1, 2
        while self.plan(batch, too_many).nbytes <= limit and too_many < NO_LIMIT:
            fits, too_many = too_many, 2 * too_many
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.plan(batch, middle).nbytes <= limit:
                fits = middle
            else:
                too_many = middle
        self.check(self.plan(batch, fits))
        return fits

    def check(self, plan: TierPlan) -> None:
        """Raise `ConfigError` where a plan exceeds `device_bytes`."""
        limit = self.config.device_bytes
        if limit is not None and plan.nbytes > limit:
            raise ConfigError(
                f"device_bytes={limit}: the device tier of {plan.geometry.batch} sequences needs "
                f"{plan.nbytes} for the pages that each selects, its windows and its streaming "
                "block; raise it, or lower num_recent_tokens, stream_block_tokens, page_size or "
                "the bits"
            )
