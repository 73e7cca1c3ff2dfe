"""The rotation against the butterflies of the reference, and the laws that it obeys."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arkcache.kernels import reference
from arkcache.kernels.torch_hadamard import _matrix, block_dim, rotate

DIMS = [1, 2, 45, 64, 80, 96, 128, 256, 576]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(states: Tensor) -> Tensor:
    """The butterflies of the reference, in the dtype of the input."""
    block, half = block_dim(states.shape[-1]), 1
    blocks = states.unflatten(-1, (-1, block))
    while half < block:
        low, high = blocks.unflatten(-1, (-1, 2, half)).unbind(dim=-2)
        blocks = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        half *= 2
    return (blocks * block**-0.5).flatten(-2)


def rounding(dim: int, dtype: torch.dtype) -> float:
    """Relative: that of two results, and that of the fp32 sums, a random walk over a block."""
    return 2 * torch.finfo(dtype).eps + block_dim(dim) ** 0.5 * torch.finfo(torch.float32).eps


def test_by_hand() -> None:
    """Sylvester's matrix of 4, and two blocks of 2 in 6 = 2 x 3."""
    first = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = torch.tensor([10.0, -2.0, -4.0, 0.0]) / 2
    torch.testing.assert_close(rotate(first), expected)
    torch.testing.assert_close(reference.hadamard(first), expected)
    second = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    expected = torch.tensor([3.0, -1.0, 7.0, -1.0, 11.0, -1.0]) * 0.5**0.5
    torch.testing.assert_close(rotate(second), expected)
    torch.testing.assert_close(reference.hadamard(second), expected)


@pytest.mark.parametrize(
    ("dim", "expected"), [(1, 1), (45, 1), (80, 16), (96, 32), (64, 64), (576, 64)]
)
def test_block_dim(dim: int, expected: int) -> None:
    assert block_dim(dim) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_rotate(dim: int, dtype: torch.dtype) -> None:
    """In 16 bits at most twice as far from the reference as the butterflies in the same dtype."""
    states = torch.randn(2, 3, 50, dim).to(dtype)
    rotated, exact = rotate(states), reference.hadamard(states)
    assert rotated.dtype == dtype
    assert rotated.shape == states.shape
    if dtype == torch.float32:
        torch.testing.assert_close(rotated, exact)
    else:
        error = (rotated.float() - exact).abs().max()
        assert error <= 2 * (plain(states).float() - exact).abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_twice_is_nothing(dim: int, dtype: torch.dtype) -> None:
    states = torch.randn(100, dim).to(dtype)
    error = (rotate(rotate(states)).float() - states.float()).norm()
    assert error <= rounding(dim, dtype) * states.float().norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_norms_and_dot_products_stay(dim: int, dtype: torch.dtype) -> None:
    """Whatever is rotated on both sides, every logit stays, to the rounding of the dtype."""
    query, key = torch.randn(2, 200, dim).to(dtype)
    before = query.double() @ key.double().T
    after = rotate(query).double() @ rotate(key).double().T
    size = query.double().norm(dim=-1)[:, None] * key.double().norm(dim=-1)
    assert ((after - before).abs() <= rounding(dim, dtype) * size).all()
    norms = rotate(key).double().norm(dim=-1)
    assert ((norms / key.double().norm(dim=-1) - 1).abs() <= rounding(dim, dtype)).all()


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_an_outlier_is_spread(dim: int) -> None:
    """One element of 1 becomes a block of +-1/sqrt(block)."""
    states = torch.zeros(dim)
    states[5] = 1.0
    rotated = rotate(states)[: block_dim(dim)]
    torch.testing.assert_close(rotated.abs(), torch.full_like(rotated, block_dim(dim) ** -0.5))
    assert rotate(states)[block_dim(dim) :].eq(0).all()


def test_strided_input_and_inference_mode() -> None:
    """The matrix is kept between calls: made in inference mode, it must serve autograd too."""
    _matrix.cache_clear()
    states = torch.randn(112, 7, requires_grad=True)
    with torch.inference_mode():
        first = rotate(states.T)
    second = rotate(states.T)
    second.sum().backward()
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(second, reference.hadamard(states.T))


@given(dim=st.integers(1, 130), rows=st.integers(0, 3), seed=st.integers(0, 10_000))
def test_any_dim(dim: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, dim, generator=generator)
    torch.testing.assert_close(rotate(states), reference.hadamard(states))
    torch.testing.assert_close(rotate(rotate(states)), states)


def test_defaults_of_the_caller_do_not_reach_the_matrix() -> None:
    """It is kept for all later calls."""
    states = torch.randn(3, 512)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            rotated = rotate(states)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(rotated, reference.hadamard(states), rtol=1e-5, atol=1e-5)
