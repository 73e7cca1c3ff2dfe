"""Bookkeeping in integers: which tokens are sealed, which page is in which place, what is padding.

Knows nothing of tensors on a device, of tiers or of models. A row is a (sequence, KV head) pair.
Of a sequence of L tokens

    [0, sealed * page_size)      sealed pages, immutable, in the host tier
    [sealed * page_size, L)      the window: `recent` tokens to less than `recent + page_size`

so everything follows from L alone, however the tokens arrived. Where tokens are grouped, pages
behind those of the sinks are sealed by segments, and so many tokens more may wait in the window.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from arkcache.errors import IntegrityError

Ids = NDArray[np.int64]


def is_in_order(index: Ids, batch: int) -> bool:
    """Whether each of `batch` sequences stays what and where it is."""
    return np.array_equal(index, np.arange(batch))


def sealed_pages(
    length: int, recent: int, page_size: int, sink_pages: int = 0, segment_pages: int = 1
) -> int:
    """Pages of a sequence that are sealed once it holds `length` tokens.

    From `sink_pages` on, so many at a time as a segment has.
    """
    pages = max(0, (length - recent) // page_size)
    if segment_pages == 1 or pages <= sink_pages:
        return pages
    return sink_pages + (pages - sink_pages) // segment_pages * segment_pages


def sealed_counts(
    lengths: Ids,
    recent: int | Ids,
    page_size: int | Ids,
    sink_pages: int = 0,
    segment_pages: int = 1,
) -> Ids:
    """`sealed_pages` of many sequences, or of several layers with settings of their own."""
    counts: Ids = np.maximum((lengths - recent) // page_size, 0)
    if segment_pages == 1:
        return counts
    whole = np.maximum(counts - sink_pages, 0) // segment_pages * segment_pages
    grouped: Ids = np.minimum(counts, sink_pages) + whole
    return grouped


def page_runs(
    first: int, last: int, most: int, sink_pages: int = 0, segment_pages: int = 1
) -> list[tuple[int, int]]:
    """Pages first..last in runs of at most `most`: of whole segments, where one goes into a run
    that begins with the sinks."""
    start, step = first, most
    if segment_pages > 1 and most >= sink_pages + segment_pages:
        start = max(first, sink_pages)
        step = (most - sink_pages) // segment_pages * segment_pages
    edges = [first, *range(start + step, last, step), last]
    return [run for run in pairwise(edges) if run[0] < run[1]]


def check_sealed(counts: Ids, lengths: Ids, sealing: tuple[int, int, int, int]) -> None:
    """Raise `IntegrityError` unless `counts` are the pages that the lengths say are sealed.

    sealing: what `sealed_pages` is told beside a length.
    """
    for sequence, length in enumerate(lengths.tolist()):
        expected = sealed_pages(length, *sealing)
        if counts[sequence] != expected:
            raise IntegrityError(
                f"sequence {sequence} of {length} tokens should have {expected} sealed pages"
            )


class Moves(NamedTuple):
    """What a selection asks for: `pages[i]` goes into place `places[i]` of row `rows[i]`."""

    rows: Ids
    places: Ids
    pages: Ids
    num_evicted: int


class PageTable:
    """The page table: which page each row holds in each of its places (slots for selected pages).

    A row's places are numbered from 0; -1 marks an empty one. Sinks and the window are not
    counted here: they never move.

    Args:
        num_rows: sequences times KV heads.
        num_places: places per row.
    """

    def __init__(self, num_rows: int, num_places: int) -> None:
        self.page_of: Ids = np.full((num_rows, num_places), -1, dtype=np.int64)
        self._resize(0)

    def place(self, rows: slice, place: int, page: int, may_hold: Ids) -> None:
        """Put `page` into an empty place of those of `rows` that `may_hold` more than `place`."""
        self.page_of[rows, place] = np.where(may_hold[rows] > place, page, -1)

    def fetch(
        self,
        selected: Ids,
        num_pages: int,
        num_selected: Ids | None = None,
        keep_score: NDArray[np.floating[Any]] | None = None,
    ) -> Moves:
        """Make `selected` resident: fill empty places first, then those of other pages.

        Args:
            selected: pages [rows, max_selected], no page twice in a row.
            num_pages: more than the largest page number.
            num_selected: [rows], row r wants its first `num_selected[r]`; None is all.
            keep_score: [rows, places], how much each resident page deserves to stay, where there
                are more places than selected pages.

        Returns the moves, already entered in the table. Without `keep_score` the residents of a
        row are then exactly its selection, in its first places.
        """
        # Page numbers of all rows in one line, a spare column for "none" at the end of each row.
        if num_pages >= self._width:
            self._resize(2 * num_pages)
        wanted, flat = self._wanted, selected + self._row_start
        if num_selected is not None:
            valid = np.arange(selected.shape[1]) < num_selected[:, None]
            flat = np.where(valid, flat, self._row_start - 1)
        wanted[flat] = True
        wanted[self._spare_columns] = False
        residents = self.page_of + self._row_start
        kept = wanted[residents]
        wanted[residents] = False
        missing = np.flatnonzero(wanted[flat])
        wanted[flat] = False
        if num_selected is None and keep_score is None:
            places = np.flatnonzero(~kept)
        else:
            places = self._choose_places(kept, selected, missing, num_selected, keep_score)
        pages = selected.reshape(-1)[missing]
        held = self.page_of.reshape(-1)
        num_evicted = int(np.count_nonzero(held[places] >= 0))
        held[places] = pages
        rows, places = np.divmod(places, max(1, self.page_of.shape[1]))
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
        self._resize(self._width)

    def check(self) -> None:
        """Raise `IntegrityError` if a row holds a page twice."""
        for row, pages in enumerate(self.page_of):
            held = pages[pages >= 0]
            if len(np.unique(held)) != len(held):
                raise IntegrityError(f"row {row} holds a page in two places: {held.tolist()}")

    def _choose_places(
        self,
        kept: NDArray[np.bool_],
        selected: Ids,
        missing: Ids,
        num_selected: Ids | None,
        keep_score: NDArray[np.floating[Any]] | None,
    ) -> Ids:
        """The places [flat] that take the missing pages, row by row as `missing` lists them."""
        num_places = self.page_of.shape[1]
        if keep_score is None:
            assert num_selected is not None
            return np.flatnonzero(~kept & (np.arange(num_places) < num_selected[:, None]))
        num_missing = np.bincount(missing // selected.shape[1], minlength=len(kept))
        rank = np.where(self.page_of < 0, -np.inf, keep_score)
        order = np.argsort(np.where(kept, np.inf, rank), axis=1, kind="stable")
        chosen = np.zeros_like(kept)
        np.put_along_axis(chosen, order, np.arange(num_places) < num_missing[:, None], axis=1)
        return np.flatnonzero(chosen)

    def _resize(self, width: int) -> None:
        self._width = width + 1
        num_rows = len(self.page_of)
        self._wanted = np.zeros(num_rows * self._width, dtype=np.bool_)
        self._row_start = (np.arange(num_rows) * self._width)[:, None]
        # Page -1 of a row is the spare column of the row before; of the last row for the first.
        self._spare_columns = np.arange(1, num_rows + 1) * self._width - 1


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

    def has_padding(self, real: NDArray[np.bool_]) -> bool:
        """Whether the first columns [batch, columns] hold tokens just where `real` says so."""
        if self._real is None or real.shape[1] == 0:
            return bool(real.all())
        return np.array_equal(self._real[:, : real.shape[1]], real)

    def lengths(self, num_columns: int) -> Ids:
        """Tokens of each sequence among the first `num_columns` columns."""
        if self._real is None:
            return np.full(self.batch, num_columns, dtype=np.int64)
        lengths: Ids = self._real[:, :num_columns].sum(axis=1, dtype=np.int64)
        return lengths

    def last_visible(self, num_columns: int, num_new: int) -> Ids:
        """Number of the last token that each of the newest columns attends [batch, num_new]."""
        first = num_columns - num_new
        if self._real is None:
            return np.tile(np.arange(first, num_columns, dtype=np.int64), (self.batch, 1))
        counts: Ids = np.cumsum(self._real[:, :num_columns], axis=1, dtype=np.int64)
        return counts[:, first:] - 1

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

    def state(self) -> dict[str, NDArray[Any]]:
        """What is logged."""
        state = {"batch": np.array(self.batch), "columns": np.array(self.num_columns)}
        return state if self._real is None else state | {"real": self._real}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Log what `state` gave, where nothing is logged yet."""
        self.extend(int(state["columns"]), state.get("real"))

    def keep_sequences(self, index: Ids) -> None:
        """Make sequence i what sequence `index[i]` was."""
        self.batch = len(index)
        if self._real is not None:
            self._real = self._real[index]
