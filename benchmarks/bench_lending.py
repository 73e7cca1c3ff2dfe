"""What lending half of a device tier takes, and having it back: time, and steps until it is warm.

    python benchmarks/bench_lending.py [--model smollm2] [--context 4096] [--write]

First the time alone: tiers of several sizes, of random keys and values, made half as large and
whole again; milliseconds for each GiB of the tier that is made (medians). Then a real model that
steps through a text, on plain torch: the hit rate as usual and in the first steps after a change,
and after how many steps it is back (at 95 % of the median of the latter half of its phase). Needs
the environment of `make eval` for smollm2.

`--write` appends the result to benchmarks/results/lending.json, the ledger.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from bench_common import RESULTS
from bench_real_model import read

from arkcache import ArkCache, CacheConfig, KVCacheManager
from arkcache.bench.ledger import append_to_ledger, entry_of
from arkcache.bench.models import fill
from arkcache.demo.conversation import load_text
from arkcache.demo.models import load_model

LEDGER = RESULTS / "lending.json"
LAYERS, KV_HEADS, HEAD_DIM = 4, 4, 128
ON_SLOTS: dict[str, Any] = {"backend": "torch", "index": "cuboid-mean", "page_size": 16}
PHASES = ("before", "half lent", "given back")
BACK = 0.95
"""The share of its usual value at which a hit rate is back."""


def time_sizes(budget: int, rounds: int) -> dict[str, float]:
    """Milliseconds to lend half of a tier for so many tokens, and to have it back."""
    config = CacheConfig(**ON_SLOTS, budget_tokens=budget)
    manager = KVCacheManager(LAYERS, KV_HEADS, HEAD_DIM, config)
    for layer in range(LAYERS):
        manager.append(layer, *torch.randn(2, 1, KV_HEADS, budget + 4096, HEAD_DIM))
    whole, lent, back = manager.stats().device_bytes, [], []
    for _ in range(rounds):
        begun = time.perf_counter()
        with manager.lend(whole // 2):
            lent.append(time.perf_counter() - begun)
            half, begun = manager.stats().device_bytes, time.perf_counter()
        back.append(time.perf_counter() - begun)
    shrink, grow = (1e3 * statistics.median(times) for times in (lent, back))
    return {
        "tier_mib": round(whole / 2**20, 1),
        "lend_ms": round(shrink, 2),
        "back_ms": round(grow, 2),
        "lend_ms_per_gib": round(shrink / (half / 2**30), 1),
        "back_ms_per_gib": round(grow / (whole / 2**30), 1),
    }


class Walk:
    """Steps of a cache through a text, and how many of the selected pages were there already."""

    def __init__(self, model: Any, cache: ArkCache, tokens: list[int]) -> None:
        self._model, self._cache, self._tokens = model, cache, iter(tokens)

    def phase(self, steps: int) -> dict[str, Any]:
        """So many steps: hit rate and milliseconds, of the first and as usual."""
        rates, times = [], []
        for _ in range(steps):
            before = self._cache.stats()
            begun = time.perf_counter()
            token = torch.tensor([[next(self._tokens)]])
            self._model(token, past_key_values=self._cache, use_cache=True)
            times.append(1e3 * (time.perf_counter() - begun))
            after = self._cache.stats()
            hits = after.pages_hit - before.pages_hit
            rates.append(hits / (hits + after.pages_recalled - before.pages_recalled))
        usual = statistics.median(rates[steps // 2 :])
        return {
            "device_mib": round(self._cache.stats().device_bytes / 2**20, 1),
            "usual_hit_rate": round(usual, 3),
            "first_hit_rates": [round(rate, 3) for rate in rates[:4]],
            "steps_until_back": next(i for i, rate in enumerate(rates) if rate >= BACK * usual),
            "usual_step_ms": round(statistics.median(times[steps // 2 :]), 1),
            "first_step_ms": round(times[0], 1),
        }


def walk(model: Any, past: Any, tokens: list[int], budget: int, factor: float) -> dict[str, Any]:
    """A cache before, while half of its tier is lent, and afterwards."""
    settings = ON_SLOTS | {"budget_tokens": budget, "device_pool_factor": factor}
    cache = ArkCache(model, **settings)
    fill(cache, past)
    cache.end_prompt()  # else the first step attends everything
    walker, steps = Walk(model, cache, tokens), len(tokens) // 3
    before = walker.phase(steps)
    begun = time.perf_counter()
    with cache.lend(cache.stats().device_bytes // 2):
        lend_ms = 1e3 * (time.perf_counter() - begun)
        lent = walker.phase(steps)
        begun = time.perf_counter()
    back_ms = 1e3 * (time.perf_counter() - begun)
    phases = dict(zip(PHASES, (before, lent, walker.phase(steps)), strict=True))
    return {"lend_ms": round(lend_ms, 2), "back_ms": round(back_ms, 2), **phases}


def main() -> None:
    """Measure, print, and with --write keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30, help="of each phase")
    parser.add_argument("--sizes", default="2048,8192,32768", help="budgets whose tiers are timed")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help=f"append to {LEDGER.name}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = [time_sizes(int(budget), options.rounds) for budget in options.sizes.split(",")]
    for size in sizes:
        print(size, flush=True)
    model, tokenizer = load_model(options.model, torch.device("cpu"), "auto")
    ids = tokenizer(load_text(None), return_tensors="pt", verbose=False).input_ids
    tokens = ids[0, options.context :][: 3 * options.steps].tolist()
    walks = {}
    with torch.inference_mode():
        past = read(model, ids[:, : options.context])
        for factor in (1.0, 2.0):
            walks[f"factor {factor:g}"] = walk(model, past, tokens, options.budget, factor)
            print(factor, json.dumps(walks[f"factor {factor:g}"], indent=1), flush=True)
    entry = entry_of("lending", vars(options), sizes=sizes, walks=walks)
    if options.write:
        append_to_ledger(LEDGER, entry)


if __name__ == "__main__":
    main()
