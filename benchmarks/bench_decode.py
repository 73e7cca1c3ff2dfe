"""Decode speed on this machine: one step of a small Llama, against the caches of transformers.

    python benchmarks/bench_decode.py [--contexts 4096,16384,65536,262144] [--write]

The model is random (4 layers, hidden 512, 8 query and 2 KV heads of 64, fp32). Each cache is given
the same past, which the model's own projections make of random tokens, and then steps through the
same tokens. Rounds are interleaved; a figure is the median over rounds of the median step. With
random weights consecutive queries have little in common, so a step reads far more pages anew than
under a trained model: see the hit rate. `bare model` has one token to attend: the limit of every
cache. `ArkCache` has the defaults; the others name what differs.

`--write` appends the result to benchmarks/results/decode.json, the ledger.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
from bench_common import (
    NUM_LAYERS,
    RESULTS,
    VOCABULARY,
    append_to_ledger,
    fill,
    ledger_entry,
    make_model,
    make_past,
    time_steps,
)
from transformers import Cache, DynamicCache, LlamaForCausalLM, QuantizedCache, StaticCache

from arkcache import ArkCache

LEDGER = RESULTS / "decode.json"
WARM_UP_STEPS = 4
BOXES: dict[str, Any] = {"index": "cuboid-mean", "page_size": 32}


@dataclass(frozen=True)
class Method:
    """A cache to time: how to build it, how many steps a round takes, up to which context, and how
    much of the past it is given (None is all)."""

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

    def static(model: LlamaForCausalLM, context: int) -> Cache:
        return StaticCache(config=model.config, max_cache_len=context + 128)

    def dynamic(model: LlamaForCausalLM, _context: int) -> Cache:
        return DynamicCache(config=model.config)

    chosen = [
        Method("bare model", dynamic, num_steps, past_tokens=1),
        Method("StaticCache", static, num_steps // 2),
        Method("DynamicCache", dynamic, num_steps // 2),
        Method("ArkCache", ark(), num_steps),
        Method("ArkCache boxes", ark(**BOXES), num_steps),
        Method("ArkCache 2-bit index", ark(index_bits=2, page_size=32), num_steps),
        Method("ArkCache K4V4", ark(key_bits=4, value_bits=4), num_steps),
        Method("ArkCache torch", ark(backend="torch"), num_steps // 2),
        Method("ArkCache torch boxes", ark(backend="torch", **BOXES), num_steps // 2),
    ]
    if find_spec("optimum") is None:
        print("optimum-quanto is not installed (make bench installs it): left out", flush=True)
        return chosen
    quanto = Method(
        "QuantizedCache quanto 4 bit",
        lambda model, _: QuantizedCache("quanto", config=model.config, nbits=4),
        3,
        longest=65536,
    )
    return [*chosen, quanto]


def measure(model: LlamaForCausalLM, context: int, chosen: list[Method], rounds: int) -> list[Row]:
    """Time all methods at one context, in turn, `rounds` times."""
    past = make_past(model, context)
    caches: dict[str, Any] = {}
    for method in chosen:
        cache = caches[method.name] = method.build(model, context)
        fill(cache, past, stop=method.past_tokens)
        time_steps(model, cache, [1] * WARM_UP_STEPS)
    del past
    generator = torch.Generator().manual_seed(2)
    times: dict[str, list[list[float]]] = {method.name: [] for method in chosen}
    for _ in range(rounds):
        tokens = torch.randint(VOCABULARY, (1000,), generator=generator).tolist()
        for method in chosen:
            step_tokens = tokens[: method.num_steps]
            times[method.name].append(time_steps(model, caches[method.name], step_tokens))
    return [row_of(name, context, times[name], cache) for name, cache in caches.items()]


def row_of(name: str, context: int, times: list[list[float]], cache: Any) -> Row:
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


def report(rows: list[Row]) -> None:
    """Print the figures, how many times faster than StaticCache each is, and what it adds to each
    layer of the bare model."""
    base = {row.context: row.median_ms for row in rows if row.method == "StaticCache"}
    bare = {row.context: row.median_ms for row in rows if row.method == "bare model"}
    print(
        f"{'context':>8} {'cache':<28} {'ms/step':>8} {'worst':>8} {'speed-up':>8} {'us/layer':>8} "
        f"{'hits':>5}"
    )
    for row in rows:
        speed_up = f"{base[row.context] / row.median_ms:.2f}x" if row.context in base else "-"
        added = "-"
        if row.context in bare:
            added = f"{(row.median_ms - bare[row.context]) / NUM_LAYERS * 1e3:.0f}"
        hits = "-" if row.hit_rate is None else f"{row.hit_rate:.2f}"
        print(
            f"{row.context:>8} {row.method:<28} {row.median_ms:>8.2f} {row.worst_ms:>8.1f} "
            f"{speed_up:>8} {added:>8} {hits:>5}",
            flush=True,
        )


def main() -> None:
    """Measure, print, and with --write keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="4096,16384,65536,262144")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", default="", help="only those whose name contains this")
    parser.add_argument("--write", action="store_true", help=f"append to {LEDGER.name}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = make_model()
    rows: list[Row] = []
    with torch.inference_mode():
        for context in map(int, options.contexts.split(",")):
            chosen = [
                method
                for method in methods(options.budget, options.steps)
                if context <= method.longest and options.methods in method.name
            ]
            rows += measure(model, context, chosen, options.rounds)
            gc.collect()
    report(rows)
    entry = ledger_entry("decode", vars(options), rows=[asdict(row) for row in rows])
    if options.write:
        append_to_ledger(LEDGER, entry)
    print(json.dumps(entry))


if __name__ == "__main__":
    main()
