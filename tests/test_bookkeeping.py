"""Bookkeeping in integers, against sets and lists."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from numpy.typing import NDArray

from arkcache import IntegrityError
from arkcache.pages.bookkeeping import Ids, Moves, PageTable, TokenLog, sealed_pages

# -- sealing --------------------------------------------------------------------------------------


@given(length=st.integers(0, 500), recent=st.integers(1, 40), page_size=st.integers(1, 40))
def test_the_window_holds_recent_tokens_and_less_than_a_page_more(
    length: int, recent: int, page_size: int
) -> None:
    sealed = sealed_pages(length, recent, page_size)
    window = length - sealed * page_size
    assert sealed >= 0
    assert window < recent + page_size
    assert window >= min(length, recent)


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0), (4, 0), (7, 0), (8, 1), (11, 1), (12, 2), (104, 25)]
)
def test_a_page_is_sealed_when_the_window_is_full(length: int, expected: int) -> None:
    assert sealed_pages(length, recent=4, page_size=4) == expected


# -- who is resident ------------------------------------------------------------------------------

NUM_PAGES = 12

Scores = NDArray[np.float64]


class PageTableRules(RuleBasedStateMachine):
    """Rows that want different numbers of pages, while pages are sealed, cropped and selected."""

    @initialize(
        max_selected=st.lists(st.integers(0, 5), min_size=1, max_size=4), spare=st.integers(0, 3)
    )
    def begin(self, max_selected: list[int], spare: int) -> None:
        self.max_selected = np.array(max_selected)
        self.spare = spare
        self.available = np.zeros(len(max_selected), dtype=np.int64)
        self.page_table = PageTable(len(max_selected), max(max_selected) + spare)

    @property
    def num_rows(self) -> int:
        return len(self.page_table.page_of)

    @rule(data=st.data(), count=st.integers(1, 4))
    def seal(self, data: st.DataObject, count: int) -> None:
        """New pages of a row enter its empty places for as long as there are some."""
        row = data.draw(st.integers(0, self.num_rows - 1))
        for _ in range(min(count, NUM_PAGES - int(self.available[row]))):
            page = int(self.available[row])
            if page < self.page_table.page_of.shape[1]:
                self.page_table.place(
                    slice(row, row + 1), page, page, self.max_selected + self.spare
                )
            self.available[row] += 1

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        row = data.draw(st.integers(0, self.num_rows - 1))
        left = data.draw(st.integers(0, int(self.available[row])))
        expected = self.page_table.page_of.copy()
        expected[row, left:] = -1
        expected[row, expected[row] >= left] = -1
        self.page_table.drop_from(slice(row, row + 1), left, left)
        self.available[row] = left
        assert np.array_equal(self.page_table.page_of, expected)

    @rule(data=st.data())
    def fetch(self, data: st.DataObject) -> None:
        """What is wanted is there, nothing moved without need, and the worst of the others went."""
        count = np.minimum(self.max_selected, self.available)
        selected = np.zeros((self.num_rows, int(count.max())), dtype=np.int64)
        for row, max_selected in enumerate(count):
            pages = data.draw(st.permutations(range(self.available[row])))
            selected[row, :max_selected] = pages[:max_selected]
        keep, before = None, self.page_table.page_of.copy()
        if self.spare:
            keep = np.random.default_rng(int(selected.sum())).random(before.shape)
        moves = self.page_table.fetch(selected, NUM_PAGES, count, keep)
        wanted = [pages[:n].tolist() for pages, n in zip(selected, count, strict=True)]
        self.check_moves(before, moves, wanted)
        if keep is not None:
            self.check_victims(before, wanted, keep)

    @rule(data=st.data())
    def fetch_alike(self, data: st.DataObject) -> None:
        """Every row fills all of its places."""
        places = self.page_table.page_of.shape[1]
        if self.spare or (self.max_selected < places).any() or (self.available < places).any():
            return
        chosen = [data.draw(st.permutations(range(n)))[:places] for n in self.available]
        before = self.page_table.page_of.copy()
        moves = self.page_table.fetch(np.array(chosen, dtype=np.int64), NUM_PAGES)
        self.check_moves(before, moves, chosen)

    def check_moves(self, before: Ids, moves: Moves, wanted: list[list[int]]) -> None:
        after = before.copy()
        after[moves.rows, moves.places] = moves.pages
        assert np.array_equal(after, self.page_table.page_of)
        missing = [
            set(pages) - set(old) for pages, old in zip(wanted, before.tolist(), strict=True)
        ]
        assert len(moves.pages) == sum(map(len, missing))
        assert moves.num_evicted == np.count_nonzero(before[moves.rows, moves.places] >= 0)
        for pages, held in zip(wanted, self.page_table.page_of.tolist(), strict=True):
            assert set(pages) <= set(held)
            if not self.spare:
                assert set(pages) == set(held) - {-1}
                assert -1 not in held[: len(pages)]

    def check_victims(self, before: Ids, wanted: list[list[int]], keep: Scores) -> None:
        """Empty places are taken first, then those of the pages that least deserve to stay."""
        rows = zip(before, self.page_table.page_of, wanted, keep, strict=True)
        for old, new, pages, score in rows:
            evicted = score[(old >= 0) & (old != new)]
            if len(evicted):
                assert -1 not in new
                unwanted = (old == new) & ~np.isin(new, pages)
                assert (score[unwanted] > evicted.max()).all()

    @rule(data=st.data())
    def keep_rows(self, data: st.DataObject) -> None:
        rows = len(self.page_table.page_of)
        order = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4))
        before = self.page_table.page_of.copy()
        self.page_table.keep_rows(np.array(order))
        self.max_selected, self.available = self.max_selected[order], self.available[order]
        assert np.array_equal(self.page_table.page_of, before[order])

    @invariant()
    def no_page_twice(self) -> None:
        if hasattr(self, "page_table"):
            self.page_table.check()


TestPageTable = PageTableRules.TestCase


def test_pages_enter_empty_places_of_the_rows_that_may_hold_them() -> None:
    page_table = PageTable(3, 2)
    may_hold = np.array([2, 1, 0])
    for place in range(2):
        page_table.place(slice(0, 3), place, 7 + place, may_hold)
    assert page_table.page_of.tolist() == [[7, 8], [7, -1], [-1, -1]]


def test_check_finds_a_page_in_two_places() -> None:
    page_table = PageTable(2, 3)
    page_table.page_of[1] = [4, -1, 4]
    with pytest.raises(IntegrityError, match="row 1"):
        page_table.check()


# -- which columns hold tokens --------------------------------------------------------------------


class Columns(RuleBasedStateMachine):
    """A `TokenLog` beside one list of booleans per sequence."""

    @initialize(batch=st.integers(1, 3))
    def begin(self, batch: int) -> None:
        self.log = TokenLog(batch)
        self.real: list[list[bool]] = [[] for _ in range(batch)]

    @property
    def num_columns(self) -> int:
        return len(self.real[0])

    @rule(data=st.data(), count=st.integers(1, 6))
    def extend(self, data: st.DataObject, count: int) -> None:
        row = st.lists(st.booleans(), min_size=count, max_size=count)
        new = data.draw(st.none() | st.lists(row, min_size=self.log.batch, max_size=self.log.batch))
        self.log.extend(count, None if new is None else np.array(new))
        for own, more in zip(self.real, new or [[True] * count] * self.log.batch, strict=True):
            own += more

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        left = data.draw(st.integers(0, self.num_columns))
        self.log.crop(left)
        self.real = [own[:left] for own in self.real]

    @rule(data=st.data())
    def keep_sequences(self, data: st.DataObject) -> None:
        sequence = st.integers(0, self.log.batch - 1)
        order = data.draw(st.lists(sequence, min_size=1, max_size=3))
        self.log.keep_sequences(np.array(order))
        self.real = [list(self.real[i]) for i in order]

    @invariant()
    def says_what_was_appended(self) -> None:
        if not hasattr(self, "log"):
            return
        columns = self.num_columns
        assert (self.log.batch, self.log.num_columns) == (len(self.real), columns)
        for known in {0, columns // 2, columns}:
            assert self.log.lengths(known).tolist() == [sum(own[:known]) for own in self.real]
            self.check_visible(known)
            self.check_recognised(np.array([own[:known] for own in self.real], dtype=np.bool_))
        real = self.log.real(columns // 2, columns)
        part = [own[columns // 2 :] for own in self.real]
        assert all(map(all, part)) if real is None else real.tolist() == part

    def check_visible(self, known: int) -> None:
        """A column attends the tokens up to itself, numbered without padding."""
        for new in {1, known // 2, known} - {0}:
            if new <= known:
                visible = self.log.last_visible(known, new).tolist()
                columns = range(known - new, known)
                assert visible == [[sum(own[: c + 1]) - 1 for c in columns] for own in self.real]

    def check_recognised(self, real: NDArray[np.bool_]) -> None:
        """It knows its own padding, and takes no other for it."""
        assert self.log.has_padding(real)
        if real.size:
            real[-1, -1] ^= True
            assert not self.log.has_padding(real)

    @invariant()
    def knows_the_columns_of_tokens(self) -> None:
        if not hasattr(self, "log") or not self.num_columns:
            return
        for sequence, own in enumerate(self.real):
            columns = [c for c, real in enumerate(own) if real]
            tokens = np.broadcast_to(np.arange(len(columns)), (len(self.real), len(columns)))
            assert self.log.columns_of(tokens)[sequence].tolist() == columns


TestColumns = Columns.TestCase


@pytest.mark.parametrize("shape", [(2, 1, 4), (2, 3, 4)])
def test_columns_of_tokens_keep_their_shape(shape: tuple[int, ...]) -> None:
    log = TokenLog(2)
    log.extend(4, np.array([[False, True, True, True], [True, True, False, True]]))
    tokens = np.broadcast_to(np.arange(4), shape)
    columns = log.columns_of(tokens)
    assert columns.shape == shape
    assert columns[0, 0].tolist() == [1, 2, 3, 3]  # beyond the last token: the last
    assert columns[1, -1].tolist() == [0, 1, 3, 3]
