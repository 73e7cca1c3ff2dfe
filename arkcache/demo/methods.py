"""The caches of the demonstration: how each is made from the text that was read, and what it costs.

The text is read once, into full layers; every method starts from those very keys and values.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from arkcache.config import CacheConfig
from arkcache.demo.baselines import FullLayer, HeavyHitterLayer, SinkWindowLayer, observing
from arkcache.errors import UnsupportedModelError
from arkcache.huggingface import ArkCache, detach

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
        try:
            cache = self.open(model, full)
            with observing(model) if self.observes else nullcontext():
                yield cache
        finally:
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
        Method("full", "full cache", _open_full),
        Method(
            "arkcache-boxes",
            "ArkCache, boxes",
            partial(_open_arkcache, config=config, index="cuboid-mean"),
        ),
        Method(
            "arkcache-tokens",
            "ArkCache, token index",
            partial(_open_arkcache, config=config, index="tokens"),
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
    """A full cache to read a text with. Raises `UnsupportedModelError` where nothing could evict."""
    cache = DynamicCache(config=model.config)
    cache.layers = [FullLayer() if _is_full(layer) else layer for layer in cache.layers]
    if not any(isinstance(layer, FullLayer) for layer in cache.layers):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layer that attends its whole past: give another model"
        )
    return cache


def usage(cache: DynamicCache) -> Usage:
    """What a cache of any of the methods holds now."""
    if isinstance(cache, ArkCache):
        stats = cache.stats()
        num_paged = sum(not isinstance(layer, DynamicLayer) for layer in cache.layers)
        return Usage(
            stats.attended_tokens / num_paged,
            stats.device_bytes + stats.digest_bytes,
            stats.host_bytes,
            stats.pages_recalled,
            stats.hit_rate,
        )
    layers = [layer for layer in cache.layers if _is_full(layer) or hasattr(layer, "budget")]
    kept = [layer.keys.shape[2] for layer in layers]
    num_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    num_bytes += sum(layer.received.nbytes for layer in layers if hasattr(layer, "received"))
    return Usage(sum(kept) / len(kept), num_bytes)


def _is_full(layer: object) -> bool:
    return type(layer) is DynamicLayer


def _open_full(model: PreTrainedModel, full: DynamicCache) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for index, read in enumerate(full.layers):
        if isinstance(read, FullLayer):
            cache.layers[index].update(read.keys, read.values)
        else:
            cache.layers[index] = copy.deepcopy(read)
    return cache


def _open_arkcache(
    model: PreTrainedModel, full: DynamicCache, config: CacheConfig, index: str
) -> DynamicCache:
    settings = vars(config) | {"index": index}
    with warnings.catch_warnings(record=True):  # compat mode is an error here, not a warning
        cache = ArkCache(model, CacheConfig(**settings))
    if cache.reason is not None:
        raise UnsupportedModelError(cache.reason)
    for number, read in enumerate(full.layers):
        if isinstance(read, FullLayer):
            cache.layers[number].update(read.keys, read.values)
        else:
            cache.layers[number] = copy.deepcopy(read)
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
