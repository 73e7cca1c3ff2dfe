"""What is counted of one layer: its tokens and sealed pages, and what its steps did."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
from torch import Tensor

from arkcache.pages.bookkeeping import Ids
from arkcache.stats import CacheStats


class LayerTokens:
    """Tokens and sealed pages of a layer; the layer and its engine look at the same ones.

    Args:
        batch: sequences, all empty.

    Attributes:
        columns: tokens and padding that the layer has received.
        lengths: tokens of each sequence, without padding [batch].
        sealed: sealed pages of each sequence [batch].
        uniform: whether all sequences were equally long when that was last looked at.
        until_seal: columns that may come before any sequence's page is full, at least; 0 where
            nobody keeps count.
    """

    def __init__(self, batch: int) -> None:
        self.columns = 0
        self.lengths: Ids = np.zeros(batch, dtype=np.int64)
        self.sealed: Ids = np.zeros(batch, dtype=np.int64)
        self.uniform = True
        self.until_seal = 0

    @property
    def total(self) -> int:
        """Tokens of all sequences."""
        return int(self.lengths.sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.lengths.max())

    def settle(self) -> None:
        """Note whether all sequences are equally long, after some of them were `set`."""
        self.uniform = bool((self.lengths == self.lengths[0]).all())

    def groups(self) -> list[slice]:
        """Runs of sequences of equal length, to be handled together."""
        if self.uniform:
            return [slice(0, len(self.lengths))]
        return [slice(b, b + 1) for b in range(len(self.lengths))]

    def set(self, seqs: slice, length: int) -> None:
        """Sequences `seqs` now hold `length` tokens."""
        self.lengths[seqs] = length

    def replace(self, lengths: Ids) -> None:
        """Sequences now hold as many tokens as `lengths` says [batch]; it is copied."""
        self.lengths = lengths.copy()
        self.settle()

    def keep_sequences(self, index: Ids) -> None:
        """Make sequence i what sequence `index[i]` was."""
        self.sealed = self.sealed[index]
        self.replace(self.lengths[index])

    def clear_empty(self, output: Tensor) -> Tensor:
        """Give sequences without a token zeros to attend to: output [batch, ...]."""
        for sequence in np.flatnonzero(self.lengths == 0).tolist():
            output[sequence] = 0
        return output


@dataclass
class Counters:
    """What a layer did since the last reset; see `CacheStats` for the units.

    Attributes:
        times_copies: whether `load_ns` and `store_ns`, the nanoseconds that copies between the
            tiers take, are counted.
    """

    attended_tokens: int = 0
    decode_steps: int = 0
    pages_hit: int = 0
    pages_recalled: int = 0
    pages_evicted: int = 0
    bytes_recalled: int = 0
    bytes_streamed: int = 0
    bytes_backed_up: int = 0
    pages_demoted: int = 0
    times_copies: bool = False
    load_ns: int = 0
    store_ns: int = 0

    def copy_begins(self) -> int:
        """When a copy between the tiers begins, for `since`; 0 where copies are not timed."""
        return perf_counter_ns() if self.times_copies else 0

    def since(self, begun: int) -> int:
        """Nanoseconds since a copy began."""
        return perf_counter_ns() - begun if begun else 0

    @property
    def moved(self) -> tuple[int, int, int, int]:
        """Pages hit, recalled and evicted, and bytes recalled."""
        return self.pages_hit, self.pages_recalled, self.pages_evicted, self.bytes_recalled

    def stats(self, tokens: LayerTokens) -> CacheStats:
        """As `CacheStats`, without sizes."""
        counted = vars(self).copy()
        del counted["times_copies"]
        load_seconds, store_seconds = counted.pop("load_ns") / 1e9, counted.pop("store_ns") / 1e9
        return CacheStats(
            total_tokens=tokens.total,
            load_seconds=load_seconds,
            store_seconds=store_seconds,
            **counted,
        )
