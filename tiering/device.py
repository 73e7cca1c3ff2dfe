"""The device tier: one allocation, carved into a working set per layer and streaming blocks.

A row (a sequence and KV head of a layer) owns adjacent slots, so that what it attends is one run
and nothing is gathered on a hit. Unpacked, keys and values are planes of their own:

    | ... page  page | sinks |  window: newest tokens ...      |
    <- places grow          ^ boundary                grows ->

Sinks and selected pages grow from the boundary to the left, the window to the right, so what is
valid is one run of tokens however full either side is. The order of tokens does not matter to
attention: positions are in the keys already. Packed, slots hold a page's bytes, right to left in
the same way, and the window is a plane beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from arkcache.kernels.torch_pages import PagePacker

_ALIGNMENT = 64
"""Bytes: of every plane in the allocation, for the widest vector loads."""

UNPACKED_BYTES = 4 << 20
"""Packed pages are unpacked and attended so many bytes (in fp32) at a time: 4 MiB stay in a cache.
A step over 16384 tokens takes 26 ms with blocks of 1 MiB, 20 with 2, 17 with 4 and 35 with 8 (4
layers, 2 KV heads of 64, 2 threads)."""


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

    def rows_of(self, seqs: slice) -> slice:
        """The rows, (sequence, KV head) pairs, of these sequences."""
        return slice(seqs.start * self.num_kv_heads, seqs.stop * self.num_kv_heads)


def unpacked_pages(geometry: Geometry, page_size: int) -> int:
    """Packed pages of every row to unpack at a time."""
    tokens = UNPACKED_BYTES // (4 * geometry.num_rows * (geometry.head_dim + geometry.value_dim))
    return max(1, tokens // page_size)


class WorkingSet:
    """One layer's part of the device tier, unpacked.

    Args:
        key, value: planes [batch, kv_heads, tokens, dim] of `num_slots` pages and the window.
        num_slots: slots left of the boundary, for sinks and selected pages.
        page_size: tokens per slot.
    """

    def __init__(self, key: Tensor, value: Tensor, num_slots: int, page_size: int) -> None:
        self.key, self.value = key, value
        self.planes: tuple[Tensor, ...] = (key, value)
        self.num_slots, self.page_size = num_slots, page_size
        self.boundary = num_slots * page_size
        self.windows = (key[:, :, self.boundary :], value[:, :, self.boundary :])
        self.slots_per_row = key.shape[2] // page_size
        self._key_slots = key.view(-1, page_size * key.shape[3])
        self._value_slots = value.view(-1, page_size * value.shape[3])

    def view(self, num_pages: int, num_recent: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `num_pages` places and `num_recent` tokens of the window."""
        start = self.boundary - num_pages * self.page_size
        stop = self.boundary + num_recent
        return self.key[:, :, start:stop], self.value[:, :, start:stop]

    def fill_places(self, seqs: slice, first_place: int, key: Tensor, value: Tensor) -> None:
        """Write pages [seqs, kv_heads, pages, page_size, dim] into adjacent places."""
        num_pages = key.shape[2]
        stop = self.num_slots - first_place
        slots = slice((stop - num_pages) * self.page_size, stop * self.page_size)
        # Places run right to left.
        self.key[seqs, :, slots] = key.flip(2).flatten(2, 3)
        self.value[seqs, :, slots] = value.flip(2).flatten(2, 3)

    def write_pages(self, rows: Tensor, places: Tensor, key: Tensor, value: Tensor) -> None:
        """Write pages [count, page_size, dim]; rows, places: int64 [count], where each goes."""
        slots = rows * self.slots_per_row + (self.num_slots - 1 - places)
        self._key_slots.index_copy_(0, slots, key.flatten(1))
        self._value_slots.index_copy_(0, slots, value.flatten(1))

    def load_places(self, first_place: int, source: Tensor, pieces: Tensor) -> None:
        """Fill adjacent places from `first_place` on in one pass, on one device.

        source: pages [count, page_size * (head_dim + value_dim)] in the planes' dtype, keys first;
        pieces: int64 [rows, places], which of them each place of each row gets.
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


class PackedWorkingSet:
    """One layer's part of the device tier, its slots packed.

    Args:
        slots: uint8 [batch, kv_heads, num_slots, nbytes].
        windows: keys and values of the recent window [batch, kv_heads, tokens, dim].
        packer: of the slots' pages.
        pages_at_once: how many slots of every row are unpacked at a time.
    """

    def __init__(
        self,
        slots: Tensor,
        windows: tuple[Tensor, Tensor],
        packer: PagePacker,
        pages_at_once: int,
    ) -> None:
        self.slots, self.windows, self.packer = slots, windows, packer
        self.pages_at_once = pages_at_once
        self.planes = (slots, *windows)
        self.num_slots = slots.shape[2]

    def fill_places(self, seqs: slice, first_place: int, packed: Tensor) -> None:
        """Write pages [seqs, kv_heads, pages, nbytes] into adjacent places."""
        stop = self.num_slots - first_place
        # Places run right to left.
        self.slots[seqs, :, stop - packed.shape[2] : stop] = packed.flip(2)

    def write_pages(self, rows: Tensor, places: Tensor, packed: Tensor) -> None:
        """Write pages [count, nbytes]; rows, places: int64 [count], where each goes."""
        slots = rows * self.num_slots + (self.num_slots - 1 - places)
        self.slots.view(-1, self.slots.shape[3]).index_copy_(0, slots, packed)

    def parts(self, num_pages: int, num_recent: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What `WorkingSet.view` gives, in the same order, some pages at a time."""
        for start in range(self.num_slots - num_pages, self.num_slots, self.pages_at_once):
            key, value = self.packer.unpack(self.slots[:, :, start : start + self.pages_at_once])
            yield key.flatten(2, 3), value.flatten(2, 3)
        key_window, value_window = self.windows
        yield key_window[:, :, :num_recent], value_window[:, :, :num_recent]


