"""Scores in, pages out: against sorting."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arkcache.config import GROUP_REDUCTIONS
from arkcache.kernels import reference
from arkcache.pages.policy import aggregate, fewest_pages, page_shares, ranked_pages, top_pages


@pytest.mark.parametrize("reduction", GROUP_REDUCTIONS)
@pytest.mark.parametrize("group", [2, 5])
def test_aggregate_is_the_reference(reduction: str, group: int) -> None:
    score = torch.randn(4, group, 30) * 3
    torch.testing.assert_close(aggregate(score, reduction), reference.aggregate(score, reduction))


@pytest.mark.parametrize("reduction", GROUP_REDUCTIONS)
def test_one_query_head_ranks_by_its_scores(reduction: str) -> None:
    """Even where softmax would underflow to ties."""
    score = torch.tensor([[[0.0, -1000.0, -2000.0, 5.0]]])
    assert ranked_pages(aggregate(score, reduction), 4).tolist() == [[3, 0, 1, 2]]


def test_softmax_mean_lets_no_head_outvote_the_others() -> None:
    """Two heads agree on page 0; the third shouts for page 1."""
    score = torch.tensor([[[3.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 100.0, 0.0]]])
    assert top_pages(aggregate(score, "softmax-mean"), 1).tolist() == [[0]]
    assert top_pages(aggregate(score, "raw-mean"), 1).tolist() == [[1]]


@pytest.mark.parametrize("reduction", GROUP_REDUCTIONS)
def test_hidden_pages_are_never_preferred(reduction: str) -> None:
    score = torch.randn(2, 3, 10)
    score[:, :, 4:] = -torch.inf
    assert set(top_pages(aggregate(score, reduction), 4)[0].tolist()) == {0, 1, 2, 3}


@given(
    rows=st.integers(1, 4),
    pages=st.integers(1, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    levels=st.sampled_from([3, 1000]),
    data=st.data(),
)
def test_the_best_pages(
    rows: int, pages: int, dtype: torch.dtype, levels: int, data: st.DataObject
) -> None:
    """The ratings that are returned are the largest ones, each page once; ties go either way."""
    wanted = data.draw(st.integers(1, pages))
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, levels, (rows, pages), generator=generator).to(dtype)
    expected = score.sort(dim=1, descending=True).values[:, :wanted]
    best, ranked = top_pages(score, wanted), ranked_pages(score, wanted)
    for chosen in (best, ranked):
        assert chosen.shape == (rows, wanted)
        assert all(len(np.unique(row)) == wanted for row in chosen)
    held = score.gather(1, torch.from_numpy(best.copy()))
    assert torch.equal(held.sort(dim=1, descending=True).values, expected)
    assert torch.equal(score.gather(1, torch.from_numpy(ranked.copy())), expected)


def test_the_fewest_pages_that_reach_a_target() -> None:
    """Three of .5 .3 .1 .06 .04 hold .85; with .4 of it fixed and halved shares, two do."""
    share = torch.tensor([[0.06, 0.5, 0.1, 0.04, 0.3]])
    cover = fewest_pages(share, 0.15, np.array([5]))
    assert cover.num_taken.tolist() == [3]
    assert cover.pages[0, :3].tolist() == [1, 4, 2]
    assert cover.missed[0] == pytest.approx(0.1)
    assert not cover.is_capped[0]
    assert fewest_pages(share / 2, 0.15, np.array([5])).num_taken.tolist() == [2]


def test_a_target_that_places_do_not_reach() -> None:
    share = torch.tensor([[0.06, 0.5, 0.1, 0.04, 0.3], [0.0, 0.0, 0.9, 0.0, 0.0]])
    cover = fewest_pages(share, 0.15, np.array([2, 0]))
    assert cover.num_taken.tolist() == [2, 0]
    assert cover.missed == pytest.approx([0.2, 0.9])
    assert cover.is_capped.tolist() == [True, True]


@given(
    rows=st.integers(1, 4),
    pages=st.integers(0, 40),
    target=st.floats(1e-9, 0.999),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_one_page_less_misses_the_target(
    rows: int, pages: int, target: float, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = 5 * torch.randn(rows, 3, pages, generator=generator)
    share = page_shares(score, 3 * torch.randn(rows, 3, generator=generator))
    cap = np.array(data.draw(st.lists(st.integers(0, pages), min_size=rows, max_size=rows)))
    cover = fewest_pages(share, target, cap)
    for row in range(rows):
        taken = cover.pages[row, : cover.num_taken[row]]
        left = np.delete(share[row].double().numpy(), taken)
        assert cover.missed[row] == pytest.approx(left.sum(), rel=1e-5, abs=1e-30)
        assert cover.num_taken[row] <= cap[row]
        assert cover.is_capped[row] == (cover.missed[row] > target)
        assert not cover.is_capped[row] or cover.num_taken[row] == cap[row]
        if cover.num_taken[row]:
            assert cover.missed[row] + float(share[row, taken[-1]]) > target


def test_a_target_of_almost_nothing_takes_all_that_places_hold() -> None:
    share = page_shares(torch.randn(2, 3, 30), torch.randn(2, 3))
    assert fewest_pages(share, 1e-9, np.array([30, 7])).num_taken.tolist() == [30, 7]


def test_shares_are_probabilities() -> None:
    """The mean over the heads of a softmax over the pages and what is fixed."""
    score, fixed = 4 * torch.randn(3, 2, 20), torch.randn(3, 2)
    together = torch.cat((score, fixed[:, :, None]), dim=2).softmax(dim=2)
    torch.testing.assert_close(page_shares(score, fixed), together[:, :, :20].mean(dim=1))
    nothing = torch.full((1, 2, 4), -torch.inf)
    assert torch.equal(page_shares(nothing, nothing[:, :, 0]), torch.zeros(1, 4))
