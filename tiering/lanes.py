"""Lanes: queues of device work, each in order, and the events that order one against another.

A lane is a CUDA stream, or on a CPU (and in Triton's interpreter) nothing at all: there work is
done when it is queued. What moves pages is written against lanes, so tests can queue it on lanes
that run it in whatever order the events allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in a lane: reached when all work queued there before it is done."""

    def synchronize(self) -> None:
        """Make the host wait for it."""


class Lane(Protocol):
    """An ordered queue of work on one device."""

    def run(self, work: Callable[[], None]) -> None:
        """Queue what `work` launches; raises what launching it raises."""

    def record(self) -> Event:
        """The point that the lane's queue has come to."""

    def wait(self, event: Event) -> None:
        """Let what is queued from now on start after `event`. The host does not wait."""

    def keep(self, tensor: Tensor) -> None:
        """Let nobody reuse the memory of `tensor` before what is queued now is done."""


@dataclass(frozen=True)
class Lanes:
    """The lanes of one device.

    Attributes:
        main: where attention runs.
        backup: copies of sealed pages into the host tier.
        side: work that nothing waits for, such as speculative recall.
    """

    main: Lane
    backup: Lane
    side: Lane


class HostLane:
    """A lane that does its work at once."""

    def run(self, work: Callable[[], None]) -> None:
        """Do `work`."""
        work()

    def record(self) -> Event:
        """A point that is reached."""
        return _REACHED

    def wait(self, event: Event) -> None:
        """Nothing to wait for."""

    def keep(self, tensor: Tensor) -> None:
        """Nothing is left to be done."""


class _Reached:
    def synchronize(self) -> None:
        """Nothing to wait for."""


_REACHED = _Reached()


class CudaLane:
    """A stream of a device.

    Args:
        device: CUDA, with an index.
        stream: None for whatever stream is current on the device at each call.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self.device, self._fixed = device, stream

    @property
    def stream(self) -> torch.cuda.Stream:
        """The stream that a call now would use."""
        return torch.cuda.current_stream(self.device) if self._fixed is None else self._fixed

    def run(self, work: Callable[[], None]) -> None:
        """Do `work` with the device and the stream current."""
        fixed = self._fixed
        guard: Any = torch.cuda.device(self.device) if fixed is None else torch.cuda.stream(fixed)
        with guard:
            work()

    def record(self) -> Event:
        """A new event on the stream."""
        event = torch.cuda.Event(enable_timing=False)
        event.record(self.stream)
        return event

    def wait(self, event: Event) -> None:
        """Let the stream wait; `event` is one of a CUDA lane."""
        assert isinstance(event, torch.cuda.Event)
        self.stream.wait_event(event)

    def keep(self, tensor: Tensor) -> None:
        """Tell torch's allocator that the stream uses `tensor`."""
        tensor.record_stream(self.stream)


def numbered(device: torch.device) -> torch.device:
    """`device`, and where it is CUDA without an index the current one."""
    if device == torch.device("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return device


def lanes_of(device: torch.device) -> Lanes:
    """The lanes of a device, the same for all who ask: hold the device rather than these."""
    return _lanes_of(numbered(device))


@cache
def _lanes_of(device: torch.device) -> Lanes:
    if device.type != "cuda":
        return Lanes(HostLane(), HostLane(), HostLane())
    backup, side = (torch.cuda.Stream(device=device) for _ in range(2))
    return Lanes(CudaLane(device), CudaLane(device, backup), CudaLane(device, side))
