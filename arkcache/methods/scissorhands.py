"""Scissorhands: what was attended less than evenly in most recent steps goes, half at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from arkcache.methods.retention import Fates, Retention, Seen, check_positive, keep_best


@dataclass(frozen=True)
class Scissorhands(Retention):
    """Keeps what was attended persistently.

    Liu et al. 2023, "Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV
    Cache Compression at Test Time", algorithm 2: a token's counter says in how many of the last
    `history` steps it received less than 1/t of the attention, t being the tokens that there were.
    When there are more than the budget holds, the half with the largest counters goes. Of equal
    counters the older goes. A page counts as its tokens together. The history takes a byte for each
    page, KV head and step.

    Args:
        history: steps that counters look back at; in a prompt, its last queries.
        newest: tokens that do not go, whatever their counters.
    """

    history: int = 400
    newest: int = 10

    observes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(history=self.history, newest=self.newest)

    @property
    def num_queries(self) -> int:
        """See `Retention`."""
        return self.history

    @property
    def num_counted(self) -> int:
        """See `Retention`."""
        return self.history

    def fates(self, seen: Seen, fates: Fates) -> Fates:
        """See `Retention`."""
        is_full = seen.candidates(fates).sum(axis=1) > seen.keep
        keep = np.where(is_full, seen.keep - seen.keep // 2, seen.keep)
        score = np.where(seen.newest(fates, self.newest), np.inf, -seen.counters)
        return keep_best(seen, fates, score, keep)
