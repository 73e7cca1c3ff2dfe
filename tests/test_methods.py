"""The rules of published methods, by hand, without a cache."""

import numpy as np
import pytest

from arkcache import CacheConfig, ConfigError
from arkcache.methods import (
    H2O,
    RETENTIONS,
    PyramidKV,
    Scissorhands,
    Seen,
    SnapKV,
    StreamingLLM,
    keep_best,
    pyramid_budgets,
)
from arkcache.methods.pyramidkv import pyramid
from arkcache.methods.retention import GONE
from arkcache.methods.snapkv import pooled_mass


def seen(num_pages: int = 10, keep: int = 4, **others: object) -> Seen:
    """One row of pages of one token, one sink and a window of two."""
    one = np.array([num_pages])
    values = {
        "lengths": one + 2,
        "sealed": one,
        "first": 1,
        "page_size": 1,
        "keep": np.array([keep]),
        "budget": np.array([keep + 3]),
        "mass": np.zeros((1, num_pages), np.float32),
        "counters": np.zeros((1, num_pages), np.int64),
        "probe": None,
        "prompt_lengths": one + 1,
    }
    return Seen(**(values | others))  # type: ignore[arg-type]


def fine(num_pages: int = 10) -> np.ndarray:
    return np.zeros((1, num_pages), np.int8)


def kept(fates: np.ndarray) -> list[int]:
    return np.flatnonzero(fates[0] != GONE).tolist()


def test_streaming_keeps_the_sinks_and_the_newest() -> None:
    assert kept(StreamingLLM().fates(seen(), fine())) == [0, 6, 7, 8, 9]


def test_heavy_hitters_keep_half_recent_half_heavy() -> None:
    mass = np.array([[9, 1, 5, 2, 7, 3, 0, 0, 0, 0]], np.float32)
    assert kept(H2O().fates(seen(mass=mass), fine())) == [0, 2, 4, 5, 9]
    assert kept(H2O(recent_share=0).fates(seen(mass=mass), fine())) == [0, 2, 4, 5, 9]
    assert kept(H2O(recent_share=1).fates(seen(mass=mass), fine())) == [0, 6, 7, 8, 9]


def test_scissorhands_drop_half_when_full_and_the_older_of_equals() -> None:
    counters = np.array([[0, 3, 1, 1, 5, 1, 1, 1, 9, 9]])
    method = Scissorhands(newest=3)  # one of them is sealed
    assert kept(method.fates(seen(counters=counters), fine())) == [0, 7, 9]
    room = seen(keep=9, counters=counters)
    assert kept(method.fates(room, fine())) == list(range(10))


def test_snapkv_pools_what_the_prompt_received() -> None:
    mass = np.array([[0, 0, 1, 0, 0, 0, 0]], np.float32)
    assert pooled_mass(mass, 5)[0] == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.2, 0, 0])
    probe = np.array([[9, 0, 0, 0, 0, 1, 0, 0, 0, 0, 8]], np.float32)
    method = SnapKV(window=1, pool=3)
    assert kept(method.fates(seen(probe=probe), fine())) == [0, 1, 5, 6, 9]
    # The window, here pages 8 and 9, goes first.
    assert kept(SnapKV(window=3, pool=1).fates(seen(probe=probe), fine())) == [0, 5, 7, 8, 9]


def test_snapkv_gives_up_nothing_while_it_decodes() -> None:
    assert kept(SnapKV().fates(seen(), fine())) == list(range(10))


def test_what_is_gone_stays_gone_and_takes_no_room() -> None:
    fates = fine()
    fates[0, 9] = GONE
    assert kept(StreamingLLM().fates(seen(), fates)) == [0, 5, 6, 7, 8]


def test_rows_keep_as_many_as_each_has_room_for() -> None:
    two = seen()._replace(
        sealed=np.array([10, 6]), lengths=np.array([12, 8]), keep=np.array([2, 3])
    )
    score = np.tile(np.arange(10), (2, 1))
    fates = keep_best(two, np.zeros((2, 10), np.int8), score)
    assert np.flatnonzero(fates[0] != GONE).tolist() == [0, 8, 9]
    assert np.flatnonzero(fates[1] != GONE).tolist() == [0, 3, 4, 5, 6, 7, 8, 9]


def test_pyramid_falls_evenly_and_keeps_the_sum() -> None:
    assert pyramid(100, 4) == pytest.approx([195, 131.667, 68.333, 5], abs=1e-3)
    assert pyramid(100, 4, longest=150) == pytest.approx([150, 116.667, 83.333, 50], abs=1e-3)
    assert pyramid(7, 1) == [7]
    for layers in (1, 2, 5, 30):
        for budget in (64, 65, 100, 777):
            budgets = pyramid_budgets(budget, layers)
            assert sum(budgets) == budget * layers
            assert list(budgets) == sorted(budgets, reverse=True)
            assert min(budgets) >= 64
    short = pyramid_budgets(200, 4, prompt_tokens=300)
    assert short[0] == 300
    assert sum(short) == 800


def test_pyramid_leaves_every_layer_what_it_needs() -> None:
    config = CacheConfig(page_size=4, budget_tokens=100, retention=PyramidKV(window=8))
    budgets = config.for_layers(4).budget_tokens
    assert isinstance(budgets, tuple)
    assert sum(budgets) == 400
    assert budgets[0] > budgets[-1] >= 40
    assert CacheConfig(page_size=4, retention="snapkv").for_layers(4).budget_tokens == 2048
    given = CacheConfig(page_size=4, budget_tokens=(64, 96), retention="pyramidkv")
    assert given.for_layers(2) == given


@pytest.mark.parametrize("name", RETENTIONS)
def test_a_name_is_the_method_as_published(name: str) -> None:
    assert CacheConfig(retention=name).keeper == RETENTIONS[name]()
    assert CacheConfig(retention=RETENTIONS[name]()).keeper == RETENTIONS[name]()


@pytest.mark.parametrize(
    "make",
    [
        lambda: SnapKV(window=0),
        lambda: SnapKV(pool=4),
        lambda: PyramidKV(steepness=0),
        lambda: H2O(recent_share=2),
        lambda: Scissorhands(history=0),
        lambda: pyramid_budgets(20, 2),
    ],
)
def test_impossible_settings_are_refused(make: object) -> None:
    with pytest.raises(ConfigError, match="expected"):
        make()  # type: ignore[operator]
