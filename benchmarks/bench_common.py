"""What the benchmarks share: a small random model, a past to fill caches with, and the ledgers."""

from __future__ import annotations

import json
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from arkcache.demo.machine import describe_machine, versions

VOCABULARY = 1024
NUM_LAYERS = 4
RESULTS = Path(__file__).parent / "results"
COMPARED_PACKAGES = ("optimum-quanto", "hqq")

Past = list[tuple[Tensor, Tensor]]
"""Keys and values [1, kv_heads, tokens, head_dim] of every layer."""


def make_model() -> LlamaForCausalLM:
    """The benchmarks' model, random and the same every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1 << 20,
    )
    return LlamaForCausalLM(config).eval()


def make_past(model: LlamaForCausalLM, context: int) -> Past:
    """Keys and values of random tokens, as the model's own projections make them."""
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


def fill(cache: Cache, past: Past, start: int = 0, stop: int | None = None) -> None:
    """Hand tokens `start` to `stop` of a past to a cache, in one update per layer."""
    for layer, (key, value) in enumerate(past):
        cache.update(key[:, :, start:stop], value[:, :, start:stop], layer)


def time_steps(model: PreTrainedModel, cache: Cache, tokens: list[int]) -> list[float]:
    """Milliseconds of each one-token step."""
    times = []
    for token in tokens:
        start = time.perf_counter()
        model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def ledger_entry(benchmark: str, settings: dict[str, Any], **measured: Any) -> dict[str, Any]:
    """One entry of a ledger: what was measured, where, and with what."""
    return {
        "benchmark": benchmark,
        "settings": settings,
        "machine": describe_machine(torch.device("cpu")),
        "versions": versions() | _compared_versions(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        **measured,
    }


def _commit() -> str:
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.check_output(command, text=True, cwd=RESULTS.parent).strip()


def append_to_ledger(ledger: Path, entry: dict[str, Any]) -> None:
    """Add an entry to the end of a ledger."""
    entries = json.loads(ledger.read_text()) if ledger.exists() else []
    ledger.parent.mkdir(exist_ok=True)
    ledger.write_text(json.dumps([*entries, entry], indent=1) + "\n")


def _compared_versions() -> dict[str, str]:
    """Of the packages that the caches of transformers need, as far as they are installed."""
    found = {}
    for package in COMPARED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
