"""Paths of a page, as in `arkcache bench tiers`, under pytest-benchmark: `make bench-tests`."""

from collections.abc import Iterator
from typing import Any

import pytest

from arkcache.bench import device_routes, routes
from arkcache.bench.tiers import Settings, all_paths
from arkcache.bench.timing import Walk

POOL_BYTES = 128 << 20
PIECES = [(16 << 10, 1), (16 << 10, 64), (256 << 10, 64)]
NAMES = [routes.GATHER, routes.MOVE, routes.WARM, routes.COLD, routes.READ, *device_routes.EVERY]


@pytest.fixture(scope="module")
def paths() -> Iterator[routes.Paths]:
    """All paths of this machine."""
    with all_paths(Settings(pool_bytes=POOL_BYTES, needs_file=False)) as (found, _pool_bytes):
        yield found


@pytest.mark.parametrize(("piece_bytes", "num_pieces"), PIECES)
@pytest.mark.parametrize("name", NAMES)
def test_route(
    benchmark: Any, paths: routes.Paths, name: str, piece_bytes: int, num_pieces: int
) -> None:
    """One step; a path that this machine does not have is skipped with the reason."""
    for absent in paths.absent:
        if absent.name == name:
            pytest.skip(absent.reason)
    (route,) = (one for one in paths.routes if one.name == name)
    step, walk = route.bind(piece_bytes), Walk(POOL_BYTES // piece_bytes)
    route.begin()

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        route.before()
        route.finish()
        return (walk.take(num_pieces),), {}

    def run(positions: Any) -> None:
        step(positions)
        route.finish()

    benchmark.extra_info["bytes"] = piece_bytes * num_pieces
    benchmark.pedantic(run, setup=setup, rounds=20, warmup_rounds=2)


def test_peak_of_memory(benchmark: Any, paths: routes.Paths) -> None:
    """One large copy, which the paths in memory are compared with."""
    (peak,) = (one for one in paths.peaks if one.name == routes.MEMORY)
    benchmark.extra_info["bytes"] = peak.nbytes
    benchmark.pedantic(peak.run, rounds=20, warmup_rounds=2)
