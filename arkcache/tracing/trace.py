"""A recording as arrays: what its file holds and its page shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arkcache.tracing.recorder import UNKNOWN, Counted, Recorder, Told

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]

STEP_FIELDS = ("number", "begin_ns", "latency_ns", "own_ns")
"""Of a step: see `RecordedStep`; it begins so long after the first."""

TIMES = ("begin_ns", "total_ns", "score_ns", "select_ns", "recall_ns", "attend_ns")
LAYER_FIELDS: tuple[str, ...] = (*TIMES, *Counted._fields)
"""Of a step of a layer: see `LayerStep`; times that were not taken are -1."""


@dataclass(frozen=True)
class Trace:
    """What decode steps did.

    Attributes:
        about: settings, plain numbers and texts; `layers` are the numbers of the layers,
            `num_kv_heads` those of each, `forgotten` what steps that are not listed counted.
        steps: [steps, len(STEP_FIELDS)].
        layers: [steps, layers, len(LAYER_FIELDS)].
        counts: how many pages each row selected, sinks apart [steps, layers, rows]; -1 where a
            layer has no such row, or no such step.
        pages: their numbers, ascending within a row, one row after another.
        recalled: which of them were not at hand before.
        mass_of: which (step, layer) was looked at for attention masses [samples, 2], in order.
        mass: their shares of attention [numbers]: for each row those of the sink pages, of the
            recent window, and of the pages it selected.
    """

    about: dict[str, Any]
    steps: Ints
    layers: Ints
    counts: NDArray[np.int32]
    pages: NDArray[np.int32]
    recalled: Bools
    mass_of: NDArray[np.int32]
    mass: Floats

    def step(self, field: str) -> Ints:
        """One number of every step [steps]."""
        return self.steps[:, STEP_FIELDS.index(field)]

    def layer(self, field: str) -> Ints:
        """One number of every layer's every step [steps, layers]."""
        return self.layers[:, :, LAYER_FIELDS.index(field)]

    @property
    def starts(self) -> Ints:
        """Where the pages of each row begin in `pages` [steps, layers, rows]."""
        sizes = np.maximum(self.counts, 0).astype(np.int64)
        ends = sizes.cumsum().reshape(sizes.shape)
        starts: Ints = ends - sizes
        return starts

    @property
    def mass_sizes(self) -> list[int]:
        """How many numbers of `mass` each sample has."""
        fixed = int(self.about["num_sink_pages"]) + 1
        rows = (self.counts[step, layer] for step, layer in self.mass_of)
        return [int((own[own >= 0] + fixed).sum()) for own in rows]

    def total(self, field: str) -> int:
        """What all steps counted together, forgotten ones included."""
        return int(self.layer(field).sum()) + int(self.about["forgotten"][field])


def trace_of(recorder: Recorder) -> Trace:
    """What a recorder kept."""
    steps, layers = list(recorder.steps), sorted(recorder.num_kv_heads)
    told = [{layer: one.tell() for layer, one in step.layers.items()} for step in steps]
    rows = [one.pages.shape[0] for step in told for one in step.values()]
    shape = (len(steps), len(layers))
    numbers = np.zeros((*shape, len(LAYER_FIELDS)), np.int64)
    numbers[:, :, : len(TIMES)] = UNKNOWN
    counts = np.full((*shape, max(rows, default=0)), -1, np.int32)
    pages: list[NDArray[np.int32]] = []
    recalled: list[Bools] = []
    masses: list[Floats] = []
    mass_of: list[tuple[int, int]] = []
    origin = steps[0].begin_ns if steps else 0
    before = {layer: one.tell() for layer, one in recorder.last_forgotten.items()}
    for s, step in enumerate(steps):
        for at, layer in enumerate(layers):
            entry = told[s].get(layer)
            if entry is None:
                continue
            times = step.layers[layer]
            laps = times.laps_ns or (UNKNOWN,) * 4
            numbers[s, at] = times.begin_ns - origin, times.total_ns, *laps, *entry.counted
            own = _rows(entry, before.get(layer))
            counts[s, at, : len(own)] = [len(row.pages) for row in own]
            pages += [row.pages for row in own]
            recalled += [row.recalled for row in own]
            if entry.mass is not None:
                mass_of.append((s, at))
                masses += [row.mass for row in own]
            before[layer] = entry
    return Trace(
        about=recorder.about
        | {
            "layers": layers,
            "num_kv_heads": [recorder.num_kv_heads[layer] for layer in layers],
            "num_forgotten": recorder.num_forgotten,
            "forgotten": recorder.forgotten._asdict(),
        },
        steps=np.array(
            [(one.number, one.begin_ns - origin, one.latency_ns, one.own_ns) for one in steps],
            np.int64,
        ).reshape(len(steps), len(STEP_FIELDS)),
        layers=numbers,
        counts=counts,
        pages=np.concatenate([np.zeros(0, np.int32), *pages]),
        recalled=np.concatenate([np.zeros(0, np.bool_), *recalled]),
        mass_of=np.array(mass_of, np.int32).reshape(-1, 2),
        mass=np.concatenate([np.zeros(0, np.float32), *masses]),
    )


@dataclass(frozen=True)
class _Row:
    """What one row selected, ascending, which of it was not at hand, and its masses."""

    pages: NDArray[np.int32]
    recalled: Bools
    mass: Floats


def _rows(entry: Told, before: Told | None) -> list[_Row]:
    at_hand = entry.before
    if at_hand is None:
        assert before is not None, "a layer's first step says what it had at hand"
        at_hand = before.pages
    rows = []
    for row, listed in enumerate(entry.pages):
        order = np.argsort(listed, kind="stable")
        order = order[listed[order] >= 0]
        pages = listed[order].astype(np.int32)
        recalled = np.isin(pages, at_hand[row], invert=True)
        mass = np.zeros(0, np.float32)
        if entry.mass is not None:
            fixed = entry.mass.shape[1] - entry.pages.shape[1]
            mass = np.concatenate((entry.mass[row, :fixed], entry.mass[row, fixed:][order]))
        rows.append(_Row(pages, recalled, mass))
    return rows
