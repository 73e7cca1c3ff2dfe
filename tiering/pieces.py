"""Where the pieces of the host tier are: what each end of its arena holds, and how they move."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arkcache.errors import IntegrityError

Ids = NDArray[np.int64]
Scalar = TypeVar("Scalar", bound=np.generic)

MOVE_BYTES = 64 << 20
"""Pieces are copied in chunks of this size, so that moving many takes little extra memory."""


class Stack:
    """Ids that are free: the last pushed are popped first."""

    def __init__(self) -> None:
        self._items: Ids = np.zeros(0, dtype=np.int64)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def ids(self) -> Ids:
        """What is free, in no particular order."""
        return self._items[: self._size]

    def push(self, ids: Ids) -> None:
        """Add ids."""
        size = self._size + len(ids)
        self._items = _with_room(self._items, size)
        self._items[self._size : size] = ids
        self._size = size

    def pop(self, count: int) -> Ids:
        """Take the last `count` ids."""
        self._size -= count
        return self._items[self._size : self._size + count][::-1].copy()


class Side:
    """Where the pieces of one kind are: positions 0, 1, 2 ... from the side's end of the arena on.

    Attributes:
        extent: positions up to the last piece, holes included.
        fixed: positions below this are others' to write: what is released there is no hole.
        holes: positions below the extent that hold nothing.
        handle_at: the handle of the piece in each position, by which a piece that moves is found.
    """

    def __init__(self) -> None:
        self.extent = self.fixed = self._num_lost = 0
        self.holes = Stack()
        self.handle_at: Ids = np.zeros(0, dtype=np.int64)

    @property
    def count(self) -> int:
        """Pieces held."""
        return self.extent - self._num_lost - len(self.holes)

    def begin_with(self, handles: Ids, positions: Ids, fixed: int) -> None:
        """Hold pieces in some of the first `fixed` positions, of a side that holds none."""
        self.extent = self.fixed = fixed
        self._num_lost = fixed - len(positions)
        self.handle_at = np.full(fixed, -1, dtype=np.int64)
        self.handle_at[positions] = handles

    def give_back(self, positions: Ids) -> None:
        """Hold nothing there any more."""
        own = positions[positions >= self.fixed]
        self.holes.push(own)
        self._num_lost += len(positions) - len(own)

    def take(self, count: int) -> Ids:
        """Rows for so many pieces, holes first."""
        reused = self.holes.pop(min(count, len(self.holes)))
        first, self.extent = self.extent, self.extent + count - len(reused)
        self.handle_at = _with_room(self.handle_at, self.extent)
        return np.concatenate((reused, np.arange(first, self.extent, dtype=np.int64)))

    def moves(self) -> tuple[Ids, Ids]:
        """The positions whose pieces must move for the side to have no holes, and where to."""
        count, holes = self.count, self.holes.ids
        targets = np.sort(holes[holes < count])
        is_piece = np.ones(self.extent - count, dtype=np.bool_)
        is_piece[holes[holes >= count] - count] = False
        return count + np.flatnonzero(is_piece), targets

    def move(self, sources: Ids, targets: Ids) -> None:
        """Note that these pieces, all that `moves` lists, have moved."""
        self.handle_at[targets] = self.handle_at[sources]
        self.extent, self.holes = self.count, Stack()

    def check(self, handles: Ids, position: Ids) -> None:
        """Raise `IntegrityError` unless the pieces and the holes are all positions, each once."""
        positions = position[handles]
        if np.any((positions < 0) | (positions >= self.extent)):
            raise IntegrityError("a piece of the host tier lies outside its side")
        if len(np.unique(positions)) != len(positions):
            raise IntegrityError("two pieces of the host tier share a place")
        if not np.array_equal(self.handle_at[positions], handles):
            raise IntegrityError("a place of the host tier names another piece than it holds")
        every = np.sort(np.concatenate((positions[positions >= self.fixed], self.holes.ids)))
        if not np.array_equal(every, np.arange(self.fixed, self.extent)):
            raise IntegrityError("the host tier's free places are not those without a piece")


def lengthened(values: NDArray[Scalar], size: int) -> NDArray[Scalar]:
    """A longer copy of `values`, zeros at its end."""
    longer = np.zeros(size, dtype=values.dtype)
    longer[: len(values)] = values
    return longer


def _with_room(ids: Ids, size: int) -> Ids:
    """`ids`, or a longer copy with at least `size` entries, so that appending is cheap."""
    return ids if size <= len(ids) else lengthened(ids, max(size, len(ids) * 3 // 2))


def copy_pieces(target: Tensor, targets: Ids, source: Tensor, sources: Ids) -> None:
    """Copy pieces to other positions; no position is both read and written."""
    step = max(1, MOVE_BYTES // source.shape[1])
    word = _word(source)
    for start in range(0, len(sources), step):
        read = torch.from_numpy(sources[start : start + step])
        written = torch.from_numpy(targets[start : start + step])
        target.view(word)[written] = source.view(word)[read]


def put_pieces(pieces: Tensor, positions: Ids, content: Tensor) -> None:
    """Copy bytes into positions of `pieces`."""
    content = content.flatten()
    word = torch.uint8 if content.storage_offset() % 8 else _word(pieces)
    pieces.view(word)[torch.from_numpy(positions)] = content.view(word).view(len(positions), -1)


def take(pieces: Tensor, positions: Ids) -> Tensor:
    """Pieces at some positions, copied in words where they divide: four times as fast as bytes."""
    return pieces.view(_word(pieces)).index_select(0, torch.from_numpy(positions)).view(torch.uint8)


def _word(pieces: Tensor) -> torch.dtype:
    """The widest elements that pieces divide into: byte by byte, a copy takes twice as long."""
    return torch.uint8 if pieces.shape[1] % 8 else torch.int64
