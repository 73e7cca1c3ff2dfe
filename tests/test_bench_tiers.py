"""The memory paths: what is moved, what is cold, what is refused, what a run comes to."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from arkcache.bench import device_routes, file_pool, routes, tiers
from arkcache.bench.file_pool import FilePool
from arkcache.bench.ledger import commit
from arkcache.bench.tiers import Settings, run
from arkcache.bench.tiers_table import render
from arkcache.bench.timing import Spread, Walk
from arkcache.errors import InputError
from tests.marks import needs_interpreter

MIB = 1 << 20
SMALL = (4096, 12288), (1, 5), 2, MIB
POSITIONS = np.array([7, 3, 0, 12])


@pytest.fixture(scope="module")
def pool() -> tuple[routes.HostTier, Tensor]:
    return routes.make_pool(MIB)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[FilePool]:
    with FilePool(tmp_path, MIB) as made:
        yield made


def check_route(route: routes.Route, source: Tensor, size: int) -> None:
    """Every piece arrives as it is in the pool."""
    route.begin()
    route.before()
    arrived = route.bind(size)(POSITIONS)
    route.finish()
    wanted = routes.pieces_of(source, size)[torch.from_numpy(POSITIONS)]
    assert torch.equal(arrived[: len(POSITIONS)].view(torch.uint8), wanted)
    assert wanted.unique().numel() > 100  # no zeros that would agree with anything


@pytest.mark.parametrize("size", [4096, 12288, 100])
def test_memory_routes_move_what_they_should(
    pool: tuple[routes.HostTier, Tensor], size: int
) -> None:
    paths = routes.memory_paths(pool[1])
    assert [route.name for route in paths.routes] == [routes.GATHER, routes.MOVE]
    for route in paths.routes:
        check_route(route, pool[1], size)
    (peak,) = paths.peaks
    assert peak.nbytes == MIB
    assert torch.equal(peak.run(), pool[1])  # type: ignore[arg-type]


def test_file_routes_read_what_they_should(tmp_path: Path) -> None:
    made = []

    def make() -> FilePool:
        made.append(FilePool(tmp_path, MIB))
        return made[0]

    with routes.file_paths(make, required=True) as paths:
        for route in paths.routes:
            for size in (4096, 12288):
                check_route(route, made[0].data, size)
        named = {route.name for route in paths.routes} | {one.name for one in paths.absent}
        assert named == {routes.WARM, routes.COLD, routes.READ}
    assert made[0].data.numel() == 0


def without_kernel(route: routes.Route) -> bool:
    return route.name != device_routes.BY_KERNEL


def test_device_routes_move_what_they_should(pool: tuple[routes.HostTier, Tensor]) -> None:
    paths = device_routes.device_paths(*pool, torch.device("cpu"))
    forward = filter(without_kernel, paths.routes)
    for route in forward:
        if route.name != device_routes.BACK:
            check_route(route, pool[1], 4096)
    assert {route.peak for route in paths.routes} <= {peak.name for peak in paths.peaks}
    named = {route.name for route in paths.routes} | {one.name for one in paths.absent}
    assert named == {*device_routes.EVERY}


@needs_interpreter
def test_the_gather_kernel_moves_what_it_should(pool: tuple[routes.HostTier, Tensor]) -> None:
    paths = device_routes.device_paths(*pool, torch.device("cpu"))
    (route,) = (one for one in paths.routes if one.name == device_routes.BY_KERNEL)
    check_route(route, pool[1], 4096)


def test_the_way_back_writes_into_the_tier() -> None:
    host, pool = routes.make_pool(MIB)
    paths = device_routes.device_paths(host, pool, torch.device("cpu"))
    (route,) = (one for one in paths.routes if one.name == device_routes.BACK)
    content = route.bind(4096)(POSITIONS)
    assert content.sum() == 0
    pieces = pool.view(-1, 4096)
    assert pieces[torch.from_numpy(POSITIONS)].sum() == 0
    assert pieces[1].sum() > 0


def test_a_gpu_that_memory_cannot_be_pinned_for(
    monkeypatch: pytest.MonkeyPatch, pool: tuple[routes.HostTier, Tensor]
) -> None:
    pageable = SimpleNamespace(pinned=False, why_pageable="no cupy")
    gpu = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.Tensor, "to", lambda self, _device: self)
    monkeypatch.setattr(device_routes.torch, "zeros", lambda *a, device, **k: torch.empty(*a, **k))
    paths = device_routes.device_paths(pageable, pool[1], gpu)  # type: ignore[arg-type]
    assert [route.name for route in paths.routes] == [
        device_routes.ON_DEVICE,
        device_routes.PAGEABLE,
    ]
    assert {one.name for one in paths.absent} | {
        device_routes.ON_DEVICE,
        device_routes.PAGEABLE,
    } == {*device_routes.EVERY}
    assert all("no cupy" in one.reason for one in paths.absent)


def open_files() -> int:
    """File descriptors of this process; 0 where the system does not show them."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


