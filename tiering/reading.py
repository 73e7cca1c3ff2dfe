"""Reading runs of pages that the host knows: by one copy per run, or by a kernel.

A copy moves a long run at the full speed of the bus but costs the driver some microseconds, however
short the run; a kernel reads pinned memory itself, somewhat slower, and does not mind how scattered
the lines are. From what length of run on copies win is measured once per device, when first needed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arkcache.tiering.host import HostTier
from arkcache.tiering.pieces import take
from arkcache.tiering.pinned import Run, runs_of
from arkcache.tiering.streams import numbered
from arkcache.tiering.transfer import upload

RUN_BYTES = 128 << 10
"""Runs from here on are copied where too little is there to measure with."""

SAMPLE_BYTES = 16 << 20
"""Measured with so much; a quarter of it will do, less says little."""

NUM_SHORT = 64
"""Short copies that the cost of one is averaged over."""


def read_lines(
    host: HostTier, pieces: Tensor, lines: NDArray[np.int64], device: torch.device
) -> Tensor:
    """Lines of the host tier, copied to a device: uint8 [count, nbytes].

    Queued on the device's current stream; where the tier is pageable, the host waits.

    Args:
        host: the host tier.
        pieces: what is in it, uint8 [lines, nbytes]: `host.pieces()` with a line per page and head.
        lines: int64 [count], which of them.
        device: where to.
    """
    lines = np.ascontiguousarray(lines)
    if host.pieces_per_chunk is None or device.type == "cpu" or len(lines) == 0:
        return take(pieces, lines).to(device)
    target = torch.empty((len(lines), pieces.shape[1]), dtype=torch.uint8, device=device)
    lines_per_chunk = host.pieces_per_chunk * (host.piece_bytes[0] // pieces.shape[1])
    copy_path_of(device).read(pieces, lines, target, lines_per_chunk)
    return target


class CopyPath:
    """How lines of pinned memory come to one device.

    Attributes:
        run_bytes: from this mean length of a run on, runs are copied; None until it is measured.
    """

    def __init__(self) -> None:
        self.run_bytes: float | None = None

    def read(
        self, pieces: Tensor, lines: NDArray[np.int64], target: Tensor, lines_per_chunk: int
    ) -> None:
        """target[i] = pieces[lines[i]], from memory that the target's device reaches by itself."""
        runs = runs_of(lines, lines_per_chunk)
        if self._wins(pieces, lines, target, lines_per_chunk) * len(runs) <= target.numel():
            copy_runs(pieces, runs, target)
        else:
            gather(pieces, lines, target)

    def _wins(
        self, pieces: Tensor, lines: NDArray[np.int64], target: Tensor, lines_per_chunk: int
    ) -> float:
        if self.run_bytes is None:
            # Lines up to one that is held are pinned, and within a chunk they are one run.
            pinned = min(int(lines.max()) + 1, lines_per_chunk, SAMPLE_BYTES // pieces.shape[1])
            if pinned * pieces.shape[1] < SAMPLE_BYTES // 4:
                return RUN_BYTES
            self.run_bytes = measure_run_bytes(pieces[:pinned], target.device)
        return self.run_bytes


def measure_run_bytes(sample: Tensor, device: torch.device) -> float:
    """Bytes of a run from which on a copy is faster than the kernel; infinite if none is.

    sample: pinned lines uint8 [count, nbytes], at least `NUM_SHORT`. The host waits.
    """
    count, nbytes = sample.shape
    target = torch.empty(sample.shape, dtype=torch.uint8, device=device)
    order = np.random.default_rng(0).permutation(count)
    short = [Run(row, row, 1) for row in order[:NUM_SHORT].tolist()]
    copy_time = _seconds(lambda: copy_runs(sample, [Run(0, 0, count)], target), device)
    short_time = _seconds(lambda: copy_runs(sample, short, target), device)
    kernel_time = _seconds(lambda: gather(sample, order, target), device)
    per_byte, saved_per_byte = (t / (count * nbytes) for t in (copy_time, kernel_time - copy_time))
    per_copy = max(0.0, short_time / len(short) - nbytes * per_byte)
    return per_copy / saved_per_byte if saved_per_byte > 0 else math.inf


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """The least time that `work` took of some."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def copy_runs(pieces: Tensor, runs: list[Run], target: Tensor) -> None:
    """target[entry : entry + length] = pieces[first : first + length] for each run, one copy each;
    the host does not wait."""
    for first, entry, length in runs:
        source = pieces[first : first + length]
        target[entry : entry + length].copy_(source, non_blocking=True)


def gather(pieces: Tensor, lines: NDArray[np.int64], target: Tensor) -> None:
    """target[i] = pieces[lines[i]], by a kernel on the target's device."""
    from arkcache.kernels.triton_copy import gather_lines

    gather_lines(pieces, upload(lines, target.device), target)


def copy_path_of(device: torch.device) -> CopyPath:
    """The path to a device, the same for all who ask."""
    return _path_to(numbered(device))


@cache
def _path_to(_device: torch.device) -> CopyPath:
    return CopyPath()
