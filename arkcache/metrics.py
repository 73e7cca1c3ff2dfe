"""Prometheus metrics of live caches, read when they are scraped. Needs the extra "metrics".

    metrics = CacheMetrics()
    prometheus_client.REGISTRY.register(metrics)
    metrics.watch(cache)

A step times its copies between the tiers for it, on a CPU, while a cache is watched; `collect` asks
the caches for the rest, in the thread that scrapes. Names follow vLLM's of its offloaded KV cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol
from weakref import ref

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from arkcache.config import CacheConfig
from arkcache.errors import InputError
from arkcache.stats import CacheStats

_PREFIX = "arkcache:"

COUNTERS: dict[str, tuple[str, Callable[[CacheStats], float]]] = {
    "kv_offload_load_bytes": (
        "Bytes copied from the host tier to the device tier, recalled by decode steps or streamed.",
        lambda stats: stats.bytes_recalled + stats.bytes_streamed,
    ),
    "kv_offload_store_bytes": (
        "Bytes copied from the device tier to the host tier.",
        lambda stats: stats.bytes_backed_up,
    ),
    "kv_offload_load_time": (
        "Seconds that copies of kv_offload_load_bytes took; left out where none was timed.",
        lambda stats: stats.load_seconds,
    ),
    "kv_offload_store_time": (
        "Seconds that copies of kv_offload_store_bytes took; left out where none was timed.",
        lambda stats: stats.store_seconds,
    ),
    "recalled_bytes": (
        "Those of kv_offload_load_bytes that decode steps recalled.",
        lambda stats: stats.bytes_recalled,
    ),
    "page_queries": (
        "Pages of a KV head that decode steps selected.",
        lambda stats: stats.pages_hit + stats.pages_recalled,
    ),
    "page_hits": (
        "Those of page_queries that were in the device tier already.",
        lambda stats: stats.pages_hit,
    ),
    "pages_evicted": (
        "Pages dropped from the device tier to make room.",
        lambda stats: stats.pages_evicted,
    ),
    "pages_demoted": ("Pages rewritten in the coarse format.", lambda stats: stats.pages_demoted),
    "layer_steps": (
        "Decode steps of one token, of each layer.",
        lambda stats: stats.decode_steps,
    ),
}
"""What only grows: what it says, and how it is read."""

TIERS: dict[str, tuple[str, dict[str, Callable[[CacheStats], int]]]] = {
    "kv_cache_bytes": (
        "Bytes held: keys and values in the host tier and on the device, and the page index.",
        {
            "host": lambda stats: stats.host_bytes,
            "device": lambda stats: stats.device_bytes,
            "index": lambda stats: stats.digest_bytes,
        },
    ),
    "kv_cache_tokens": (
        "Tokens held, of each layer and sequence: sealed in the host tier, others on the device.",
        {
            "host": lambda stats: stats.host_tokens,
            "device": lambda stats: stats.total_tokens - stats.host_tokens,
        },
    ),
}
"""What is held at present, by tier."""


LIMITS: dict[str, tuple[Callable[[CacheStats], int], Callable[[CacheConfig], int | None]]] = {
    "host": (lambda stats: stats.host_bytes, lambda config: config.host_bytes),
    "device": (lambda stats: stats.device_bytes, lambda config: config.device_bytes),
}
"""What a tier holds of what, by settings, it may."""


class Watchable(Protocol):
    """What can be watched: an `ArkCache`, a `KVCacheManager`."""

    @property
    def config(self) -> CacheConfig:
        """Settings."""

    def stats(self) -> CacheStats:
        """Counters and sizes."""

    def time_copies(self, on: bool) -> None:
        """Count how long copies between the tiers take, or cease to."""


@dataclass
class _Watched:
    """A cache, the name it is shown by, and what it had counted when it was last read."""

    cache: ref[Watchable]
    name: str
    seen: CacheStats


class CacheMetrics(Collector):
    """Metrics of caches, for a registry of prometheus_client.

    Every metric has one label, `cache`: the name given to `watch`. Caches of one name are added up.
    Caches are held weakly. Counters never go down, whatever becomes of a cache: what it counted
    between the latest read and its end, or a `reset()`, is lost, unless `read` is called before.

    With CUDA graphs, scrape from the thread that decodes: asking waits for the device, which is
    not allowed in any thread while a graph is recorded.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: list[_Watched] = []
        self._totals: dict[str, dict[str, float]] = {}

    def watch(self, cache: Watchable, name: str = "") -> None:
        """Count what this cache does from now on. Raises `InputError` if it is watched already."""
        with self._lock:
            if any(one.cache() is cache for one in self._watched):
                raise InputError("this cache is watched already: forget it first")
            cache.time_copies(True)
            self._watched.append(_Watched(ref(cache), name, cache.stats()))
            self._totals.setdefault(name, dict.fromkeys(COUNTERS, 0))

    def forget(self, cache: Watchable) -> None:
        """Read this cache once more, then no longer; what it counted stays."""
        self.read()
        with self._lock:
            self._watched = [one for one in self._watched if one.cache() is not cache]
            cache.time_copies(False)

    @contextmanager
    def watching(self, cache: Watchable, name: str = "") -> Iterator[None]:
        """Watch a cache for as long as the block runs; nothing that it counts there is lost."""
        self.watch(cache, name)
        try:
            yield
        finally:
            self.forget(cache)

    def read(self) -> dict[str, CacheStats]:
        """Read all caches that live; what those of each name hold."""
        with self._lock:
            held = {name: CacheStats() for name in self._totals}
            living = []
            for one in self._watched:
                cache = one.cache()
                if cache is None:
                    continue
                living.append(one)
                stats = cache.stats()
                totals = self._totals[one.name]
                if any(value(stats) < value(one.seen) for _, value in COUNTERS.values()):
                    one.seen = CacheStats()  # it was reset, and has counted from 0 since
                for name, (_, value) in COUNTERS.items():
                    totals[name] += value(stats) - value(one.seen)
                one.seen = stats
                held[one.name] += stats
            self._watched = living
            return held

    def collect(self) -> Iterator[Metric]:
        """What a registry asks for when it is scraped."""
        held = self.read()
        with self._lock:
            totals = {cache: dict(self._totals[cache]) for cache in held}
        for name, (what, _) in COUNTERS.items():
            counter = CounterMetricFamily(_PREFIX + name, what, labels=["cache"])
            for cache, counted in totals.items():
                if counted[name] or not name.endswith("_time"):
                    counter.add_metric([cache], counted[name])
            yield counter
        for name, (what, tiers) in TIERS.items():
            gauge = GaugeMetricFamily(_PREFIX + name, what, labels=["cache", "tier"])
            for cache, stats in held.items():
                for tier, value in tiers.items():
                    gauge.add_metric([cache, tier], value(stats))
            yield gauge
        yield self._usage()
        yield from _ratios(totals, held)

    def _usage(self) -> GaugeMetricFamily:
        """What tiers hold of their limits; caches of one name together, if all have a limit."""
        gauge = GaugeMetricFamily(
            _PREFIX + "kv_cache_usage_perc",
            "Share of host_bytes or device_bytes that is taken (1 is all), where it is set.",
            labels=["cache", "tier"],
        )
        with self._lock:
            living = [(one.name, cache) for one in self._watched if (cache := one.cache())]
        for name in dict.fromkeys(name for name, _ in living):
            own = [cache for other, cache in living if other == name]
            for tier, (taken, limit) in LIMITS.items():
                limits = [found for cache in own if (found := limit(cache.config)) is not None]
                if len(limits) == len(own):
                    used = sum(taken(cache.stats()) for cache in own)
                    gauge.add_metric([name, tier], used / sum(limits))
        return gauge


