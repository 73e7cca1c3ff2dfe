"""What the pages of a layer received, by which a retention decides: integers and numpy only.

Queries come from two sides: those of a prompt's end, all at once, and those of decode steps, one by
one. A row is a (sequence, KV head) pair; a page is known by its number, also while its tokens are
in the recent window.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from arkcache.pages.bookkeeping import Ids


class Evidence:
    """Attention received by row and page.

    Args:
        num_rows: sequences times KV heads.
        page_size: tokens of a page.
        history: queries that counters look back at; 0 is no counters.

    Attributes:
        mass: summed over all queries [rows, pages or more].
    """

    def __init__(self, num_rows: int, page_size: int, history: int) -> None:
        self._page_size, self._history = page_size, history
        self.mass = np.zeros((num_rows, 64), dtype=np.float32)
        self._little = np.zeros((history, num_rows, 64), dtype=np.bool_)
        self._next = 0  # the place in the history of the next query

    def begin(self, num_queries: int) -> None:
        """Make room in the history for so many queries; `note` says what they attend."""
        if self._history:
            assert num_queries <= self._history
            self._next += num_queries
            self._little[self._places(num_queries, 0, num_queries)] = False

    def note(
        self,
        row: int,
        first: int,
        share: NDArray[np.float32],
        visible: Ids,
        which: tuple[int, int] = (0, 1),
    ) -> None:
        """Of a row's pages from `first` on, the shares of attention that they received.

        Args:
            share: [queries, pages].
            visible: the number of the last token that each query attends [queries].
            which: the first of these queries among those that `begin` counted, and their number.
        """
        stop = first + share.shape[1]
        self._widen(stop)
        self.mass[row, first:stop] += share.sum(axis=0)
        if self._history:
            start, total = which
            seen = visible[:, None] + 1
            held = np.clip(seen - np.arange(first, stop) * self._page_size, 0, self._page_size)
            places = self._places(total, start, start + len(share))
            # An even share: nothing of a page that the query does not see is little.
            self._little[places, row, first:stop] = share < held / np.maximum(seen, 1)

    def _places(self, total: int, start: int, stop: int) -> Ids:
        """Where the history has queries start..stop of the last `total`."""
        places: Ids = (self._next - total + np.arange(start, stop)) % self._history
        return places

    def counters(self, num_pages: int) -> Ids:
        """In how many of the latest queries a page received less than an even share
        [rows, num_pages]."""
        self._widen(num_pages)
        counters: Ids = self._little[:, :, :num_pages].sum(axis=0, dtype=np.int64)
        return counters

    def mass_of(self, num_pages: int) -> NDArray[np.float32]:
        """`mass` of the first pages [rows, num_pages]."""
        self._widen(num_pages)
        return self.mass[:, :num_pages]

    def forget_from(self, rows: slice, page: int) -> None:
        """The pages of these rows from `page` on exist no longer."""
        self.mass[rows, page:] = 0
        self._little[:, rows, page:] = False

    def keep_rows(self, rows: Ids) -> None:
        """Make row i what row `rows[i]` was."""
        self.mass, self._little = self.mass[rows], self._little[:, rows]

    def _widen(self, num_pages: int) -> None:
        width = self.mass.shape[1]
        if width < num_pages:
            more = (0, max(num_pages, 2 * width) - width)
            self.mass = np.pad(self.mass, ((0, 0), more))
            self._little = np.pad(self._little, ((0, 0), (0, 0), more))
