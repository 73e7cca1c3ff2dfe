"""What a trace's page says in numbers: a few for all steps, and series by step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arkcache.tracing.recorder import UNKNOWN
from arkcache.tracing.trace import Trace

PHASES = ("score", "select", "recall", "attend")

NS_PER_MS = 1e6


@dataclass(frozen=True)
class Figures:
    """Of the steps that a trace lists.

    Attributes:
        num_steps: that are listed; each made one token of every sequence.
        num_forgotten: recorded before them, and no longer listed.
        held_tokens: held in the last step, the mean over layers.
        attended_tokens: attended by a layer's step, the mean over steps and layers.
        token_share: tokens attended among those held.
        page_share: pages attended among those sealed.
        hit_rate: pages at hand among those selected; 1 where none was selected.
        bytes_per_step: recalled by all layers together, the mean over steps.
        latency_median_ms, latency_p95_ms: of a step; None where no step's is known.
    """

    num_steps: int
    num_forgotten: int
    held_tokens: float
    attended_tokens: float
    token_share: float
    page_share: float
    hit_rate: float
    bytes_per_step: float
    latency_median_ms: float | None
    latency_p95_ms: float | None


def figures_of(trace: Trace) -> Figures:
    """The figures of a trace."""
    attended, held = trace.layer("attended_tokens"), trace.layer("held_tokens")
    pages, sealed = int(trace.layer("attended_pages").sum()), int(trace.layer("sealed_pages").sum())
    hits, recalled = int(trace.layer("hits").sum()), int(trace.layer("recalled").sum())
    num_steps = len(trace.steps)
    known = trace.step("latency_ns")
    known = known[known != UNKNOWN] / NS_PER_MS
    median, p95 = np.percentile(known, (50, 95)).tolist() if len(known) else (None, None)
    return Figures(
        num_steps=num_steps,
        num_forgotten=int(trace.about["num_forgotten"]),
        held_tokens=_mean(held[-1:]),
        attended_tokens=_mean(attended),
        token_share=_share(int(attended.sum()), int(held.sum())),
        page_share=_share(pages, sealed),
        hit_rate=_share(hits, hits + recalled),
        bytes_per_step=_share(int(trace.layer("bytes_recalled").sum()), num_steps, 0.0),
        latency_median_ms=median,
        latency_p95_ms=p95,
    )


def _mean(of_layers: NDArray[np.int64]) -> float:
    """Over the steps of layers that held any tokens."""
    real = of_layers[of_layers > 0]
    return float(real.mean()) if real.size else 0.0


def _share(part: int, whole: int, of_nothing: float = 1.0) -> float:
    return part / whole if whole else of_nothing


@dataclass(frozen=True)
class Series:
    """By step, layers together. Times in milliseconds, None where they were not taken.

    Attributes:
        number: of the step.
        recalled, evicted: pages of one KV head.
        latency: until the next step began.
        attention: in the layers that select pages.
        phases: its parts, by name; only of timed steps.
    """

    number: list[int]
    recalled: list[int]
    evicted: list[int]
    latency: list[float | None]
    attention: list[float]
    phases: dict[str, list[float | None]]


def series_of(trace: Trace) -> Series:
    """The series of a trace."""
    total = np.maximum(trace.layer("total_ns"), 0).sum(axis=1)
    return Series(
        number=trace.step("number").tolist(),
        recalled=trace.layer("recalled").sum(axis=1).tolist(),
        evicted=trace.layer("evicted").sum(axis=1).tolist(),
        latency=_in_ms(trace.step("latency_ns")),
        attention=[time or 0.0 for time in _in_ms(total)],
        phases={phase: _in_ms(_sums(trace.layer(f"{phase}_ns"))) for phase in PHASES},
    )


def _sums(times: NDArray[np.int64]) -> NDArray[np.int64]:
    """Over layers; unknown where no layer's is known."""
    known = times != UNKNOWN
    sums: NDArray[np.int64] = np.where(known, times, 0).sum(axis=1)
    return np.where(known.any(axis=1), sums, UNKNOWN)


def _in_ms(times: NDArray[np.int64]) -> list[float | None]:
    return [None if time == UNKNOWN else round(time / NS_PER_MS, 4) for time in times.tolist()]
