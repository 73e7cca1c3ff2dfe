"""The queries of a prompt's end, and what its tokens received from them.

Several new tokens attend everything before them and are forgotten; where a retention asks for it,
their queries are kept until the prompt has ended and all keys are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arkcache.engines.engine import Blocks
from arkcache.engines.step import Step
from arkcache.pages.bookkeeping import Ids

QUERIES_AT_ONCE = 64
"""Queries that are scored at a time against a block: bounds the temporaries."""


class Received(NamedTuple):
    """What the tokens of a block received: share [batch, kv_heads, queries, tokens], the mean over
    a KV head's query heads, of queries `first` on; numbers of the tokens [batch, tokens]."""

    first: int
    share: NDArray[np.float32]
    numbers: Ids


@dataclass
class PromptQueries:
    """The latest queries of a prompt.

    Attributes:
        step: how they attend, `query` [batch, heads, queries, head_dim]; no mask of the user's.
        visible: the number of the last token that each attends [batch, queries]; -1 for padding.
    """

    step: Step
    visible: Ids

    @classmethod
    def of(cls, step: Step, visible: Ids, most: int | None) -> PromptQueries:
        """The last queries of a step, `most` at most, in memory of their own."""
        first = 0 if most is None else max(0, step.query.shape[2] - most)
        query = step.query[:, :, first:].clone()
        return cls(step._replace(query=query, index_query=query, bias=None), visible[:, first:])

    def then(self, later: PromptQueries, most: int) -> PromptQueries:
        """These, followed by later ones: the last `most`."""
        query = torch.cat((self.step.query, later.step.query), dim=2)[:, :, -most:]
        step = later.step._replace(query=query, index_query=query)
        return PromptQueries(step, np.concatenate((self.visible, later.visible), axis=1)[:, -most:])

    def cropped(self, lengths: Ids) -> PromptQueries | None:
        """Those of tokens that are left when sequences are shortened to `lengths`."""
        left = int(np.count_nonzero((self.visible < lengths[:, None]).all(axis=0)))
        if left == 0:
            return None
        query = self.step.query[:, :, :left]
        return PromptQueries(
            self.step._replace(query=query, index_query=query), self.visible[:, :left]
        )

    def keep_sequences(self, index: Ids) -> None:
        """Make sequence i what sequence `index[i]` was."""
        query = self.step.query[torch.from_numpy(index).to(self.step.query.device)]
        self.step = self.step._replace(query=query, index_query=query)
        self.visible = self.visible[index]


def received(
    asked: PromptQueries, blocks: Callable[[], Blocks], hide: Callable[[Step], Step]
) -> Iterator[Received]:
    """What the tokens of a layer received from a prompt's queries, block by block.

    The blocks are read twice: for what the probabilities of a query add up to, and for them.
    hide: gives a step the mask of what was given up.
    """
    parts = [
        (first, _part(asked, first, hide))
        for first in range(0, asked.visible.shape[1], QUERIES_AT_ONCE)
    ]
    totals: list[Tensor | None] = [None] * len(parts)
    for key, _, numbers in blocks():
        for number, (_, part) in enumerate(parts):
            if not _sees(part, numbers):
                continue
            own, before = (
                _logits(part, key, numbers).logsumexp(dim=-1, keepdim=True),
                totals[number],
            )
            totals[number] = own if before is None else torch.logaddexp(before, own)
    for key, _, numbers in blocks():
        for (first, part), total in zip(parts, totals, strict=True):
            if total is not None and _sees(part, numbers):
                total = _with_sinks(part.step, total)
                share = (_logits(part, key, numbers) - total).exp_().nan_to_num_().mean(dim=2)
                yield Received(first, share.cpu().numpy(), numbers)


def _part(asked: PromptQueries, first: int, hide: Callable[[Step], Step]) -> PromptQueries:
    own = slice(first, first + QUERIES_AT_ONCE)
    step = asked.step._replace(query=asked.step.query[:, :, own])
    return PromptQueries(hide(step), asked.visible[:, own])


def _sees(part: PromptQueries, numbers: Ids) -> bool:
    """Whether any of the queries attends any of the tokens."""
    held = numbers[numbers >= 0]
    return bool(len(held)) and int(held.min()) <= int(part.visible.max())


def _with_sinks(step: Step, total: Tensor) -> Tensor:
    """Log mass [batch, kv_heads, group, queries, 1] with what the sink logits add to it."""
    if step.sink_logits is None:
        return total
    return torch.logaddexp(total, step.sink_logits.float().view(1, *total.shape[1:3], 1, 1))


def _logits(part: PromptQueries, key: Tensor, numbers: Ids) -> Tensor:
    """The masked logits [batch, kv_heads, group, queries, tokens] over a block, in fp32."""
    step, tokens = part.step, torch.from_numpy(numbers).to(key.device)
    query = step.query.float().unflatten(1, (key.shape[1], -1)) * step.scale
    logits: Tensor = query @ key.float().transpose(-1, -2)[:, :, None]
    if step.softcap is not None:
        logits = logits.div_(step.softcap).tanh_().mul_(step.softcap)
    visible = torch.from_numpy(part.visible).to(key.device)
    hidden = (tokens[:, None] > visible[:, :, None]) | (tokens[:, None] < 0)
    logits = logits.masked_fill_(hidden[:, None, None], float("-inf"))
    return logits if step.bias is None else logits + step.bias(np.maximum(numbers, 0)[:, None])
