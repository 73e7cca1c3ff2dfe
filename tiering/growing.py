"""Tensors that grow along one dimension: in one piece, or in chunks that are never copied."""

from __future__ import annotations

import torch
from torch import Tensor

from arkcache.tiering.mapping import ask_for_huge_pages

FIRST_ENTRIES = 64
"""What there is room for at first, where nothing else decides."""

GROWTH = 1.125
"""At most a ninth of a large tensor is room to grow: a device's memory is scarcer than the time to
copy each entry eight times. While a tensor grows, old and new exist side by side."""


def grown_capacity(capacity: int, first: int = FIRST_ENTRIES) -> int:
    """Entries that there is room for after the next growth, of a tensor that had room for `first`
    when it was made: a quarter of that is the least that is worth a copy."""
    return max(int(capacity * GROWTH), capacity + first // 4)


class GrowingTensor:
    """A tensor [..., capacity, ...] of which the first entries along `dim` are in use.

    Args:
        shape: its shape; the entry at `dim` is the first capacity.
        dim: the dimension that grows.
    """

    def __init__(
        self, shape: tuple[int, ...], dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dim, self._first_capacity = dim, shape[dim]
        # Not an inference tensor: it is written to in and out of inference mode.
        with torch.inference_mode(False):
            self.data = _zeros(shape, dtype, device)

    @property
    def nbytes(self) -> int:
        """Bytes of the allocation."""
        return self.data.numel() * self.data.element_size()

    def reserve(self, length: int) -> None:
        """Make room for `length` entries along `dim`."""
        capacity = self.capacity
        if length <= capacity:
            return
        shape = list(self.data.shape)
        shape[self.dim] = max(length, grown_capacity(capacity, self._first_capacity))
        with torch.inference_mode(False):
            grown = _zeros(tuple(shape), self.data.dtype, self.data.device)
        grown.narrow(self.dim, 0, capacity).copy_(self.data)
        self.data = grown

    def write(self, seqs: slice, start: int, entries: Tensor) -> None:
        """Write `entries` of some sequences (dimension 0) from `start` on along `dim`."""
        length = entries.shape[self.dim]
        self.reserve(start + length)
        self.data[seqs].narrow(self.dim, start, length).copy_(entries)

    @property
    def capacity(self) -> int:
        """Entries along `dim` that there is room for."""
        return self.data.shape[self.dim]

    def read(self, first: int, last: int) -> Tensor:
        """A view of entries first..last along `dim`."""
        return self.data.narrow(self.dim, first, last - first)

    def first(self, length: int) -> Tensor:
        """A view of the first `length` entries along `dim`."""
        return self.data.narrow(self.dim, 0, length)

    def keep_sequences(self, index: Tensor) -> None:
        """Make sequence i (dimension 0) what sequence `index[i]` was."""
        with torch.inference_mode(False):
            self.data = self.data[index]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    zeros = torch.zeros(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        ask_for_huge_pages(zeros.data_ptr(), zeros.nbytes)
    return zeros


class ChunkedTensor:
    """A tensor [..., length, ...] in chunks along `dim`: it grows without copying what it holds.

    Args:
        shape: its shape; the entry at `dim` is the length of a chunk.
        dim: the dimension that grows.
    """

    def __init__(
        self, shape: tuple[int, ...], dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dim, self._shape = dim, shape
        self._dtype, self._device = dtype, device
        self._chunks: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks."""
        return sum(chunk.nbytes for chunk in self._chunks)

    @property
    def capacity(self) -> int:
        """Entries along `dim` that there is room for."""
        return len(self._chunks) * self._shape[self.dim]

    def write(self, seqs: slice, start: int, entries: Tensor) -> None:
        """Write `entries` of some sequences (dimension 0) from `start` on along `dim`."""
        length = self._shape[self.dim]
        stop = start + entries.shape[self.dim]
        with torch.inference_mode(False):  # written to in and out of it
            while self.capacity < stop:
                self._chunks.append(
                    torch.zeros(self._shape, dtype=self._dtype, device=self._device)
                )
        done = start
        while done < stop:
            number, offset = divmod(done, length)
            count = min(length - offset, stop - done)
            part = entries.narrow(self.dim, done - start, count)
            self._chunks[number][seqs].narrow(self.dim, offset, count).copy_(part)
            done += count

    def read(self, first: int, last: int) -> Tensor:
        """Entries first..last along `dim`: a view where they are in one chunk."""
        length = self._shape[self.dim]
        parts = []
        while first < last:
            number, offset = divmod(first, length)
            count = min(length - offset, last - first)
            parts.append(self._chunks[number].narrow(self.dim, offset, count))
            first += count
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)

    def keep_sequences(self, index: Tensor) -> None:
        """Make sequence i (dimension 0) what sequence `index[i]` was."""
        with torch.inference_mode(False):
            self._chunks = [chunk[index] for chunk in self._chunks]
        self._shape = (len(index), *self._shape[1:])
