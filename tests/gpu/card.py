"""The device under test: how to wait for it, to see who waits for it, and to keep it busy."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

NAN = float("nan")


class Card:
    """A device to check.

    Args:
        device: where the checks run; the CPU in a rehearsal.
        threads: that compile kernels.

    Attributes:
        rehearsing: whether sizes are tiny.
        notes: what the check under way has found so far, by name.
        tell: called with every note at once, so that it outlives this process.
    """

    def __init__(self, device: torch.device, threads: int = 1) -> None:
        self.device, self.threads = device, threads
        self.rehearsing = device.type == "cpu"
        self.notes: dict[str, Any] = {}
        self.tell: Callable[[dict[str, Any]], None] = lambda _details: None

    def note(self, **details: Any) -> None:
        """Keep what was found, whatever becomes of the check after it."""
        self.notes |= details
        self.tell(details)

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

    def release(self) -> None:
        """Free what is garbage."""
        gc.collect()
        if not self.rehearsing:
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def waiting_is_an_error(self) -> Iterator[None]:
        """Within it torch raises where the host would wait for the device."""
        if self.rehearsing:
            yield
            return
        with warnings.catch_warnings():  # that it does not see every wait, which `while_busy` does
            warnings.filterwarnings("ignore", message="Synchronization debug mode")
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
