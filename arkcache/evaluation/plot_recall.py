"""Draws page recall against k by method, as ArkVale's figure 7 does. Needs matplotlib."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from arkcache.evaluation.attention_figures import AttentionRow
from arkcache.evaluation.plot_style import styles

_PANELS = {
    "recall": "most attention, as a group agrees",
    "recall_alone": "most attention, each query head",
    "recall_peak": "highest logit, each query head",
}

Rated = dict[int, dict[str, AttentionRow]]
"""By length, one row for each method with ratings: they do not depend on the budget."""


def rated_methods(rows: list[AttentionRow]) -> Rated:
    """What there is to draw of an evaluation's rows; nothing where no page was rated."""
    found: Rated = {}
    for row in rows:
        if row.ladder:
            found.setdefault(row.case.length, {}).setdefault(row.case.method, row)
    return found


def recall(rated: Rated) -> Figure:
    """A row of panels for each length, a line for each method."""
    methods = [method for rows in rated.values() for method in rows]
    looks = styles(methods)
    figure = Figure(figsize=(9.6, 0.8 + 2.9 * len(rated)), layout="constrained")
    axes = figure.subplots(len(rated), len(_PANELS), squeeze=False, sharey=True)
    for panels, (length, rows) in zip(axes, rated.items(), strict=True):
        for panel, (kind, title) in zip(panels, _PANELS.items(), strict=True):
            for method, row in rows.items():
                values = [spread.value for spread in getattr(row, kind)]
                panel.errorbar(row.ladder, values, label=method, **looks[method])
            panel.set_title(title, loc="left")
            _scale(panel, sorted({k for row in rows.values() for k in row.ladder}))
        panels[0].set_ylabel(f"page recall, {length:,} tokens")
    named = {
        label: handle
        for panel in axes[:, 0]
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(named.values()),
        list(named),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
        handlelength=3.5,
    )
    return figure


def _scale(axes: Axes, ladder: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ladder, [str(k) for k in ladder], fontsize=7)
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("k")
    axes.grid(visible=False, axis="x")
