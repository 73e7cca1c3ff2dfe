"""What is compared: every method opens a cache of a text that was read once.

A method is named by a short spec: "full", "ark" with any settings of `CacheConfig` as in
"ark:index=tokens,page_size=16", the controls "sinks", "random" and "oracle" (the last two take the
same settings), and the evictors "h2o", "scissorhands", "snapkv" and "pyramidkv".
"""

from __future__ import annotations

import ast
import copy
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from arkcache.config import CacheConfig
from arkcache.demo.baselines import (
    FullLayer,
    HeavyHitterLayer,
    SinkWindowLayer,
    observing,
)
from arkcache.demo.methods import device_of, open_arkcache, open_full, read_arkcache, shape_of
from arkcache.demo.run import CHUNK_TOKENS
from arkcache.errors import ConfigError, InputError, UnsupportedModelError
from arkcache.evaluation.ratings import OracleIndex, RandomIndex
from arkcache.evaluation.scissorhands import ScissorhandsLayer
from arkcache.evaluation.snapkv import SnapLayer, pyramid_budgets
from arkcache.huggingface import ArkCache, detach
from arkcache.memory import within_bytes
from arkcache.pages.index import PageIndex

PAGED = ("ark", "random", "oracle")
_STEPWISE = ("h2o", "scissorhands")
"""Evictors that go on looking at what every step attends."""
EVICTING = ("sinks", *_STEPWISE, "snapkv", "pyramidkv")
_NUM_SINKS = 4
"""StreamingLLM's."""


@dataclass(frozen=True)
class Reading:
    """A text that was read with full attention.

    Attributes:
        cache: its keys and values, in full layers.
        observed: of each full layer, the attention received from the last queries
            [num_kv_heads, tokens], by layer number; empty where nobody needs it.
        ids: its tokens, for those who have to read it themselves.
    """

    cache: DynamicCache
    observed: dict[int, Tensor]
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Method:
    """One way to keep a text.

    Attributes:
        spec: as given.
        kind: "full", or one of `PAGED` and `EVICTING`.
        settings: of `CacheConfig`, for the paged kinds.
    """

    spec: str
    kind: str
    settings: dict[str, Any]

    @property
    def observes(self) -> bool:
        """Whether reading has to note the attention that tokens receive."""
        return self.kind in EVICTING and self.kind != "sinks"

    @property
    def has_own_budget(self) -> bool:
        """Whether the budgets of the run do not matter to it."""
        return self.kind == "full" or "budget_tokens" in self.settings

    def on_torch(self) -> Method:
        """The same on plain torch, whose ratings can be looked at."""
        if self.kind not in PAGED:
            return self
        return replace(self, settings={"backend": "torch"} | self.settings)

    def config(self, budget: int | str | None) -> CacheConfig:
        """The settings of a paged method. Raises `ConfigError` where they are impossible."""
        settings: dict[str, Any] = {"budget_tokens": budget}
        if self.kind != "ark":  # the kernels rate pages by indexes of their own
            settings["backend"] = "torch"
        return CacheConfig(**(settings | self.settings))

    def within(self, budget: int, reading: Reading, length: int) -> Method:
        """The method with the bytes on the device that `budget` of `length` tokens take in the full
        cache, its streaming block as small as can be: questions never need it.

        Raises `ConfigError` where its index and dense layers alone take more, and
        `UnsupportedModelError` where layers differ in size.
        """
        if self.kind not in PAGED:
            return self  # it keeps tokens and nothing else
        device = device_of(reading.cache)
        config = self.config("auto").on(device)
        if config.device_bytes is not None:
            raise ConfigError(
                f"device_bytes={config.device_bytes} beside a share of the bytes: expected one of "
                "them"
            )
        shape = shape_of(reading.cache)
        if config.stream_block_tokens is None:
            config = replace(config, stream_block_tokens=config.page_size)
        fitted = within_bytes(
            config,
            shape,
            length,
            budget * shape.token_bytes,
            device,
            None if self.kind == "ark" else _control(self.kind, seed=0),
        )
        names = ("budget_tokens", "device_bytes", "stream_block_tokens")
        found = {name: getattr(fitted, name) for name in names}
        return replace(self, settings=self.settings | found)

    @contextmanager
    def cache(
        self, model: PreTrainedModel, reading: Reading, budget: int | None, seed: int
    ) -> Iterator[DynamicCache]:
        """A cache that holds the text; the model is as it was afterwards.

        Raises `UnsupportedModelError` and `ConfigError` where the method does not fit.
        """
        cache = None
        try:
            cache = self._open(model, reading, budget, seed)
            with observing(model) if self.kind in _STEPWISE else nullcontext():
                yield cache
        finally:
            if cache is not None:
                cache.reset()
            detach(model)

    def _open(
        self, model: PreTrainedModel, reading: Reading, budget: int | None, seed: int
    ) -> DynamicCache:
        if self.kind == "full":
            return open_full(model, reading.cache)
        if self.kind in EVICTING:
            return _open_evicting(self.kind, model, reading, budget)
        config = self.config(budget)
        if config.retention is not None:  # it decides by queries, which are not in what was read
            own = read_arkcache(model, reading.ids, config, CHUNK_TOKENS)
            _rate(own, self.kind, seed)
            return own
        cache = open_arkcache(model, reading.cache, config, config.index)
        assert isinstance(cache, ArkCache)
        _rate(cache, self.kind, seed)
        return cache


