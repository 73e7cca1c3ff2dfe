"""Attention in plain torch: one decode step over a working set, and many tokens over blocks.

Knows nothing of pages or tiers. Query heads that share a KV head are laid beside each other as
[batch, kv_heads, group * new_tokens, dim], so that keys are never repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

TILE_TOKENS = 256
"""New tokens per tile: with blocks of 1024 tokens a tile's logits are 1 MiB per query head."""


class Block(NamedTuple):
    """A run of tokens and who may attend it.

    key [batch, kv_heads, tokens, head_dim], value [..., value_dim]. New tokens before `seen_from`
    attend none of it. `mask(start, stop)` gives the additive mask of new tokens start..stop,
    broadcast to [batch, kv_heads, group, stop - start, tokens], or None where all is attended.
    """

    key: Tensor
    value: Tensor
    seen_from: int = 0
    mask: Callable[[int, int], Tensor | None] | None = None


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attend one token: query [batch, kv_heads, group, head_dim] over [batch, kv_heads, tokens, :].

    mask is additive, broadcast to [batch, kv_heads, group, tokens]; sinks [kv_heads, group] are
    logits that take probability and give nothing. Returns [batch, kv_heads, group, value_dim].
    """
    if softcap is None and sinks is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale
        )
    whole = Block(
        key, value, mask=None if mask is None else lambda _start, _stop: mask[:, :, :, None]
    )
    output = block_attention(
        query[:, :, :, None], [whole], scale=scale, softcap=softcap, sinks=sinks
    )
    return output[:, :, :, 0]


def block_attention(
    query: Tensor,
    blocks: Iterable[Block],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend blocks one after another and merge them by log-sum-exp (online softmax), in fp32.

    query [batch, kv_heads, group, new, head_dim]; sinks [kv_heads, group]. A query that no block
    lets attend anything gets zeros. Returns [batch, kv_heads, group, new, value_dim] in the
    query's dtype. Beside the result, memory is one tile's logits, whatever the number of tokens.
    """
    new_tokens = query.shape[3]
    peak = mass = total = query.new_empty(0, dtype=torch.float32)
    for block in blocks:
        if total.numel() == 0:
            peak = query.new_full((*query.shape[:4], 1), float("-inf"), dtype=torch.float32)
            mass = torch.zeros_like(peak)
            total = peak.new_zeros((*query.shape[:4], block.value.shape[-1]))
        if block.key.shape[2] == 0:
            continue
        first_tile = block.seen_from // TILE_TOKENS * TILE_TOKENS
        for start in range(first_tile, new_tokens, TILE_TOKENS):
            tile = slice(start, min(start + TILE_TOKENS, new_tokens))
            logits = _logits(query[:, :, :, tile], block, tile, scale, softcap)
            _accumulate(
                logits, block.value, peak[..., tile, :], mass[..., tile, :], total[..., tile, :]
            )
    if sinks is not None:
        reference = peak.masked_fill(peak == float("-inf"), 0.0)
        mass = mass + (sinks.float()[:, :, None, None] - reference).exp_()
    return (total / mass.masked_fill(mass == 0, 1.0)).to(query.dtype)


def _logits(
    query: Tensor, block: Block, tile: slice, scale: float, softcap: float | None
) -> Tensor:
    """The masked logits [batch, kv_heads, group, tile, tokens] of one tile, in fp32."""
    # Scaled first: in fp16 a product of long vectors may overflow.
    scaled = (query.float() * scale).to(query.dtype).flatten(2, 3)
    logits: Tensor = (scaled @ block.key.transpose(-1, -2)).float().unflatten(2, query.shape[2:4])
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    mask = None if block.mask is None else block.mask(tile.start, tile.stop)
    return logits if mask is None else logits.add_(mask)


def _accumulate(logits: Tensor, value: Tensor, peak: Tensor, mass: Tensor, total: Tensor) -> None:
    """Fold one block into the running peak, mass and total of a tile, in place."""
    new_peak = torch.maximum(peak, logits.amax(dim=-1, keepdim=True))
    # A row that may attend nothing yet has a peak of -inf; 0 keeps its exponents finite.
    reference = new_peak.masked_fill(new_peak == float("-inf"), 0.0)
    weight = logits.sub_(reference).exp_()
    decay = (peak - reference).exp_()
    mass.mul_(decay).add_(weight.sum(dim=-1, keepdim=True))
    output = weight.to(value.dtype).flatten(2, 3) @ value
    total.mul_(decay).add_(output.unflatten(2, total.shape[2:4]))
    peak.copy_(new_peak)
