"""A tensor that grows along one dimension, geometrically, so that appending is amortised O(1)."""

from __future__ import annotations

import torch
from torch import Tensor


class GrowingTensor:
    """A tensor [..., capacity, ...] of which the first entries along `dim` are in use.

    Args:
        shape: its shape; the entry at `dim` is the first capacity.
        dim: the dimension that grows.
    """

    GROWTH = 1.5
    """At most a third is waste; while it grows, old and new exist side by side."""

    def __init__(
        self, shape: tuple[int, ...], dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dim = dim
        # Not an inference tensor: it is written to in and out of inference mode.
        with torch.inference_mode(False):
            self.data = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of the allocation."""
        return self.data.numel() * self.data.element_size()

    def reserve(self, length: int) -> None:
        """Make room for `length` entries along `dim`."""
        capacity = self.data.shape[self.dim]
        if length <= capacity:
            return
        shape = list(self.data.shape)
        shape[self.dim] = max(length, int(capacity * self.GROWTH))
        with torch.inference_mode(False):
            grown = torch.zeros(shape, dtype=self.data.dtype, device=self.data.device)
        grown.narrow(self.dim, 0, capacity).copy_(self.data)
        self.data = grown

    def write(self, sequences: slice, start: int, entries: Tensor) -> None:
        """Write `entries` of some sequences (dimension 0) from `start` on along `dim`."""
        length = entries.shape[self.dim]
        self.reserve(start + length)
        self.data[sequences].narrow(self.dim, start, length).copy_(entries)

    def first(self, length: int) -> Tensor:
        """A view of the first `length` entries along `dim`."""
        return self.data.narrow(self.dim, 0, length)

    def keep_sequences(self, index: Tensor) -> None:
        """Make sequence i (dimension 0) what sequence `index[i]` was."""
        with torch.inference_mode(False):
            self.data = self.data[index]
