"""Scissorhands: what was attended less than the mean in recent steps goes for good.

Liu et al. 2023, "Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV
Cache Compression at Test Time", algorithm 2. Of each of the last `HISTORY` steps it is known which
tokens received less than 1/t of its attention, t being the tokens that there had been; a token's
counter is in how many of them it did. When more than the budget are held, half of the budget goes:
those with the largest counters, but none of the newest `NUM_RECENT`. So between half of the budget
and all of it is attended. The query heads of a KV head count as one, by the mean of their
probabilities. Of equal counters the older token goes, which the paper leaves open. The text itself
is read with full attention and cut afterwards, as for H2O.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arkcache.demo.baselines import (
    NUM_QUERIES_KEPT,
    EvictingLayer,
    FullLayer,
    appended,
    held,
    take,
    watched,
)

HISTORY = NUM_QUERIES_KEPT
NUM_RECENT = 10


class ScissorhandsLayer(EvictingLayer):
    """What Scissorhands keeps of a text and of the tokens after it.

    Args:
        full: the layer that the text was read into, whose queries were observed.
        budget: tokens that are held at most.
        history: steps that counters are of.
        num_recent: of the newest tokens that are always kept.

    Attributes:
        little: bool [num_kv_heads, steps, kept tokens]: which tokens received less than the mean in
            each of the latest steps.
    """

    def __init__(
        self, full: FullLayer, budget: int, history: int = HISTORY, num_recent: int = NUM_RECENT
    ) -> None:
        super().__init__(full, budget)
        assert full.queries is not None
        self.history, self.num_recent = history, num_recent
        key, value = held(full)
        queries = full.queries[:, :, -history:]
        self.little = attended_little(queries, key, full.scale, self.seen)
        self.keys, self.values = self._kept(key, value)

    @property
    def state_bytes(self) -> int:
        """Of the history, in bits, which is what it would take."""
        return -(-self.little.numel() // 8)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what the next query attends: what is kept then."""
        num_tokens = self.num_kept + query_length
        return num_tokens if num_tokens <= self.budget else self._least, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one token [1, kv_heads, 1, dim], evict where they are too many; what is kept."""
        self.seen += key_states.shape[2]
        self.little = torch.nn.functional.pad(self.little, (0, key_states.shape[2]))
        self.keys, self.values = self._kept(*appended(self, key_states, value_states))
        return watched(self, self.keys), self.values

    def see(self, query: Tensor, key: Tensor, scale: float) -> None:
        """Note what a query [1, heads, 1, dim] attends of the keys [1, kv_heads, kept, dim]."""
        more = attended_little(query, key, scale, self.seen)
        self.little = torch.cat((self.little, more), dim=1)[:, -self.history :]

    @property
    def _least(self) -> int:
        return self.budget - self.budget // 2

    def _kept(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        num_tokens = key.shape[2]
        if num_tokens <= self.budget:
            return key, value
        counters = self.little.sum(dim=1)
        counters[:, -self.num_recent :] = 0
        newest_first = counters.flip(1).argsort(dim=1, stable=True)[:, : self._least]
        kept = (num_tokens - 1 - newest_first).sort(dim=1).values
        steps = self.little.shape[1]
        self.little = self.little.gather(2, kept[:, None].expand(-1, steps, -1))
        return take(key, kept), take(value, kept)


def attended_little(query: Tensor, key: Tensor, scale: float, num_seen: int) -> Tensor:
    """Which tokens receive less than 1/t of a query's attention, bool [kv_heads, new, tokens].

    query [1, heads, new, head_dim] of the newest tokens, key [1, kv_heads, tokens, head_dim];
    causal. t: tokens up to the query, `num_seen` for the last one. The mean over a group's heads.
    """
    num_tokens, new_tokens = key.shape[2], query.shape[2]
    later = torch.ones(new_tokens, num_tokens, dtype=torch.bool, device=key.device)
    later.triu_(num_tokens - new_tokens + 1)
    until = torch.arange(num_seen - new_tokens, num_seen, device=key.device) + 1
    groups = query[0].unflatten(0, (key.shape[1], -1)).float() * scale
    rows = []
    for group, keys in zip(groups, key[0].float(), strict=True):  # one at a time: they are large
        logits = (group @ keys.T).masked_fill_(later, float("-inf"))
        probabilities = logits.softmax(dim=-1).mean(dim=0)
        rows.append((probabilities < 1 / until[:, None]) & ~later)
    return torch.stack(rows)
