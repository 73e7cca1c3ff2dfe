"""Registering host memory with CUDA's driver, at once or in a thread that runs ahead of need."""

from __future__ import annotations

import atexit
import contextlib
import logging
import mmap
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

logger = logging.getLogger("arkcache")


class Span(NamedTuple):
    """Memory from an address on."""

    address: int
    size: int


@contextlib.contextmanager
def driver(device: torch.device) -> Iterator[Any]:
    """CUDA's runtime, for a device. Raises `ImportError` without cupy."""
    import cupy

    # cupy makes the device before current again, and where that has no context yet creates one
    # there; within torch's guard it is this same device.
    with torch.cuda.device(device), cupy.cuda.Device(device.index):
        yield cupy.cuda.runtime


def check_addresses(device: torch.device) -> None:
    """Raise `OtherAddressesError` unless the device reaches registered memory where the host does.

    Also `ImportError` without cupy and `RuntimeError` without a driver.
    """
    with driver(device) as runtime:
        attribute = getattr(runtime, "cudaDevAttrCanUseHostPointerForRegisteredMem", None)
        if attribute is not None and not runtime.deviceGetAttribute(attribute, device.index):
            raise OtherAddressesError("cudaDevAttrCanUseHostPointerForRegisteredMem is 0")


def register(device: torch.device, span: Span) -> None:
    """Pin memory for a device. Raises `RuntimeError` if that is refused, and nothing is pinned."""
    with driver(device) as runtime:
        runtime.hostRegister(span.address, span.size, 0)
        try:
            seen_at = runtime.pointerGetAttributes(span.address).devicePointer
            if seen_at != span.address:
                raise OtherAddressesError(f"{span.address:#x} is {seen_at:#x} there")
        except RuntimeError:
            _unregister(runtime, span)
            raise


def unregister(device: torch.device, spans: list[Span]) -> None:
    """Unpin memory; what the driver refuses is logged."""
    if spans:
        with driver(device) as runtime:
            for span in spans:
                _unregister(runtime, span)


def _unregister(runtime: Any, span: Span) -> None:
    try:
        runtime.hostUnregister(span.address)
    except RuntimeError as error:
        logger.warning("the driver could not unpin host memory: %s", error)


class OtherAddressesError(RuntimeError):
    """The device has addresses of its own for memory that was registered.

    Pieces are found by their distance from the first, in memory that is registered bit by bit: such
    a device may see each registration anywhere, so that no distance is known.
    """

    def __init__(self, found: str) -> None:
        super().__init__(f"the device sees host memory at other addresses than the host: {found}")


class RegistrationAhead(threading.Thread):
    """One registration in a thread of its own; starts at once. To be taken over or given up.

    Whoever takes the outcome out of `_outcome` owns what was registered: `list.pop` gives it to one
    only. So nobody has to wait to give up, not even a collection of garbage in this very thread.

    Args:
        device: which it is for.
        mapping: what the memory is part of; kept mapped until the driver is done with it.
        span: what to register.

    Attributes:
        span: what it registers.
    """

    def __init__(self, device: torch.device, mapping: mmap.mmap, span: Span) -> None:
        super().__init__(name="arkcache-pin", daemon=True)  # exit waits in `_finish`, not forever
        self.span, self._device, self._mapping = span, device, mapping
        self._outcome: list[Exception | None] = []
        self._is_given_up = False
        self.start()

    def run(self) -> None:
        """Register, and undo that if it was given up meanwhile."""
        failure: Exception | None = None
        try:
            register(self._device, self.span)
        except Exception as error:
            failure = error  # raised by `take`
        self._outcome.append(failure)
        if self._is_given_up:
            self._undo()

    def take(self) -> None:
        """Wait for the end; the memory is the caller's then. Raises what registering it raised."""
        self.join()
        failure = self._outcome.pop()
        if failure is not None:
            raise failure

    def give_up(self) -> None:
        """Let the memory be unpinned as soon as it is pinned. Does not wait for that."""
        self._is_given_up = True
        self._undo()

    def _undo(self) -> None:
        try:
            failure = self._outcome.pop()
        except IndexError:
            return  # not there yet, or in the other thread's hands
        if failure is None:
            unregister(self._device, [self.span])


def _finish() -> None:
    """Before exit takes the driver away, let it end what it is at."""
    for thread in threading.enumerate():
        if isinstance(thread, RegistrationAhead):
            thread.join()


atexit.register(_finish)
