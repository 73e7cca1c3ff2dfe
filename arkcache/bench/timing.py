"""What the measurements share: what rounds come to, and one seeded order of places to read."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from arkcache.tiering.pieces import Ids

Progress = Callable[[str, int, int], None]
"""Told what is under way, how much of it is done, and of how much."""

Row = TypeVar("Row")


@dataclass
class Measured(Generic[Row]):
    """Rows of figures; `finished` is false where an interrupt left some out."""

    rows: list[Row] = field(default_factory=list)
    finished: bool = False


class Spread(NamedTuple):
    """A figure over rounds: the median, and the quartiles below and above it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Spread:
        """Of at least one round."""
        if len(rounds) == 1:
            return cls(rounds[0], rounds[0], rounds[0])
        low, middle, high = statistics.quantiles(rounds, n=4, method="inclusive")
        return cls(middle, low, high)


class Walk:
    """Places 0 to size - 1 in a random order, again from the start when all were given.

    So what was read is not read again before everything else was, and a cache of the processor
    that is smaller than all places is of no help.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self._order: Ids = np.random.default_rng(seed).permutation(size).astype(np.int64)
        self._next = 0

    def take(self, count: int) -> Ids:
        """The next places, all different: at most `size`."""
        assert count <= len(self._order)
        if self._next + count > len(self._order):
            self._next = 0
        self._next += count
        return self._order[self._next - count : self._next]


def synchronize(device: torch.device) -> None:
    """Wait for a device; nothing to do for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
