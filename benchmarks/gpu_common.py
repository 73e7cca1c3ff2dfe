"""What all GPU checks share: the device and its clock, measured peaks, and what a check answers."""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
NAN = float("nan")


class Skipped(Exception):
    """Why a check cannot be done here."""


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    Attributes:
        figure: what its aim is about, in the aim's unit.
        of_peak: the share of the peak that this is, where it has one.
        details: everything else worth keeping.
    """

    figure: float | None = None
    of_peak: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


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


class Bench:
    """A device to check, and how to time it.

    Args:
        device: where the checks run; the CPU in a rehearsal.
        host_bytes: host memory that they may take.
        seconds: how long all of them together may take.
        threads: that compile kernels.

    Attributes:
        rehearsing: whether sizes are tiny and nothing is timed.
        peaks: bytes per second, measured in this run: see `gpu_transfers.peaks`.
        kept: what later checks use again, such as a model; see `release`.
    """

    def __init__(
        self, device: torch.device, host_bytes: int, seconds: float, threads: int = 1
    ) -> None:
        self.device, self.host_bytes, self.threads = device, host_bytes, threads
        self._ends = time.monotonic() + seconds
        self.rehearsing = device.type == "cpu"
        self.peaks: dict[str, float] = {}
        self.kept: dict[str, Any] = {}

    def seconds_left(self) -> float:
        """Until no check should be under way any more."""
        return self._ends - time.monotonic()

    def pick(self, full: Any, tiny: Any) -> Any:
        """`full`, or in a rehearsal `tiny`."""
        return tiny if self.rehearsing else full

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Random numbers on the device."""
        return torch.randn(shape, dtype=dtype, device=self.device)

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.rehearsing:
            torch.cuda.synchronize(self.device)

    def release(self, *names: str) -> None:
        """Free what is garbage, and what was kept under these names."""
        for name in names:
            self.kept.pop(name, None)
        gc.collect()
        if not self.rehearsing:
            torch.cuda.empty_cache()

    def peak(self, name: str) -> float:
        """Bytes per second: "host_to_device", "device_to_host" or "device" (reads and writes)."""
        if not self.peaks:
            import gpu_transfers

            gpu_transfers.peaks(self)
        return self.peaks[name]

    def num_sets(self, nbytes: int) -> int:
        """How many buffers of so many bytes, used in turn, the L2 cache is of no help for."""
        if self.rehearsing:
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(2, -(-2 * cache // nbytes))

    def time(self, run: Callable[[int], Any], sets: int, calls: int = 0) -> Timing:
        """Time `run(i)`, i counting round the sets of buffers, in a graph of so many calls.

        The graph leaves out what Python and the driver take to launch.
        """
        if self.rehearsing:
            run(0)
            return Timing(NAN, NAN, NAN, NAN)
        calls = max(calls, sets, 20)
        for number in range(sets):
            run(number)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for number in range(calls):
                run(number % sets)
        return self.time_calls(lambda _: graph.replay(), repeats=30, calls=calls)

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

    @contextlib.contextmanager
    def waiting_is_an_error(self) -> Iterator[None]:
        """Within it torch raises where the host would wait for the device."""
        if self.rehearsing:
            yield
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def while_busy(self, work: Callable[[], Any]) -> float:
        """Milliseconds that the host takes for `work` while the GPU does something else.

        Raises `AssertionError` if it waited for that: also where the driver does, unseen by torch.
        """
        self.synchronize()
        self.delay(1.0)
        busy = None if self.rehearsing else torch.cuda.current_stream().record_event()
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        assert busy is None or not busy.query(), f"the host waited for the GPU, {seconds:.3f} s"
        self.synchronize()
        return round(seconds * 1e3, 3)

    def delay(self, seconds: float) -> None:
        """Keep the current stream busy for about so long."""
        if not self.rehearsing:
            torch.cuda._sleep(int(seconds * 1.7e9))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within it, memory that `torch.empty` gives out holds NaN, or the largest integer."""
    allocate = torch.empty

    def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("arkcache.kernels."):
            return tensor
        return tensor.fill_(NAN if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    torch.empty = allocate_poisoned
    try:
        yield
    finally:
        torch.empty = allocate


def find_repository() -> None:
    """Make `arkcache` and `tests` of this working tree importable, whatever is installed."""
    sys.path.insert(0, str(ROOT))
    # `tests` has no __init__.py: any package of that name that is installed would win.
    tests = types.ModuleType("tests")
    tests.__path__ = [str(ROOT / "tests")]
    sys.modules.setdefault("tests", tests)
