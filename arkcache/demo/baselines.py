"""What ArkCache is compared with: two ways to evict for good, at the same budget.

`SinkWindowLayer` keeps the first tokens and the most recent ones (StreamingLLM, Xiao et al. 2024);
the keys keep the positions that they were rotated to when they were read.

`HeavyHitterLayer` keeps the most recent tokens and, per KV head, those that have received the most
attention so far (H2O, Zhang et al. 2023, algorithm 1): half of the budget each. Attention received
is the sum of softmax probabilities over all queries of the text, the query heads of a KV head
added up, and goes on being added to with every new token. The text itself is read with full
attention, and is cut to the budget afterwards, as in the authors' code.

Both hold the kept keys and values and nothing else: what they evict no later step can attend. A
step appends its token, evicts one where the budget is exceeded, and attends the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "arkcache-demo"
_TAG = "_arkcache_demo_layer"
NUM_QUERIES_KEPT = 400
"""What Scissorhands looks back at."""
_BLOCK_ELEMENTS = 2**23
"""Probabilities held at a time while attention is added up (32 MiB)."""


class FullLayer(DynamicLayer):
    """Keeps everything, and adds up the attention that every token receives.

    Attributes:
        received: [num_kv_heads, tokens], fp32; None until `observing` has seen a query.
        queries: the newest `NUM_QUERIES_KEPT` [1, heads, queries, head_dim]; None likewise.
        scale: of their logits.
    """

    _layer_type = None

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.received: Tensor | None = None
        self.queries: Tensor | None = None
        self.scale = 1.0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens [1, kv_heads, new, dim]; all keys and values."""
        key, value = super().update(key_states, value_states)
        return watched(self, key), value

    def see(self, query: Tensor, key: Tensor, scale: float) -> None:
        """Note that queries [1, heads, new, head_dim] attend all keys."""
        self.observe(attention_received(query, key, scale))
        earlier = query[:, :, :0] if self.queries is None else self.queries
        self.queries = torch.cat((earlier, query), dim=2)[:, :, -NUM_QUERIES_KEPT:]
        self.scale = scale

    def observe(self, received: Tensor) -> None:
        """Add attention received [num_kv_heads, tokens]."""
        if self.received is not None:
            received[:, : self.received.shape[1]] += self.received
        self.received = received


