"""What ArkCache is measured against: torch's attention over the whole context, as fast as it goes.

`StaticCache` is filled to its last place and attended without a mask, which the "sdpa" of
transformers makes for it and which keeps torch from its fastest kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.bench import Bench

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""query [batch, heads, 1, dim], key, value [batch, kv_heads, tokens, dim], scale -> like query."""

NAME = "gpu_check_dense"


def grouped(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """`enable_gqa`: the kernel is left to share the KV heads."""
    return scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)


def stacked(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The query heads of a KV head as if they were queries of one head after another."""
    by_head = query.reshape(key.shape[0], key.shape[1], -1, query.shape[3])
    return scaled_dot_product_attention(by_head, key, value, scale=scale).view_as(query)


def on(backend: SDPBackend, attention: Attention) -> Attention:
    """An attention on one of torch's backends."""

    def attend(*args: Any) -> Tensor:
        with sdpa_kernel(backend):
            return attention(*args)

    return attend


def candidates() -> dict[str, Attention]:
    """What is tried: both ways to share heads, as torch chooses and on each backend."""
    ways = {"enable_gqa": grouped, "stacked": stacked}
    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    return ways | {
        f"{name} {backend.name.lower()}": on(backend, attention)
        for name, attention in ways.items()
        for backend in backends
    }


def fastest_attention(
    bench: Bench, query: Tensor, key: Tensor, value: Tensor
) -> tuple[str, Attention]:
    """The fastest of what torch offers for these shapes, by one buffer."""
    if bench.rehearsing:
        return "enable_gqa", grouped
    best: tuple[float, str, Attention] = (math.inf, "", grouped)
    for name, attention in candidates().items():
        try:
            attention(query, key, value, 1.0)
        except RuntimeError:  # this backend does not take these shapes
            continue
        timing = bench.time_calls(lambda _, a=attention: a(query, key, value, 1.0), repeats=5)
        best = min(best, (timing.median_us, name, attention), key=lambda entry: entry[0])
    return best[1:]


@contextmanager
def attending(model: Any, attention: Attention) -> Iterator[None]:
    """Within it a transformers model attends by `attention`; no mask is made for it."""
    from transformers import AttentionInterface

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        output = attention(query, key, value, kwargs["scaling"])
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, forward)
    previous = model.config._attn_implementation
    model.config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        model.config._attn_implementation_internal = previous


def static_step(bench: Bench, model: Any, batch: int, context: int) -> Callable[[int], Any]:
    """A decode step over a `StaticCache` of `context` random tokens, as a CUDA graph.

    Every step overwrites the last token, so that all of them attend just as many.
    """
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=context)
    shape = (batch, model.config.num_key_value_heads, 1, model.config.head_dim)
    token = torch.zeros(shape, dtype=model.dtype, device=bench.device)
    for layer in cache.layers:
        layer.lazy_initialization(token, token)
        layer.keys.normal_()
        layer.values.normal_()
    layer = cache.layers[0]
    name, attention = fastest_attention(
        bench, token.repeat(1, model.config.num_attention_heads // shape[1], 1, 1),
        layer.keys, layer.values,
    )  # fmt: skip
    bench.kept["dense_is"] = name
    ids = torch.ones((batch, 1), dtype=torch.int64, device=bench.device)
    positions = torch.full_like(ids, context - 1)

    def step(_number: int) -> Any:
        for layer in cache.layers:
            layer.cumulative_length.fill_(context - 1)
        return model(input_ids=ids, position_ids=positions, past_key_values=cache).logits

    with attending(model, attention):
        return captured(bench, step)


def captured(bench: Bench, step: Callable[[int], Any]) -> Callable[[int], Any]:
    """A step as a CUDA graph, after it has run twice; in a rehearsal the step itself."""
    with torch.inference_mode():
        step(0)
        step(0)
        if bench.rehearsing:
            return step
        torch.cuda.synchronize(bench.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may pin memory
            output = step(0)

    def replay(_number: int, _alive: Any = step) -> Any:  # what the graph reads belongs to `step`
        graph.replay()
        return output

    return replay