def parse_method(spec: str) -> Method:
    """A method from its spec.

    Raises `InputError` for an unknown one, `ConfigError` for impossible settings.
    """
    kind, _, rest = spec.partition(":")
    kinds = ("full", *PAGED, *EVICTING)
    if kind not in kinds:
        raise InputError(f"method {spec!r}: expected one of {', '.join(kinds)}")
    settings = dict(map(_setting, _parts(rest))) if rest else {}
    if settings and kind not in PAGED:
        raise InputError(f"method {spec!r}: {kind} takes no settings; {', '.join(PAGED)} do")
    method = Method(spec, kind, settings)
    if kind in PAGED:
        method.config("auto")  # refuses unknown names now rather than after minutes
    return method


def _parts(text: str) -> list[str]:
    """Split at commas outside brackets."""
    return re.findall(r"[^,(\[]+(?:[(\[][^)\]]*[)\]])?[^,]*", text)


def _setting(text: str) -> tuple[str, Any]:
    name, found, value = (part.strip() for part in text.partition("="))
    if not found:
        raise InputError(f"setting {text!r}: expected name=value, as in index=tokens")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a name, such as tokens


def _rate(cache: ArkCache, kind: str, seed: int) -> None:
    """Have pages rated by what a control rates them by."""
    if kind == "ark":
        return
    seeds = itertools.count(seed << 16)
    for manager in cache.managers:
        manager.rate_with(lambda: _control(kind, next(seeds)))


def _control(kind: str, seed: int) -> PageIndex:
    return OracleIndex() if kind == "oracle" else RandomIndex(seed)


def _open_evicting(
    kind: str, model: PreTrainedModel, reading: Reading, budget: int | None
) -> DynamicCache:
    if budget is None:
        raise ConfigError(f"method {kind}: expected a budget, it evicts the rest")
    cache = DynamicCache(config=model.config)
    layers = reading.cache.layers
    numbers = [number for number, layer in enumerate(layers) if isinstance(layer, FullLayer)]
    budgets = dict(zip(numbers, pyramid_budgets(budget, len(numbers)), strict=True))
    for number, layer in enumerate(layers):
        if not isinstance(layer, FullLayer):
            cache.layers[number] = copy.deepcopy(layer)
        elif kind == "sinks":
            cache.layers[number] = SinkWindowLayer(layer, budget, _NUM_SINKS)
        elif not reading.observed:
            raise UnsupportedModelError("the attention of this model cannot be observed")
        elif kind == "h2o":
            cache.layers[number] = HeavyHitterLayer(layer, budget)
        elif kind == "scissorhands":
            cache.layers[number] = ScissorhandsLayer(layer, budget)
        else:
            own = budgets[number] if kind == "pyramidkv" else budget
            cache.layers[number] = SnapLayer(layer, own, reading.observed[number])
    return cache
