"""What all layers and engines share: a step's parameters, its masks, how a view is attended.

Tokens are numbered per sequence, without padding; the manager knows their columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arkcache.kernels.torch_attention import Block, block_attention, decode_attention
from arkcache.pages.bookkeeping import Ids

Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Turns stored keys and values into those to attend (multi-head latent attention)."""


class Step(NamedTuple):
    """How a query is to be attended.

    query [batch, heads, new, head_dim]. index_query is what pages are rated by: the query itself,
    or its image in the latent space. bias(tokens) gives the user's additive mask
    [batch, kv_heads or 1, group or 1, new, tokens] for token numbers [batch, kv_heads or 1,
    tokens].
    """

    query: Tensor
    scale: float
    index_query: Tensor
    softcap: float | None = None
    sink_logits: Tensor | None = None
    expand: Expand | None = None
    bias: Callable[[Ids], Tensor] | None = None


def attend_view(step: Step, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attend one new token over a view of keys and values [batch, kv_heads, tokens, dim].

    mask is additive [batch, kv_heads or 1, group or 1, tokens]. Returns [batch, heads, 1, dim].
    """
    if step.expand is not None:
        key, value = step.expand(key, value)
    batch, num_heads, _, head_dim = step.query.shape
    num_kv_heads = key.shape[1]
    group = num_heads // num_kv_heads
    sink_logits = (
        None if step.sink_logits is None else step.sink_logits.reshape(num_kv_heads, group)
    )
    output = decode_attention(
        step.query.reshape(batch, num_kv_heads, group, head_dim),
        key,
        value,
        scale=step.scale,
        softcap=step.softcap,
        sink_logits=sink_logits,
        mask=mask if mask is None or mask.dtype == step.query.dtype else mask.to(step.query.dtype),
    )
    return output.reshape(batch, num_heads, 1, output.shape[-1])


def page_mass(
    step: Step, key: Tensor, value: Tensor, mask: Tensor | None, num_tokens: int, page_size: int
) -> Tensor:
    """Which share of a step's attention the pages in the first `num_tokens` of a view receive.

    key, value and mask as in `attend_view`. Returns [batch, kv_heads, pages], the mean over a KV
    head's query heads, in fp32.
    """
    batch, num_kv_heads = key.shape[:2]
    share = _shares(step, key, value, mask, num_tokens)
    share = share.unflatten(-1, (-1, page_size)).sum(dim=-1)
    # Expanded latents have a KV head for every query head, and share their pages.
    per_page: Tensor = share.reshape(batch, num_kv_heads, -1, share.shape[-1]).mean(dim=2)
    return per_page


def token_mass(
    step: Step, key: Tensor, value: Tensor, mask: Tensor | None, num_tokens: int
) -> Tensor:
    """`page_mass` token by token [batch, kv_heads, num_tokens]; not for latents."""
    return _shares(step, key, value, mask, num_tokens).mean(dim=2)


def _shares(step: Step, key: Tensor, value: Tensor, mask: Tensor | None, num_tokens: int) -> Tensor:
    """The share of a step's attention of the first tokens of a view, for each query head."""
    logits = view_logits(step, expanded(step, key, value)[0], mask)
    mass = with_sink_logits(step, logits.logsumexp(dim=-1, keepdim=True))
    share: Tensor = (logits[..., :num_tokens] - mass).exp_().nan_to_num_()
    return share


def view_logits(step: Step, key: Tensor, mask: Tensor | None) -> Tensor:
    """The masked logits of a step's token over expanded keys [batch, kv_heads, tokens, dim].

    mask as in `attend_view`. Returns [batch, kv_heads, group, tokens] in fp32.
    """
    query = step.query.float().unflatten(1, (key.shape[1], -1))[:, :, :, 0] * step.scale
    logits: Tensor = query @ key.float().transpose(-1, -2)
    if step.softcap is not None:
        logits = logits.div_(step.softcap).tanh_().mul_(step.softcap)
    return logits if mask is None else logits + mask


def with_sink_logits(step: Step, mass: Tensor) -> Tensor:
    """The log mass of tokens [batch, kv_heads, group, 1] with what the sink logits add to it."""
    if step.sink_logits is None:
        return mass
    return torch.logaddexp(mass, step.sink_logits.float().view(1, *mass.shape[1:3], 1))


def attend_parts(
    step: Step, parts: Iterator[tuple[Tensor, Tensor]], num_kv_heads: int, mask: Tensor | None
) -> Tensor:
    """`attend_view` over a view that comes in parts, merged by log-sum-exp."""

    def blocks() -> Iterator[Block]:
        start = 0
        for key, value in parts:
            stop = start + key.shape[2]
            own = None if mask is None else mask[:, :, :, None, start:stop]
            key, value = expanded(step, key, value)
            yield Block(key, value, mask=None if own is None else partial(_whole, own))
            start = stop

    return _attend_all(step, blocks(), num_kv_heads)


def attend_blocks(
    step: Step,
    blocks: Iterator[tuple[Tensor, Tensor, Ids]],
    num_kv_heads: int,
    last_visible: Ids,
) -> Tensor:
    """Attend new tokens over a layer's blocks (key, value, token numbers), causally.

    last_visible [batch, new]: the number of the last token that each new token attends. Returns
    [batch, heads, new, value_dim].
    """
    return _attend_all(step, causal_blocks(blocks, step, last_visible), num_kv_heads)


def _attend_all(step: Step, blocks: Iterator[Block], num_kv_heads: int) -> Tensor:
    if step.expand is not None:  # every query head has expanded keys of its own
        num_kv_heads = step.query.shape[1]
    output = block_attention(
        step.query.unflatten(1, (num_kv_heads, -1)),
        blocks,
        scale=step.scale,
        softcap=step.softcap,
        sink_logits=None
        if step.sink_logits is None
        else step.sink_logits.reshape(num_kv_heads, -1),
    )
    return output.flatten(1, 2)


def _whole(mask: Tensor, _start: int, _stop: int) -> Tensor:
    """The mask of a single new token."""
    return mask


def additive(attended: NDArray[np.bool_], device: torch.device) -> Tensor:
    """Turn True (attended) and False into 0 and -inf: [batch, kv_heads or 1, 1, tokens]."""
    bias = np.where(attended, np.float32(0), np.float32(-np.inf))
    return torch.from_numpy(bias).to(device)[:, :, None]


def causal_blocks(
    blocks: Iterator[tuple[Tensor, Tensor, Ids]], step: Step, last_visible: Ids
) -> Iterator[Block]:
    """A layer's blocks (key, value, token numbers) with who attends what of them.

    last_visible [batch, new]: the number of the last token that each new token attends.
    """
    lines = [] if step.bias is not None else causal_lines(last_visible)
    if not lines:
        yield from _masked_blocks(blocks, step, last_visible)
        return
    for key, value, numbers in blocks:
        key, value = expanded(step, key, value)
        if numbers.shape[1] == 0:
            yield Block(key, value, last_visible.shape[1])
            continue
        for line in lines:
            yield from line.blocks(key, value, numbers[line.seqs])


class CausalLine(NamedTuple):
    """Sequences whose new tokens attend one token more each: no mask is needed.

    All new tokens attend the tokens up to `oldest`; from new token `first` on, each attends the
    next one too.
    """

    seqs: slice
    oldest: int
    first: int

    def blocks(self, key: Tensor, value: Tensor, numbers: Ids) -> Iterator[Block]:
        """Of a layer's block, what all new tokens attend and what they attend one by one."""
        start = int(numbers[0, 0])
        held = int(np.count_nonzero(numbers[0] >= 0))
        past = min(held, max(0, self.oldest + 1 - start))
        for first, stop in ((0, past), (past, held)):
            if first == stop:
                continue
            causal = first == past
            yield Block(
                key[self.seqs, :, first:stop],
                value[self.seqs, :, first:stop],
                seen_from=self.first + start + first - self.oldest - 1 if causal else 0,
                causal=causal,
                seqs=self.seqs,
            )


def causal_lines(last_visible: Ids) -> list[CausalLine]:
    """One line for all sequences or one for each; none where a mask is needed or cheaper.

    It is needed where padding is between the new tokens (not where it is before them), and cheaper
    for one new token. last_visible: see `causal_blocks`.
    """
    batch, new_tokens = last_visible.shape
    alike = bool((last_visible == last_visible[0]).all())
    if new_tokens == 1 and not alike:
        return []
    lines = []
    for sequence in range(1 if alike else batch):
        visible = last_visible[sequence]
        first = int(np.count_nonzero(visible == visible[0]))
        more = np.maximum(np.arange(new_tokens) - first + 1, 0)
        if not np.array_equal(visible, visible[0] + more):
            return []
        seqs = slice(0, batch) if alike else slice(sequence, sequence + 1)
        lines.append(CausalLine(seqs, int(visible[0]), first))
    return lines


def _masked_blocks(
    blocks: Iterator[tuple[Tensor, Tensor, Ids]], step: Step, last_visible: Ids
) -> Iterator[Block]:
    """Blocks of all sequences whose masks say who attends what."""
    visible = torch.from_numpy(last_visible).to(step.query.device)
    new_tokens = last_visible.shape[1]
    for key, value, numbers in blocks:
        key, value = expanded(step, key, value)
        if numbers.shape[1] == 0:
            yield Block(key, value, new_tokens)
            continue
        held = numbers >= 0
        first = int(numbers[held].min()) if held.any() else 0
        seen = (last_visible >= first).any(axis=0)
        seen_from = int(np.argmax(seen)) if seen.any() else new_tokens
        yield Block(key, value, seen_from, _causal_mask(step, numbers, visible))


def expanded(step: Step, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """A block's keys and values as they are attended."""
    if step.expand is None:
        return key, value
    if key.shape[2]:
        return step.expand(key, value)
    # Of one token, as modules may not expand none.
    ones = (plane.new_zeros(*plane.shape[:2], 1, plane.shape[3]) for plane in (key, value))
    key, value = (plane[:, :, :0] for plane in step.expand(*ones))
    return key, value


def _causal_mask(step: Step, numbers: Ids, visible: Tensor) -> Callable[[int, int], Tensor | None]:
    tokens = torch.from_numpy(numbers).to(visible.device)
    bias = None if step.bias is None else step.bias(np.maximum(numbers, 0)[:, None])

    def mask(start: int, stop: int) -> Tensor:
        hidden = (tokens[:, None] > visible[:, start:stop, None]) | (tokens[:, None] < 0)
        block = torch.zeros(hidden.shape, device=visible.device).masked_fill_(hidden, float("-inf"))
        if bias is None:
            return block[:, None, None]
        return block[:, None, None] + bias[..., start:stop, :]

    return mask
