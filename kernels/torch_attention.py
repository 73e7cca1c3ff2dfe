"""Attention in plain torch: one decode step over a working set, and many tokens over blocks.

Knows nothing of pages or tiers. Query heads that share a KV head are laid beside each other as
[batch, kv_heads, group * new_tokens, dim], so that keys are never repeated. Blocks go through the
fused attention of `torch_flash.py` where it serves them, else through tiles of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from arkcache.kernels.torch_flash import flash_attention, has_flash

TILE_TOKENS = 256
"""New tokens per tile: with blocks of 1024 tokens a tile's logits are 1 MiB per query head."""


class Block(NamedTuple):
    """A run of tokens and who may attend it.

    key [batch, kv_heads, tokens, head_dim], value [..., value_dim]. `seqs` are those of the
    batch that the block is of; None is all. New tokens before `seen_from` attend none of it. If
    `causal`, new token `seen_from` + i attends tokens 0..i. `mask(start, stop)` gives the additive
    mask of new tokens start..stop, broadcast to [batch, kv_heads, group, stop - start, tokens].
    """

    key: Tensor
    value: Tensor
    seen_from: int = 0
    mask: Callable[[int, int], Tensor | None] | None = None
    causal: bool = False
    seqs: slice | None = None


class Sums(NamedTuple):
    """Of every query, over the blocks so far, in fp32: the largest logit, what the exponentials of
    the others add up to relative to it [batch, kv_heads, group, new, 1], and the values so weighted
    [..., value_dim]."""

    peak: Tensor
    mass: Tensor
    total: Tensor

    @classmethod
    def empty(cls, query: Tensor, value_dim: int) -> Sums:
        """Of no block; query [batch, kv_heads, group, new, head_dim]."""
        peak = query.new_full((*query.shape[:4], 1), float("-inf"), dtype=torch.float32)
        return cls(peak, torch.zeros_like(peak), peak.new_zeros((*query.shape[:4], value_dim)))

    def of(self, seqs: slice | None, new: slice) -> Sums:
        """Those of some sequences and new tokens, to be updated in place."""
        own = slice(None) if seqs is None else seqs
        return Sums(*(plane[own, :, :, new] for plane in self))

    def merge(self, peak: Tensor, mass: Tensor | float, total: Tensor) -> None:
        """Add a block whose sums are these; a peak of -inf is a block that is not attended."""
        new_peak = torch.maximum(self.peak, peak)
        # A query that may attend nothing yet has a peak of -inf; 0 keeps its exponents finite.
        reference = new_peak.masked_fill(new_peak == float("-inf"), 0.0)
        decay, share = (self.peak - reference).exp_(), (peak - reference).exp_()
        self.mass.mul_(decay).add_(share * mass)
        self.total.mul_(decay).addcmul_(total.float(), share)
        self.peak.copy_(new_peak)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attend one token: query [batch, kv_heads, group, head_dim] over [batch, kv_heads, tokens, :].

    mask is additive, broadcast to [batch, kv_heads, group, tokens]; sink_logits [kv_heads, group]
    take probability and give nothing. Returns [batch, kv_heads, group, value_dim].
    """
    if softcap is None and sink_logits is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale
        )
    whole = Block(
        key, value, mask=None if mask is None else lambda _start, _stop: mask[:, :, :, None]
    )
    output = block_attention(
        query[:, :, :, None], [whole], scale=scale, softcap=softcap, sink_logits=sink_logits
    )
    return output[:, :, :, 0]


def block_attention(
    query: Tensor,
    blocks: Iterable[Block],
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attend blocks one after another and merge them by log-sum-exp (online softmax), in fp32.

    query [batch, kv_heads, group, new, head_dim]; sink_logits [kv_heads, group]. A query that no
    block lets attend anything gets zeros. Returns [batch, kv_heads, group, new, value_dim] in the
    query's dtype. Beside the result, memory is one tile's logits, whatever the number of tokens.
    """
    sums: Sums | None = None
    for block in blocks:
        if sums is None:
            sums = Sums.empty(query, block.value.shape[-1])
        if block.key.shape[2] == 0 or block.seen_from >= query.shape[3]:
            continue
        own = query if block.seqs is None else query[block.seqs]
        if softcap is None and _is_flash(own, block):
            _attend_fused(own, block, sums, scale)
        else:
            _attend_tiles(own, block, sums, scale, softcap)
    assert sums is not None, "there is no block"
    mass = sums.mass
    if sink_logits is not None:
        reference = sums.peak.masked_fill(sums.peak == float("-inf"), 0.0)
        mass = mass + (sink_logits.float()[:, :, None, None] - reference).exp_()
    return (sums.total / mass.masked_fill(mass == 0, 1.0)).to(query.dtype)


