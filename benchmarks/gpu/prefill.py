"""Seconds of a prompt that is read in chunks, against a cache that keeps everything on the GPU."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.check import Outcome
from benchmarks.gpu.models import cache_config, check_room, make_model

CHUNK = 2048


def prefill(bench: Bench, shape: str, context: int) -> Outcome:
    """The figure is seconds over those of a `DynamicCache` that reads the same chunks."""
    from transformers import DynamicCache

    import arkcache

    check_room(bench, shape, context, 1, "K16V16")
    context, chunk = bench.pick((context, CHUNK), (192, 64))
    model = make_model(bench, shape)
    ids = torch.randint(model.config.vocab_size, (1, context), device=bench.device)
    chunks = ids.split(chunk, dim=1)
    with torch.inference_mode():
        full = DynamicCache(config=model.config)
        read(bench, model, full, chunks[:2])
        full = DynamicCache(config=model.config)
        theirs = read(bench, model, full, chunks)
        del full
        bench.note(context=context, chunk=chunk, full_cache_seconds=round(theirs, 3))
        bench.release()
        ours = []
        for part in (chunks[:2], chunks):  # first what compiles and measures copies
            cache = arkcache.ArkCache(model, cache_config(bench))
            assert cache.mode == "paged", cache.reason
            ours.append(read(bench, model, cache, part))
            cache.reset()
            arkcache.detach(model)
    rate = context / ours[1]
    bench.note(seconds=round(ours[1], 3), tokens_per_s=round(rate), first_seconds=round(ours[0], 3))
    return Outcome(ours[1] / theirs if not bench.rehearsing else None)


def read(bench: Bench, model: Any, cache: Any, chunks: tuple[Tensor, ...]) -> float:
    """Seconds to read a prompt in these chunks."""
    bench.synchronize()
    start = time.perf_counter()
    for chunk in chunks:
        model(input_ids=chunk, past_key_values=cache, logits_to_keep=1)
    bench.synchronize()
    return time.perf_counter() - start
