"""Records what decode steps do, while they do it.

Knows nothing of caches: engines tell a `LayerTrace` what a step of one layer did, a `Recorder`
keeps the steps of all layers, the newest as far as its bounds allow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from arkcache.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

Ids = NDArray[np.integer[Any]]
Floats = NDArray[np.float32]

SCORE, SELECT, RECALL, ATTEND = PHASES = range(4)
"""What a step of a layer consists of."""

UNKNOWN = -1
"""A time that was not taken."""

ENTRY_BYTES = 600
"""Of what is kept of one step of one layer, beside its arrays."""


class Counted(NamedTuple):
    """What a step of one layer counted, summed over sequences and KV heads; tokens are per KV head
    (the mean over the heads), as in `CacheStats`.

    attended_pages and sealed_pages include those of the sinks; the others do not.
    """

    attended_tokens: int
    held_tokens: int
    attended_pages: int
    sealed_pages: int
    hits: int
    recalled: int
    evicted: int
    bytes_recalled: int


class Told(NamedTuple):
    """What an engine tells of a step of its layer.

    Attributes:
        counted: numbers.
        pages: which were selected, sinks apart [rows, any], -1 for none; rows are (sequence, KV
            head) pairs.
        before: which were at hand before the step [rows, any], -1 for none; None: what this layer's
            step before selected.
        mass: the share of attention of each sink page, of the recent window and of each entry of
            `pages` [rows, sinks + 1 + any]; None where it was not looked at.
    """

    counted: Counted
    pages: Ids
    before: Ids | None
    mass: Floats | None


class LayerStep(NamedTuple):
    """A step of one layer.

    Attributes:
        begin_ns, total_ns: when it began, and how long it took.
        laps_ns: how long each phase took; None where they were not timed.
        tell: says what it did. Not said at once: a step has no time for what can wait.
        nbytes: that keeping it takes.
    """

    begin_ns: int
    total_ns: int
    laps_ns: tuple[int, ...] | None
    tell: Callable[[], Told]
    nbytes: int


@dataclass
class RecordedStep:
    """A step of all layers.

    Attributes:
        number: counted from the first that was recorded.
        begin_ns: when its first layer began.
        is_timed: whether its phases are.
        latency_ns: until the next step began, `own_ns` apart; `UNKNOWN` where none followed.
        own_ns: what looking at masses took.
        layers: by number.
    """

    number: int
    begin_ns: int
    is_timed: bool
    latency_ns: int = UNKNOWN
    own_ns: int = 0
    layers: dict[int, LayerStep] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """What keeping it takes."""
        return sum(layer.nbytes for layer in self.layers.values())


class LayerTrace:
    """What an engine tells about the steps of its layer: `begin`, `lap` after each phase of a timed
    step, `stop`, `note`.

    Copies and pickles of a traced cache are not traced: a copy of this is None.

    Attributes:
        follows: whether what the layer's step before selected is what it had at hand.
        wants_mass: whether the step under way is to be looked at for attention masses.
    """

    def __init__(self, recorder: Recorder, number: int) -> None:
        self._recorder, self._number = recorder, number
        self.follows, self.wants_mass = False, False
        self._laps: list[int] | None = None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def begin(self) -> Callable[[int], None] | None:
        """A step of the layer begins; returns `lap` if its phases are to be timed."""
        self._begin = self._last = now = perf_counter_ns()
        self._step = self._recorder.step_of(self._number, now)
        self.wants_mass = self._recorder.wants_mass(self._number)
        self._laps = [0] * len(PHASES) if self._step.is_timed else None
        return None if self._laps is None else self.lap

    def lap(self, phase: int) -> None:
        """What was done since the last lap was part of this phase."""
        if self._laps is not None:
            now = perf_counter_ns()
            self._laps[phase] += now - self._last
            self._last = now

    def stop(self) -> None:
        """The step of the layer is over."""
        self._total = perf_counter_ns() - self._begin

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is done within it is no part of the step."""
        start = perf_counter_ns()
        yield
        self._step.own_ns += perf_counter_ns() - start

    def note(self, tell: Callable[[], Told], nbytes: int, *, has_phases: bool = True) -> None:
        """Keep what the step did: see `LayerStep`; nbytes: of what `tell` holds."""
        laps = tuple(self._laps) if self._laps is not None and has_phases else None
        step = LayerStep(self._begin, self._total, laps, tell, nbytes + ENTRY_BYTES)
        self._step.layers[self._number] = step
        self.follows = True


