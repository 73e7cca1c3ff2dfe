"""The parts of one layer's decode step, each by itself, on the backend that this machine has.

A layer of 8 query and 2 KV heads of 64 (fp32 on a CPU, bf16 on a GPU) holds random keys and values
and decodes one token after another; 64 MiB are read between any two measurements, so that the
caches of the processor hold no more of the layer than they would within a model.

`append` and `step` are the two calls of a manager. `rate` is what pages are selected by, without
selecting. On a CPU with numba a step is taken apart: `score`, `select` and `attend` are launched
one by one. On a GPU the host's launches are part of every figure: `make gpu-check`, in the source
tree, measures kernels within CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from arkcache.bench.timing import Measured, Progress, Spread, synchronize
from arkcache.config import CacheConfig
from arkcache.errors import InputError
from arkcache.manager import KVCacheManager

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64
INDEXES: dict[str, dict[str, Any]] = {
    "tokens": {},
    "cuboid-mean": {"index": "cuboid-mean", "page_size": 32},
}
"""The default index, and boxes with pages of 32."""

BETWEEN_BYTES = 64 << 20
CHUNK_TOKENS = 8192


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    contexts: tuple[int, ...] = (4096, 65536)
    budget: int = 2048
    rounds: int = 25
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise InputError(f"rounds={self.rounds}: expected at least 1")
        if not self.contexts or min(self.contexts) < 64:
            raise InputError(f"contexts={self.contexts}: expected numbers of tokens, from 64 on")


@dataclass(frozen=True)
class Row:
    """A part of a step: microseconds, median, quartiles, and each round."""

    backend: str
    index: str
    context: int
    part: str
    median_us: float
    low_us: float
    high_us: float
    rounds_us: list[float]


@torch.inference_mode()
def run(settings: Settings, progress: Progress = lambda *_: None) -> Measured[Row]:
    """Measure both indexes at every context; after Ctrl-C, what is finished.

    Raises `ConfigError` for a budget that is impossible, `KeyboardInterrupt` before anything is
    finished.
    """
    measured, cases = Measured[Row](), [(c, i) for c in settings.contexts for i in INDEXES]
    for number, (context, index) in enumerate(cases):

        def tell(done: float, name: str = f"{index}, {context:,} tokens", at: int = number) -> None:
            progress(name, round(1000 * (at + done)), 1000 * len(cases))

        try:
            layer = make_layer(context, index, settings.budget, torch.device(settings.device))
            measured.rows += measure(layer, index, context, settings.rounds, tell)
        except KeyboardInterrupt:
            if not measured.rows:
                raise
            return measured
    measured.finished = True
    return measured


def make_layer(
    context: int, index: str, budget: int | None, device: torch.device
) -> KVCacheManager:
    """A manager of one layer that holds so many random tokens."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    config = CacheConfig(budget_tokens=budget, **INDEXES[index])
    manager = KVCacheManager(1, NUM_KV_HEADS, HEAD_DIM, config, device=device, dtype=dtype)
    for start in range(0, context, CHUNK_TOKENS):
        manager.append(0, *draw(min(CHUNK_TOKENS, context - start), device))
    return manager


def draw(num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random keys and values [1, kv_heads, tokens, head_dim]."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    shape = (2, 1, NUM_KV_HEADS, num_tokens, HEAD_DIM)
    key, value = torch.randn(shape, device=device, dtype=dtype)
    return key, value


def measure(
    manager: KVCacheManager,
    index: str,
    context: int,
    rounds: int,
    tell: Callable[[float], None] = lambda _: None,
) -> list[Row]:
    """Time every part in turn, `rounds` times; the first of all, which warms up, is left out."""
    seconds: dict[str, list[float]] = {}
    for number in range(-1, rounds):
        tell(max(number, 0) / rounds)
        for part, taken in one_round(manager):
            if number >= 0:
                seconds.setdefault(part, []).append(taken)
    rows = []
    for part, taken_all in seconds.items():
        us = [round(one * 1e6, 2) for one in taken_all]
        figures = Spread(*(round(one, 2) for one in Spread.of(us)))
        rows.append(Row(manager.planner.backend, index, context, part, *figures, us))
    return rows


def one_round(manager: KVCacheManager) -> Iterator[tuple[str, float]]:
    """Seconds of every part; one token is appended."""
    device = manager.device
    key, value = draw(1, device)
    query = torch.randn((1, NUM_HEADS, 1, HEAD_DIM), device=device, dtype=key.dtype)
    parts: dict[str, Callable[[], object]] = {
        "append": lambda: manager.append(0, key, value),
        "step": lambda: manager.attend(0, query),
        "rate": lambda: manager.ratings(0, query),
    }
    for part, work in parts.items():
        yield part, seconds_of(work, device)
    read_between(device)
    yield from (manager.time_parts(0, torch.randn_like(query)) or {}).items()


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """What a part takes when the caches hold other things."""
    read_between(device)
    synchronize(device)
    start = perf_counter()
    work()
    synchronize(device)
    return perf_counter() - start


def read_between(device: torch.device) -> None:
    """Have other things in the processor's caches."""
    torch.ones(BETWEEN_BYTES // 4, device=device).sum()


def render(rows: Sequence[Row]) -> Table:
    """A line for each part, a column for each index and context."""
    backends = ", ".join(dict.fromkeys(row.backend for row in rows))
    table = Table(title=f"{backends}: microseconds, median (quartiles)", box=box.SIMPLE_HEAD)
    table.add_column("part", no_wrap=True)
    cases = list(dict.fromkeys((row.context, row.index) for row in rows))
    for context, index in cases:
        table.add_column(f"{index}\n{context:,}", justify="right")
    for part in dict.fromkeys(row.part for row in rows):
        own = {(row.context, row.index): row for row in rows if row.part == part}
        table.add_row(part, *(cell(own.get(case)) for case in cases))
    return table


def cell(row: Row | None) -> str:
    """A median, and the quartiles beside it."""
    if row is None:
        return "-"
    return f"{row.median_us:,.0f} ({row.low_us:,.0f}-{row.high_us:,.0f})"
