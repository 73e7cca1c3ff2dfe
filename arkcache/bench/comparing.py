"""Two ledgers of one benchmark against each other: ratios of medians, and which are no noise.

Reads our own ledgers and those of pytest-benchmark.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from arkcache.bench.ledger import read_ledger
from arkcache.bench.timing import Spread
from arkcache.errors import InputError


class Kind(NamedTuple):
    """Which entries of a row say what was timed, and which holds the time of each round."""

    names: tuple[str, ...]
    rounds: str


KINDS = {
    "tiers": Kind(("route", "piece_bytes", "num_pieces"), "rounds_us"),
    "decode": Kind(("method", "context"), "round_medians_ms"),
    "prefill": Kind(("method", "context"), "rounds_s"),
    "kernels": Kind(("part", "index", "context"), "rounds_us"),
}
"""The benchmarks of our own ledgers that are times: less is better."""


@dataclass(frozen=True)
class Compared:
    """One case in two ledgers.

    Attributes:
        name: what was timed.
        ratio: the second median over the first; above 1 the second took longer.
        differs: whether the middle halves of the rounds have no time in common.
    """

    name: str
    first: Spread
    second: Spread
    ratio: float
    differs: bool


@dataclass(frozen=True)
class Comparison:
    """All cases that both ledgers have, and the names of those that only one has."""

    cases: list[Compared]
    only_first: list[str]
    only_second: list[str]

    def slower_than(self, percent: float) -> list[Compared]:
        """Cases that took more than so many percent longer, by more than the rounds' spread."""
        return [one for one in self.cases if one.differs and one.ratio > 1 + percent / 100]


def compare(first: Path, second: Path) -> Comparison:
    """Compare two ledgers. Raises `InputError` for what is none, or has no case in common."""
    one, two = _times(first), _times(second)
    cases = [_compared(name, one[name], two[name]) for name in one if name in two]
    if not cases:
        raise InputError(
            f"{first} and {second} have no case in common, as in {_some(one)} and {_some(two)}: "
            "expected two ledgers of the same benchmark"
        )
    return Comparison(
        cases, [name for name in one if name not in two], [name for name in two if name not in one]
    )


def _compared(name: str, first: Spread, second: Spread) -> Compared:
    differs = first.high < second.low or second.high < first.low
    return Compared(name, first, second, second.median / first.median, differs)


def _some(times: dict[str, Spread]) -> str:
    return repr(next(iter(times)))


def _times(path: Path) -> dict[str, Spread]:
    """Time of every case by its name, in whatever unit the ledger has."""
    ledger = read_ledger(path)
    try:
        if "benchmarks" in ledger:
            times = dict(_of_pytest(ledger["benchmarks"]))
        else:
            times = dict(_of_ours(ledger))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is no ledger ({type(error).__name__}: {error}): expected what --output of "
            f"{', '.join(KINDS)} writes, or --benchmark-json of pytest-benchmark"
        ) from None
    if not times:
        raise InputError(f"{path} has no case that was timed")
    return times


def _of_ours(ledger: dict[str, Any]) -> Iterator[tuple[str, Spread]]:
    kind = KINDS[ledger["benchmark"]]
    for row in ledger["rows"]:
        yield ", ".join(str(row[name]) for name in kind.names), Spread.of(row[kind.rounds])


def _of_pytest(benchmarks: list[dict[str, Any]]) -> Iterator[tuple[str, Spread]]:
    for one in benchmarks:
        stats = one["stats"]
        yield one["fullname"], Spread(stats["median"], stats["q1"], stats["q3"])
