"""What full attention attends: recorded while the full cache decodes, and computed in fp32.

`replay.py` puts the same queries, keys and values to the cache of a method.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from arkcache.demo.baselines import FullLayer, held, showing
from arkcache.errors import UnsupportedModelError
from arkcache.evaluation.decoding import Decoder

LOOK_EVERY = 4
"""One step in so many is looked at: neighbours attend much the same."""


@dataclass(frozen=True)
class Truth:
    """What a query attends with nothing left out.

    Attributes:
        logits: of every token [num_kv_heads, group, tokens], fp32.
        log_mass: what their exponentials add up to [num_kv_heads, group, 1], its logarithm.
        output: [num_kv_heads, group, value_dim], fp32.
    """

    logits: Tensor
    log_mass: Tensor
    output: Tensor

    def pages(self, tokens: Tensor) -> Tensor:
        """The log-probabilities by page [num_kv_heads, group, pages, page_size].

        tokens: those of the pages of each KV head [num_kv_heads, pages, page_size].
        """
        every = tokens.flatten(1)[:, None].expand(-1, self.logits.shape[1], -1)
        shares = self.logits.gather(2, every) - self.log_mass
        by_page: Tensor = shares.unflatten(2, tokens.shape[1:])
        return by_page


@dataclass(frozen=True)
class LayerSteps:
    """What a layer attended with while the full cache decoded.

    Attributes:
        query: of the steps [heads, steps, head_dim].
        key, value: of the text and the steps [num_kv_heads, tokens, dim].
        scale: of the logits.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float

    @property
    def num_steps(self) -> int:
        """Steps that were decoded."""
        return self.query.shape[1]

    def at(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of a step [1, heads or num_kv_heads, 1, dim]."""
        token = self.key.shape[1] - self.num_steps + step
        own = (self.query[:, step], self.key[:, token], self.value[:, token])
        query, key, value = (states[None, :, None] for states in own)
        return query, key, value

    @cached_property
    def truth(self) -> dict[int, Truth]:
        """Of the steps that are looked at, by number."""
        return {step: self._truth(step) for step in range(0, self.num_steps, LOOK_EVERY)}

    def _truth(self, step: int) -> Truth:
        seen = self.key.shape[1] - self.num_steps + step + 1
        query = self.query[:, step].unflatten(0, (self.key.shape[0], -1)).float() * self.scale
        logits = query @ self.key[:, :seen].float().transpose(1, 2)
        log_mass = logits.logsumexp(dim=-1, keepdim=True)
        output = (logits - log_mass).exp() @ self.value[:, :seen].float()
        return Truth(logits, log_mass, output)


Recorded = dict[int, LayerSteps]
"""What was recorded of the layers that attend their whole past, by number."""


def record(model: PreTrainedModel, text: DynamicCache, ids: list[int]) -> Recorded:
    """Decode tokens behind a text that full layers hold, and keep what they attend with.

    The text stays as it is. Raises `UnsupportedModelError` where attention cannot be seen.
    """
    cache = copy.copy(text)
    cache.layers = [copy.copy(layer) for layer in text.layers]  # replaced, never written to
    full = {id(layer): n for n, layer in enumerate(cache.layers) if isinstance(layer, FullLayer)}
    queries: dict[int, list[Tensor]] = {number: [] for number in full.values()}
    scales: dict[int, float] = {}

    def see(layer: CacheLayerMixin, query: Tensor, _key: Tensor, scale: float) -> None:
        number = full[id(layer)]
        queries[number].append(query[0, :, 0])
        scales[number] = scale

    with showing(model, see):
        Decoder(model, cache).feed(ids)
    if any(len(own) != len(ids) for own in queries.values()):
        raise UnsupportedModelError("the attention of this model cannot be observed")
    recorded = {}
    for number, own in queries.items():
        layer = cache.layers[number]
        assert isinstance(layer, FullLayer)
        key, value = (states[0] for states in held(layer))
        recorded[number] = LayerSteps(torch.stack(own, dim=1), key, value, scales[number])
    return recorded