# -- the file -------------------------------------------------------------------------------------


def test_the_file_has_no_name_and_goes(tmp_path: Path) -> None:
    before = open_files()
    with FilePool(tmp_path, MIB) as file:
        assert list(tmp_path.iterdir()) == []
        assert file.data.numel() == MIB
    assert open_files() == before


def test_warm_and_cold(file: FilePool) -> None:
    file.warm()
    assert file.resident_share() == 1
    reason = file.why_never_cold()
    if reason is not None:
        pytest.skip(reason)
    file.drop()
    assert file.resident_share() == 0
    file.read_pieces(np.array([3]), np.empty((1, 4096), np.uint8))
    assert 0 < file.resident_share() < 0.1  # what was asked for, and nothing ahead of it


def test_a_file_that_stays_in_memory_is_not_called_cold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FilePool, "resident_share", lambda _: 0.5)
    with routes.file_paths(lambda: FilePool(tmp_path, MIB), required=True) as paths:
        assert [route.name for route in paths.routes] == [routes.WARM]
        assert [one.name for one in paths.absent] == [routes.COLD, routes.READ]
        assert "50% of the file stays in memory" in paths.absent[0].reason


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(free=MIB)
    monkeypatch.setattr(file_pool.shutil, "disk_usage", lambda _: free)
    with pytest.raises(
        InputError, match="has 1 MiB free, and a temporary file of 1 MiB needs 64 MiB"
    ):
        run(Settings(*SMALL, tmp_path))
    result = run(Settings(*SMALL, tmp_path, needs_file=False))
    assert {one.name for one in result.absent} >= {routes.WARM, routes.COLD, routes.READ}
    assert {row.route for row in result.rows} == {routes.GATHER, routes.MOVE}


