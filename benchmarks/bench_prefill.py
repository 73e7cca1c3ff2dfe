"""Seconds to read a prompt on this machine, against a full cache in the same run.

    python benchmarks/bench_prefill.py [--contexts 7168,16384,32768] [--layers 2] [--write]

The model is random, its layers of the shape of SmolLM2-135M (hidden 576, 9 query and 3 KV heads of
64, fp32). Every method reads the same random tokens, in chunks or at once, and computes the logits
of the last one. Rounds are interleaved; a figure is the median over rounds. ArkCache attends every
prompt exactly; what it adds is sealing (digests, backup), streaming the past in blocks, and merging
them. Every layer but `--dense` of them is sparse.

`--write` appends the result to benchmarks/results/prefill.json, the ledger.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from bench_common import RESULTS, append_to_ledger, ledger_entry
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

from arkcache import ArkCache, CacheConfig

LEDGER = RESULTS / "prefill.json"
VOCABULARY = 1024


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


def make_model(num_layers: int) -> LlamaForCausalLM:
    """A random model, the same every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=num_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=1 << 20,
    )
    return LlamaForCausalLM(config).eval()


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


def read(model: LlamaForCausalLM, cache: Cache, prompt: Tensor, chunk: int | None) -> float:
    """Seconds to read a prompt [1, tokens] into an empty cache."""
    start = time.perf_counter()
    for part in prompt.split(chunk or prompt.shape[1], dim=1):
        model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def measure(model: LlamaForCausalLM, context: int, chosen: list[Method], rounds: int) -> list[Row]:
    """Time all methods at one context, in turn, `rounds` times."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(VOCABULARY, (1, context), generator=generator)
    times: dict[str, list[float]] = {method.name: [] for method in chosen}
    sizes: dict[str, int] = {}
    for _ in range(rounds):
        for method in chosen:
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


def report(rows: list[Row]) -> None:
    """Print the figures."""
    for row in rows:
        device = "" if row.device_bytes is None else f"{row.device_bytes / 2**20:8.1f} MiB"
        print(
            f"{row.context:>8} {row.method:<38} {row.median_s:>8.2f} s {row.ratio:>6.2f}x {device}"
        )


def main() -> None:
    """Measure, print, and with --write keep the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--contexts", default="7168,16384,32768")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dense", type=int, default=0, help="layers that attend everything")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help=f"append to {LEDGER.name}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = make_model(options.layers)
    rows: list[Row] = []
    with torch.inference_mode():
        chosen = methods(options.chunk, options.dense)
        measure(model, 2 * options.chunk, chosen, 1)  # libraries load and pages of memory come
        for context in map(int, options.contexts.split(",")):
            rows += measure(model, context, chosen, options.rounds)
            report(rows[-len(chosen) :])
    settings: dict[str, Any] = vars(options)
    entry = ledger_entry("prefill", settings, rows=[asdict(row) for row in rows])
    if options.write:
        append_to_ledger(LEDGER, entry)
    print(json.dumps(entry))


if __name__ == "__main__":
    main()
