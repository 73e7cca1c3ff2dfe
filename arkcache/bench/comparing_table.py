"""Renders two ledgers against each other."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from arkcache.bench.comparing import Compared, Comparison
from arkcache.bench.timing import Spread


def render(found: Comparison, too_slow: Sequence[Compared] = ()) -> RenderableType:
    """Every case with both medians and their ratio; what differs is marked, and counted below."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("case", overflow="fold")
    for name in ("first", "second", "ratio", ""):
        table.add_column(name, justify="left" if name == "" else "right", no_wrap=True)
    for case in found.cases:
        style = {"slower": "red", "faster": "green"}.get(mark(case))
        ratio = f"{case.ratio:.2f}x"
        table.add_row(
            case.name, _time(case.first), _time(case.second), ratio, mark(case), style=style
        )
    return Group(table, Text("\n".join(_lines(found, too_slow))))


def mark(case: Compared) -> str:
    """What is no noise."""
    return "" if not case.differs else "slower" if case.ratio > 1 else "faster"


def _lines(found: Comparison, too_slow: Sequence[Compared]) -> list[str]:
    marks = [mark(case) for case in found.cases]
    lines = [
        f"{len(marks)} cases, medians and half of what lies between the quartiles: "
        f"{marks.count('slower')} slower and {marks.count('faster')} faster by more than the "
        "spread."
    ]
    for names, which in ((found.only_first, "first"), (found.only_second, "second")):
        if names:
            lines.append(f"{len(names)} only in the {which}, as {names[0]!r}.")
    if too_slow:
        lines.append(f"{len(too_slow)} slower than allowed: {', '.join(c.name for c in too_slow)}.")
    return lines


def _time(one: Spread) -> str:
    return f"{one.median:.4g} ±{(one.high - one.low) / 2 / one.median:.0%}"
