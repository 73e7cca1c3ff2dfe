"""The token index in plain torch against the reference and against an unpacker of its own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arkcache.kernels import reference
from arkcache.kernels.torch_tokens import PAGES_PER_BLOCK, TokenIndex

BITS = [2, 4, 8]
HEAD_DIMS = [1, 20, 32, 33, 64, 80, 96, 128, 256]


def unpack(index: TokenIndex, digest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [..., page_size, head_dim], scale and zero [..., 1, head_dim], byte by byte."""
    dim, bits = index.head_dim, index.bits
    header = digest[..., : 4 * dim].contiguous().view(torch.bfloat16).float()
    packed = digest[..., 4 * dim :].unflatten(-1, (-1, index.page_size))
    planes = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    codes = torch.cat(planes, dim=-2)[..., :dim, :].transpose(-1, -2).float()
    return codes, header[..., None, :dim], header[..., None, dim:]


def make(head_dim: int, page_size: int, bits: int, pages: int = 3) -> tuple[TokenIndex, Tensor]:
    """An index and keys [2, 2, pages, page_size, head_dim] far from the origin."""
    offset = torch.randn(1, 2, 1, 1, head_dim) * 3
    key = torch.randn(2, 2, pages, page_size, head_dim) + offset
    return TokenIndex(page_size, head_dim, bits), key


@pytest.mark.parametrize("page_size", [1, 2, 5, 16, 32, 64])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_digest_holds_the_keys(bits: int, head_dim: int, page_size: int) -> None:
    """What is unpacked is within half a step of the keys, beside the rounding of the header."""
    index, key = make(head_dim, page_size, bits)
    digest = index.digest(key)
    assert digest.shape == (2, 2, 3, 4 * head_dim + -(-head_dim * bits // 8) * page_size)
    codes, scale, zero = unpack(index, digest)
    _, exact_scale, exact_zero = reference.quantize_page(key, bits)
    header_error = 2**-8 * (exact_zero.abs() + (2**bits - 1) * exact_scale + exact_zero.abs())
    assert ((codes * scale + zero - key).abs() <= exact_scale / 2 + header_error).all()


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_score(bits: int, head_dim: int, group: int) -> None:
    index, key = make(head_dim, 16, bits, pages=5)
    query = torch.randn(4, group, head_dim) * head_dim**-0.5
    digest = index.digest(key).flatten(0, 1)
    expected = reference.token_score(query, *unpack(index, digest))
    torch.testing.assert_close(index.score(query, digest), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("page_size", [1, 2, 5, 64])
@pytest.mark.parametrize(
    "pages", [1, PAGES_PER_BLOCK - 1, PAGES_PER_BLOCK, PAGES_PER_BLOCK + 1, 2 * PAGES_PER_BLOCK + 3]
)
def test_score_of_many_pages(pages: int, page_size: int) -> None:
    index, key = make(20, page_size, 2, pages)
    query, digest = torch.randn(4, 2, 20), index.digest(key).flatten(0, 1)
    expected = reference.token_score(query, *unpack(index, digest))
    torch.testing.assert_close(index.score(query, digest), expected, rtol=1e-4, atol=1e-4)


def test_score_of_a_slice() -> None:
    """Digests are read where they lie: sinks cut off in front, spare capacity behind."""
    index, key = make(33, 4, 4, pages=12)
    digest = index.digest(key).flatten(0, 1)
    query = torch.randn(4, 2, 33)
    part = index.score(query, digest[:, 3:9])
    torch.testing.assert_close(part, index.score(query, digest)[:, :, 3:9])


@pytest.mark.parametrize("bits", BITS)
def test_scores_approach_the_truth_with_more_bits(bits: int) -> None:
    index, key = make(64, 32, bits, pages=8)
    query = torch.randn(4, 2, 64) * 64**-0.5
    score = index.score(query, index.digest(key).flatten(0, 1))
    truth = torch.einsum("rgd,rptd->rgpt", query, key.flatten(0, 1)).logsumexp(dim=-1)
    _, scale, zero = reference.quantize_page(key.flatten(0, 1), bits)
    key_error = scale / 2 + 2**-8 * (2 * zero.abs() + (2**bits - 1) * scale)
    bound = torch.einsum("rgd,rpd->rgp", query.abs(), key_error[:, :, 0])
    assert ((score - truth).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
def test_constant_channels_are_finite_and_exact(bits: int, dtype: torch.dtype) -> None:
    """A channel without spread has a scale of nothing to divide by."""
    index, key = make(20, 8, bits)
    key[..., 0], key[..., 1], key[..., 2] = 0.0, 1000.0, -1e-30
    key[:, :, 0] = 0.5
    key = key.to(dtype)
    digest = index.digest(key)
    codes, scale, zero = unpack(index, digest)
    held = codes * scale + zero
    torch.testing.assert_close(held[..., :3], key[..., :3].float(), rtol=2**-8, atol=1e-30)
    assert torch.equal(held[:, :, 0], key[:, :, 0].float())
    assert index.score(torch.randn(4, 2, 20), digest.flatten(0, 1)).isfinite().all()


@given(
    bits=st.sampled_from(BITS),
    head_dim=st.integers(1, 40),
    page_size=st.integers(1, 9),
    seed=st.integers(0, 10_000),
)
def test_codes_survive_packing(bits: int, head_dim: int, page_size: int, seed: int) -> None:
    """Keys that are codes already (times a power of two) come back exactly."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (1, 1, 4, page_size, head_dim), generator=generator)
    codes[..., 0, :], codes[..., -1, :] = 0, 2**bits - 1
    key = (codes * 0.5 - 8.0) if page_size > 1 else codes.float()
    index = TokenIndex(page_size, head_dim, bits)
    held, scale, zero = unpack(index, index.digest(key))
    assert torch.equal(held * scale + zero, key)
    if page_size > 1:
        assert torch.equal(held, codes.float())


def test_pages_are_digested_alone() -> None:
    """Bit for bit the same digest, however many pages and sequences come together."""
    index, key = make(33, 8, 2, pages=6)
    together = index.digest(key)
    for page in range(6):
        assert torch.equal(
            index.digest(key[1:, :, page : page + 1].clone()), together[1:, :, page : page + 1]
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keys_and_queries(dtype: torch.dtype) -> None:
    """Scores are summed in fp32 whatever the dtype: only the inputs are rounded."""
    index, key = make(64, 16, 4)
    key, query = key.to(dtype), torch.randn(4, 2, 64).to(dtype)
    digest = index.digest(key)
    assert torch.equal(digest, index.digest(key.float()))
    score = index.score(query, digest.flatten(0, 1))
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, index.score(query.float(), digest.flatten(0, 1)))


@pytest.mark.parametrize("bits", BITS)
def test_mass_under_a_softcap_and_a_mask(bits: int) -> None:
    """The mask comes after the softcap, for all query heads or each of its own."""
    page_size, head_dim, pages = 4, 20, 70
    index = TokenIndex(page_size, head_dim, bits)
    digest = index.digest(torch.randn(1, 3, pages, page_size, head_dim)).flatten(0, 1)
    query = torch.randn(3, 2, head_dim)
    for group in (1, 2):
        bias = torch.randn(3, group, pages, page_size)
        bias[:, :, 5] = -torch.inf
        bias[:, :, 6, 1:] = -torch.inf
        logits = index._logits(query, digest)
        expected = (2.0 * torch.tanh(logits / 2.0) + bias).logsumexp(dim=3)
        mass = index.log_mass(query, digest, 2.0, bias)
        torch.testing.assert_close(mass, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(index.log_mass(query, digest), index.score(query, digest))
