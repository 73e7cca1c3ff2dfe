"""What the decode and prompt benchmarks share: random models, a past for caches, timed steps."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import Cache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from arkcache.errors import InputError
from arkcache.sizes import bytes_text
from arkcache.tiering.system_memory import available_memory_bytes

VOCABULARY = 1024

Past = list[tuple[Tensor, Tensor]]
"""Keys and values [1, kv_heads, tokens, head_dim] of every layer."""


def make_model(
    num_layers: int = 4,
    hidden_size: int = 512,
    intermediate_size: int = 1408,
    num_heads: int = 8,
    num_kv_heads: int = 2,
) -> LlamaForCausalLM:
    """A random Llama with heads of 64, the same every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=64,
        max_position_embeddings=1 << 20,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    return model


def make_past(model: LlamaForCausalLM, context: int) -> Past:
    """Keys and values of random tokens, as the model's own projections make them."""
    tokens = torch.randint(VOCABULARY, (1, context), generator=torch.Generator().manual_seed(1))
    past = []
    for layer in model.model.layers:
        hidden = layer.input_layernorm(model.model.embed_tokens(tokens))
        shape = (1, context, -1, 64)
        key = layer.self_attn.k_proj(hidden).view(shape).transpose(1, 2)
        value = layer.self_attn.v_proj(hidden).view(shape).transpose(1, 2)
        cos, sin = model.model.rotary_emb(hidden, torch.arange(context)[None])
        past.append((apply_rotary_pos_emb(key, key, cos, sin)[0], value))
    return past


def past_bytes(model: LlamaForCausalLM, context: int) -> int:
    """Bytes of keys and values of so many tokens, in fp32."""
    config = model.config
    heads = config.num_key_value_heads or config.num_attention_heads
    return 2 * 4 * 64 * heads * config.num_hidden_layers * context


def check_memory(needed: int, context: int) -> None:
    """Raise `InputError` where so many bytes, for caches of so many tokens, are not available."""
    found = available_memory_bytes()
    if needed > found:
        raise InputError(
            f"caches of {context:,} tokens need about {bytes_text(needed)}, and "
            f"{bytes_text(found)} are available: give shorter --contexts, or fewer --methods"
        )


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
