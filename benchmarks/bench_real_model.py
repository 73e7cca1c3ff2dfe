"""A real model's decode step on this machine, against the bare model and a full cache.

    python benchmarks/bench_real_model.py [--model smollm2] [--context 7168] [--write]

The model reads a text once; each cache is given its keys and values, and all step through the same
tokens in turn, step by step, so that what disturbs the machine disturbs all. `bare model` has one
token to attend: the limit of every cache. Ratios are medians over steps, each against the bare
model's step beside it. Needs the environment of `make eval` for smollm2.

`--write` appends the result to benchmarks/results/real_model.json, the ledger.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from bench_common import RESULTS
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from arkcache import ArkCache
from arkcache.bench.ledger import append_to_ledger, entry_of
from arkcache.bench.models import Past, fill
from arkcache.demo.conversation import load_text
from arkcache.demo.models import load_model

LEDGER = RESULTS / "real_model.json"
CHUNK_TOKENS = 1024
WARM_UP_STEPS = 6


@dataclass(frozen=True)
class Row:
    """One cache. Milliseconds per step; ratio to the bare model: median, quartiles."""

    cache: str
    median_ms: float
    fastest_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


def read(model: PreTrainedModel, ids: torch.Tensor) -> Past:
    """Keys and values of a text."""
    cache = DynamicCache(config=model.config)
    for chunk in ids.split(CHUNK_TOKENS, dim=1):
        model(chunk, past_key_values=cache, logits_to_keep=1)
    return [(layer.keys, layer.values) for layer in cache.layers]


def measure(
    model: PreTrainedModel, past: Past, tokens: list[int], budget: int
) -> dict[str, list[float]]:
    """Milliseconds of each step of each cache."""
    room = past[0][0].shape[2] + len(tokens) + 1

    def ark(**settings: Any) -> ArkCache:
        return ArkCache(model, budget_tokens=budget, **settings)

    caches: dict[str, Cache] = {
        "bare model": DynamicCache(config=model.config),
        "StaticCache": StaticCache(config=model.config, max_cache_len=room),
        "ArkCache": ark(),
        "ArkCache boxes": ark(index="cuboid-mean", page_size=32),
        "ArkCache 2-bit index": ark(index_bits=2, page_size=32),
        "ArkCache K4V4": ark(key_bits=4, value_bits=4),
    }
    for name, cache in caches.items():
        fill(cache, past, stop=1 if name == "bare model" else None)
    times: dict[str, list[float]] = {name: [] for name in caches}
    for token in tokens:
        given = torch.tensor([[token]])
        for name, cache in caches.items():
            start = time.perf_counter()
            model(given, past_key_values=cache, use_cache=True)
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: one[WARM_UP_STEPS:] for name, one in times.items()}


def rows_of(times: dict[str, list[float]]) -> list[Row]:
    """Each cache against the bare model, step by step."""
    rows = []
    for name, own in times.items():
        ratios = [step / bare for step, bare in zip(own, times["bare model"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        figures = (statistics.median(own), min(own), middle, low, high)
        rows.append(Row(name, *(round(figure, 3) for figure in figures)))
    return rows


def main() -> None:
    """Measure, print, and with --write keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context", type=int, default=7168)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help=f"append to {LEDGER.name}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model(options.model, torch.device("cpu"), "auto")
    ids = tokenizer(load_text(None), return_tensors="pt", verbose=False).input_ids
    tokens = ids[0, options.context :][: options.steps + WARM_UP_STEPS].tolist()
    with torch.inference_mode():
        past = read(model, ids[:, : options.context])
        rows = rows_of(measure(model, past, tokens, options.budget))
    for row in rows:
        print(
            f"{row.cache:<22} {row.median_ms:7.1f} ms (least {row.fastest_ms:.1f})  "
            f"{row.ratio:.3f} x the bare model ({row.ratio_low:.3f} to {row.ratio_high:.3f})"
        )
    entry = entry_of("real_model", vars(options), rows=[asdict(row) for row in rows])
    if options.write:
        append_to_ledger(LEDGER, entry)
    print(json.dumps(entry))


if __name__ == "__main__":
    main()
