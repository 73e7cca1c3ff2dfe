"""Scores in, pages out: against sorting."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arkcache.config import GROUP_REDUCTIONS
from arkcache.kernels import reference
from arkcache.policy import aggregate, ranked_pages, top_pages


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
