"""From budgets to slots: what the device tier is made of, and how much of it fits in bytes.

Knows sizes only; `DeviceTier` allocates what is planned here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from arkcache.config import NO_LIMIT, CacheConfig
from arkcache.errors import ConfigError
from arkcache.formats import PageLayout
from arkcache.kernels.torch_pages import PagePacker
from arkcache.pages.bookkeeping import Ids
from arkcache.tiering.device import Geometry, TierPlan

MIN_STREAMED, MAX_STREAMED = 1024, 8192
"""Tokens of a streaming block, unless the settings say how many. On a CPU the least is as fast as
any; on a GPU longer blocks are fewer launches and longer copies, and take memory."""

MAX_SLOTS = 4.0
"""The largest automatic pool factor: slots for each page that a step selects."""

SPARE_SHARE = 1 / 16
"""The part of a device's free memory that automatic spare slots may take: models need the rest."""


@dataclass(frozen=True)
class Planner:
    """Plans the device tier of a manager.

    Args:
        config: the settings.
        num_layers, num_kv_heads, head_dim, value_dim, dtype, device: of the manager.
        backend: "torch"; "triton", whose slots hold pages as the host tier does; or "numba", which
            reads them there and has no slots.
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

    def within(self, device_bytes: int | None) -> Planner:
        """The same under another limit; raises `ConfigError` for an impossible one."""
        return replace(self, config=replace(self.config, device_bytes=device_bytes))

    def selected(self, layer: int, max_selected: int) -> Ids:
        """Pages that each KV head of a layer may select [num_kv_heads], at most `max_selected`."""
        if self.config.budget_of(layer) is None:
            return np.full(self.num_kv_heads, max_selected)
        pages = [self.config.selected_pages(layer, head) for head in range(self.num_kv_heads)]
        return np.minimum(np.array(pages, dtype=np.int64), max_selected)

    def budgets(self, max_selected: int) -> list[list[int]]:
        """`selected` of each layer that selects pages."""
        paged = [one for one in range(self.num_layers) if self.config.budget_of(one) is not None]
        return [self.selected(layer, max_selected).tolist() for layer in paged]

    @property
    def takes_spare(self) -> bool:
        """Whether the pool factor follows from free memory: it is not set, and spare slots help."""
        automatic = self.config.device_pool_factor is None
        return automatic and self.backend == "triton" and self.device.type == "cuda"

    def pool_factor(self, batch: int, max_selected: int) -> float:
        """Slots for each page that a step selects: as set, or what the device has room for."""
        least = self.config.device_pool_factor or 1.0
        if not self.takes_spare:
            return least
        free, _ = torch.cuda.mem_get_info(self.device)
        room = self.plan(batch, max_selected, least).nbytes + int(free * SPARE_SHARE)
        return self.factor_within(room, batch, max_selected)

    def factor_within(self, room: int, batch: int, max_selected: int) -> float:
        """The largest automatic pool factor of a tier within so many bytes and `device_bytes`."""
        limit = self.config.device_bytes
        room = room if limit is None else min(room, limit)
        factors = np.arange(MAX_SLOTS, 1.0, -1 / 8).tolist()
        fits = (
            factor for factor in factors if self.plan(batch, max_selected, factor).nbytes <= room
        )
        return next(fits, 1.0)

    def plan(self, batch: int, max_selected: int, pool_factor: float | None = None) -> TierPlan:
        """The device tier for so many sequences, whose heads select at most `max_selected` pages.

        pool_factor: slots for each page that a step selects; None is `self.pool_factor`.
        """
        config = self.config
        factor = self.pool_factor(batch, max_selected) if pool_factor is None else pool_factor
        geometry = Geometry(
            batch, self.num_kv_heads, self.head_dim, self.value_dim, self.dtype, self.device
        )
        slots = tuple(
            self._slots(layer, max_selected, factor)
            for layer in range(self.num_layers)
            if config.budget_of(layer) is not None
        )
        packed = config.packed_slots
        if packed is None:
            unpacks = config.coarse_format is not None or config.retention is not None
            packed = self.device.type != "cpu" and not unpacks
        packed = (packed and not config.format.is_raw) or self.backend == "triton"
        packed = packed and self.backend != "numba"
        return TierPlan(
            geometry,
            slots,
            config.page_size,
            config.window_tokens,
            self._stream_block_tokens(geometry),
            self.packers[0] if packed else None,
            num_stream_blocks=1 if self.device.type == "cpu" else 2,
            pool_factor=factor,
        )

    def _slots(self, layer: int, max_selected: int, factor: float) -> int:
        """Slots of a paged layer, for sinks and selected pages."""
        if self.backend == "numba":
            return 0
        selected = self.selected(layer, max_selected).max()
        return self.config.num_sink_pages + int(np.ceil(selected * factor))

    def _stream_block_tokens(self, geometry: Geometry) -> int:
        """Tokens of a streaming block of so many sequences: whole pages, one at least."""
        config, page_size = self.config, self.config.page_size
        tokens = config.stream_block_tokens
        if tokens is None:
            tokens = MIN_STREAMED
            if self.device.type != "cpu":
                tokens = max(tokens, MAX_STREAMED // geometry.batch)
                if config.device_bytes is not None:
                    per_token = geometry.num_rows * (geometry.head_dim + geometry.value_dim)
                    limit = config.device_bytes // (8 * 2 * per_token * geometry.dtype.itemsize)
                    tokens = min(tokens, limit)
        return max(tokens // page_size, 1) * page_size

    def pages_that_fit(self, batch: int) -> int:
        """The most pages that every KV head may select within `device_bytes`.

        An automatic pool factor leaves no page out: spare slots take what is left. On the numba
        backend, which has no slots, as many as would fit on plain torch. Raises `ConfigError` where
        not even one fits.
        """
        limit = self.config.device_bytes
        if limit is None:
            return NO_LIMIT
        if self.backend == "numba":
            return replace(self, backend="torch").pages_that_fit(batch)
        fits, too_many, least = 1, 2, self.config.device_pool_factor or 1.0
        while self.plan(batch, too_many, least).nbytes <= limit and too_many < NO_LIMIT:
            fits, too_many = too_many, 2 * too_many
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.plan(batch, middle, least).nbytes <= limit:
                fits = middle
            else:
                too_many = middle
        self.check(self.plan(batch, fits, least))
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
