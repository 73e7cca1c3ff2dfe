"""Models of real size with random weights, and caches of random tokens for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from arkcache import CacheConfig, KVCacheManager
from arkcache.config import NO_LIMIT
from arkcache.kernels.torch_pages import PagePacker
from arkcache.memory import CacheShape, plan_memory
from arkcache.tiering.growing import GROWTH
from benchmarks.gpu.bench import Bench
from tests.gpu.decoder import captured
from tests.gpu.outcome import Skipped

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
}
LLAMA_7B = LLAMA_8B | {
    "intermediate_size": 11008,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
SHAPES = {"8b": LLAMA_8B, "7b": LLAMA_7B}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256}

DTYPE = torch.bfloat16

SPARE_BYTES = 3 << 30
"""Of GPU memory, for everything that is not a cache or a model."""

SPARE_HOST_BYTES = 16 << 30
"""Of host memory: for this process and for the system."""


def make_model(bench: Bench, shape: str) -> Any:
    """A random Llama in bf16, kept for the next check of its shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    name = f"model {shape}"
    if name not in bench.kept:
        bench.release(*(other for other in bench.kept if other.startswith("model")))
        sizes = bench.pick(SHAPES[shape], TINY)
        config = LlamaConfig(**sizes, max_position_embeddings=1 << 18, attn_implementation="sdpa")
        torch.manual_seed(0)
        torch.set_default_dtype(DTYPE)
        try:
            with bench.device:
                bench.kept[name] = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    return bench.kept[name]


def kv_bytes(sizes: dict[str, int], layers: int | None = None) -> int:
    """Bytes of a token's keys and values in bf16, in so many layers or all."""
    layers = sizes["num_hidden_layers"] if layers is None else layers
    return layers * sizes["num_key_value_heads"] * sizes["head_dim"] * 4


def check_room(bench: Bench, shape: str, context: int, batch: int, preset: str) -> None:
    """Raise `Skipped` unless host and GPU have the memory that both caches need."""
    if bench.rehearsing:
        return
    sizes = SHAPES[shape]
    config = CacheConfig.preset(preset)
    _, page_bytes = tier_bytes(bench, config, sizes, context, batch)
    if page_bytes + SPARE_HOST_BYTES > bench.host_bytes:
        raise Skipped(
            f"needs {page_bytes / 1e9:.0f} GB of host memory and {SPARE_HOST_BYTES / 1e9:.0f} "
            f"spare, of {bench.host_bytes / 1e9:.0f}"
        )


def tier_bytes(
    bench: Bench, config: CacheConfig, sizes: dict[str, int], context: int, batch: int
) -> tuple[int, int]:
    """Bytes of a cache in bf16 on the device, index included, and of its pages on the host."""
    heads, head_dim = sizes["num_key_value_heads"], sizes["head_dim"]
    manager = KVCacheManager(
        sizes["num_hidden_layers"], heads, head_dim, config, device=bench.device, dtype=DTYPE
    )
    packer: PagePacker = manager.planner.packers[0]
    pages = -(-context // manager.planner.config.page_size) * heads * batch
    dense = config.num_dense_layers * pages * packer.layout.nbytes
    paged = sizes["num_hidden_layers"] - config.num_dense_layers
    cache = CacheShape(sizes["num_hidden_layers"], heads, head_dim, head_dim, DTYPE)
    plan = plan_memory(config, cache, context, batch, device=bench.device.type)
    addresses = 8 * paged * pages
    slots = manager.planner.plan(batch, NO_LIMIT).nbytes
    index = int(GROWTH * (plan.digest_bytes + addresses))
    return slots + dense + index, paged * pages * packer.layout.nbytes


@contextmanager
def filled_cache(
    bench: Bench, model: Any, config: CacheConfig, batch: int, context: int
) -> Iterator[Any]:
    """An `ArkCache` of random tokens, 3 before a page seals; freed afterwards."""
    import arkcache

    cache = arkcache.ArkCache(model, config)
    assert cache.mode == "paged", cache.reason
    llama, context = model.config, context - 3
    # Prompts come in such chunks that a layer's pages fill a staging block of 32 MiB.
    chunk = bench.pick((1 << 25) // (kv_bytes(llama.to_dict(), 1) * batch) // 32 * 32, 128)
    shape = (batch, llama.num_key_value_heads, chunk, llama.head_dim)
    for number, layer in enumerate(cache.layers):
        for start in range(0, context, chunk):
            key, value = bench.randn(*shape), bench.randn(*shape)
            if layer.manager is None:
                layer.lazy_initialization(key, value)
            new = min(chunk, context - start)
            layer.manager.append(layer.index, key[:, :, :new], value[:, :, :new])
            if number == start == 0:
                captured(layer.manager).reserve(context + 1024)
    try:
        yield cache
    finally:
        cache.reset()
        arkcache.detach(model)
        del cache, layer
        bench.release()


def cache_config(bench: Bench, preset: str = "K16V16", **settings: Any) -> CacheConfig:
    """Of a model of real size: the kernels, all host memory, otherwise default settings."""
    sizes = bench.pick({"budget_tokens": 2048}, {"budget_tokens": 256, "group_size": 8})
    settings = sizes | {"backend": "triton"} | settings
    if not bench.rehearsing:
        settings.setdefault("host_bytes", bench.host_bytes)
    return CacheConfig.preset(preset, **settings)


def largest_batch(
    bench: Bench, config: CacheConfig, sizes: dict[str, int], context: int, cap: int
) -> int:
    """The most sequences whose device tier fits the cap, and whose pages fit the host."""
    batch = 1
    while True:
        device, host = tier_bytes(bench, config, sizes, context, batch + 1)
        if device > cap or host + SPARE_HOST_BYTES > bench.host_bytes:
            return batch
        batch += 1
