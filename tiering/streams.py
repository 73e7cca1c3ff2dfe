"""Streams: queues of device work, each in order, and the events that order one against another.

On a GPU it is a CUDA stream. On a CPU (and in Triton's interpreter) there is no queue: work is done
when it is handed in. What moves pages is written against streams, so tests can queue it on streams
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
    """A point in a stream: reached when all work queued there before it is done."""

    def synchronize(self) -> None:
        """Make the host wait for it."""


class Stream(Protocol):
    """An ordered queue of work on one device."""

    def run(self, work: Callable[[], None]) -> None:
        """Queue what `work` launches; raises what launching it raises."""

    def record(self) -> Event:
        """The point that the stream's queue has come to."""

    def wait(self, event: Event) -> None:
        """Let what is queued from now on start after `event`. The host does not wait."""

    def keep(self, tensor: Tensor) -> None:
        """Keep the memory of `tensor` from being reused before what is queued now is done."""


@dataclass(frozen=True)
class Streams:
    """The streams of one device.

    Attributes:
        main: where attention runs.
        backup: copies of sealed pages into the host tier.
        side: work that nothing waits for, such as speculative recall.
    """

    main: Stream
    backup: Stream
    side: Stream


class HostStream:
    """A stream that does its work at once."""

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


class CudaStream:
    """A CUDA stream of a device.

    Args:
        device: CUDA, with an index.
        stream: None for the stream that is current on the device at each call.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self.device, self._fixed = device, stream

    @property
    def cuda_stream(self) -> torch.cuda.Stream:
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
        event.record(self.cuda_stream)
        return event

    def wait(self, event: Event) -> None:
        """Let the stream wait; `event` is one of another CUDA stream."""
        assert isinstance(event, torch.cuda.Event)
        self.cuda_stream.wait_event(event)

    def keep(self, tensor: Tensor) -> None:
        """Tell torch's allocator that the stream uses `tensor`."""
        tensor.record_stream(self.cuda_stream)


def numbered(device: torch.device) -> torch.device:
    """`device`, and where it is CUDA without an index the current one."""
    if device == torch.device("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return device


def streams_of(device: torch.device) -> Streams:
    """The streams of a device, the same for all who ask: hold the device rather than these."""
    return _streams_of(numbered(device))


@cache
def _streams_of(device: torch.device) -> Streams:
    if device.type != "cuda":
        return Streams(HostStream(), HostStream(), HostStream())
    backup, side = (torch.cuda.Stream(device=device) for _ in range(2))
    return Streams(CudaStream(device), CudaStream(device, backup), CudaStream(device, side))