class Recorder:
    """Keeps what decode steps did: the newest, as far as there is room.

    Args:
        max_steps: kept at most; older ones are forgotten and only counted.
        max_bytes: kept at most, in memory.
        time_every: phases are timed in one step of so many; None for never.
        mass_every: the attention mass of pages is looked at in each layer's every so manieth step,
            the layers in turn; None for never.

    Attributes:
        about: settings of what was traced, plain numbers and texts.
        steps: those that are kept.
        num_kv_heads: of the layers that are recorded, by number.
        forgotten: what the steps that were forgotten counted.
        last_forgotten: the latest forgotten step of each layer.
    """

    def __init__(
        self,
        *,
        max_steps: int = 1024,
        max_bytes: int = 256 << 20,
        time_every: int | None = 8,
        mass_every: int | None = 64,
    ) -> None:
        for name, number in (("max_steps", max_steps), ("max_bytes", max_bytes)):
            if number < 1:
                raise InputError(f"{name}={number}: expected at least 1")
        for name, every in (("time_every", time_every), ("mass_every", mass_every)):
            if every is not None and every < 1:
                raise InputError(f"{name}={every}: expected at least 1, or None for never")
        self._max_steps, self._max_bytes = max_steps, max_bytes
        self._time_every, self._mass_every = time_every, mass_every
        self.about: dict[str, Any] = {
            "time_every": time_every,
            "mass_every": mass_every,
            "num_sink_pages": 0,
        }
        self.steps: deque[RecordedStep] = deque()
        self.num_kv_heads: dict[int, int] = {}
        self.forgotten = Counted(*[0] * len(Counted._fields))
        self.last_forgotten: dict[int, LayerStep] = {}
        self._num_steps = self._last_layer = self._nbytes = 0
        self._follows = False

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def layer(self, number: int, num_kv_heads: int) -> LayerTrace:
        """What the engine of a layer is to tell; numbers grow in the order in which layers run."""
        self.num_kv_heads[number] = num_kv_heads
        return LayerTrace(self, number)

    @property
    def num_steps(self) -> int:
        """Steps recorded, forgotten ones included."""
        return self._num_steps

    @property
    def num_forgotten(self) -> int:
        """Steps that were recorded and are no longer kept."""
        return self._num_steps - len(self.steps)

    def end_run(self) -> None:
        """Something else than a decode step follows, or nothing: the time until the next step is
        not the last one's."""
        if self._follows:
            self._nbytes += self.steps[-1].nbytes
            self._follows = False
            self._forget_old()

    def step_of(self, layer: int, now: int) -> RecordedStep:
        """The step to which a layer's belongs that begins now: a new one for the first layer."""
        if self._follows and layer > self._last_layer:
            self._last_layer = layer
            return self.steps[-1]
        if self._follows:
            before = self.steps[-1]
            before.latency_ns = now - before.begin_ns - before.own_ns
            self.end_run()
        number, every = self._num_steps, self._time_every
        self.steps.append(RecordedStep(number, now, every is not None and number % every == 0))
        self._num_steps, self._last_layer, self._follows = number + 1, layer, True
        self._forget_old()
        return self.steps[-1]

    def wants_mass(self, layer: int) -> bool:
        """Whether this layer's masses are to be looked at in the step under way."""
        every = self._mass_every
        return every is not None and (self._num_steps - 1 - layer) % every == 0

    def _forget_old(self) -> None:
        while len(self.steps) > 1 and (
            len(self.steps) > self._max_steps or self._nbytes > self._max_bytes
        ):
            old = self.steps.popleft()
            self._nbytes -= old.nbytes
            self.last_forgotten.update(old.layers)
            for layer in old.layers.values():
                both = zip(self.forgotten, layer.tell().counted, strict=True)
                self.forgotten = Counted(*(mine + its for mine, its in both))
