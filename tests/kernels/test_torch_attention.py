"""Attention in plain torch against the reference: one token over a view, many over blocks."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from arkcache.kernels import reference
from arkcache.kernels.torch_attention import (
    TILE_TOKENS,
    Block,
    block_attention,
    decode_attention,
)

KV_HEADS = 2
GROUPS = [1, 3, 4, 5, 7, 16]
HALVES = [torch.bfloat16, torch.float16]


def in_the_middle(*shape: int) -> Tensor:
    """Random numbers in a view of a plane that holds NaN on both sides of it."""
    plane = torch.full((*shape[:2], shape[2] + 9, shape[3]), math.nan)
    view = plane[:, :, 4 : 4 + shape[2]]
    return view.copy_(torch.randn(shape))


def inputs(group: int, new_tokens: int, tokens: int, dim: int = 16) -> tuple[Tensor, ...]:
    query = torch.randn(2, KV_HEADS, group, new_tokens, dim)
    return query, in_the_middle(2, KV_HEADS, tokens, dim), in_the_middle(2, KV_HEADS, tokens, 12)


def expected_of(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **how: object
) -> Tensor:
    """The reference, in the layout of the fast version; mask [batch, kv_heads, group, new, all]."""
    sink_logits = how.pop("sink_logits", None)
    if mask is not None:
        mask = mask.expand(*query.shape[:4], -1).flatten(1, 2)
    output = reference.attention(
        query.flatten(1, 2),
        key,
        value,
        mask=mask,
        sink_logits=None if sink_logits is None else sink_logits.flatten(),  # type: ignore[attr-defined]
        **how,  # type: ignore[arg-type]
    )
    return output.unflatten(1, query.shape[1:3])


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """What anybody would write, in the dtype of the inputs."""
    logits = query.flatten(2, 3) @ key.transpose(-1, -2) * scale
    return (logits.softmax(dim=-1) @ value).unflatten(2, query.shape[2:4])


def assert_twice_as_good(output: Tensor, inputs: tuple[Tensor, ...], scale: float) -> None:
    """At most twice the error of plain PyTorch in the same dtype, against fp32."""
    truth = expected_of(*inputs, scale=scale)
    error = (output.float() - truth).abs().max()
    assert error <= 2 * (plain(*inputs, scale).float() - truth).abs().max()


def masks(kind: str, new_tokens: int, tokens: int, group: int) -> Tensor | None:
    """Additive masks as callers give them: per sequence, per KV head, per query head, or none."""
    shapes = {"sequence": (2, 1, 1), "kv_head": (2, KV_HEADS, 1), "head": (1, KV_HEADS, group)}
    if kind == "none":
        return None
    mask = torch.randn(*shapes[kind], new_tokens, tokens)
    return mask.masked_fill(torch.rand(mask.shape) < 0.3, -math.inf)


# -- one token ------------------------------------------------------------------------------------


@pytest.mark.parametrize("extras", ["", "softcap", "sink_logits", "softcap sink_logits"])
@pytest.mark.parametrize("mask_kind", ["none", "sequence", "kv_head", "head"])
@pytest.mark.parametrize("group", GROUPS)
def test_decode(group: int, mask_kind: str, extras: str) -> None:
    query, key, value = inputs(group, 1, 37)
    mask = masks(mask_kind, 1, 37, group)
    how = {"scale": 0.3, "softcap": 2.0 if "softcap" in extras else None}
    sink_logits = torch.randn(KV_HEADS, group) if "sink_logits" in extras else None
    output = decode_attention(
        query[:, :, :, 0],
        key,
        value,
        mask=None if mask is None else mask[:, :, :, 0],
        sink_logits=sink_logits,
        **how,
    )
    expected = expected_of(query, key, value, mask, sink_logits=sink_logits, **how)[:, :, :, 0]
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_decode_gives_zeros_where_nothing_may_be_attended(softcap: float | None) -> None:
    query, key, value = inputs(3, 1, 8)
    mask = torch.zeros(2, 1, 1, 8)
    mask[1] = -math.inf
    output = decode_attention(query[:, :, :, 0], key, value, scale=1.0, softcap=softcap, mask=mask)
    assert output[0].abs().min() > 0
    assert not output[1].any()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("group", GROUPS)
def test_decode_in_half_precision(group: int, dtype: torch.dtype) -> None:
    half = tuple(tensor.to(dtype) for tensor in inputs(group, 1, 300, dim=64))
    query, key, value = half
    output = decode_attention(query[:, :, :, 0], key, value, scale=0.125)
    assert output.dtype == dtype
    assert_twice_as_good(output[:, :, :, None], half, 0.125)


# -- many tokens over blocks ----------------------------------------------------------------------


def split(key: Tensor, value: Tensor, sizes: list[int], mask: Tensor | None) -> Iterator[Block]:
    """Blocks of the given sizes, each with its part of the mask [..., new, tokens]."""
    start = 0
    for size in sizes:
        own = slice(start, start + size)
        yield Block(
            key[:, :, own], value[:, :, own], mask=None if mask is None else part(mask, own)
        )
        start += size


def part(mask: Tensor, own: slice) -> Callable[[int, int], Tensor]:
    return lambda start, stop: mask[..., start:stop, own]


def causal(new_tokens: int, tokens: int) -> Tensor:
    hidden = torch.ones(new_tokens, tokens, dtype=torch.bool).triu(tokens - new_tokens + 1)
    return torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)[None, None, None]


@pytest.mark.parametrize("extras", ["", "softcap", "sink_logits", "softcap sink_logits"])
@pytest.mark.parametrize("sizes", [[40], [1, 39], [16, 16, 8], [8] * 5])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_blocks(group: int, sizes: list[int], extras: str) -> None:
    query, key, value = inputs(group, 9, 40)
    mask = causal(9, 40)
    how = {"scale": 0.3, "softcap": 2.0 if "softcap" in extras else None}
    sink_logits = torch.randn(KV_HEADS, group) if "sink_logits" in extras else None
    blocks = split(key, value, sizes, mask)
    output = block_attention(query, blocks, sink_logits=sink_logits, **how)
    expected = expected_of(query, key, value, mask, sink_logits=sink_logits, **how)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask_kind", ["none", "sequence", "kv_head", "head"])
@pytest.mark.parametrize("group", GROUPS)
def test_blocks_with_masks(group: int, mask_kind: str) -> None:
    query, key, value = inputs(group, 5, 24)
    mask = masks(mask_kind, 5, 24, group)
    output = block_attention(query, split(key, value, [7, 17], mask), scale=0.3)
    expected = expected_of(query, key, value, mask, scale=0.3)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("new_tokens", [TILE_TOKENS - 1, TILE_TOKENS, TILE_TOKENS + 1, 600])
def test_tiles_of_new_tokens(new_tokens: int) -> None:
    """Tiles start at multiples of their size; blocks that early tokens cannot see are skipped."""
    query, key, value = inputs(2, new_tokens, new_tokens + 30, dim=8)
    mask = causal(new_tokens, new_tokens + 30)
    sizes = [30, 100, new_tokens - 100]
    first_seen = [0, 0, 100]
    blocks = [
        block._replace(seen_from=seen)
        for block, seen in zip(split(key, value, sizes, mask), first_seen, strict=True)
    ]
    output = block_attention(query, blocks, scale=0.3)
    expected = expected_of(query, key, value, mask, scale=0.3)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_blocks_that_nobody_sees_change_nothing() -> None:
    query, key, value = inputs(2, 3, 10)
    hidden = torch.full((1, 1, 1, 3, 10), -math.inf)
    seen = Block(key, value)
    unseen = [Block(key, value, seen_from=3, mask=part(hidden, slice(0, 10)))]
    expected = block_attention(query, [seen], scale=1.0)
    for blocks in ([*unseen, seen], [seen, *unseen], [*unseen, seen, *unseen]):
        torch.testing.assert_close(block_attention(query, blocks, scale=1.0), expected)


@pytest.mark.parametrize("sink_logits", [None, torch.zeros(KV_HEADS, 2)])
def test_blocks_give_zeros_where_nothing_may_be_attended(sink_logits: Tensor | None) -> None:
    query, key, value = inputs(2, 3, 10)
    mask = torch.zeros(2, 1, 1, 3, 10)
    mask[1, :, :, 1] = -math.inf
    output = block_attention(
        query, split(key, value, [4, 6], mask), scale=1.0, sink_logits=sink_logits
    )
    assert not output[1, :, :, 1].any()
    assert output[0].abs().min() > 0


def test_block_order_does_not_matter() -> None:
    """Positions are in the keys: sealed pages may come in any order."""
    query, key, value = inputs(2, 3, 30)
    blocks = list(split(key, value, [10, 10, 10], None))
    torch.testing.assert_close(
        block_attention(query, blocks, scale=1.0),
        block_attention(query, blocks[::-1], scale=1.0),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_dominant_token_in_the_last_block_does_not_overflow() -> None:
    query, key, value = inputs(1, 2, 20)
    key[:, :, -1] = query[:, :, 0, 0] * 100
    output = block_attention(query, split(key, value, [10, 10], None), scale=1.0)
    expected = expected_of(query, key, value, scale=1.0)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("group", GROUPS)
def test_blocks_in_half_precision(group: int, dtype: torch.dtype) -> None:
    half = tuple(tensor.to(dtype) for tensor in inputs(group, 4, 300, dim=64))
    output = block_attention(half[0], split(half[1], half[2], [100, 200], None), scale=0.125)
    assert output.dtype == dtype
    assert_twice_as_good(output, half, 0.125)
