"""How fast a page moves along every path of this machine, by its size and how many move at once.

A step moves so many pieces from random places, and is over when all have arrived. Every path, size
and count is timed once per round, the rounds follow each other, and a figure is the median over
them: what disturbs the machine for a while disturbs all alike.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from arkcache.bench.device_routes import (
    device_paths,
    no_device_paths,
    why_no_device,
    why_no_room,
)
from arkcache.bench.file_pool import FilePool
from arkcache.bench.routes import (
    MOVED_BYTES,
    Absent,
    Paths,
    Peak,
    Route,
    file_paths,
    make_pool,
    memory_paths,
)
from arkcache.bench.timing import Progress, Spread, Walk
from arkcache.errors import InputError
from arkcache.sizes import bytes_text
from arkcache.tiering.pieces import Ids
from arkcache.tiering.system_memory import available_memory_bytes

SAMPLE_BYTES = 4 << 20
"""A sample is so many steps that about this much moves, so that the clock is fine enough."""

WORK_PARTS = 4
"""So often there is host memory beside the pool for what a step moves: what it writes, on several
paths, and what copies pass through."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        piece_bytes: sizes of a piece.
        counts: pieces of a step; of those sizes where together they are `MOVED_BYTES` at most.
        rounds: so often each is timed.
        pool_bytes: memory that pieces are read from, and the size of the temporary file.
        folder: where the file is made; None is the system's folder for such files.
        needs_file: whether a file that cannot be made is an error, or a path that is absent.
    """

    piece_bytes: tuple[int, ...] = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
    counts: tuple[int, ...] = (1, 8, 64, 512)
    rounds: int = 15
    pool_bytes: int = 256 << 20
    folder: Path | None = None
    needs_file: bool = True

    def __post_init__(self) -> None:
        for name in ("piece_bytes", "counts"):
            given = getattr(self, name)
            if not given or min(given) < 1 or len(set(given)) < len(given):
                raise InputError(f"{name}={given}: expected numbers from 1 on, each once")
        if self.rounds < 1:
            raise InputError(f"rounds={self.rounds}: expected at least 1")
        least = max(*self.piece_bytes, 1 << 20)
        if self.pool_bytes < least:
            raise InputError(
                f"a pool of {self.pool_bytes} bytes: expected {least} at least, to hold a piece"
            )

    @classmethod
    def quick(cls, folder: Path | None = None, *, needs_file: bool = True) -> Settings:
        """Few sizes, few rounds, little memory: some seconds."""
        return cls((16 << 10, 256 << 10), (1, 64), 5, 64 << 20, folder, needs_file)


class Case(NamedTuple):
    """A step: so many pieces of so many bytes along a path."""

    route: str
    piece_bytes: int
    num_pieces: int


@dataclass(frozen=True)
class Row:
    """A case's figures. Microseconds per step: median, quartiles and each round.

    `gb_s` is 1e9 bytes that arrive per second, `of_peak` its share of the path's peak.
    """

    route: str
    piece_bytes: int
    num_pieces: int
    median_us: float
    low_us: float
    high_us: float
    rounds_us: list[float]
    us_per_piece: float
    gb_s: float
    of_peak: float


@dataclass(frozen=True)
class PeakRow:
    """What one large move of so many bytes reaches, and which paths are compared with it."""

    name: str
    nbytes: int
    gb_s: float
    low_gb_s: float
    high_gb_s: float


@dataclass
class Result:
    """What was measured; `finished` is false after an interrupt, and `rounds` what was done."""

    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    peaks: list[PeakRow] = field(default_factory=list)
    peak_of: dict[str, str] = field(default_factory=dict)
    absent: list[Absent] = field(default_factory=list)
    rounds: int = 0
    finished: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"absent": [one._asdict() for one in self.absent]}


def run(settings: Settings, progress: Progress = lambda *_: None) -> Result:
    """Measure every path that there is; after Ctrl-C, what the rounds so far come to.

    Raises `InputError` where memory or disk have too little room, `KeyboardInterrupt` before the
    first round is over.
    """
    progress("Making the pool and the file", 0, 1)
    with all_paths(settings) as (paths, pool_bytes):
        return measure(settings, paths, pool_bytes, progress)


@contextmanager
def all_paths(settings: Settings) -> Iterator[tuple[Paths, int]]:
    """Every path that there is, and how many bytes the pool has that they read from.

    Raises `InputError` where memory or disk have too little room.
    """
    _check_memory(settings)
    reason = why_no_device()
    if reason is None:
        reason = why_no_room(settings.pool_bytes)
    device = None if reason is not None else torch.device("cuda")
    host, pool = make_pool(settings.pool_bytes, device)
    folder = settings.folder or Path(tempfile.gettempdir())
    with file_paths(lambda: FilePool(folder, len(pool)), required=settings.needs_file) as files:
        parts = [memory_paths(pool), files]
        if device is None:
            parts.append(no_device_paths(reason or ""))
        else:
            parts.append(device_paths(host, pool, device))
        paths = Paths(
            [route for one in parts for route in one.routes],
            [peak for one in parts for peak in one.peaks],
            [absent for one in parts for absent in one.absent],
        )
        yield paths, len(pool)


def measure(settings: Settings, paths: Paths, pool_bytes: int, progress: Progress) -> Result:
    """Time all cases of some paths, in turn, `rounds` times."""
    result = Result(asdict(settings) | {"num_threads": torch.get_num_threads()})
    result.settings["folder"] = None  # says nothing of the machine, and where it is is private
    result.absent = paths.absent
    result.peak_of = {route.name: route.peak for route in paths.routes}
    cases = list(_cases(settings, paths, pool_bytes))
    walks = {size: Walk(pool_bytes // size) for size in settings.piece_bytes}
    seconds: dict[Case | str, list[float]] = {}
    done, total = 0, settings.rounds * (len(cases) + len(paths.peaks))
    try:
        for number in range(-1, settings.rounds):  # the first warms up
            kept = seconds if number >= 0 else {}
            for name, taken in _one_round(paths, cases, walks):
                progress("Moving pieces", done, total)
                kept.setdefault(name, []).append(taken)
                done += number >= 0
            result.rounds = number + 1
        result.finished = True
    except KeyboardInterrupt:
        if result.rounds == 0:
            raise
    whole = {name: taken[: result.rounds] for name, taken in seconds.items()}
    _summarise(result, paths, cases, whole)
    return result


def _cases(settings: Settings, paths: Paths, pool_bytes: int) -> Iterator[tuple[Route, Case]]:
    for route in paths.routes:
        for size in settings.piece_bytes:
            for count in settings.counts:
                if count * size <= min(MOVED_BYTES, pool_bytes):
                    yield route, Case(route.name, size, count)


def _one_round(
    paths: Paths, cases: list[tuple[Route, Case]], walks: dict[int, Walk]
) -> Iterator[tuple[Case | str, float]]:
    """Seconds of every peak's move and every case's step."""
    for peak in paths.peaks:
        yield peak.name, _time_peak(peak)
    latest = None
    for route, case in cases:
        if route is not latest:
            route.begin()
            latest = route
        yield case, _time_steps(route, case, walks[case.piece_bytes])


def _time_peak(peak: Peak) -> float:
    peak.before()
    peak.finish()
    start = perf_counter()
    peak.run()
    peak.finish()
    return perf_counter() - start


def _time_steps(route: Route, case: Case, walk: Walk) -> float:
    """Seconds of one step, the mean of a sample."""
    step = route.bind(case.piece_bytes)
    most = SAMPLE_BYTES // (case.num_pieces * case.piece_bytes)
    steps: list[Ids] = [
        walk.take(case.num_pieces) for _ in range(max(1, min(route.max_calls, most)))
    ]
    route.before()
    route.finish()
    start = perf_counter()
    for positions in steps:
        step(positions)
    route.finish()
    return (perf_counter() - start) / len(steps)


def _summarise(
    result: Result,
    paths: Paths,
    cases: list[tuple[Route, Case]],
    seconds: dict[Case | str, list[float]],
) -> None:
    rates = {}
    for peak in paths.peaks:
        taken = Spread.of(seconds[peak.name])
        figures = (round(peak.nbytes / one / 1e9, 3) for one in (taken.median, *taken[:0:-1]))
        result.peaks.append(PeakRow(peak.name, peak.nbytes, *figures))
        rates[peak.name] = peak.nbytes / taken.median
    for route, case in cases:
        rounds = [round(one * 1e6, 2) for one in seconds[case]]
        us = Spread(*(round(one, 2) for one in Spread.of(rounds)))
        rate = case.num_pieces * case.piece_bytes / us.median * 1e6
        row = Row(
            *case,
            *us,
            rounds,
            us_per_piece=round(us.median / case.num_pieces, 3),
            gb_s=round(rate / 1e9, 3),
            of_peak=round(rate / rates[route.peak], 3),
        )
        result.rows.append(row)


def _check_memory(settings: Settings) -> None:
    work = WORK_PARTS * min(settings.pool_bytes, MOVED_BYTES)
    needed, found = settings.pool_bytes + work, available_memory_bytes()
    if needed > found:
        raise InputError(
            f"a pool of {bytes_text(settings.pool_bytes)} and {bytes_text(work)} to work with need "
            f"{bytes_text(needed)} of memory, and {bytes_text(found)} are available: give less "
            "with --pool"
        )
