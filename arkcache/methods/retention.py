"""What decides which pages are given up for good: told what they received, it answers with fates.

Pure functions on small arrays. A row is a (sequence, KV head) pair.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from arkcache.errors import ConfigError

Ids = NDArray[np.int64]
Fates = NDArray[np.int8]
"""What becomes of each page [rows, pages]: `FINE`, `COARSE` or `GONE`."""

FINE, COARSE, GONE = 0, 1, 3
"""As it was sealed; in the coarse format; lost. 2 is left for pages of which a summary stays."""


class Seen(NamedTuple):
    """What is known of a layer's sealed pages.

    Attributes:
        lengths: tokens of each row, the new one included [rows].
        sealed: pages of each row [rows].
        first: pages before this one hold the sinks, which are never given up.
        page_size: tokens of a page.
        keep: pages beside sinks and window that the budget has room for [rows].
        budget: tokens that a step attends at most [rows].
        mass: attention that each page received from all queries that were looked at, the mean over
            a KV head's query heads, summed over queries and tokens [rows, pages].
        counters: in how many of the latest queries, `Retention.num_counted` at most, each page
            received less than an even share [rows, pages]; zeros where there is no history.
        probe: where a prompt has just ended, what each token received from its last
            `Retention.num_queries` queries [rows, tokens]; else None.
        prompt_lengths: tokens of each row when that prompt ended [rows].
    """

    lengths: Ids
    sealed: Ids
    first: int
    page_size: int
    keep: Ids
    budget: Ids
    mass: NDArray[np.float32]
    counters: Ids
    probe: NDArray[np.float32] | None
    prompt_lengths: Ids

    def candidates(self, fates: Fates) -> NDArray[np.bool_]:
        """Which pages [rows, pages] are there, hold no sinks and are not gone."""
        page = np.arange(fates.shape[1])
        there: NDArray[np.bool_] = (page >= self.first) & (page < self.sealed[:, None])
        there &= fates != GONE
        return there

    def newest(self, fates: Fates, num_tokens: int | Ids) -> NDArray[np.bool_]:
        """Which pages [rows, pages] hold one of the newest `num_tokens` tokens of their row."""
        oldest = np.maximum(self.lengths - num_tokens, 0) // self.page_size
        newest: NDArray[np.bool_] = np.arange(fates.shape[1]) >= oldest[:, None]
        return newest


class Retention(ABC):
    """Keeps some pages and gives up the others; a frozen dataclass."""

    observes: ClassVar[bool] = False
    """Whether the queries of decode steps are looked at."""

    shares_out: ClassVar[bool] = False
    """Whether layers get budgets of their own."""

    @property
    def num_queries(self) -> int | None:
        """Of the last queries of a prompt that are looked at; None is all."""
        return 0

    @property
    def num_counted(self) -> int:
        """Queries that `Seen.counters` look back at."""
        return 0

    @abstractmethod
    def fates(self, seen: Seen, fates: Fates) -> Fates:
        """What becomes of the pages, given what has become of them [rows, pages].

        Asked at the first step of one token after a prompt, and whenever a step finds more pages
        than `seen.keep`. What is `GONE` stays so; sinks, and what is not sealed, are not judged.
        """

    def budgets(self, budget_tokens: int, num_layers: int, _least: int) -> tuple[int, ...]:
        """The budget of each layer, where one is given for all; `_least` is needed by each."""
        return (budget_tokens,) * num_layers


def keep_best(
    seen: Seen, fates: Fates, score: NDArray[np.floating[Any]], keep: Ids | None = None
) -> Fates:
    """Fates after which each row holds the `keep` candidates of the highest score [rows, pages].

    keep: [rows]; None is `seen.keep`. Of equal scores the newer page stays, and the newest does in
    any case: its tokens are recent ones again when a step is taken back.
    """
    candidate, width = seen.candidates(fates), fates.shape[1]
    ranked = np.where(candidate, score, -np.inf)
    ranked[candidate & (np.arange(width) == seen.sealed[:, None] - 1)] = np.inf
    order = width - 1 - np.argsort(-ranked[:, ::-1], axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(width)[None], axis=1)
    room = (seen.keep if keep is None else keep)[:, None]
    return np.where(candidate & (rank >= room), np.int8(GONE), fates)


def check_positive(**values: Any) -> None:
    """Raise `ConfigError` unless all are integers of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r}: expected an integer of at least 1")
