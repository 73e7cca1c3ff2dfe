"""Reading runs of pages: the same bytes by either path, and the faster one by what was measured."""

import math
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from arkcache.tiering import pinned, reading
from arkcache.tiering.host import HostTier
from arkcache.tiering.reading import CopyPath, measure_run_bytes, read_lines
from tests.tiering.fake_cupy import GPU, FakeCupy, cupy
from tests.tiering.test_host import ids, write

__all__ = ["cupy"]

CPU = torch.device("cpu")
LINES = np.array([3, 4, 5, 130, 131, 127, 128, 0])


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the kernel was asked for, in the place of the kernel."""
    asked: list[Tensor] = []

    def gather_lines(pieces: Tensor, lines: Tensor, target: Tensor) -> None:
        asked.append(lines)
        target.copy_(pieces[lines])

    kernel = SimpleNamespace(gather_lines=gather_lines)
    monkeypatch.setitem(sys.modules, "arkcache.kernels.triton_copy", kernel)
    return asked


@pytest.mark.parametrize("size", [96, 100])
@pytest.mark.parametrize("heads", [1, 2])
def test_a_host_selects_lines(size: int, heads: int) -> None:
    tier = HostTier([size], 300 * size)
    write(tier, tier.allocate(200))
    pieces = tier.pieces().view(-1, size // heads)
    for lines in (LINES, LINES[::-1], LINES[:0]):
        found = read_lines(tier, pieces, lines, CPU)
        assert torch.equal(found, pieces[torch.from_numpy(lines.copy())])


@pytest.mark.usefixtures("gathered")
@pytest.mark.parametrize("run_bytes", [0, math.inf])
def test_either_path_reads_the_same(run_bytes: float) -> None:
    pieces, target = torch.randint(0, 256, (200, 96), dtype=torch.uint8), torch.empty(8, 96)
    target = target.to(torch.uint8)
    path = CopyPath()
    path.run_bytes = run_bytes
    path.read(pieces, LINES, target, 128)
    assert torch.equal(target, pieces[torch.from_numpy(LINES)])


def test_the_length_of_runs_decides(gathered: list[Tensor]) -> None:
    pieces, target = torch.zeros((200, 96), dtype=torch.uint8), torch.ones(8, 96).byte()
    path = CopyPath()
    path.run_bytes = 4 * 96
    path.read(pieces, np.arange(8), target, 4)
    assert gathered == []
    path.read(pieces, np.arange(8), target, 3)  # boundaries make three runs of it
    assert len(gathered) == 1
    path.read(pieces, ids([0, 1, 2, 5, 6, 7, 8, 10]), target, 200)
    assert len(gathered) == 2


def test_it_is_measured_once_and_with_pinned_lines_only(
    gathered: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples: list[Tensor] = []

    def measure(sample: Tensor, _device: torch.device) -> float:
        samples.append(sample)
        return 0.0

    monkeypatch.setattr(reading, "measure_run_bytes", measure)
    monkeypatch.setattr(reading, "SAMPLE_BYTES", 100 * 96)
    pieces, path = torch.zeros((200, 96), dtype=torch.uint8), CopyPath()
    path.read(pieces, ids([20, 2]), torch.empty((2, 96), dtype=torch.uint8), 128)
    assert samples == []  # too little is pinned to tell
    assert len(gathered) == 1
    for highest in (49, 199):
        path.read(pieces, ids([highest, 2]), torch.empty((2, 96), dtype=torch.uint8), 128)
    assert [len(sample) for sample in samples] == [50]
    assert path.run_bytes == 0


def times(monkeypatch: pytest.MonkeyPatch, copy: float, short: float, kernel: float) -> float:
    """The threshold where one copy, 64 short ones and the kernel take so many seconds."""
    clock = iter((copy, short, kernel))

    def seconds(work: Callable[[], None], _device: torch.device) -> float:
        work()
        return next(clock)

    monkeypatch.setattr(reading, "_seconds", seconds)
    return measure_run_bytes(torch.zeros((100, 1000), dtype=torch.uint8), CPU)


@pytest.mark.usefixtures("gathered")
def test_copies_win_from_where_their_speed_pays_for_their_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 10 ns/byte by copy, 12 by the kernel, and 10 us more per copy: even at 5000 bytes.
    assert times(monkeypatch, 1e-3, 64 * (10e-6 + 10e-6), 1.2e-3) == pytest.approx(5000)
    assert times(monkeypatch, 1e-3, 64 * 20e-6, 1e-3) == math.inf  # the kernel is as fast
    assert times(monkeypatch, 1e-3, 64 * 20e-6, 0.9e-3) == math.inf
    assert times(monkeypatch, 1e-3, 64 * 9e-6, 2e-3) == 0  # copies that cost nothing


def test_the_least_of_some_times(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: calls.append("wait"))
    assert 0 <= reading._seconds(lambda: calls.append("work"), GPU) < 1
    assert calls == ["wait", "work", "wait"] * 5


def test_a_device_reads_by_its_path(
    cupy: FakeCupy, gathered: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinned, "CHUNK_BYTES", 1)
    asked: list[int] = []

    class Path(CopyPath):
        def read(
            self, pieces: Tensor, lines: np.ndarray, target: Tensor, lines_per_chunk: int
        ) -> None:
            asked.append(lines_per_chunk)

    tier = HostTier([96], 300 * 96, pin_to=GPU)
    tier.allocate(200)
    monkeypatch.setattr(reading, "copy_path_of", lambda _device: Path())
    device = torch.device("meta")
    found = read_lines(tier, tier.pieces().view(-1, 48), LINES, device)
    assert (found.shape, found.device, asked) == ((8, 48), device, [256])
    pageable = HostTier([96], 300 * 96)
    pageable.allocate(200)
    assert read_lines(pageable, pageable.pieces(), LINES, device).shape == (8, 96)
    assert len(asked) == 1


def test_a_path_per_device() -> None:
    assert reading.copy_path_of(CPU) is reading.copy_path_of(torch.device("cpu"))
    assert reading.copy_path_of(CPU) is not reading.copy_path_of(torch.device("meta"))
