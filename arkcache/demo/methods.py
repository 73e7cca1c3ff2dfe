"""The caches of the demonstration: how each is made from the text that was read, and what it costs.

The text is read once, into full layers; every method starts from those very keys and values.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from arkcache.config import CacheConfig
from arkcache.demo.baselines import (
    EvictingLayer,
    FullLayer,
    HeavyHitterLayer,
    SinkWindowLayer,
    held,
    observing,
)
from arkcache.errors import UnsupportedModelError
from arkcache.huggingface import ArkCache, detach
from arkcache.memory import CacheShape

Open = Callable[[PreTrainedModel, DynamicCache], DynamicCache]


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        key: its name in JSON.
        title: its name in the table.
        open: makes its cache from the model and the full cache of the text.
        observes: whether its layers need to see the attention that their tokens receive.
    """

    key: str
    title: str
    open: Open
    observes: bool = False

    @contextmanager
    def cache(self, model: PreTrainedModel, full: DynamicCache) -> Iterator[DynamicCache]:
        """A cache that holds the text; the model is as it was afterwards.

        Raises `UnsupportedModelError` where the method does not fit the model.
        """
        cache = None
        try:
            cache = self.open(model, full)
            with observing(model) if self.observes else nullcontext():
                yield cache
        finally:
            if cache is not None:
                cache.reset()
            detach(model)


@dataclass(frozen=True)
class Usage:
    """What a cache holds and did: tokens attended per layer by the latest step, bytes, pages."""

    attended_tokens: float
    device_bytes: int
    host_bytes: int = 0
    pages_recalled: int = 0
    hit_rate: float = 1.0


def methods(config: CacheConfig) -> list[Method]:
    """The five methods, at the budget of `config`; `config.index` is set by each."""
    budget = config.budget_tokens
    assert isinstance(budget, int)
    num_sinks = config.num_sink_pages * config.page_size
    return [
        Method("full", "full cache", open_full),
        Method(
            "arkcache-tokens",
            "ArkCache, token index",
            partial(open_arkcache, config=config, index="tokens"),
        ),
        Method(
            "arkcache-boxes",
            "ArkCache, boxes",
            partial(open_arkcache, config=config, index="cuboid-mean"),
        ),
        Method(
            "sinks-and-window",
            "sinks + recent window",
            partial(_open_evicting, layer=partial(_sink_window, budget, num_sinks)),
        ),
        Method(
            "heavy-hitters",
            "heavy hitters (H2O)",
            partial(_open_evicting, layer=partial(_heavy_hitters, budget)),
            observes=True,
        ),
    ]


def reading_cache(model: PreTrainedModel) -> DynamicCache:
    """A full cache to read a text with. Raises `UnsupportedModelError` where all layers slide."""
    cache = DynamicCache(config=model.config)
    cache.layers = [FullLayer() if _is_full(layer) else layer for layer in cache.layers]
    if not any(isinstance(layer, FullLayer) for layer in cache.layers):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layer that attends its whole past: give another model"
        )
    return cache


def shape_of(full: DynamicCache) -> CacheShape:
    """Sizes of the layers that attend their whole past, of a text that was read.

    Raises `UnsupportedModelError` where they differ.
    """
    layers = [held(layer) for layer in full.layers if isinstance(layer, FullLayer)]
    shapes = {
        CacheShape(len(layers), key.shape[1], key.shape[3], value.shape[3], key.dtype)
        for key, value in layers
    }
    if len(shapes) > 1:
        raise UnsupportedModelError(
            "the layers of this model store keys and values of several sizes, which share no one "
            "device tier: give another model"
        )
    return shapes.pop()


def device_of(full: DynamicCache) -> str:
    """ "cpu" or "cuda": where the keys and values of a text are."""
    read = next(layer for layer in full.layers if isinstance(layer, FullLayer))
    return "cpu" if held(read)[0].device.type == "cpu" else "cuda"


def usage(cache: DynamicCache) -> Usage:
    """What a cache of any of the methods holds now."""
    if isinstance(cache, ArkCache):
        stats = cache.stats()
        num_paged = sum(manager.num_layers for manager in cache.managers)
        return Usage(
            stats.attended_tokens / num_paged,
            stats.device_bytes + stats.digest_bytes,
            stats.host_bytes,
            stats.pages_recalled,
            stats.hit_rate,
        )
    layers = [
        layer
        for layer in cache.layers
        if isinstance(layer, DynamicLayer) and (_is_full(layer) or isinstance(layer, EvictingLayer))
    ]
    kept = [held(layer)[0].shape[2] for layer in layers]
    num_bytes = sum(part.nbytes for layer in layers for part in held(layer))
    states = [layer.state_bytes for layer in layers if isinstance(layer, EvictingLayer)]
    return Usage(sum(kept) / len(kept), num_bytes + sum(states))


def _is_full(layer: object) -> bool:
    return type(layer) is DynamicLayer


def open_full(model: PreTrainedModel, full: DynamicCache) -> DynamicCache:
    """A full cache of the text."""
    return _filled(DynamicCache(config=model.config), full)


def open_arkcache(
    model: PreTrainedModel, full: DynamicCache, config: CacheConfig, index: str
) -> DynamicCache:
    """An `ArkCache` of the text. Raises `UnsupportedModelError` where the model is not paged."""
    cache = _arkcache(model, replace(config, index=index))
    _filled(cache, full)
    cache.end_prompt()  # every token from here on is a decode step
    return cache


def read_arkcache(
    model: PreTrainedModel, ids: Sequence[int], config: CacheConfig, chunk_tokens: int
) -> ArkCache:
    """An `ArkCache` that has read a text itself, in chunks of so many tokens.

    Raises `UnsupportedModelError` where the model is not paged.
    """
    cache = _arkcache(model, config)
    for chunk in torch.tensor([list(ids)], device=model.device).split(chunk_tokens, dim=1):
        model(chunk, past_key_values=cache, logits_to_keep=1)
    cache.end_prompt()
    return cache


def _arkcache(model: PreTrainedModel, config: CacheConfig) -> ArkCache:
    with warnings.catch_warnings(record=True):  # compat mode skips the row, which says why
        cache = ArkCache(model, config)
    if cache.reason is not None:
        raise UnsupportedModelError(cache.reason)
    return cache


def _filled(cache: DynamicCache, full: DynamicCache) -> DynamicCache:
    """Hands an empty cache what was read."""
    for index, read in enumerate(full.layers):
        if isinstance(read, FullLayer):
            cache.update(*held(read), index)
        else:
            cache.layers[index] = copy.deepcopy(read)
    return cache


def _open_evicting(
    model: PreTrainedModel, full: DynamicCache, layer: Callable[[FullLayer], DynamicLayer]
) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [
        layer(read) if isinstance(read, FullLayer) else copy.deepcopy(read) for read in full.layers
    ]
    return cache


def _sink_window(budget: int, num_sinks: int, read: FullLayer) -> DynamicLayer:
    return SinkWindowLayer(read, budget, num_sinks)


def _heavy_hitters(budget: int, read: FullLayer) -> DynamicLayer:
    if read.received is None:
        raise UnsupportedModelError("the attention of this model cannot be observed")
    return HeavyHitterLayer(read, budget)
