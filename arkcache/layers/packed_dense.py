"""The cache of a layer that attends everything, quantised, in the device tier (KIVI).

Sealed pages stay packed; a step unpacks some of them at a time and merges them with the
full-precision window by log-sum-exp, so that nothing of the size of the cache is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.engines.engine import State
from arkcache.engines.step import Step, attend_blocks
from arkcache.errors import IntegrityError
from arkcache.kernels.torch_pages import PagePacker
from arkcache.layers.sealing import SealingLayer
from arkcache.pages.bookkeeping import Ids
from arkcache.pages.windows import RingWindow, ShiftedWindow
from arkcache.stats import CacheStats
from arkcache.tiering.device import DeviceTier, Geometry, unpacked_pages
from arkcache.tiering.growing import ChunkedTensor, GrowingTensor
from arkcache.tiering.transfer import upload

CHUNK_PAGES = 32
"""Pages that the layer grows by: what it holds is never copied, and little is held in advance."""


class PackedDenseLayer(SealingLayer):
    """A layer that attends everything, its sealed pages packed.

    Args:
        config: the cache's settings.
        geometry: sizes.
        packer: of its pages.
        pages: empty, for packed pages [batch, kv_heads, pages, nbytes]; None makes one.
        window: the recent window; None makes one.
    """

    def __init__(
        self,
        config: CacheConfig,
        geometry: Geometry,
        packer: PagePacker,
        pages: ChunkedTensor | GrowingTensor | None = None,
        window: RingWindow | ShiftedWindow | None = None,
    ) -> None:
        super().__init__(config, geometry)
        self._packer = packer
        if pages is None:
            shape = (geometry.batch, geometry.num_kv_heads, CHUNK_PAGES, packer.layout.nbytes)
            pages = ChunkedTensor(shape, 2, torch.uint8, geometry.device)
        if window is None:
            window = ShiftedWindow(*window_planes(geometry, config.window_tokens))
        self._pages, self._window = pages, window

    @property
    def window(self) -> RingWindow | ShiftedWindow:
        """The recent window."""
        return self._window

    def attend_one(self, step: Step) -> Tensor:
        """See `Layer`."""
        heads = self.geometry.num_kv_heads
        return attend_blocks(step, self.blocks(), heads, self.tokens.lengths[:, None] - 1)

    def _page_state(self) -> State:
        """See `SealingLayer`."""
        sealed = int(self.tokens.sealed.max())
        return {"pages": self._pages.read(0, sealed)} if sealed else {}

    def _restore_pages(self, state: State) -> None:
        """See `SealingLayer`."""
        if "pages" in state:
            self._pages.write(slice(None), 0, state["pages"])

    def keep_sequences(self, index: Ids, device_tier: DeviceTier, _num_selected: Ids) -> None:
        """See `Layer`."""
        self.geometry = device_tier.geometry
        on_device = upload(index, self.geometry.device)
        self._pages.keep_sequences(on_device)
        with torch.inference_mode(False):
            self._window = type(self._window)(*(plane[on_device] for plane in self._window))
        self.tokens.keep_sequences(index)

    def check(self) -> None:
        """See `Layer`."""
        self._check_sealed(self.tokens.sealed)
        if int(self.tokens.sealed.max()) > self._pages.capacity:
            raise IntegrityError("a packed layer counts more pages than it has room for")

    def stats(self) -> CacheStats:
        """See `Layer`."""
        size = self._pages.nbytes + sum(plane.nbytes for plane in self._window)
        return self.counters.stats(self.tokens) + CacheStats(device_bytes=size)

    def _seal(self, seqs: slice, first: int, key: Tensor, value: Tensor) -> None:
        self._pages.write(seqs, first, self._packer.pack(key, value))

    def _read(self, sequence: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        key, value = self._packer.unpack(self._pages.read(first, last)[sequence])
        return key.flatten(1, 2), value.flatten(1, 2)

    def _unseal(self, _sequence: int, _first: int, _last: int) -> None:
        """Nothing: what is counted as sealed says what is."""

    def _page_blocks(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        total = int(self.tokens.sealed.max())
        per_block = unpacked_pages(self.geometry, self.config.page_size)
        for first in range(0, total, per_block):
            last = min(first + per_block, total)
            key, value = self._packer.unpack(self._pages.read(first, last))
            yield first, last, key.flatten(2, 3), value.flatten(2, 3)


def window_planes(geometry: Geometry, tokens: int) -> tuple[Tensor, Tensor]:
    """Zeros for a window: keys and values [batch, kv_heads, tokens, dim]."""
    rows = (geometry.batch, geometry.num_kv_heads, tokens)
    with torch.inference_mode(False):  # written to in and out of it
        like = torch.empty(0, dtype=geometry.dtype, device=geometry.device)
        return like.new_zeros((*rows, geometry.head_dim)), like.new_zeros(
            (*rows, geometry.value_dim)
        )