def test_a_disk_that_is_full_on_the_way(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = open_files()
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB // 2, hard))
    try:
        with pytest.raises(InputError, match="cannot make a temporary file of 1 MiB"):
            FilePool(tmp_path, MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    assert open_files() == before


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file or directory"):
        FilePool(tmp_path / "none", MIB)


# -- a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"piece_bytes": ()}, "piece_bytes"),
        ({"piece_bytes": (4096, 0)}, "piece_bytes"),
        ({"counts": (4, 4)}, "each once"),
        ({"rounds": 0}, "rounds=0"),
        ({"pool_bytes": 4096}, "to hold a piece"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**settings)  # type: ignore[arg-type]


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "available_memory_bytes", lambda: 2 * MIB)
    with pytest.raises(InputError, match="need 5 MiB of memory, and 2 MiB are available"):
        run(Settings(*SMALL))


def test_a_gpu_without_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tiers, "why_no_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 * MIB, 80 << 30))
    result = run(Settings((4096,), (1,), 1, MIB, tmp_path))
    reasons = dict(result.absent)
    assert {*reasons} >= {*device_routes.EVERY}
    assert "the GPU has 5 MiB free, and 257 MiB are needed" in reasons[device_routes.PAGEABLE]
    assert {row.route for row in result.rows} >= {routes.GATHER}


def test_figures_agree_with_each_other(tmp_path: Path) -> None:
    result = run(Settings(*SMALL, tmp_path))
    assert result.finished
    assert result.rounds == 2
    measured = {row.route for row in result.rows}
    absent = {one.name for one in result.absent}
    assert measured | absent >= {routes.GATHER, routes.WARM, routes.READ, *device_routes.EVERY}
    assert not measured & absent
    peaks = {peak.name: peak for peak in result.peaks}
    for row in result.rows:
        assert len(row.rounds_us) == 2
        assert row.low_us <= row.median_us <= row.high_us
        nbytes = row.num_pieces * row.piece_bytes
        assert row.gb_s == pytest.approx(nbytes / row.median_us / 1e3, rel=0.01, abs=0.001)
        assert row.us_per_piece == pytest.approx(row.median_us / row.num_pieces, abs=0.001)
        peak = peaks[result.peak_of[row.route]]
        assert row.of_peak == pytest.approx(row.gb_s / peak.gb_s, rel=0.05, abs=0.002)
    cases = [(row.route, row.piece_bytes, row.num_pieces) for row in result.rows]
    assert len(cases) == len(set(cases)) == 4 * len(measured)
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in repr(result.to_dict())


def interrupt_at(call: int) -> tiers.Progress:
    calls = iter(range(100000))

    def progress(*_: object) -> None:
        if next(calls) == call:
            raise KeyboardInterrupt

    return progress


def test_an_interrupt_keeps_whole_rounds(tmp_path: Path) -> None:
    settings = Settings((4096,), (1,), 50, MIB, tmp_path)
    result = run(settings, interrupt_at(40))
    assert not result.finished
    assert 0 < result.rounds < 50
    assert {len(row.rounds_us) for row in result.rows} == {result.rounds}
    with pytest.raises(KeyboardInterrupt):
        run(settings, interrupt_at(3))


def test_a_walk_gives_everything_before_anything_again() -> None:
    walk = Walk(12)
    given = [walk.take(4) for _ in range(3)]
    assert sorted(np.concatenate(given).tolist()) == list(range(12))
    assert walk.take(4).tolist() == given[0].tolist()
    assert len(set(walk.take(12).tolist())) == 12


def test_a_spread() -> None:
    assert Spread.of([3.0]) == (3, 3, 3)
    assert Spread.of([1.0, 2, 3, 4, 100]) == (3, 2, 4)


def test_the_table_says_all(tmp_path: Path) -> None:
    result = run(Settings(*SMALL, tmp_path))
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(render(result))
    console.file.close()
    text = console.export_text()
    for route in result.peak_of:
        assert route in text
    for words in (
        "12 KiB",
        "5 per step",
        "microseconds of one piece",
        "GB/s ±",
        "Not here: ",
        "median of 2 rounds",
        "Why: ",
    ):
        assert words in " ".join(text.split())


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    from arkcache.bench.plot_tiers import draw, figure

    result = run(Settings(*SMALL, tmp_path))
    panels = [axes for axes in figure(result).axes if axes.axison]
    assert [panel.get_title(loc="left").partition("\n")[0] for panel in panels] == [*result.peak_of]
    drawn = panels[0].containers[0].lines[0].get_ydata()  # type: ignore[attr-defined]
    assert list(drawn) == [row.gb_s for row in result.rows if row.num_pieces == 1][:2]
    draw(result, tmp_path / "tiers.png")
    assert (tmp_path / "tiers.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="cannot write"):
        draw(result, tmp_path / "none" / "tiers.png")
    with pytest.raises(InputError, match="cannot write"):
        draw(result, tmp_path / "tiers.what")


def test_the_commit_is_of_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = commit()
    in_git = (Path(tiers.__file__).parents[2] / ".git").exists()
    assert (found is not None) == in_git
    assert found is None or len(found.removesuffix("-dirty")) == 40
