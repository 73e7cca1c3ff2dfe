"""Draws page recall against k by method, as ArkVale's figure 7 does. Needs matplotlib."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from arkcache.errors import InputError
from arkcache.evaluation.attention_figures import AttentionRow, attention_rows
from arkcache.evaluation.records import Result

_PANELS = {
    "recall": "most attention, as a group agrees",
    "recall_alone": "most attention, each query head",
    "recall_peak": "highest logit, each query head",
}
_MARKERS = "osD^v<>Px*"
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
}


def plot_recall(result: Result, path: Path) -> None:
    """Draw a row of panels for each length, a line for each method that rates pages.

    The format is that of the file's suffix. Raises `InputError` where nothing was rated.
    """
    lengths = [
        (length, _by_method(list(own)))
        for length, own in groupby(attention_rows(result), lambda row: row.case.length)
    ]
    lengths = [(length, rows) for length, rows in lengths if rows]
    if not lengths:
        raise InputError("no page was rated: expected a result of the task attention")
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(
            len(lengths),
            len(_PANELS),
            figsize=(9.6, 0.8 + 2.9 * len(lengths)),
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for panels, (length, rows) in zip(axes, lengths, strict=True):
            for panel, (kind, title) in zip(panels, _PANELS.items(), strict=True):
                _draw(panel, rows, kind)
                panel.set_title(title)
            panels[0].set_ylabel(f"page recall, {length:,} tokens")
        named = {str(line.get_label()): line for panel in axes[:, 0] for line in panel.get_lines()}
        figure.legend(
            list(named.values()),
            list(named),
            loc="outside lower center",
            ncols=3,
            frameon=False,
            fontsize=8,
        )
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _by_method(rows: list[AttentionRow]) -> list[AttentionRow]:
    """One row for each method with ratings, which do not depend on the budget."""
    found: dict[str, AttentionRow] = {}
    for row in rows:
        if row.ladder:
            found.setdefault(row.case.method, row)
    return list(found.values())


def _draw(axes: Axes, rows: list[AttentionRow], kind: str) -> None:
    for number, row in enumerate(rows):
        recalls = [spread.value for spread in getattr(row, kind)]
        marker = _MARKERS[number % len(_MARKERS)]
        # Colours come back after ten, line styles tell what then looks alike.
        line = ("-", "--", ":")[number // 10 % 3]
        style: dict[str, Any] = {
            "marker": marker,
            "markersize": 4,
            "linewidth": 1,
            "linestyle": line,
        }
        axes.plot(row.ladder, recalls, label=row.case.method, color=f"C{number % 10}", **style)
    ladder = sorted({k for row in rows for k in row.ladder})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ladder, [str(k) for k in ladder], fontsize=7)
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("k")
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
