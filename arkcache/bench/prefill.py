"""Seconds to read a prompt on a CPU, against a full cache in the same run.

The model is random, its layers of the shape of SmolLM2-135M (hidden 576, 9 query and 3 KV heads of
64, fp32). Every method reads the same random tokens, in chunks or at once, and computes the logits
of the last one. Rounds are interleaved; a figure is the median over rounds. ArkCache attends every
prompt exactly; what it adds is sealing (digests, backup), streaming the past in blocks, and merging
them. Every layer but the dense ones is sparse.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaForCausalLM

from arkcache.bench.models import VOCABULARY, check_memory, make_model, past_bytes
from arkcache.bench.timing import Measured, Progress
from arkcache.config import CacheConfig
from arkcache.errors import InputError
from arkcache.huggingface import ArkCache


@dataclass(frozen=True)
class Settings:
    """What is measured: prompts of so many tokens, read in chunks of so many."""

    contexts: tuple[int, ...] = (7168, 16384, 32768)
    chunk: int = 2048
    layers: int = 2
    dense: int = 0
    rounds: int = 3

    def __post_init__(self) -> None:
        for name in ("chunk", "layers", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected at least 1")
        if not self.contexts or min(self.contexts) < 1:
            raise InputError(f"contexts={self.contexts}: expected numbers of tokens, from 1 on")
        if not 0 <= self.dense <= self.layers:
            raise InputError(f"dense={self.dense}: expected 0 to {self.layers}, the layers")


class Method(NamedTuple):
    """A cache to time, and in chunks of how many tokens it reads; None is all at once."""

    name: str
    build: Callable[[LlamaForCausalLM], Cache]
    chunk: int | None


@dataclass(frozen=True)
class Row:
    """One method at one context. Seconds per prompt; `ratio` is to the faster full cache."""

    method: str
    context: int
    median_s: float
    rounds_s: list[float]
    ratio: float
    device_bytes: int | None = None


def methods(chunk: int, num_dense_layers: int) -> list[Method]:
    """What is compared; the full cache in its two ways first."""

    def full(model: LlamaForCausalLM) -> Cache:
        return DynamicCache(config=model.config)

    def ark(config: CacheConfig) -> Callable[[LlamaForCausalLM], Cache]:
        return lambda model: ArkCache(model, config)

    config = CacheConfig(num_dense_layers=num_dense_layers)
    packed = CacheConfig.preset("K4V4", num_dense_layers=num_dense_layers)
    boxes = CacheConfig(num_dense_layers=num_dense_layers, index="cuboid-mean", page_size=32)
    return [
        Method("DynamicCache", full, None),
        Method(f"DynamicCache, chunks of {chunk}", full, chunk),
        Method("ArkCache", ark(config), None),
        Method(f"ArkCache, chunks of {chunk}", ark(config), chunk),
        Method(f"ArkCache K4V4, chunks of {chunk}", ark(packed), chunk),
        Method(f"ArkCache boxes, chunks of {chunk}", ark(boxes), chunk),
    ]


@torch.inference_mode()
def run(settings: Settings, progress: Progress = lambda *_: None) -> Measured[Row]:
    """Measure all methods at every context; after Ctrl-C, the contexts so far.

    Raises `InputError` where memory has too little room, `KeyboardInterrupt` before the first
    context is measured.
    """
    model, measured = make_model(settings.layers, 576, 1536, 9, 3), Measured[Row]()
    for context in settings.contexts:
        check_memory(2 * past_bytes(model, context), context)
    chosen = methods(settings.chunk, settings.dense)
    total = len(settings.contexts) * settings.rounds * len(chosen)
    progress("Warming up", 0, total)
    measure(model, 2 * settings.chunk, chosen, 1)  # libraries load and pages of memory come
    for number, context in enumerate(settings.contexts):
        stage, before = f"Reading {context:,} tokens", total * number // len(settings.contexts)

        def tell(done: int, stage: str = stage, before: int = before) -> None:
            progress(stage, before + done, total)

        try:
            measured.rows += measure(model, context, chosen, settings.rounds, tell)
        except KeyboardInterrupt:
            if not measured.rows:
                raise
            return measured
    measured.finished = True
    return measured


def read(model: LlamaForCausalLM, cache: Cache, prompt: Tensor, chunk: int | None) -> float:
    """Seconds to read a prompt [1, tokens] into an empty cache."""
    start = time.perf_counter()
    for part in prompt.split(chunk or prompt.shape[1], dim=1):
        model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def measure(
    model: LlamaForCausalLM,
    context: int,
    chosen: list[Method],
    rounds: int,
    tell: Callable[[int], None] = lambda _: None,
) -> list[Row]:
    """Time all methods at one context, in turn, `rounds` times. tell: how many prompts are read."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(VOCABULARY, (1, context), generator=generator)
    times: dict[str, list[float]] = {method.name: [] for method in chosen}
    sizes: dict[str, int] = {}
    for number in range(rounds):
        for place, method in enumerate(chosen):
            tell(number * len(chosen) + place)
            cache = method.build(model)
            times[method.name].append(round(read(model, cache, prompt, method.chunk), 3))
            if isinstance(cache, ArkCache):
                sizes[method.name] = cache.stats().device_bytes
            del cache
            gc.collect()
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    full = min(medians[method.name] for method in chosen[:2])
    return [
        Row(name, context, medians[name], seconds, round(medians[name] / full, 3), sizes.get(name))
        for name, seconds in times.items()
    ]


def render(rows: Sequence[Row]) -> Table:
    """The figures, and the ratio to the faster full cache."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("prompt", justify="right", no_wrap=True)
    table.add_column("cache", overflow="fold")
    for name in ("seconds", "±", "ratio", "device MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.context:,}",
            row.method,
            f"{row.median_s:.2f}",
            f"±{(max(row.rounds_s) - min(row.rounds_s)) / 2 / row.median_s:.0%}",
            f"{row.ratio:.2f}x",
            "-" if row.device_bytes is None else f"{row.device_bytes / 2**20:.1f}",
        )
    return table
