"""Bounding volumes in plain torch against the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arkcache.config import INDEXES
from arkcache.kernels import reference
from arkcache.kernels.torch_digest import BoundingVolumes

VOLUMES = [index for index in INDEXES if index != "tokens"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def keys(pages: int, page_size: int, head_dim: int, seed: int = 0) -> torch.Tensor:
    """Keys [2, 3, pages, page_size, head_dim] far from the origin, as keys are."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, pages, page_size, head_dim)
    offset = torch.randn(1, 3, 1, 1, head_dim, generator=generator) * 4
    return torch.randn(shape, generator=generator) + offset


def test_all_volumes_are_here() -> None:
    assert len(VOLUMES) == 7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 2, 16, 32])
@pytest.mark.parametrize("kind", VOLUMES)
def test_digest(kind: str, page_size: int, dtype: torch.dtype) -> None:
    key = keys(5, page_size, 20).to(dtype)
    digest = BoundingVolumes(kind).digest(key)
    expected = reference.bounding_volume(key, kind).transpose(-1, -2)
    assert digest.dtype == dtype
    # A center and the distances from it are rounded once each on their way.
    rounding = 4 * torch.finfo(dtype).eps * float(key.abs().max())
    torch.testing.assert_close(digest.float(), expected, rtol=0, atol=rounding)


@pytest.mark.parametrize("group", [1, 4, 5])
@pytest.mark.parametrize("kind", VOLUMES)
def test_score(kind: str, group: int) -> None:
    index, key = BoundingVolumes(kind), keys(7, 16, 20)
    query = torch.randn(6, group, 20)
    score = index.score(query, index.digest(key).flatten(0, 1))
    digest = reference.bounding_volume(key, kind).flatten(0, 1)
    torch.testing.assert_close(score, reference.volume_score(query, digest, kind))


@pytest.mark.parametrize("kind", VOLUMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_score_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    """A score errs by no more than the rounding of each of its products."""
    index, key = BoundingVolumes(kind), keys(7, 16, 64).to(dtype)
    query = torch.randn(6, 4, 64).to(dtype)
    score = index.score(query, index.digest(key).flatten(0, 1)).float()
    digest = reference.bounding_volume(key, kind).flatten(0, 1)
    expected = reference.volume_score(query, digest, kind)
    size = reference.volume_score(query.abs(), digest.abs(), kind)
    assert ((score - expected).abs() <= 4 * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("kind", VOLUMES)
def test_pages_are_digested_alone(kind: str) -> None:
    """Bit for bit the same digest, however many pages and sequences come together."""
    index, key = BoundingVolumes(kind), keys(9, 16, 33)
    together = index.digest(key)
    for page in range(9):
        alone = index.digest(key[1:, :, page : page + 1].clone())
        assert torch.equal(alone, together[1:, :, :, page : page + 1])


@given(
    kind=st.sampled_from(["cuboid-max", "sphere-max"]),
    page_size=st.sampled_from([1, 2, 7, 32]),
    head_dim=st.sampled_from([1, 8, 33]),
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
)
def test_bounds_hold(kind: str, page_size: int, head_dim: int, seed: int, spread: float) -> None:
    """No key of a page has a larger q.k than the page's score, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(1, 1, 4, page_size, head_dim, generator=generator) * spread
    key += torch.randn(head_dim, generator=generator) * 10
    query = torch.randn(1, 3, head_dim, generator=generator)
    index = BoundingVolumes(kind)
    score = index.score(query, index.digest(key).flatten(0, 1))
    truth = torch.einsum("rgd,rptd->rgpt", query, key[0]).amax(dim=-1)
    size = torch.einsum("rgd,rptd->rgpt", query.abs(), key[0].abs()).amax(dim=-1)
    assert (score >= truth - 1e-5 * size).all()


@pytest.mark.parametrize("kind", VOLUMES)
def test_a_page_of_one_token_scores_its_product(kind: str) -> None:
    index, key, query = BoundingVolumes(kind), keys(6, 1, 12), torch.randn(6, 2, 12)
    score = index.score(query, index.digest(key).flatten(0, 1))
    expected = torch.einsum("rgd,rpd->rgp", query, key.flatten(0, 1)[:, :, 0])
    torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-4)