# -- fused ----------------------------------------------------------------------------------------


def _is_flash(query: Tensor, block: Block) -> bool:
    """Whether the fused attention serves a block; a single query is faster without."""
    if block.mask is not None or query.shape[3] == 1:
        return False
    return has_flash(query.flatten(1, 2), block.key, block.value)


def _attend_fused(query: Tensor, block: Block, sums: Sums, scale: float) -> None:
    """Fold a block without a mask into the sums."""
    first, stop = block.seen_from, query.shape[3]
    seen_whole = min(stop, first + block.key.shape[2]) if block.causal else first
    for new, causal in ((slice(first, seen_whole), True), (slice(seen_whole, stop), False)):
        num_new = new.stop - new.start
        if num_new == 0:
            continue
        tokens = num_new if causal else block.key.shape[2]
        output, peak = flash_attention(
            query[:, :, :, new].flatten(1, 2),
            block.key[:, :, :tokens],
            block.value[:, :, :tokens],
            scale=scale,
            causal=causal,
        )
        heads = query.shape[1:3]
        own = sums.of(block.seqs, new)
        # A block's log-sum-exp is as good a peak as its largest logit: its mass is 1 then.
        own.merge(peak.unflatten(1, heads)[..., None], 1.0, output.unflatten(1, heads))


# -- tiles of logits ------------------------------------------------------------------------------


def _attend_tiles(
    query: Tensor, block: Block, sums: Sums, scale: float, softcap: float | None
) -> None:
    """Fold a block into the sums, `TILE_TOKENS` new tokens at a time."""
    new_tokens = query.shape[3]
    first_tile = block.seen_from // TILE_TOKENS * TILE_TOKENS
    for start in range(first_tile, new_tokens, TILE_TOKENS):
        tile = slice(start, min(start + TILE_TOKENS, new_tokens))
        logits = _logits(query[:, :, :, tile], block, tile, scale, softcap)
        peak = logits.amax(dim=-1, keepdim=True)
        weight = logits.sub_(peak.masked_fill(peak == float("-inf"), 0.0)).exp_()
        output = weight.to(block.value.dtype).flatten(2, 3) @ block.value
        mass = weight.sum(dim=-1, keepdim=True)
        own = sums.of(block.seqs, tile)
        own.merge(peak, mass, output.unflatten(2, query[:, :, :, tile].shape[2:4]))


def _logits(
    query: Tensor, block: Block, tile: slice, scale: float, softcap: float | None
) -> Tensor:
    """The masked logits [batch, kv_heads, group, tile, tokens] of one tile, in fp32."""
    # Scaled first: in fp16 a product of long vectors may overflow.
    scaled = (query.float() * scale).to(query.dtype).flatten(2, 3)
    logits: Tensor = (scaled @ block.key.transpose(-1, -2)).float().unflatten(2, query.shape[2:4])
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    if block.mask is not None:
        logits = _add(logits, block.mask(tile.start, tile.stop))
    if tile.start < block.seen_from or block.causal:
        logits.masked_fill_(_unseen(block, tile), float("-inf"))
    return logits


def _add(logits: Tensor, mask: Tensor | None) -> Tensor:
    return logits if mask is None else logits.add_(mask)


def _unseen(block: Block, tile: slice) -> Tensor:
    """Which tokens of a block the new tokens of a tile may not attend [tile, tokens]."""
    device = block.key.device
    new = torch.arange(tile.start, tile.stop, device=device)[:, None] - block.seen_from
    token = torch.arange(block.key.shape[2], device=device)
    return token > new if block.causal else (new < 0).expand(-1, len(token))
