"""The recent window of a layer: its newest tokens, in full precision, in order or in a ring.

Both hold tokens by number. `first` is the oldest token that the window holds; `at` the first of
those that are read or written; `seqs` a run of sequences of equal length.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Window(Protocol):
    """Keys and values of the newest tokens, planes [batch, kv_heads, window_tokens, dim]."""

    def write(self, seqs: slice, first: int, at: int, key: Tensor, value: Tensor) -> None:
        """Store tokens [seqs, kv_heads, new, dim] as numbers `at` onwards."""
        ...

    def read(self, seqs: slice, first: int, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` tokens: key, value [seqs, kv_heads, count, dim]."""
        ...

    def recent(self, firsts: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """`count` tokens of every sequence from its own `firsts` [batch] (int64, on the host) on.

        Undefined beyond a sequence's last token.
        """
        ...


class ShiftedWindow(NamedTuple):
    """A window whose first token lies first: what follows a sealed page moves to the front."""

    key: Tensor
    value: Tensor

    def write(self, seqs: slice, first: int, at: int, key: Tensor, value: Tensor) -> None:
        """See `Window`."""
        tokens = slice(at - first, at - first + key.shape[2])
        self.key[seqs, :, tokens] = key
        self.value[seqs, :, tokens] = value

    def read(self, seqs: slice, first: int, count: int) -> tuple[Tensor, Tensor]:
        """See `Window`."""
        return self.key[seqs, :, :count], self.value[seqs, :, :count]

    def recent(self, firsts: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """See `Window`."""
        return self.key[:, :, :count], self.value[:, :, :count]


class RingWindow(NamedTuple):
    """A window in which token t lies at t modulo its size: nothing moves when a page is sealed."""

    key: Tensor
    value: Tensor

    def write(self, seqs: slice, first: int, at: int, key: Tensor, value: Tensor) -> None:
        """See `Window`."""
        where = self._places(at, key.shape[2])
        self.key[seqs].index_copy_(2, where, key)
        self.value[seqs].index_copy_(2, where, value)

    def read(self, seqs: slice, first: int, count: int) -> tuple[Tensor, Tensor]:
        """See `Window`."""
        where = self._places(first, count)
        return self.key[seqs].index_select(2, where), self.value[seqs].index_select(2, where)

    def recent(self, firsts: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """See `Window`."""
        where = (firsts[:, None] + torch.arange(count)) % self.key.shape[2]
        where = where.to(self.key.device)[:, None, :, None]
        key, value = (
            plane.gather(2, where.expand(-1, plane.shape[1], -1, plane.shape[3])) for plane in self
        )
        return key, value

    def by_row(self) -> tuple[Tensor, Tensor]:
        """Keys and values of every row [rows, tokens, dim]."""
        return self.key.flatten(0, 1), self.value.flatten(0, 1)

    def _places(self, at: int, count: int) -> Tensor:
        return torch.arange(at, at + count, device=self.key.device) % self.key.shape[2]
