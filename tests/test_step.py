"""How new tokens see the blocks of a layer, against a mask written out token by token."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from arkcache.engines.step import Step, causal_blocks, causal_lines
from arkcache.kernels import reference, torch_attention
from arkcache.kernels.torch_attention import block_attention
from arkcache.pages.bookkeeping import Ids

HEADS, DIM = 2, 16


def visible_after(real: list[list[int]], past: list[int]) -> Ids:
    """Last visible token of each new column: `real` says which columns are tokens."""
    counts = np.cumsum(np.array(real), axis=1) + np.array(past)[:, None]
    visible: Ids = counts - 1
    return visible


def layer_blocks(
    key: Tensor, value: Tensor, lengths: list[int], sizes: list[int]
) -> Iterator[tuple[Tensor, Tensor, Ids]]:
    start = 0
    for size in sizes:
        tokens = np.arange(start, start + size)
        held = tokens < np.array(lengths)[:, None]
        yield key[:, :, tokens], value[:, :, tokens], np.where(held, tokens, -1)
        start += size


@pytest.mark.parametrize("sizes", [[40], [7, 20, 13], [30, 2, 8]])
@pytest.mark.parametrize(
    ("real", "past", "num_lines"),
    [
        ([[1] * 6] * 2, [30, 30], 1),  # alike
        ([[1] * 6] * 2, [30, 12], 2),  # of other lengths
        ([[0, 0, 1, 1, 1, 1], [1] * 6], [30, 34], 2),  # padding before a turn
        ([[0] * 5 + [1], [1] * 6], [0, 0], 2),  # padding before a prompt
        ([[1, 1, 0, 1, 1, 1], [1] * 6], [30, 20], 0),  # padding in between
        ([[1, 1, 1, 1, 0, 0], [1] * 6], [30, 20], 0),  # and after
        ([[1], [1]], [30, 30], 1),
        ([[1], [1]], [30, 20], 0),  # one new token: one mask is cheaper
        ([[0, 0], [1, 1]], [0, 5], 2),  # a sequence without a token
    ],
)
def test_every_token_sees_what_came_before(
    real: list[list[int]], past: list[int], num_lines: int, sizes: list[int]
) -> None:
    visible = visible_after(real, past)
    assert len(causal_lines(visible)) == num_lines
    lengths = (visible[:, -1] + 1).tolist()
    key, value = torch.randn(2, HEADS, 40, DIM), torch.randn(2, HEADS, 40, DIM)
    query = torch.randn(2, HEADS * 3, len(real[0]), DIM)
    step = Step(query, 0.3, query)
    output = block_attention(
        query.unflatten(1, (HEADS, 3)),
        causal_blocks(layer_blocks(key, value, lengths, sizes), step, visible),
        scale=0.3,
    )
    mask = torch.from_numpy(np.arange(40) <= visible[:, :, None])[:, None]
    expected = reference.attention(query, key, value, scale=0.3, mask=mask)
    torch.testing.assert_close(output.flatten(1, 2), expected, rtol=1e-5, atol=1e-5)


def test_no_mask_is_made_for_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left-padded batches included: all their blocks go through the fused attention."""
    monkeypatch.setattr(torch_attention, "_attend_tiles", None)
    visible = visible_after([[0, 0, 1, 1, 1, 1], [1] * 6], [20, 24])
    key, value = torch.randn(2, HEADS, 30, DIM), torch.randn(2, HEADS, 30, DIM)
    query = torch.randn(2, HEADS, 6, DIM)
    blocks = layer_blocks(key, value, [24, 30], [10, 20])
    step = Step(query, 0.3, query)
    block_attention(query[:, :, None], causal_blocks(blocks, step, visible), scale=0.3)
