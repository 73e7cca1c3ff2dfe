"""A tensor that grows along one dimension."""

import pytest
import torch
from torch import Tensor

from arkcache.tiering.growing import ChunkedTensor, GrowingTensor, grown_capacity

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
        assert tensor.nbytes <= max(64, grown_capacity(length)) * 4
    assert copies <= 45  # by 16 entries up to 128, then by an eighth of what there is


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


def test_chunks_hold_what_was_written_wherever_it_falls() -> None:
    chunked = ChunkedTensor((2, 3, 4, 5), 2, torch.float32, torch.device("cpu"))
    states = torch.randn(2, 3, 19, 5)
    for start, stop in ((0, 1), (1, 4), (4, 13), (13, 19)):
        chunked.write(slice(0, 1), start, states[:1, :, start:stop])
        chunked.write(slice(1, 2), start, states[1:, :, start:stop])
    for first in range(19):
        for last in range(first + 1, 20):
            assert torch.equal(chunked.read(first, last), states[:, :, first:last])
    assert chunked.capacity == 20
    assert chunked.nbytes == 20 * 2 * 3 * 5 * 4


def test_chunks_stay_where_they_are_when_more_come() -> None:
    chunked = ChunkedTensor((1, 4, 2), 1, torch.float32, torch.device("cpu"))
    chunked.write(slice(0, 1), 0, torch.ones(1, 4, 2))
    before = chunked.read(0, 4).data_ptr()
    chunked.write(slice(0, 1), 4, torch.ones(1, 40, 2))
    assert chunked.read(0, 4).data_ptr() == before


def test_chunks_keep_sequences() -> None:
    chunked = ChunkedTensor((3, 4, 2), 1, torch.float32, torch.device("cpu"))
    states = torch.randn(3, 6, 2)
    chunked.write(slice(0, 3), 0, states)
    index = torch.tensor([2, 0, 0, 1])
    chunked.keep_sequences(index)
    assert torch.equal(chunked.read(0, 6), states[index])
    more = torch.randn(4, 5, 2)
    chunked.write(slice(0, 4), 6, more)
    assert torch.equal(chunked.read(6, 11), more)
