"""Draws figures by bytes on the device: a panel for each task. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, PercentFormatter

from arkcache.evaluation.figures import FULL, Interval, LanguageRow, TaskRow
from arkcache.evaluation.plot_style import folded, styles

_SHARES = tuple(1 / 2**power for power in range(11))
_MAX_COLUMNS = 3

Row = TaskRow | LanguageRow
Figured = Callable[[Any], Interval]
"""What is drawn of a row."""


def panels_by_task(rows: list[TaskRow]) -> dict[str, list[TaskRow]]:
    """The rows of each task, in their order, by the title of its panel."""
    panels: dict[str, list[TaskRow]] = {}
    for row in rows:
        title = f"{row.case.task}: full cache {row.num_full_right} of {row.num_asked}"
        panels.setdefault(title, []).append(row)
    return panels


def by_bytes(
    panels: dict[str, Any], title: str, figured: Figured, scaled: Callable[[Axes], None]
) -> Figure:
    """One panel for each group of rows, and in it a line for each method over its budgets."""
    columns = min(len(panels), _MAX_COLUMNS)
    lines = -(-len(panels) // columns)
    rows: list[Row] = [row for own in panels.values() for row in own]
    looks = styles([row.case.method for row in rows])
    num_named = sum(len(folded(method).splitlines()) for method in looks)  # below, in two columns
    figure = Figure(
        figsize=(max(7.0, 3.7 * columns), 3.3 * lines + 0.7 + 0.1 * num_named),
        layout="constrained",
    )
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for one, (name, own) in zip(axes.flat, panels.items(), strict=False):
        _draw_panel(one, own, figured, looks)
        one.set_title(name, loc="left", fontweight="bold")
        scaled(one)
        one.yaxis.set_tick_params(labelleft=True)
    for spare in list(axes.flat)[len(panels) :]:
        spare.set_axis_off()
    figure.suptitle(title, x=0.01, ha="left")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower left", ncols=2, frameon=False, handlelength=3.5
    )
    return figure


def _draw_panel(
    axes: Axes, rows: Sequence[Row], figured: Figured, looks: dict[str, dict[str, Any]]
) -> None:
    for method, style in looks.items():
        own = sorted(
            (row for row in rows if row.case.method == method),
            key=lambda row: row.spent.device_bytes,
        )
        found = [figured(row) for row in own]
        if method == FULL and not any(one.value > 0 for one in found):
            continue  # it does not diverge from itself
        values = np.array([one.value for one in found])
        beyond = np.array([(one.value - one.low, one.high - one.value) for one in found])
        axes.errorbar(
            [row.spent.device_bytes / 2**20 for row in own],
            values,
            yerr=beyond.T if len(found) else None,
            label=folded("full cache" if method == FULL else method),
            **style,
        )
    _draw_bytes(axes, rows)


def _draw_bytes(axes: Axes, rows: Sequence[Row]) -> None:
    """Bytes along the bottom, the same as a share of the full cache's along the top."""
    axes.set_xscale("log", base=2)
    axes.set_xlabel("on the device, MiB")
    sizes = [row.spent.device_bytes for row in rows]
    narrow = max(sizes) < 4 * min(sizes)
    axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5) if narrow else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    full = next((row.spent.device_bytes for row in rows if row.case.method == FULL), 0) / 2**20
    if not full:
        axes.spines["top"].set_visible(False)
        return
    shares = axes.secondary_xaxis("top", functions=(_times(1 / full), _times(full)))
    shares.set_xlabel("of the full cache's bytes")
    shares.xaxis.set_major_locator(FixedLocator(_SHARES))
    shares.xaxis.set_major_formatter(FuncFormatter(_fraction))
    shares.xaxis.set_minor_locator(NullLocator())


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda value: np.asarray(value) * factor


def _fraction(value: float, _: object) -> str:
    return "1" if value == 1 else f"1/{1 / value:.0f}"


def percent(axes: Axes) -> None:
    """Scale a panel for shares."""
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(bottom=0)


def nats(axes: Axes) -> None:
    """Scale a panel for divergences."""
    axes.set_yscale("log", nonpositive="mask")  # the full cache's own is 0
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("KL to the full cache, nats per token")
