"""The device tier: one allocation of equal slots, carved into a working set per layer.

A row (a sequence and KV head of a layer) owns adjacent slots, keys and values in planes of their
own, so that everything a row attends is one view of each plane and nothing is gathered on a hit:

    | ... page  page | sinks |  window: newest tokens ...      |
    <- places grow          ^ boundary                grows ->

Sinks and selected pages grow from the boundary to the left, the window to the right, so what is
valid is one run of tokens however full either side is. The order of tokens does not matter to
attention: positions are in the keys already.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """Sizes that all layers of a manager share. `value_dim` may differ from `head_dim`."""

    batch: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def num_rows(self) -> int:
        """Rows of a layer: sequences times KV heads."""
        return self.batch * self.num_kv_heads


class WorkingSet:
    """One layer's part of the device tier.

    Args:
        key, value: planes [batch, kv_heads, tokens, dim] of `num_slots` pages and the window.
        num_slots: slots left of the boundary, for sinks and selected pages.
        page_size: tokens per slot.
    """

    def __init__(self, key: Tensor, value: Tensor, num_slots: int, page_size: int) -> None:
        self.key, self.value = key, value
        self.num_slots, self.page_size = num_slots, page_size
        self.boundary = num_slots * page_size
        self.key_window = key[:, :, self.boundary :]
        self.value_window = value[:, :, self.boundary :]
        self.slots_per_row = key.shape[2] // page_size
        self._key_slots = key.view(-1, page_size * key.shape[3])
        self._value_slots = value.view(-1, page_size * value.shape[3])

    def view(self, num_pages: int, num_recent: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `num_pages` places and `num_recent` tokens of the window."""
        start = self.boundary - num_pages * self.page_size
        stop = self.boundary + num_recent
        return self.key[:, :, start:stop], self.value[:, :, start:stop]

    def fill_places(self, rows: slice, first_place: int, key: Tensor, value: Tensor) -> None:
        """Write pages [sequences, kv_heads, pages, page_size, dim] into adjacent places."""
        num_pages = key.shape[2]
        stop = self.num_slots - first_place
        slots = slice((stop - num_pages) * self.page_size, stop * self.page_size)
        # Places run right to left.
        self.key[rows, :, slots] = key.flip(2).flatten(2, 3)
        self.value[rows, :, slots] = value.flip(2).flatten(2, 3)

    def write_pages(self, rows: Tensor, places: Tensor, pages: Tensor) -> None:
        """Write packed pages [count, page_size * (head_dim + value_dim)], keys first.

        rows, places: int64 [count], where each of them goes.
        """
        slots = rows * self.slots_per_row + (self.num_slots - 1 - places)
        key_size = self._key_slots.shape[1]
        self._key_slots.index_copy_(0, slots, pages[:, :key_size])
        self._value_slots.index_copy_(0, slots, pages[:, key_size:])

    def load_places(self, first_place: int, source: Tensor, pieces: Tensor) -> None:
        """Fill adjacent places from `first_place` on in one pass, on one device.

        source: packed pages [count, page_size * (head_dim + value_dim)]; pieces: int64
        [rows, places], which of them each place of each row gets.
        """
        stop = (self.num_slots - first_place) * self.page_size
        start = stop - pieces.shape[1] * self.page_size
        key_size = self._key_slots.shape[1]
        # Places run right to left.
        pieces = pieces.flip(1)
        for plane, part in ((self.key, source[:, :key_size]), (self.value, source[:, key_size:])):
            for row, wanted in zip(plane.flatten(0, 1), pieces, strict=True):
                target = row[start:stop].view(pieces.shape[1], -1)
                torch.index_select(part, 0, wanted, out=target)

    def copy_sequences(self, source: WorkingSet, index: Tensor) -> None:
        """Fill from another working set: sequence i from its sequence `index[i]`."""
        self.key.copy_(source.key[index])
        self.value.copy_(source.value[index])


class DeviceTier:
    """The one allocation: a working set per paged layer and a block to stream the past through.

    Args:
        geometry: sizes shared by the layers.
        slots_per_layer: slots for sinks and selected pages of each paged layer.
        page_size: tokens per slot.
        window_tokens: capacity of the recent window; rounded up to whole slots.
        stream_block_tokens: tokens of the streaming block; 0 without paged layers.
    """

    def __init__(
        self,
        geometry: Geometry,
        slots_per_layer: list[int],
        page_size: int,
        window_tokens: int,
        stream_block_tokens: int,
    ) -> None:
        self.geometry = geometry
        self._slots_per_layer, self._page_size = slots_per_layer, page_size
        window_slots = -(-window_tokens // page_size)
        self._tokens = [(slots + window_slots) * page_size for slots in slots_per_layer]
        self._block_tokens = stream_block_tokens if slots_per_layer else 0
        per_token = geometry.head_dim + geometry.value_dim
        size = geometry.num_rows * (sum(self._tokens) + self._block_tokens) * per_token
        # Zeros, not empty: what is masked out is multiplied by 0, which a stale NaN would survive.
        # Not an inference tensor: it is written to in and out of inference mode.
        with torch.inference_mode(False):
            self.pool = torch.zeros(size, dtype=geometry.dtype, device=geometry.device)
        self._carve_all()

    @property
    def nbytes(self) -> int:
        """Bytes of the allocation."""
        return self.pool.numel() * self.pool.element_size()

    def __getstate__(self) -> dict[str, object]:
        views = ("working_sets", "stream_key", "stream_value")
        return {name: value for name, value in vars(self).items() if name not in views}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._carve_all()

    def _carve_all(self) -> None:
        self._next = 0
        self.working_sets = [
            WorkingSet(*self._carve(tokens), slots, self._page_size)
            for tokens, slots in zip(self._tokens, self._slots_per_layer, strict=True)
        ]
        self.stream_key, self.stream_value = self._carve(self._block_tokens)

    def _carve(self, tokens: int) -> tuple[Tensor, Tensor]:
        planes = []
        for dim in (self.geometry.head_dim, self.geometry.value_dim):
            shape = (self.geometry.batch, self.geometry.num_kv_heads, tokens, dim)
            size = self.geometry.num_rows * tokens * dim
            planes.append(self.pool[self._next : self._next + size].view(shape))
            self._next += size
        return planes[0], planes[1]
