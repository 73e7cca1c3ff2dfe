"""What a check is, what is expected of it, and what comes of it. Imports no torch."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

BROKEN = ("failed", "timeout")
"""Statuses that make the whole run fail."""


@dataclass(frozen=True)
class Goal:
    """What a figure should reach.

    Attributes:
        expected: worse than this is a miss.
        aim: what is hoped for.
        unit: of both.
        is_most: whether less is better.
    """

    expected: float
    aim: float
    unit: str
    is_most: bool

    def verdict(self, figure: float) -> str:
        """ "ok", "below aim" or "missed"."""
        if self._is_met(self.aim, figure):
            return "ok"
        return "below aim" if self._is_met(self.expected, figure) else "missed"

    def _is_met(self, bound: float, figure: float) -> bool:
        return figure <= bound if self.is_most else figure >= bound

    def __str__(self) -> str:
        sign = "<=" if self.is_most else ">="
        bounds = f"{sign} {self.expected:g}"
        bounds += "" if self.aim == self.expected else f", aim {self.aim:g}"
        return f"{bounds} {self.unit}".rstrip()


def most(expected: float, aim: float | None = None, unit: str = "") -> Goal:
    """A goal from above."""
    return Goal(expected, expected if aim is None else aim, unit, is_most=True)


def least(expected: float, aim: float | None = None, unit: str = "") -> Goal:
    """A goal from below."""
    return Goal(expected, expected if aim is None else aim, unit, is_most=False)


@dataclass(frozen=True)
class Outcome:
    """What a check measured.

    Attributes:
        figure: what its goal is about, in the goal's unit.
        of_peak: the share of the peak that this is, where it has one.
        details: everything else worth keeping that was not noted before.
    """

    figure: float | None = None
    of_peak: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One check. Its function is called with a `Bench` and `settings`; it may return an `Outcome`.

    Attributes:
        place: module and function, "benchmarks.gpu.micro:scan_volumes".
        shows: one line.
        seconds: about how long it takes; it is skipped where less is left.
        unit: of the figure.
        is_quick: whether a rehearsal takes about a second.
        most_seconds: after which it is stopped; by default `limit` says.
    """

    name: str
    place: str
    shows: str
    seconds: int
    goal: Goal | None = None
    unit: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    is_quick: bool = False
    most_seconds: float | None = None

    @property
    def limit(self) -> float:
        """Seconds after which it is stopped: three times what it should take, half a minute."""
        return max(30.0, 3.0 * self.seconds) if self.most_seconds is None else self.most_seconds

    @property
    def function(self) -> Callable[..., Outcome | None]:
        """What does it; the import may need Triton."""
        module, _, name = self.place.partition(":")
        function: Callable[..., Outcome | None] = getattr(importlib.import_module(module), name)
        return function

    def verdict(self, figure: float | None) -> str:
        """As the goal says; "ok" without one, or where nothing was timed."""
        if self.goal is None or figure is None or math.isnan(figure):
            return "ok"
        return self.goal.verdict(figure)

    def result(
        self,
        status: str,
        seconds: float,
        details: dict[str, Any],
        outcome: Outcome | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        """What the ledger keeps of it."""
        outcome = outcome or Outcome()
        return {
            "status": status,
            "figure": _rounded(outcome.figure, 4),
            "unit": self.unit if self.goal is None else self.goal.unit,
            "expected": None if self.goal is None else self.goal.expected,
            "aim": None if self.goal is None else self.goal.aim,
            "of_peak": _rounded(outcome.of_peak, 3),
            "seconds": round(seconds, 1),
            **({} if reason is None else {"reason": reason}),
            "details": _plain(details | outcome.details),
        }


def _plain(value: Any) -> Any:
    """Without NaN, as JSON has none."""
    if isinstance(value, dict):
        return {name: _plain(own) for name, own in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _rounded(number: float | None, digits: int) -> float | None:
    """None for NaN as well, which is none in JSON."""
    return None if number is None or math.isnan(number) else round(number, digits)
