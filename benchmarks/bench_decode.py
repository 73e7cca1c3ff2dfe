"""Decode speed on this machine: one step of a small Llama, against the caches of transformers.

    python benchmarks/bench_decode.py [--contexts 4096,16384,65536,262144] [--write]

The model is random (4 layers, hidden 512, 8 query and 2 KV heads of 64, fp32). Each cache is given
the same past, which the model's own projections make of random tokens, and then steps through the
same tokens. Rounds are interleaved; a figure is the median over rounds of the median step. With
random weights consecutive queries have little in common, so pages are recalled far more often than
under a trained model: see the hit rate. Every layer is sparse (num_dense_layers=0).

`--write` appends the result to benchmarks/results/decode.json, the ledger.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    QuantizedCache,
    StaticCache,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from arkcache import ArkCache
from arkcache.demo.machine import describe_machine, versions

LEDGER = Path(__file__).parent / "results" / "decode.json"
VOCABULARY = 1024
WARM_UP_STEPS = 4


@dataclass(frozen=True)
class Method:
    """A cache to time: how to build it, how many steps a round takes, up to which context."""

    name: str
    build: Callable[[LlamaForCausalLM, int], Cache]
    num_steps: int = 40
    longest: int = 1 << 30


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
    """What is compared. `past of 1` is the model with nothing to attend: the floor."""

    def ark(index: str) -> Callable[[LlamaForCausalLM, int], Cache]:
        return lambda model, _: ArkCache(
            model, budget_tokens=budget, num_dense_layers=0, index=index
        )

    def static(model: LlamaForCausalLM, context: int) -> Cache:
        return StaticCache(config=model.config, max_cache_len=context + 128)

    return [
        Method("StaticCache", static, num_steps // 2),
        Method("DynamicCache", lambda model, _: DynamicCache(config=model.config), num_steps // 2),
        Method("ArkCache boxes", ark("cuboid-mean"), num_steps),
        Method("ArkCache tokens", ark("tokens"), num_steps),
        Method(
            "QuantizedCache quanto 4 bit",
            lambda model, _: QuantizedCache("quanto", config=model.config, nbits=4),
            3,
            longest=65536,
        ),
    ]


def make_model() -> LlamaForCausalLM:
    """The benchmark's model, random and the same every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1 << 20,
    )
    return LlamaForCausalLM(config).eval()


def make_past(model: LlamaForCausalLM, context: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [1, 2, context, 64] of random tokens for every layer."""
    tokens = torch.randint(VOCABULARY, (1, context), generator=torch.Generator().manual_seed(1))
    past = []
    for layer in model.model.layers:
        hidden = layer.input_layernorm(model.model.embed_tokens(tokens))
        shape = (1, context, 2, 64)
        key = layer.self_attn.k_proj(hidden).view(shape).transpose(1, 2)
        value = layer.self_attn.v_proj(hidden).view(shape).transpose(1, 2)
        cos, sin = model.model.rotary_emb(hidden, torch.arange(context)[None])
        past.append((apply_rotary_pos_emb(key, key, cos, sin)[0], value))
    return past


def time_round(model: LlamaForCausalLM, cache: Cache, tokens: list[int]) -> list[float]:
    """Milliseconds of each step."""
    times = []
    for token in tokens:
        start = time.perf_counter()
        model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def measure(model: LlamaForCausalLM, context: int, chosen: list[Method], rounds: int) -> list[Row]:
    """Time all methods at one context, in turn, `rounds` times."""
    past = make_past(model, context)
    caches: dict[str, Any] = {}
    for method in chosen:
        cache = caches[method.name] = method.build(model, context)
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        time_round(model, cache, [1] * WARM_UP_STEPS)
    del past
    generator = torch.Generator().manual_seed(2)
    times: dict[str, list[list[float]]] = {method.name: [] for method in chosen}
    for _ in range(rounds):
        tokens = torch.randint(VOCABULARY, (1000,), generator=generator).tolist()
        for method in chosen:
            step_tokens = tokens[: method.num_steps]
            times[method.name].append(time_round(model, caches[method.name], step_tokens))
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
    """Print the figures and how many times faster than StaticCache each is."""
    base = {row.context: row.median_ms for row in rows if row.method == "StaticCache"}
    print(f"{'context':>8} {'cache':<28} {'ms/step':>8} {'worst':>8} {'speed-up':>8} {'hits':>5}")
    for row in rows:
        speed_up = f"{base[row.context] / row.median_ms:.2f}x" if row.context in base else "-"
        hits = "-" if row.hit_rate is None else f"{row.hit_rate:.2f}"
        print(
            f"{row.context:>8} {row.method:<28} {row.median_ms:>8.2f} {row.worst_ms:>8.1f} "
            f"{speed_up:>8} {hits:>5}",
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
        floor = Method("past of 1", lambda model, _: DynamicCache(config=model.config))
        rows += measure(model, 1, [floor], options.rounds)
        for context in map(int, options.contexts.split(",")):
            chosen = [
                method
                for method in methods(options.budget, options.steps)
                if context <= method.longest and options.methods in method.name
            ]
            rows += measure(model, context, chosen, options.rounds)
            gc.collect()
    report(rows)
    entry = {
        "benchmark": "decode",
        "settings": vars(options),
        "machine": describe_machine(torch.device("cpu")),
        "versions": versions(),
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": [asdict(row) for row in rows],
    }
    if options.write:
        entries = json.loads(LEDGER.read_text()) if LEDGER.exists() else []
        LEDGER.parent.mkdir(exist_ok=True)
        LEDGER.write_text(json.dumps([*entries, entry], indent=1) + "\n")
    print(json.dumps(entry))


if __name__ == "__main__":
    main()
