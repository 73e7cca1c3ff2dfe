"""Streams that queue their work and do it in the worst order that the events allow.

    world = World(seed)              # or World(order=earliest("backup")), or latest("backup")
    engine = BackupEngine(world.streams, torch.device("cpu"))
    world.streams.main.run(closure)    # queued
    world.drain()                    # done, in an order drawn from the seed

A real device may run streams in any of these orders, and usually runs a harmless one. To see that a
barrier matters, switch it off: `world.forget_waits_of("submit")` drops the waits that a function of
this name queues.
"""

import random
import sys
from collections import deque
from collections.abc import Callable, Sequence

from torch import Tensor

from arkcache.tiering.streams import Streams

NAMES = ("main", "backup", "side")

Order = Callable[[Sequence[str]], str]
"""Which of the streams that could go on does."""


def at_random(seed: int) -> Order:
    """Any order, the same for the same seed."""
    return random.Random(seed).choice


def earliest(name: str) -> Order:
    """A stream does all it can before the others do anything."""
    return lambda ready: name if name in ready else ready[0]


def latest(name: str) -> Order:
    """A stream does nothing until the others cannot go on without it."""
    return lambda ready: next((other for other in ready if other != name), name)


class FakeEvent:
    """A point in a stream's queue."""

    def __init__(self, world: "World") -> None:
        self.reached = False
        self._world = world

    def synchronize(self) -> None:
        self._world.run_until(lambda: self.reached)


class FakeStream:
    """A queue of closures, events to reach and events to wait for.

    Attributes:
        failures: errors that the next calls of `run` raise instead of queueing; None is success.
    """

    def __init__(self, world: "World") -> None:
        self.failures: list[Exception | None] = []
        self._world = world
        self._queue: deque[Callable[[], None] | FakeEvent] = deque()

    def run(self, work: Callable[[], None]) -> None:
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        self._queue.append(work)

    def record(self) -> FakeEvent:
        event = FakeEvent(self._world)

        def reach() -> None:
            event.reached = True

        self._queue.append(reach)
        return event

    def wait(self, event: FakeEvent) -> None:
        if sys._getframe(1).f_code.co_name not in self._world.forgetful:
            self._queue.append(event)

    def keep(self, tensor: Tensor) -> None:
        """Closures hold what they use."""

    @property
    def is_ready(self) -> bool:
        """Whether it has something to do and may."""
        head = self._queue[0] if self._queue else None
        return head is not None and (not isinstance(head, FakeEvent) or head.reached)

    def go_on(self) -> None:
        head = self._queue.popleft()
        if not isinstance(head, FakeEvent):
            head()


class World:
    """Three streams and who goes next.

    Args:
        seed: of a random order.
        order: another order.
    """

    def __init__(self, seed: int = 0, order: Order | None = None) -> None:
        self.order = order or at_random(seed)
        self.forgetful: set[str] = set()
        self._streams = {name: FakeStream(self) for name in NAMES}
        self.streams = Streams(**self._streams)

    def __getitem__(self, name: str) -> FakeStream:
        return self._streams[name]

    def forget_waits_of(self, function: str) -> None:
        """Drop the waits that a function of this name queues from now on."""
        self.forgetful.add(function)

    def drain(self) -> None:
        """Do all that is queued."""
        self.run_until(lambda: False)
        assert not any(stream._queue for stream in self._streams.values()), (
            "streams wait for each other"
        )

    def run_until(self, is_over: Callable[[], bool]) -> None:
        """Go on until `is_over`, or until no stream can."""
        while not is_over():
            ready = [name for name in NAMES if self._streams[name].is_ready]
            if not ready:
                return
            self._streams[self.order(ready)].go_on()
