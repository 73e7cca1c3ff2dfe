"""A decode step of a small Llama on a CPU, against the caches of transformers.

The model is random (4 layers, hidden 512, 8 query and 2 KV heads of 64, fp32). Each cache is given
the same past, which the model's own projections make of random tokens, and then steps through the
same tokens. Rounds are interleaved; a figure is the median over rounds of the median step. With
random weights consecutive queries have little in common, so a step reads far more pages anew than
under a trained model: see the hit rate. `bare model` has one token to attend: the limit of every
cache. `ArkCache` has the defaults; the others name what differs.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from transformers import Cache, DynamicCache, LlamaForCausalLM, StaticCache

from arkcache.bench.models import (
    VOCABULARY,
    check_memory,
    fill,
    make_model,
    make_past,
    past_bytes,
    time_steps,
)
from arkcache.bench.timing import Measured, Progress
from arkcache.errors import InputError
from arkcache.huggingface import ArkCache

WARM_UP_STEPS = 4
ROOM = 128
"""Tokens that a `StaticCache` has room for beside its past, or more where the rounds need it."""

BOXES: dict[str, Any] = {"index": "cuboid-mean", "page_size": 32}
BARE, BASE = "bare model", "StaticCache"


@dataclass(frozen=True)
class Settings:
    """What is measured: only methods whose name contains `methods`."""

    contexts: tuple[int, ...] = (4096, 16384, 65536)
    budget: int = 2048
    rounds: int = 3
    steps: int = 40
    methods: str = ""

    def __post_init__(self) -> None:
        for name in ("rounds", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected at least 1")
        if not self.contexts or min(self.contexts) < 2:
            raise InputError(f"contexts={self.contexts}: expected numbers of tokens, from 2 on")


@dataclass(frozen=True)
class Method:
    """A cache to time: how to build it for a model and so much room, how many steps a round takes,
    up to which context, and how much of the past it is given (None is all)."""

    name: str
    build: Callable[[LlamaForCausalLM, int], Cache]
    num_steps: int = 40
    longest: int = 1 << 30
    past_tokens: int | None = None


@dataclass(frozen=True)
class Row:
    """One method at one context. Times in milliseconds per step."""

    method: str
    context: int
    median_ms: float
    round_medians_ms: list[float]
    worst_ms: float
    device_bytes: int | None = None
    host_bytes: int | None = None
    digest_bytes: int | None = None
    hit_rate: float | None = None


def methods(budget: int, num_steps: int) -> list[Method]:
    """What is compared."""

    def ark(**settings: Any) -> Callable[[LlamaForCausalLM, int], Cache]:
        return lambda model, _: ArkCache(model, budget_tokens=budget, **settings)

    def static(model: LlamaForCausalLM, room: int) -> Cache:
        return StaticCache(config=model.config, max_cache_len=room)

    def dynamic(model: LlamaForCausalLM, _room: int) -> Cache:
        return DynamicCache(config=model.config)

    half = max(1, num_steps // 2)
    return [
        Method(BARE, dynamic, num_steps, past_tokens=1),
        Method(BASE, static, half),
        Method("DynamicCache", dynamic, half),
        Method("ArkCache", ark(), num_steps),
        Method("ArkCache boxes", ark(**BOXES), num_steps),
        Method("ArkCache 2-bit index", ark(index_bits=2, page_size=32), num_steps),
        Method("ArkCache K4V4", ark(key_bits=4, value_bits=4), num_steps),
        Method("ArkCache torch", ark(backend="torch"), half),
        Method("ArkCache torch boxes", ark(backend="torch", **BOXES), half),
    ]


@torch.inference_mode()
def run(
    settings: Settings, progress: Progress = lambda *_: None, more: Sequence[Method] = ()
) -> Measured[Row]:
    """Measure all methods, and `more`, at every context; after Ctrl-C, the contexts so far.

    Raises `InputError` where no method is left or memory has too little room, `KeyboardInterrupt`
    before the first context is measured.
    """
    every = [*methods(settings.budget, settings.steps), *more]
    chosen = [method for method in every if settings.methods in method.name]
    if not chosen:
        names = ", ".join(method.name for method in every)
        raise InputError(f"methods={settings.methods!r}: expected a part of a name among {names}")
    model, measured = make_model(), Measured[Row]()
    for context in settings.contexts:
        check_memory((len(chosen) + 1) * past_bytes(model, context), context)
    for number, context in enumerate(settings.contexts):
        stage = f"Decoding at {context:,} tokens"
        own = [method for method in chosen if context <= method.longest]

        def tell(done: float, stage: str = stage, number: int = number) -> None:
            progress(stage, round(1000 * (number + done)), 1000 * len(settings.contexts))

        try:
            measured.rows += measure(model, context, own, settings.rounds, tell)
        except KeyboardInterrupt:
            if not measured.rows:
                raise
            return measured
        gc.collect()
    measured.finished = True
    return measured


def measure(
    model: LlamaForCausalLM,
    context: int,
    chosen: list[Method],
    rounds: int,
    tell: Callable[[float], None] = lambda _: None,
) -> list[Row]:
    """Time all methods at one context, in turn, `rounds` times. tell: which share is done."""
    past = make_past(model, context)
    caches: dict[str, Cache] = {}
    for number, method in enumerate(chosen):
        tell(number / len(chosen) / 2)
        room = context + max(ROOM, WARM_UP_STEPS + rounds * method.num_steps)
        cache = caches[method.name] = method.build(model, room)
        fill(cache, past, stop=method.past_tokens)
        time_steps(model, cache, [1] * WARM_UP_STEPS)
    del past
    generator = torch.Generator().manual_seed(2)
    times: dict[str, list[list[float]]] = {method.name: [] for method in chosen}
    for number in range(rounds):
        tokens = torch.randint(VOCABULARY, (1000,), generator=generator).tolist()
        for method in chosen:
            step_tokens = tokens[: method.num_steps]
            times[method.name].append(time_steps(model, caches[method.name], step_tokens))
        tell(0.5 + (number + 1) / rounds / 2)
    return [row_of(name, context, times[name], cache) for name, cache in caches.items()]


def row_of(name: str, context: int, times: list[list[float]], cache: Cache) -> Row:
    """Summarise the rounds of one method."""
    medians = [round(statistics.median(one), 3) for one in times]
    sizes: dict[str, Any] = {}
    if isinstance(cache, ArkCache):
        stats = cache.stats()
        sizes = {
            "device_bytes": stats.device_bytes,
            "host_bytes": stats.host_bytes,
            "digest_bytes": stats.digest_bytes,
            "hit_rate": round(stats.hit_rate, 3),
        }
    worst = round(max(max(one) for one in times), 3)
    return Row(name, context, statistics.median(medians), medians, worst, **sizes)


def render(rows: Sequence[Row], num_layers: int = 4) -> Table:
    """The figures, how many times faster than StaticCache each is, and what it adds to each layer
    of the bare model."""
    base = {row.context: row.median_ms for row in rows if row.method == BASE}
    bare = {row.context: row.median_ms for row in rows if row.method == BARE}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("context", justify="right", no_wrap=True)
    table.add_column("cache", overflow="fold")
    for name in ("ms/step", "±", "worst", "speed-up", "us/layer", "hits"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        half = (max(row.round_medians_ms) - min(row.round_medians_ms)) / 2
        faster = base.get(row.context, 0) / row.median_ms
        added = (row.median_ms - bare.get(row.context, 0)) / num_layers * 1e3
        table.add_row(
            f"{row.context:,}",
            row.method,
            f"{row.median_ms:.2f}",
            f"±{half / row.median_ms:.0%}",
            f"{row.worst_ms:.1f}",
            f"{faster:.2f}x" if row.context in base else "-",
            f"{added:.0f}" if row.context in bare else "-",
            "-" if row.hit_rate is None else f"{row.hit_rate:.2f}",
        )
    return table
