"""Whole decode steps of models of real size: replayed ArkCache steps against a `StaticCache`.

Both are CUDA graphs, so that neither pays for Python; the events around a step of ArkCache include
the books that the host keeps for it, where they take longer than the GPU. Weights are random and
caches are filled with random keys and values, so selections mean nothing; how many pages a step
recalls is therefore set by hand. Every step repeats the same token at the same position, which
selects the same pages again, and before it a share of the places is emptied:

    recall_0      nothing: what is selected is resident. The same kernels with nothing to recall
    recall_10     a tenth: what must be no slower than 1.1 times that
    recall_100    all: the worst case

What was really recalled is counted and kept beside each figure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_baseline import static_step
from gpu_common import Bench, Outcome, Skipped

from arkcache import CacheConfig, KVCacheManager
from arkcache.config import NO_LIMIT
from arkcache.kernels.torch_pages import PagePacker

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

SHARES = (0, 10, 100)
REPEATS = 32
"""Measured steps; a page of 32 tokens seals in one of them."""

WARM_UP = 36
"""Steps until both kinds are recorded: the caches are filled to 3 tokens before a page seals."""

DTYPE = torch.bfloat16

SPARE_BYTES = 6 << 30
"""Of GPU memory, for everything that is not a cache or a model."""

SPARE_HOST_BYTES = 16 << 30
"""Of host memory: for this process and for the system."""


# -- models and caches ----------------------------------------------------------------------------


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
    pages = -(-context // config.page_size) * heads * batch
    dense = config.num_dense_layers * pages * packer.layout.nbytes
    paged = sizes["num_hidden_layers"] - config.num_dense_layers
    digests = paged * pages * (2 * head_dim * 2 + 8)
    slots = manager.planner.plan(batch, NO_LIMIT).nbytes
    return slots + dense + digests, paged * pages * packer.layout.nbytes


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
                layer.manager.reserve(context + 1024)
    try:
        yield cache
    finally:
        cache.reset()
        arkcache.detach(model)
        del cache, layer
        bench.release()


# -- steps ----------------------------------------------------------------------------------------


def ark_steps(bench: Bench, model: Any, cache: Any, batch: int, context: int) -> dict[str, Any]:
    """Milliseconds of a replayed step, with no, some and all of the selected pages recalled."""
    from arkcache.huggingface.graphed import replayed

    ids = torch.ones((batch, 1), dtype=torch.int64, device=bench.device)
    positions = torch.full_like(ids, context)
    manager = cache.managers[0]
    found: dict[str, Any] = {}
    with torch.inference_mode(), replayed(model, cache, 1024):

        def step(_number: int) -> None:
            model(input_ids=ids, position_ids=positions, past_key_values=cache)

        for number in range(bench.pick(WARM_UP, 2)):
            step(number)
        for share in SHARES:
            before = manager.stats()
            timing = bench.time_calls(step, REPEATS, before=emptying(manager, share))
            after = manager.stats()
            steps = bench.pick(REPEATS + 3, 1)
            recalled = after.pages_recalled - before.pages_recalled
            hits = after.pages_hit - before.pages_hit
            found[f"recall_{share}"] = timing.asdict() | {
                "hit_rate": round(hits / max(1, hits + recalled), 4),
                "recalled_mib": round(
                    (after.bytes_recalled - before.bytes_recalled) / steps / 2**20, 2
                ),
            }
    stats = manager.stats()
    sizes = {"device": stats.device_bytes, "digests": stats.digest_bytes, "host": stats.host_bytes}
    return found | {f"{name}_gb": round(size / 1e9, 3) for name, size in sizes.items()}


def emptying(manager: KVCacheManager, share: int) -> Any:
    """What empties so many percent of the places of all layers, other places at every step."""
    paged = [layer for layer in manager._layers if hasattr(layer, "_residents")]
    tables = [layer._residents.page_of for layer in paged]
    places = tables[0].shape[1]
    count = round(share * places / 100)
    order = torch.randperm(places, device=tables[0].device).repeat(2)
    starts = [number * count % places for number in range(64)]

    def empty(number: int) -> None:
        start = starts[number % len(starts)]
        for table in tables if count else ():
            table.index_fill_(1, order[start : start + count], -1)

    return empty


def static_ms(bench: Bench, model: Any, shape: str, batch: int, context: int) -> dict[str, Any]:
    """Milliseconds of a step over a `StaticCache`; why not, where it does not fit."""
    sizes = bench.pick(SHAPES[shape], TINY)
    if not bench.rehearsing:
        free, needed = torch.cuda.mem_get_info(bench.device)[0], kv_bytes(sizes) * batch * context
        if needed + SPARE_BYTES > free:
            return {"skipped": f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free"}
    step = static_step(bench, model, batch, context)
    timing = bench.time_calls(step, bench.pick(20, 1))
    del step
    bench.release()
    return timing.asdict() | {"attention": bench.kept["dense_is"]}


# -- the checks -----------------------------------------------------------------------------------


def whole_step(
    bench: Bench, shape: str, context: int, batch: int, against: str = "resident"
) -> Outcome:
    """A step at one size, by default settings and with spare places that are filled by guesses.

    The figure is recall_10 over recall_0 ("resident") or StaticCache over recall_10 ("static").
    """
    check_room(bench, shape, context, batch, "K16V16")
    context, batch = bench.pick((context, batch), (384, 1))
    model = make_model(bench, shape)
    details: dict[str, Any] = {"context": context, "batch": batch}
    for name, factor, seconds in (("default", 1.0, 0), ("speculative", 2.0, 40)):
        if bench.seconds_left() < seconds:
            details[name] = {"skipped": "no time left"}
            continue
        config = _config(bench, device_pool_factor=factor)
        with filled_cache(bench, model, config, batch, context) as cache:
            details[name] = ark_steps(bench, model, cache, batch, context)
    details["static"] = static_ms(bench, model, shape, batch, context)
    ours = {share: details["default"][f"recall_{share}"]["median_us"] for share in SHARES}
    static = details["static"].get("median_us")
    details["recall_10_over_recall_0"] = round(ours[10] / ours[0], 3)
    details["recall_100_over_recall_0"] = round(ours[100] / ours[0], 3)
    if static is not None:
        details["static_over_recall_10"] = round(static / ours[10], 3)
    if against == "static" and static is None:
        raise Skipped(f"StaticCache {details['static']['skipped']}")
    name = "recall_10_over_recall_0" if against == "resident" else "static_over_recall_10"
    return Outcome(details[name], details=details)


def throughput(bench: Bench, shape: str, context: int, preset: str, cap_gb: int) -> Outcome:
    """Tokens per second of the largest batches whose GPU KV fits the cap, a tenth recalled."""
    sizes = bench.pick(SHAPES[shape], TINY)
    config = _config(bench, preset)
    context = bench.pick(context, 384)
    dense_batch = bench.pick(cap_gb * 10**9 // (kv_bytes(sizes) * context), 1)
    batch = bench.pick(_largest_batch(bench, config, sizes, context, cap_gb * 10**9), 2)
    model = make_model(bench, shape)
    config = _config(bench, preset, host_bytes=bench.pick(bench.host_bytes, None))
    with filled_cache(bench, model, config, batch, context) as cache:
        ours = ark_steps(bench, model, cache, batch, context)
    used = ours["device_gb"] + ours["digests_gb"]
    assert bench.rehearsing or used <= cap_gb, f"the cache takes {used} GB of {cap_gb}"
    static = static_ms(bench, model, shape, dense_batch, context)
    if "skipped" in static:
        raise Skipped(f"StaticCache {static['skipped']}")
    rates = {
        "tokens_per_s": batch / ours["recall_10"]["median_us"] * 1e6,
        "static_tokens_per_s": dense_batch / static["median_us"] * 1e6,
    }
    details = {"batch": batch, "static_batch": dense_batch, "static": static, preset: ours}
    details |= {name: round(rate, 1) for name, rate in rates.items()}
    return Outcome(rates["tokens_per_s"] / rates["static_tokens_per_s"], details=details)


def _config(bench: Bench, preset: str = "K16V16", **settings: Any) -> CacheConfig:
    sizes = bench.pick({"budget_tokens": 2048}, {"budget_tokens": 256, "group_size": 8})
    settings = sizes | {"backend": "triton"} | settings
    if not bench.rehearsing:
        settings.setdefault("host_bytes", bench.host_bytes)
    return CacheConfig.preset(preset, **settings)


def _largest_batch(
    bench: Bench, config: CacheConfig, sizes: dict[str, int], context: int, cap: int
) -> int:
    """The most sequences whose device tier fits the cap, and whose pages fit the host."""
    batch = 1
    while True:
        device, host = tier_bytes(bench, config, sizes, context, batch + 1)
        if device > cap or host + SPARE_HOST_BYTES > bench.host_bytes:
            return batch
        batch += 1