def copy_sequences(source: tuple[Tensor, ...], target: tuple[Tensor, ...], index: Tensor) -> None:
    """Make sequence i of the planes of `target` what sequence `index[i]` of `source` is."""
    for plane, other in zip(target, source, strict=True):
        plane.copy_(other[index])


@dataclass(frozen=True)
class TierPlan:
    """What a device tier is made of, and so its size.

    Attributes:
        geometry: sizes shared by the layers.
        slots_per_layer: slots for sinks and selected pages of each paged layer.
        page_size: tokens per slot.
        window_tokens: capacity of the recent window; rounded up to whole slots.
        stream_block_tokens: tokens of a streaming block; none is made without paged layers.
        packer: where slots hold packed pages, of these; None where they are unpacked.
        num_stream_blocks: two, and one is read while the other is attended.
        pool_factor: slots for each page that a step selects, of any KV head.
    """

    geometry: Geometry
    slots_per_layer: tuple[int, ...]
    page_size: int
    window_tokens: int
    stream_block_tokens: int
    packer: PagePacker | None = None
    num_stream_blocks: int = 1
    pool_factor: float = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of the allocation."""
        layers = sum(self._plane_bytes(slots) for slots in self.slots_per_layer)
        block = self.states_bytes(self.stream_block_tokens)
        return layers + (self.num_stream_blocks * block if layers else 0)

    @property
    def whole_window_tokens(self) -> int:
        """`window_tokens` rounded up to whole slots, so that planes divide into slots."""
        return -(-self.window_tokens // self.page_size) * self.page_size

    def states_bytes(self, tokens: int) -> int:
        """Bytes of a plane of keys and one of values, of so many tokens of every row."""
        geometry = self.geometry
        per_token = geometry.num_rows * geometry.dtype.itemsize
        dims = (geometry.head_dim, geometry.value_dim)
        return sum(_aligned(per_token * tokens * dim) for dim in dims)

    def slots_bytes(self, slots: int) -> int:
        """Bytes of a plane of packed slots of every row."""
        assert self.packer is not None
        return _aligned(self.geometry.num_rows * slots * self.packer.layout.nbytes)

    def _plane_bytes(self, slots: int) -> int:
        if self.packer is None:
            return self.states_bytes(slots * self.page_size + self.whole_window_tokens)
        return self.slots_bytes(slots) + self.states_bytes(self.whole_window_tokens)


class DeviceTier:
    """The one allocation: a working set per paged layer, and blocks to stream the past through.

    Args:
        plan: what it is made of.

    Attributes:
        working_sets: of each paged layer.
        stream_blocks: keys and values [batch, kv_heads, stream_block_tokens, dim] of each block.
        lines: int64 [paged layers, rows], where kernels find which line of the host tier each page
            that a step seals goes to; of all layers, so that one copy says it.
    """

    def __init__(self, plan: TierPlan) -> None:
        self.plan = plan
        # Zeros, not empty: what is masked out is multiplied by 0, which a stale NaN would survive.
        # Not inference tensors: they are written to in and out of inference mode.
        with torch.inference_mode(False):
            self.pool = torch.zeros(plan.nbytes, dtype=torch.uint8, device=plan.geometry.device)
            self._carve_all()

    @property
    def geometry(self) -> Geometry:
        """Sizes shared by the layers."""
        return self.plan.geometry

    @property
    def nbytes(self) -> int:
        """Bytes of the allocation."""
        return self.pool.numel()

    def __getstate__(self) -> dict[str, object]:
        return {"plan": self.plan, "pool": self.pool}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        with torch.inference_mode(False):
            self._carve_all()

    def _carve_all(self) -> None:
        plan = self.plan
        self._next = 0
        rows = (len(plan.slots_per_layer), plan.geometry.num_rows)
        self.lines = torch.full(rows, -1, dtype=torch.int64, device=self.pool.device)
        self.working_sets: list[WorkingSet | PackedWorkingSet] = []
        window = plan.whole_window_tokens
        for slots in plan.slots_per_layer:
            if plan.packer is None:
                planes = self._carve_states(slots * plan.page_size + window)
                self.working_sets.append(WorkingSet(*planes, slots, plan.page_size))
            else:
                packed = self._carve_slots(slots, plan.packer)
                windows = self._carve_states(window)
                at_once = unpacked_pages(plan.geometry, plan.page_size)
                self.working_sets.append(PackedWorkingSet(packed, windows, plan.packer, at_once))
        num_blocks = plan.num_stream_blocks if plan.slots_per_layer else 0
        self.stream_blocks = [
            self._carve_states(plan.stream_block_tokens) for _ in range(num_blocks)
        ]

    def _carve_states(self, tokens: int) -> tuple[Tensor, Tensor]:
        geometry = self.geometry
        planes = []
        for dim in (geometry.head_dim, geometry.value_dim):
            shape = (geometry.batch, geometry.num_kv_heads, tokens, dim)
            size = geometry.num_rows * tokens * dim * geometry.dtype.itemsize
            planes.append(self._carve(size).view(geometry.dtype).view(shape))
        return planes[0], planes[1]

    def _carve_slots(self, slots: int, packer: PagePacker) -> Tensor:
        geometry = self.geometry
        nbytes = packer.layout.nbytes
        shape = (geometry.batch, geometry.num_kv_heads, slots, nbytes)
        return self._carve(geometry.num_rows * slots * nbytes).view(shape)

    def _carve(self, size: int) -> Tensor:
        start = self._next
        self._next += _aligned(size)
        return self.pool[start : start + size]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
