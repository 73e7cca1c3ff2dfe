"""What checks of speed run on: the device and its clock, measured peaks, what is kept of each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.gpu.card import NAN, Card


class Timing(NamedTuple):
    """Of one call, in microseconds; NaN in a rehearsal."""

    median_us: float
    p20_us: float
    p80_us: float
    mean_us: float

    @classmethod
    def of(cls, samples_us: list[float]) -> Timing:
        """The median, the 20th and the 80th percentile, the mean."""
        p20, *_, p80 = statistics.quantiles(samples_us, n=5, method="inclusive")
        return cls(statistics.median(samples_us), p20, p80, statistics.fmean(samples_us))

    def asdict(self) -> dict[str, float]:
        """For the ledger."""
        return {name: round(value, 3) for name, value in self._asdict().items()}


class Bench(Card):
    """A device to check, and how to time it.

    Args:
        device: where the checks run; the CPU in a rehearsal.
        seconds: how long all of them together may take.
        threads: that compile kernels.
        host_bytes: host memory that they may take; None is all that this process may use.
        checkpoint: a folder with a real model, where one is given.

    Attributes:
        rehearsing: whether sizes are tiny and nothing is timed.
        peaks: bytes per second, measured in this process: see `transfers.peaks`.
        kept: what later checks in this process use again, such as a model; see `release`.
    """

    def __init__(
        self,
        device: torch.device,
        seconds: float,
        threads: int = 1,
        host_bytes: int | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        super().__init__(device, threads)
        self._ends = time.monotonic() + seconds
        self._host_bytes, self.checkpoint = host_bytes, checkpoint
        self.peaks: dict[str, float] = {}
        self.kept: dict[str, Any] = {}

    def begin(self, tell: Callable[[dict[str, Any]], None]) -> None:
        """Be as new for a check: whatever ran before it, it draws the same numbers."""
        self.notes, self.tell = {}, tell
        torch.manual_seed(0)

    @property
    def host_bytes(self) -> int:
        """Host memory that the checks may take."""
        if self._host_bytes is None:
            from benchmarks.gpu.environment import host_memory

            self._host_bytes = host_memory()
        return self._host_bytes

    def seconds_left(self) -> float:
        """Until no check should be under way any more."""
        return self._ends - time.monotonic()

    def release(self, *names: str) -> None:
        """Free what is garbage, and what was kept under these names."""
        for name in names:
            self.kept.pop(name, None)
        super().release()

    def peak(self, name: str) -> float:
        """Bytes per second: "host_to_device", "device_to_host" or "device" (reads and writes)."""
        if not self.peaks:
            from benchmarks.gpu import transfers

            transfers.peaks(self)
        return self.peaks[name]

    def num_sets(self, nbytes: int) -> int:
        """How many buffers of so many bytes, used in turn, the L2 cache is of no help for."""
        if self.rehearsing:
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(2, -(-2 * cache // nbytes))

    def time(self, run: Callable[[int], Any], sets: int) -> Timing:
        """Time `run(i)`, i counting round the sets of buffers, in a graph of 20 calls or more."""
        replay, calls = self.record(run, sets)
        return self.time_calls(replay, repeats=30, calls=calls)

    def record(
        self, run: Callable[[int], Any], sets: int, calls: int = 20
    ) -> tuple[Callable[[int], Any], int]:
        """A graph of so many calls, at least one per set of buffers, and how many they are.

        The graph leaves out what Python and the driver take to launch. In a rehearsal it is `run`.
        """
        if self.rehearsing:
            return run, 1
        calls = max(calls, sets)
        for number in range(sets):
            run(number)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # others may pin memory
            for number in range(calls):
                run(number % sets)
        return lambda _number: graph.replay(), calls

    def time_calls(
        self,
        run: Callable[[int], Any],
        repeats: int,
        *,
        calls: int = 1,
        before: Callable[[int], Any] = lambda _: None,
    ) -> Timing:
        """Time `run(i)` by events on the stream, after `before(i)`; it stands for so many calls.

        The host queues all repeats without waiting, as it does while it decodes.
        """
        if self.rehearsing:
            before(0)
            run(0)
            return Timing(NAN, NAN, NAN, NAN)
        for number in range(3):
            before(number)
            run(number)
        events = []
        for number in range(repeats):
            before(number)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(number)
            end.record()
            events.append((start, end))
        torch.cuda.synchronize(self.device)
        return Timing.of([start.elapsed_time(end) * 1e3 / calls for start, end in events])
