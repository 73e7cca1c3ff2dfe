"""Whole decode steps of models of real size: replayed ArkCache steps against a `StaticCache`.

Both are CUDA graphs, so that neither pays for Python; the events around a step of ArkCache include
the counting that the host does for it, where that takes longer than the GPU. A step that was to be
replayed and is not fails its check. Weights are random and caches are filled with random keys and
values, so selections mean nothing; how many pages a step recalls is therefore set by hand. Every
step repeats the same token at the same position, which selects the same pages again, and before it
a share of the places is emptied:

    recall_0      nothing: what is selected is resident. The same kernels with nothing to recall
    recall_10     a tenth: what must be no slower than 1.1 times that
    recall_100    all: the worst case

What was really recalled is counted and kept beside each figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from arkcache import KVCacheManager
from arkcache.layers.paged import PagedLayer
from benchmarks.gpu.baseline import static_step
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.check import Outcome
from benchmarks.gpu.models import (
    SHAPES,
    SPARE_BYTES,
    TINY,
    cache_config,
    check_room,
    filled_cache,
    kv_bytes,
    largest_batch,
    make_model,
)
from tests.gpu.decoder import captured
from tests.gpu.outcome import Skipped
from tests.gpu.replays import Replays, replaying

SHARES = (0, 10, 100)
REPEATS = 32
"""Measured steps; a page of 32 tokens seals in one of them."""

WARM_UP = 36
"""Steps until both kinds are recorded: the caches are filled to 3 tokens before a page seals."""

TINY_SIZES = (384, 1)
"""Context and batch of a rehearsal."""


class Steps:
    """Decode steps that are replayed: the same token at the same position, over and over.

    Attributes:
        manager: of the cache.
        replays: graphs replayed since both kinds of steps are recorded.
        host_ms: milliseconds that each plain and each sealing step took on the host.
    """

    def __init__(
        self, bench: Bench, model: Any, cache: Any, replays: Replays, batch: int, context: int
    ) -> None:
        self._model, self._cache, self.replays = model, cache, replays
        self._ids = torch.ones((batch, 1), dtype=torch.int64, device=bench.device)
        self._positions = torch.full_like(self._ids, context)
        self.manager: KVCacheManager = cache.managers[0]
        self.host_ms: dict[str, list[float]] = {"plain": [], "sealing": []}

    def __call__(self, _number: int = 0) -> None:
        """Queue one step."""
        kind = "sealing" if captured(self.manager).seals_next() else "plain"
        start = time.perf_counter()
        self._model(input_ids=self._ids, position_ids=self._positions, past_key_values=self._cache)
        self.host_ms[kind].append((time.perf_counter() - start) * 1e3)


@contextmanager
def warm_steps(bench: Bench, model: Any, cache: Any, batch: int, context: int) -> Iterator[Steps]:
    """Steps of which both kinds are recorded. Raises where they are not replayed."""
    with torch.inference_mode(), replaying(bench, model, cache, 1024) as replays:
        steps = Steps(bench, model, cache, replays, batch, context)
        for number in range(bench.pick(WARM_UP, 2)):
            steps(number)
        bench.synchronize()
        replays.count = 0
        steps.host_ms = {kind: [] for kind in steps.host_ms}
        yield steps


def ark_steps(
    bench: Bench, model: Any, cache: Any, batch: int, context: int, name: str
) -> dict[str, Any]:
    """Milliseconds of a replayed step, with no, some and all of the selected pages recalled.

    Noted under `name` as far as they go.
    """
    found: dict[str, Any] = {}
    with warm_steps(bench, model, cache, batch, context) as steps:
        manager = steps.manager
        for share in SHARES:
            before = manager.stats()
            timing = bench.time_calls(steps, REPEATS, before=emptying(manager, share))
            steps.replays.check(REPEATS)
            steps.replays.count = 0
            after = manager.stats()
            recalled = after.pages_recalled - before.pages_recalled
            hits = after.pages_hit - before.pages_hit
            nbytes = after.bytes_recalled - before.bytes_recalled
            found[f"recall_{share}"] = timing.asdict() | {
                "hit_rate": round(hits / max(1, hits + recalled), 4),
                "recalled_mib": round(nbytes / bench.pick(REPEATS + 3, 1) / 2**20, 2),
            }
            bench.note(**{name: found})
        for kind, samples in steps.host_ms.items():
            if samples:
                found[f"host_ms_{kind}"] = round(statistics.median(samples), 3)
    stats = manager.stats()
    sizes = {"device": stats.device_bytes, "digests": stats.digest_bytes, "host": stats.host_bytes}
    found |= {f"{kind}_gb": round(size / 1e9, 3) for kind, size in sizes.items()}
    bench.note(**{name: found})
    return found


def emptying(manager: KVCacheManager, share: int) -> Callable[[int], None]:
    """What empties so many percent of the places of all layers, other places at every step."""
    engines = [layer.engine for layer in manager._layers if isinstance(layer, PagedLayer)]
    tables = [engine.pages.page_table.page_of for engine in engines]
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
    try:
        timing = bench.time_calls(static_step(bench, model, batch, context), bench.pick(20, 1))
    except torch.OutOfMemoryError as error:
        return {"skipped": f"does not fit: {str(error)[:120]}"}
    finally:
        bench.release()
    return timing.asdict() | {"attention": bench.kept["dense_is"]}


# -- the checks -----------------------------------------------------------------------------------


def whole_step(bench: Bench, shape: str, context: int, batch: int) -> Outcome:
    """A step at one size by default settings; a single one also with spare places for guesses.

    The figure is StaticCache's time over that of a step in which a tenth is recalled.
    """
    check_room(bench, shape, context, batch, "K16V16")
    name = f"step {shape} {context} {batch}"
    context, batch = bench.pick((context, batch), TINY_SIZES)
    model = make_model(bench, shape)
    bench.note(context=context, batch=batch)
    config = cache_config(bench)
    with filled_cache(bench, model, config, batch, context) as cache:
        found = ark_steps(bench, model, cache, batch, context, "default")
    ours = {share: found[f"recall_{share}"]["median_us"] for share in SHARES}
    bench.kept[name] = ours
    static = static_ms(bench, model, shape, batch, context)
    bench.note(static=static)
    if batch == 1 and bench.seconds_left() > 40 and not bench.rehearsing:
        config = cache_config(bench, device_pool_factor=2.0)
        with filled_cache(bench, model, config, batch, context) as cache:
            ark_steps(bench, model, cache, batch, context, "pool_factor_2")
    if "skipped" in static:
        raise Skipped(f"StaticCache {static['skipped']}")
    return Outcome(static["median_us"] / ours[10])


def recalled_share(bench: Bench, shape: str, context: int, batch: int) -> Outcome:
    """What recalling a tenth and all of the pages costs a step that `whole_step` has timed."""
    ours = bench.kept.get(f"step {shape} {context} {batch}")
    if ours is None:
        raise Skipped("the step was not timed in this process")
    return Outcome(
        ours[10] / ours[0], details={"recall_100_over_recall_0": round(ours[100] / ours[0], 3)}
    )


def throughput(bench: Bench, shape: str, context: int, preset: str, cap_gb: int) -> Outcome:
    """Tokens per second of the largest batches whose GPU KV fits the cap, a tenth recalled."""
    sizes = bench.pick(SHAPES[shape], TINY)
    config = cache_config(bench, preset)
    context = bench.pick(context, 384)
    dense_batch = bench.pick(cap_gb * 10**9 // (kv_bytes(sizes) * context), 1)
    batch = bench.pick(largest_batch(bench, config, sizes, context, cap_gb * 10**9), 1)
    model = make_model(bench, shape)
    bench.note(batch=batch, static_batch=dense_batch)
    with filled_cache(bench, model, config, batch, context) as cache:
        ours = ark_steps(bench, model, cache, batch, context, preset)
    used = ours["device_gb"] + ours["digests_gb"]
    assert bench.rehearsing or used <= cap_gb, f"the cache takes {used} GB of {cap_gb}"
    static = static_ms(bench, model, shape, dense_batch, context)
    bench.note(static=static)
    if "skipped" in static:
        raise Skipped(f"StaticCache {static['skipped']}")
    rates = {
        "tokens_per_s": batch / ours["recall_10"]["median_us"] * 1e6,
        "static_tokens_per_s": dense_batch / static["median_us"] * 1e6,
    }
    bench.note(**{name: round(rate, 1) for name, rate in rates.items()})
    return Outcome(rates["tokens_per_s"] / rates["static_tokens_per_s"])
