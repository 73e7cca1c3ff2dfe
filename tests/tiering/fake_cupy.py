"""A driver that only notes which memory is registered, in place of cupy's."""

import contextlib
import gc
import mmap
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from arkcache.tiering import pinned, registration

GPU = torch.device("cuda", 1)
"""Not device 0, so that whatever happens there is seen."""


class CUDARuntimeError(RuntimeError):
    """What cupy raises for an error of the driver."""


class FakeCupy:
    """Enough of cupy to register memory with.

    Attributes:
        ranges: address -> size of what is registered now.
        refuse: numbers of the registrations, counted from 0, that fail.
        num_calls: registrations asked for.
        num_waits: times that a device was waited for.
        offset: from an address of the host to what the device calls it.
        has_host_addresses: what the driver says of the device's addresses of registered memory.
        gates: registrations by number that take until their event is set, at most ten seconds.
        is_dead: every call but a registration fails, as after a fault of a kernel.
    """

    def __init__(self) -> None:
        self.ranges: dict[int, int] = {}
        self.refuse: set[int] = set()
        self.num_calls = self.num_waits = self.offset = 0
        self.is_dead = False
        self.has_host_addresses = True
        self.gates: dict[int, threading.Event] = {}
        self._local = threading.local()
        self.cuda = SimpleNamespace(runtime=self, Device=self._on)

    cudaDevAttrCanUseHostPointerForRegisteredMem = 91

    @property
    def current(self) -> list[int]:
        """Devices that were made current in this thread, one within the other."""
        if not hasattr(self._local, "current"):
            self._local.current = [0]
        current: list[int] = self._local.current
        return current

    @contextlib.contextmanager
    def _on(self, index: int) -> Iterator[None]:
        assert isinstance(index, int)
        self.current.append(index)
        try:
            yield
        finally:
            self.current.pop()

    def deviceGetAttribute(self, attribute: int, index: int) -> int:
        self._check()
        assert attribute == self.cudaDevAttrCanUseHostPointerForRegisteredMem
        assert index == GPU.index
        return int(self.has_host_addresses)

    def hostRegister(self, address: int, size: int, flags: int) -> None:
        self._check()
        number, self.num_calls = self.num_calls, self.num_calls + 1
        if number in self.gates:
            assert self.gates[number].wait(10), "nobody opened the gate"
        if number in self.refuse:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        assert address % mmap.PAGESIZE == 0
        assert size > 0
        assert flags == 0
        for start, length in self.ranges.items():
            assert address + size <= start or start + length <= address, "registered twice"
        self.ranges[address] = size

    def hostUnregister(self, address: int) -> None:
        self._check()
        del self.ranges[address]
        if self.is_dead:
            raise CUDARuntimeError("cudaErrorIllegalAddress")

    def pointerGetAttributes(self, address: int) -> SimpleNamespace:
        self._check()
        return SimpleNamespace(devicePointer=address + self.offset)

    def deviceSynchronize(self) -> None:
        self._check()
        if self.is_dead:
            raise CUDARuntimeError("cudaErrorIllegalAddress")
        self.num_waits += 1

    def _check(self) -> None:
        assert self.current[-1] == GPU.index, "the driver was called for another device"

    @property
    def nbytes(self) -> int:
        """Bytes registered."""
        return sum(self.ranges.values())


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCupy]:
    """In the place of cupy; at the end nothing may be registered any more."""
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    monkeypatch.setattr(pinned, "_has_warned", False)
    yield fake
    gc.collect()
    registration._finish()
    assert fake.ranges == {}, "memory stayed registered"


SETUP = """
import contextlib, sys, torch
from arkcache.tiering.host import HostTier
from tests.tiering.fake_cupy import GPU, FakeCupy

fake = sys.modules['cupy'] = FakeCupy()
torch.cuda.device = lambda device: contextlib.nullcontext()
"""


def run_alone(code: str) -> str:
    """What `code` prints in a process of its own, where `fake` stands in the place of cupy."""
    done = subprocess.run(
        [sys.executable, "-c", SETUP + code],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