class EvictingLayer(DynamicLayer):
    """Keeps at most `budget` tokens of each KV head, and knows how many it has seen."""

    _layer_type = None

    def __init__(self, full: FullLayer, budget: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.budget = budget
        self.seen = full.get_seq_length()
        self.lazy_initialization(*held(full))

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones included: positions go on from there."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what the next query attends: what is kept then."""
        return min(self.num_kept + query_length, self.budget), 0

    def see(self, query: Tensor, key: Tensor, scale: float) -> None:
        """Told what a query [1, heads, 1, head_dim] attends, by which some decide what to keep."""

    @property
    def state_bytes(self) -> int:
        """Bytes of what it decides by, beside keys and values."""
        return 0

    @property
    def num_kept(self) -> int:
        """Tokens held per KV head."""
        return int(held(self)[0].shape[2])


class SinkWindowLayer(EvictingLayer):
    """The first `num_sinks` tokens and the most recent ones, `budget` in all."""

    def __init__(self, full: FullLayer, budget: int, num_sinks: int) -> None:
        super().__init__(full, budget)
        self.num_sinks = num_sinks
        self.keys, self.values = map(self._kept, held(full))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one token [1, kv_heads, 1, dim], evict the oldest but the sinks; what is kept."""
        self.seen += key_states.shape[2]
        self.keys, self.values = map(self._kept, appended(self, key_states, value_states))
        return self.keys, self.values

    def _kept(self, states: Tensor) -> Tensor:
        if states.shape[2] <= self.budget:
            return states
        recent = states.shape[2] - (self.budget - self.num_sinks)
        return torch.cat((states[:, :, : self.num_sinks], states[:, :, recent:]), dim=2)


class HeavyHitterLayer(EvictingLayer):
    """The `budget // 2` most recent tokens, and of the others those that were attended the most.

    Attributes:
        received: [num_kv_heads, kept tokens], fp32, the attention that they have received.
    """

    def __init__(self, full: FullLayer, budget: int) -> None:
        super().__init__(full, budget)
        assert full.received is not None
        self.num_recent = budget // 2
        self.received = full.received
        self.keys, self.values = self._kept(*held(full))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one token [1, kv_heads, 1, dim], evict the least attended; what is kept."""
        self.seen += key_states.shape[2]
        self.received = torch.nn.functional.pad(self.received, (0, key_states.shape[2]))
        self.keys, self.values = self._kept(*appended(self, key_states, value_states))
        return watched(self, self.keys), self.values

    @property
    def state_bytes(self) -> int:
        """Of the attention received."""
        return self.received.nbytes

    def see(self, query: Tensor, key: Tensor, scale: float) -> None:
        """Note that a query [1, heads, 1, head_dim] attends the kept keys."""
        self.observe(attention_received(query, key, scale))

    def observe(self, received: Tensor) -> None:
        """Add attention received [num_kv_heads, kept tokens]."""
        self.received = self.received + received

    def _kept(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        num_tokens = key.shape[2]
        excess = num_tokens - self.budget
        if excess <= 0:
            return key, value
        num_older = num_tokens - self.num_recent
        heavy = self.received[:, :num_older].topk(num_older - excess).indices.sort().values
        recent = torch.arange(num_older, num_tokens, device=heavy.device)
        kept = torch.cat((heavy, recent.expand(len(heavy), -1)), dim=1)
        self.received = self.received.gather(1, kept)
        return take(key, kept), take(value, kept)


See = Callable[[Any, Tensor, Tensor, float], None]
"""Told by a layer which query [1, heads, new, dim] is about to attend which of its keys, and the
scale of the logits."""


def held(layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    """The keys and values of a layer that has been written to [1, kv_heads, tokens, dim]."""
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


def appended(layer: DynamicLayer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer holds, followed by new keys and values; the layer stays as it is."""
    old_key, old_value = held(layer)
    return torch.cat((old_key, key), dim=2), torch.cat((old_value, value), dim=2)


def watched(layer: DynamicLayer, key: Tensor) -> Tensor:
    """Keys that a layer returns, so that `observing` shows it what attends them."""
    setattr(key, _TAG, layer)
    return key


def take(states: Tensor, kept: Tensor) -> Tensor:
    """Tokens `kept` [kv_heads, tokens] of states [1, kv_heads, tokens, dim]."""
    return states.gather(2, kept[None, :, :, None].expand(-1, -1, -1, states.shape[3]))


def attention_received(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Softmax probabilities [kv_heads, tokens] in fp32, summed over queries and a group's heads.

    query [1, heads, new, head_dim] of the newest tokens, key [1, kv_heads, tokens, head_dim];
    causal, and blockwise, so that the memory stays bounded.
    """
    num_tokens, new_tokens = key.shape[2], query.shape[2]
    query = query[0].unflatten(0, (key.shape[1], -1)).float() * scale
    past = key[0].transpose(1, 2)[:, None].float()
    total = torch.zeros(key.shape[1], num_tokens, device=key.device)
    rows = max(1, _BLOCK_ELEMENTS // (query.shape[0] * query.shape[1] * num_tokens))
    for start in range(0, new_tokens, rows):
        stop = min(start + rows, new_tokens)
        seen = num_tokens - new_tokens + stop
        logits = query[:, :, start:stop] @ past[..., :seen]
        future = torch.ones(stop - start, seen, dtype=torch.bool, device=key.device)
        logits.masked_fill_(future.triu_(seen - (stop - start) + 1), float("-inf"))
        total[:, :seen] += logits.softmax(-1).sum((1, 2))
    return total


def observing(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Lets layers of this module add up the attention that tokens receive: see `showing`."""
    return showing(
        model,
        lambda layer, query, key, scale: layer.see(query, key, scale),
    )


@contextmanager
def showing(model: PreTrainedModel, see: See) -> Iterator[None]:
    """Lets `see` look at what the layers of this module attend.

    The model attends as it always does; afterwards its attention implementation is what it was.
    Where that is not "sdpa" nothing is seen.
    """
    base = model.config._attn_implementation
    if base != "sdpa":
        yield
        return
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = getattr(key, _TAG, None)
        if layer is not None:
            see(layer, query, key, kwargs.get("scaling") or query.shape[3] ** -0.5)
        return attend(module, query, key, *args, **kwargs)

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(base)
