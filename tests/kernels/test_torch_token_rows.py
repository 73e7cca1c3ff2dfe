"""The token index of a CPU against keys as they are and against the reference."""

import pytest
import torch
from torch import Tensor

from arkcache.kernels import reference
from arkcache.kernels.torch_token_rows import TOKENS_PER_BLOCK, TokenRows
from tests.oracle import stored_rows

HEAD_DIMS = [1, 20, 33, 64, 96, 128, 256]


def make(head_dim: int, page_size: int, pages: int) -> tuple[TokenRows, Tensor]:
    """An index and keys [2, 2, pages, page_size, head_dim] with channels of very different size."""
    key = torch.randn(2, 2, pages, page_size, head_dim)
    key[..., 0] *= 20
    return TokenRows(page_size, head_dim), key


@pytest.mark.parametrize("page_size", [1, 5, 32])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_digest_holds_the_keys(head_dim: int, page_size: int) -> None:
    """Within half a step of each rotated token's own scale, in half a byte for each element."""
    index, key = make(head_dim, page_size, 3)
    digest = index.digest(key)
    assert digest.dtype == torch.uint8
    assert digest.shape[:4] == key.shape[:4]
    assert digest.shape[4] <= head_dim / 2 + 4 + 4
    rotated, held = reference.hadamard(key), reference_keys(digest, head_dim)
    step = rotated.abs().amax(dim=-1, keepdim=True) / 7
    assert ((held - rotated).abs() <= step * (0.5 + 1e-4)).all()


def reference_keys(digest: Tensor, head_dim: int) -> Tensor:
    """Rotated keys from bytes, one scale at a time."""
    scale = digest[..., -4:].contiguous().view(torch.float32)
    low, high = digest[..., :-4] % 16, digest[..., :-4] // 16
    return (torch.cat((low, high), dim=-1).float() - 8)[..., :head_dim] * scale


def test_an_outlier_is_spread() -> None:
    """A channel twenty times the others does not take their bits: without the rotation the logits'
    error would be three times as large."""
    key = torch.randn(1, 1, 200, 4, 64)
    key[..., 5] += 20
    query = torch.randn(1, 4, 64) * 64**-0.5
    truth = torch.einsum("rgd,rptd->rgpt", query, key[0])
    step = key.abs().amax(dim=-1, keepdim=True) / 7
    plain = torch.einsum("rgd,rptd->rgpt", query, ((key / step).round() * step)[0]) - truth
    held = torch.einsum("rgd,rptd->rgpt", query, stored_rows(key)[0][0]) - truth
    assert held.std() < 0.5 * plain.std()


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("page_size", [1, 5, 32])
def test_score(page_size: int, head_dim: int, group: int) -> None:
    index, key = make(head_dim, page_size, pages=7)
    query = torch.randn(4, group, head_dim) * head_dim**-0.5
    expected = reference.token_score(query, *stored_rows(key.flatten(0, 1)))
    score = index.score(query, index.digest(key).flatten(0, 1))
    torch.testing.assert_close(score, expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("pages", [1, 255, 256, 257, 600])
def test_score_of_many_pages(pages: int) -> None:
    """In blocks, the last of which may be short."""
    assert TOKENS_PER_BLOCK == 256 * 4 * 4  # rows, page size
    index, key = make(20, 4, pages)
    query = torch.randn(4, 2, 20)
    expected = reference.token_score(query, *stored_rows(key.flatten(0, 1)))
    score = index.score(query, index.digest(key).flatten(0, 1))
    torch.testing.assert_close(score, expected, rtol=1e-5, atol=5e-5)


def test_score_of_a_slice() -> None:
    """Digests are read where they lie: sinks cut off in front, spare capacity behind."""
    index, key = make(33, 4, pages=12)
    digest, query = index.digest(key).flatten(0, 1), torch.randn(4, 2, 33)
    part = index.score(query, digest[:, 3:9])
    torch.testing.assert_close(part, index.score(query, digest)[:, :, 3:9])


def test_a_page_is_known_to_a_quarter() -> None:
    """On keys without outliers, the mass of a page to 27 %, to 8 % in the mean."""
    key, query = torch.randn(2, 2, 40, 8, 64), torch.randn(4, 3, 64) * 64**-0.5
    index = TokenRows(8, 64)
    truth = torch.einsum("rgd,rptd->rgpt", query, key.flatten(0, 1)).logsumexp(dim=-1)
    score = index.score(query, index.digest(key).flatten(0, 1))
    torch.testing.assert_close(score, truth, rtol=0, atol=0.24)
    assert (score - truth).std() < 0.08


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_of_nothing_and_of_much(dtype: torch.dtype) -> None:
    index, key = make(20, 8, pages=3)
    key = key.to(dtype)
    key[:, :, 0], key[:, :, 1, 0] = 0, 60000
    digest = index.digest(key)
    held = reference_keys(digest, 20)
    assert torch.equal(held[:, :, 0], torch.zeros_like(held[:, :, 0]))
    large = held[:, :, 1, 0].norm(dim=-1) / key[:, :, 1, 0].float().norm(dim=-1)
    torch.testing.assert_close(large, torch.ones_like(large), rtol=0.02, atol=0)
    assert index.score(torch.randn(4, 2, 20), digest.flatten(0, 1)).isfinite().all()


@pytest.mark.parametrize("group", [1, 2])
def test_mass_under_a_softcap_and_a_mask(group: int) -> None:
    """The mask comes after the softcap, for all query heads or each of its own."""
    index, key = make(20, 4, pages=600)
    digest, query = index.digest(key).flatten(0, 1), torch.randn(4, 2, 20)
    bias = torch.randn(4, group, 600, 4)
    bias[:, :, 5] = -torch.inf
    bias[:, :, 6, 1:] = -torch.inf
    logits = torch.einsum("rgd,rptd->rgpt", query, stored_rows(key.flatten(0, 1))[0])
    expected = (2.0 * torch.tanh(logits / 2.0) + bias).logsumexp(dim=3)
    mass = index.log_mass(query, digest, 2.0, bias)
    torch.testing.assert_close(mass, expected, rtol=1e-5, atol=5e-5)
    assert torch.equal(index.log_mass(query, digest), index.score(query, digest))
