"""Which pages are demoted: those that get less attention than an even share."""

from typing import Any

import numpy as np

from arkcache.pages.importance import Importance, demotable


def judge(
    mass: list[float], steps: list[int], fine: list[bool] | None = None, **settings: Any
) -> list[bool]:
    """`demotable` of one row: below half an even share, after 4 steps, unless told otherwise."""
    below, after = settings.get("below", 0.5), settings.get("after", 4)
    held = np.array([[True] * len(mass) if fine is None else fine], dtype=np.bool_)
    chosen = demotable(np.array([mass], dtype=np.float32), np.array([steps]), held, below, after)
    assert chosen.shape == (1, len(mass))
    return chosen[0].tolist()


def test_pages_below_their_share_are_demoted() -> None:
    """An even share of 2.0 in 10 steps is 0.05 a step and page."""
    assert judge([1.1, 0.5, 0.26, 0.14], [10] * 4) == [False, False, False, True]
    assert judge([1.1, 0.5, 0.26, 0.14], [10] * 4, below=0.6) == [False, False, True, True]
    assert judge([1.1, 0.5, 0.26, 0.14], [10] * 4, below=0.0) == [False] * 4
    assert judge([1.1, 0.5, 0.26, 0.14], [10] * 4, below=1.01) == [False, True, True, True]


def test_the_threshold_itself_is_enough() -> None:
    assert judge([3.0, 1.0], [4, 4], below=0.5) == [False, False]
    assert judge([3.0, 0.99], [4, 4], below=0.5) == [False, True]


def test_young_pages_are_not_judged() -> None:
    """Nor do they count in the share of the others."""
    assert judge([1.0, 0.0, 0.0], [4, 4, 3]) == [False, True, False]
    assert judge([1.0, 0.9, 50.0], [4, 4, 3]) == [False, False, False]
    assert judge([1.0, 0.0], [1, 0], after=0) == [False, False]


def test_pages_are_judged_by_their_rate() -> None:
    """A page of a tenth of the age needs a tenth of the mass."""
    assert judge([10.0, 1.0], [100, 10]) == [False, False]
    assert judge([10.0, 1.0], [100, 100]) == [False, True]


def test_pages_alike_stay() -> None:
    assert judge([0.7] * 5, [9] * 5) == [False] * 5
    assert judge([0.0] * 5, [9] * 5) == [False] * 5
    assert judge([0.7], [9], below=1.0) == [False]
    assert judge([], []) == []


def test_what_is_coarse_is_not_demoted_again() -> None:
    """But counts in the share of the others."""
    assert judge([1.0, 0.0, 0.0], [9] * 3, [True, False, True]) == [False, False, True]
    assert judge([8.0, 1.0, 1.0], [9] * 3, [False, True, True]) == [False, True, True]


def test_rows_are_judged_apart() -> None:
    mass = np.array([[1.0, 0.0], [0.0, 0.001], [0.0, 0.0]], dtype=np.float32)
    chosen = demotable(mass, np.array([9, 9]), np.ones((3, 2), dtype=np.bool_), 0.5, 4)
    assert chosen.tolist() == [[False, True], [True, False], [False, False]]


def observed(importance: Importance, pages: list[list[int]], mass: list[list[float]]) -> None:
    importance.observe(np.array(pages), np.array(mass, dtype=np.float32))


def test_importance_follows_pages_and_rows() -> None:
    importance = Importance(2)
    importance.seal(slice(0, 2), 0, 3)
    for _ in range(4):
        observed(importance, [[2, 1, -1], [1, -1, 2]], [[0.5, 0.25, 9.0], [0.5, 9.0, 0.25]])
    assert importance.mass[:, :4].tolist() == [[0.0, 1.0, 2.0, 0.0], [0.0, 2.0, 1.0, 0.0]]
    fine = np.ones((2, 2), dtype=np.bool_)
    assert importance.demotable(1, fine, 0.7, 4).tolist() == [[True, False], [False, True]]
    assert not importance.demotable(1, fine, 0.7, 5).any()
    importance.keep_rows(np.array([1, 1, 0]))
    fine = np.ones((3, 2), dtype=np.bool_)
    expected = [[False, True], [False, True], [True, False]]
    assert importance.demotable(1, fine, 0.7, 4).tolist() == expected


def test_importance_of_a_page_that_is_sealed_again_starts_anew() -> None:
    importance = Importance(1)
    importance.seal(slice(0, 1), 0, 2)
    for _ in range(6):
        observed(importance, [[0, 1]], [[0.9, 0.1]])
    importance.seal(slice(0, 1), 1, 2)
    fine = np.ones((1, 2), dtype=np.bool_)
    assert not importance.demotable(0, fine, 0.5, 4).any()
    assert importance.mass[0, 1] == 0
    for _ in range(4):
        observed(importance, [[0, 1]], [[0.9, 0.1]])
    assert importance.demotable(0, fine, 0.5, 4).tolist() == [[False, True]]


def test_importance_grows_with_the_pages() -> None:
    importance = Importance(2)
    importance.seal(slice(0, 2), 0, 70)
    observed(importance, [[69], [3]], [[0.5], [0.75]])
    importance.seal(slice(0, 1), 70, 300)
    assert importance.mass.shape[1] >= 300
    assert (importance.mass[0, 69], importance.mass[1, 3]) == (0.5, 0.75)
    assert importance.mass.sum() == 1.25
