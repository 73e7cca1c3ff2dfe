"""A tensor that grows along one dimension."""

import pytest
import torch
from torch import Tensor

from arkcache.tiering.growing import GrowingTensor

CPU = torch.device("cpu")


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_what_is_written_stays(dim: int) -> None:
    """Written in pieces by sequence, read as a whole: the same, whatever grew in between."""
    shape = [2, 3, 4, 5]
    shape[dim] = 2
    tensor = GrowingTensor(tuple(shape), dim, torch.float32, CPU)
    shape[dim] = 40
    content, start = torch.randn(shape), 0
    for length in (1, 2, 3, 5, 29):
        for sequence in range(2):
            rows = slice(sequence, sequence + 1)
            tensor.write(rows, start, content[rows].narrow(dim, start, length))
        start += length
        assert torch.equal(tensor.first(start), content.narrow(dim, 0, start))
    assert start == 40


def test_the_rest_is_zeros() -> None:
    """What is masked out is still multiplied: it must be finite."""
    tensor = GrowingTensor((2, 2), 1, torch.float32, CPU)
    tensor.write(slice(0, 1), 6, torch.ones(1, 1))
    assert tensor.first(tensor.data.shape[1]).sum() == 1.0


def test_growth_is_amortised_and_bounded() -> None:
    tensor, copies, address = GrowingTensor((1, 64), 1, torch.float32, CPU), 0, 0
    for length in range(1, 10_000):
        tensor.write(slice(0, 1), length - 1, torch.zeros(1, 1))
        copies += tensor.data.data_ptr() != address
        address = tensor.data.data_ptr()
        assert tensor.nbytes == tensor.data.numel() * 4
        assert tensor.nbytes <= max(64, length * tensor.GROWTH) * 4
    assert copies <= 15


def test_reserve_takes_what_is_asked_for_at_least() -> None:
    tensor = GrowingTensor((1, 4), 1, torch.float32, CPU)
    tensor.reserve(1000)
    assert tensor.data.shape == (1, 1000)
    tensor.reserve(10)
    assert tensor.data.shape == (1, 1000)


def test_first_is_a_view() -> None:
    tensor = GrowingTensor((2, 4), 1, torch.float32, CPU)
    tensor.first(2)[:] = 1.0
    assert tensor.data.sum() == 4.0


@pytest.mark.parametrize("index", [[1, 0], [1], [0, 0, 1]])
def test_keep_sequences(index: list[int]) -> None:
    tensor = GrowingTensor((2, 4), 1, torch.float32, CPU)
    content: Tensor = torch.randn(2, 4)
    tensor.write(slice(0, 2), 0, content)
    tensor.keep_sequences(torch.tensor(index))
    assert torch.equal(tensor.first(4), content[index])
