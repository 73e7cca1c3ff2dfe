"""Bookkeeping of pages in integers: which tokens are sealed, which pages sit in which slots.

Knows nothing of tensors on a device, of tiers or of models. A row is a (sequence, KV head) pair.
Of a sequence of L tokens

    [0, sealed * page_size)      sealed pages, immutable, in the host tier
    [sealed * page_size, L)      the window: at least `recent`, less than `recent + page_size` tokens

so everything follows from L alone, however the tokens arrived.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arkcache.errors import IntegrityError

Ids = NDArray[np.int64]


def sealed_pages(length: int, recent: int, page_size: int) -> int:
    """Pages of a sequence that are sealed once it holds `length` tokens."""
    return max(0, (length - recent) // page_size)


@dataclass(frozen=True)
class Moves:
    """What a selection asks for: `pages[i]` of `rows[i]` goes into place `places[i]` of that row."""

    rows: Ids
    places: Ids
    pages: Ids
    num_evicted: int


class Residency:
    """Which page each row holds in each of its places (slots for selected pages).

    A row's places are numbered from 0; -1 marks an empty one. Sinks and the window are not
    counted here: they never move.

    Args:
        num_rows: sequences times KV heads.
        num_places: places per row.
    """

    def __init__(self, num_rows: int, num_places: int) -> None:
        self.page_of: Ids = np.full((num_rows, num_places), -1, dtype=np.int64)
        self._wanted = np.zeros((num_rows, 1), dtype=np.bool_)

    def place(self, rows: slice, place: int, page: int) -> None:
        """Put `page` into an empty place of several rows."""
        self.page_of[rows, place] = page

    def fetch(self, selected: Ids, num_selected: Ids, num_pages: int, spare_score: None | Ids) -> Moves:
        """Make `selected` resident: fill empty places, then those of pages nobody wants.

        Args:
            selected: pages [rows, most]; row r wants its first `num_selected[r]`.
            num_selected: [rows].
            num_pages: one more than the largest page id.
            spare_score: [rows, places], the higher the sooner a page that is not selected stays;
                None evicts in any order.

        Returns the moves, already entered in the books. With as many places as selected pages the
        residents of a row are then exactly its selection, in its first places.
        """
        num_rows, num_places = self.page_of.shape
        wanted = self._scratch(num_pages + 1)
        valid = np.arange(selected.shape[1]) < num_selected[:, None]
        row_index = np.arange(num_rows)[:, None]
        wanted[row_index, np.where(valid, selected, -1)] = True
        wanted[:, -1] = False
        kept = wanted[row_index, self.page_of]
        wanted[row_index, np.where(kept, self.page_of, -1)] = False
        missing = wanted[row_index, selected] & valid
        wanted[row_index, selected] = False
        free = self._choose_places(~kept, missing.sum(axis=1), num_selected, spare_score)
        rows, columns = np.nonzero(missing)
        places = np.nonzero(free)[1]
        pages = selected[rows, columns]
        num_evicted = int(np.count_nonzero(self.page_of[rows, places] >= 0))
        self.page_of[rows, places] = pages
        return Moves(rows, places, pages, num_evicted)

    def drop_from(self, rows: slice, page: int, num_left: int) -> None:
        """Forget the pages of `rows` from `page` on, and all places from `num_left` on.

        Called when pages are unsealed: `num_left` selectable pages remain, and a selection fills
        the first places only.
        """
        residents = self.page_of[rows]
        residents[residents >= page] = -1
        residents[:, num_left:] = -1

    def keep_rows(self, rows: Ids) -> None:
        """Make row i what row `rows[i]` was."""
        self.page_of = self.page_of[rows]
        self._wanted = np.zeros((len(rows), 1), dtype=np.bool_)

    def check(self) -> None:
        """Raise `IntegrityError` if a row holds a page twice."""
        for row, pages in enumerate(self.page_of):
            held = pages[pages >= 0]
            if len(np.unique(held)) != len(held):
                raise IntegrityError(f"row {row} holds a page in two places: {held.tolist()}")

    def _choose_places(
        self, candidates: NDArray[np.bool_], num_needed: Ids, num_selected: Ids,
        spare_score: None | Ids,
    ) -> NDArray[np.bool_]:
        num_places = self.page_of.shape[1]
        if spare_score is None:
            # Without spare places the first `num_selected` must end up being the selection.
            return candidates & (np.arange(num_places) < num_selected[:, None])
        rank = np.where(self.page_of < 0, -np.inf, spare_score)
        rank = np.where(candidates, rank, np.inf)
        order = np.argsort(rank, axis=1, kind="stable")
        chosen = np.zeros_like(candidates)
        takes = np.arange(num_places) < num_needed[:, None]
        np.put_along_axis(chosen, order, takes, axis=1)
        return chosen

    def _scratch(self, num_columns: int) -> NDArray[np.bool_]:
        if self._wanted.shape[1] < num_columns:
            self._wanted = np.zeros((len(self.page_of), 2 * num_columns), dtype=np.bool_)
        return self._wanted


class TokenLog:
    """Which columns of a batch hold real tokens; the others are padding and are never stored.

    A column is a position of the batch's rectangular input. Without padding a token's number is
    its column.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.num_columns = 0
        self._real: NDArray[np.bool_] | None = None

    def extend(self, num_columns: int, real: NDArray[np.bool_] | None) -> None:
        """Append columns; `real` [batch, num_columns] is None where all hold tokens."""
        if real is not None and real.all():
            real = None
        if real is not None or self._real is not None:
            if self._real is None:
                self._real = np.ones((self.batch, self.num_columns), dtype=np.bool_)
            if real is None:
                real = np.ones((self.batch, num_columns), dtype=np.bool_)
            self._real = np.concatenate((self._real, real), axis=1)
        self.num_columns += num_columns

    def real(self, start: int, stop: int) -> NDArray[np.bool_] | None:
        """Which of columns start..stop hold tokens [batch, stop - start]; None is all."""
        if self._real is None or self._real[:, start:stop].all():
            return None
        return self._real[:, start:stop]

    def lengths(self, num_columns: int) -> Ids:
        """Tokens of each sequence among the first `num_columns` columns."""
        if self._real is None:
            return np.full(self.batch, num_columns, dtype=np.int64)
        return np.count_nonzero(self._real[:, :num_columns], axis=1).astype(np.int64)

    def last_visible(self, num_columns: int, num_new: int) -> Ids:
        """Number of the last token that each of the newest columns attends [batch, num_new]."""
        if self._real is None:
            newest = np.arange(num_columns - num_new, num_columns)
            return np.broadcast_to(newest, (self.batch, num_new)).copy()
        counts = np.cumsum(self._real[:, :num_columns], axis=1)
        return counts[:, num_columns - num_new :].astype(np.int64) - 1

    def columns_of(self, tokens: Ids) -> Ids:
        """Columns of token numbers [batch, ...]; a number beyond the last token gives the last."""
        if self._real is None:
            return np.minimum(tokens, self.num_columns - 1)
        flat = tokens.reshape(self.batch, -1)
        columns = np.empty_like(flat)
        for sequence, numbers in enumerate(flat):
            own = np.flatnonzero(self._real[sequence])
            columns[sequence] = own[np.minimum(numbers, len(own) - 1)] if len(own) else 0
        return columns.reshape(tokens.shape)

    def crop(self, num_columns: int) -> None:
        """Forget all columns from `num_columns` on."""
        self.num_columns = num_columns
        if self._real is not None:
            self._real = self._real[:, :num_columns]
            if self._real.all():
                self._real = None

    def keep_sequences(self, index: Ids) -> None:
        """Make sequence i what sequence `index[i]` was."""
        self.batch = len(index)
        if self._real is not None:
            self._real = self._real[index]