def _ratios(
    totals: dict[str, dict[str, float]], held: dict[str, CacheStats]
) -> Iterator[GaugeMetricFamily]:
    """What is known once something was counted."""
    ratios = (
        ("page_hit_rate", "page_hits / page_queries since the start.", "page_hits", "page_queries"),
        (
            "recalled_bytes_per_layer_step",
            "recalled_bytes / layer_steps since the start.",
            "recalled_bytes",
            "layer_steps",
        ),
    )
    for name, what, above, below in ratios:
        gauge = GaugeMetricFamily(_PREFIX + name, what, labels=["cache"])
        for cache, counted in totals.items():
            if counted[below]:
                gauge.add_metric([cache], counted[above] / counted[below])
        yield gauge
    gauge = GaugeMetricFamily(
        _PREFIX + "missed_mass",
        "Share of attention that steps left out by the index's estimate, where it is measured.",
        labels=["cache"],
    )
    for cache, stats in held.items():
        if stats.missed.estimated is not None:
            gauge.add_metric([cache], stats.missed.estimated)
    yield gauge


@contextmanager
def served(metrics: CacheMetrics, port: int, address: str = "127.0.0.1") -> Iterator[int]:
    """Serve these metrics alone, at http://ADDRESS:PORT/metrics, while the block runs.

    port: 0 takes any that is free; the one that was taken is given. Raises `InputError` where it
    cannot be had.
    """
    registry = CollectorRegistry()
    registry.register(metrics)
    try:
        server, thread = start_http_server(port, address, registry)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot serve metrics at {address}:{port}: {error}") from None
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
