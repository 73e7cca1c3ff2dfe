"""Draws scores by where in the text the answer is. Needs matplotlib."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from arkcache.evaluation.figures import FULL
from arkcache.evaluation.plot_style import folded
from arkcache.evaluation.records import Asked, Case

_QUESTIONS_PER_BIN, _MAX_BINS = 5, 10


def by_depth(asked: list[Asked], cases: list[Case], title: str) -> Figure | None:
    """A heat map of one task: a row for each case, a column for each part of the text.

    None where no answer stands anywhere in the text.
    """
    placed = [one for one in asked if one.depth is not None and one.case in cases]
    if not placed:
        return None
    num_bins = max(2, min(_MAX_BINS, len(placed) // len(cases) // _QUESTIONS_PER_BIN))
    scores, counts = binned(placed, cases, num_bins)
    labels = [folded(_named(case)) for case in cases]
    widest = max(len(line) for label in labels for line in label.splitlines())
    figure = Figure(
        figsize=(max(6.0, 1.4 + 0.08 * widest + 0.85 * num_bins), 1.7 + 0.38 * len(cases)),
        layout="constrained",
    )
    axes = figure.subplots()
    image = axes.imshow(scores, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    axes.set_facecolor("#eeeeee")  # no question there
    for (row, column), score in np.ndenumerate(scores):
        if not math.isnan(score):
            colour = "black" if score > 0.6 else "white"
            axes.text(column, row, f"{score:.0%}", ha="center", va="center", color=colour)
    axes.grid(visible=False)
    edges = np.linspace(0, 1, num_bins + 1)
    names = [
        f"{low:.0%}-{high:.0%}\nn={number}"
        for low, high, number in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    axes.set_xticks(range(num_bins), names)
    axes.set_yticks(range(len(cases)), labels)
    axes.set_xlabel("where in the text the answer is, n questions")
    figure.suptitle(title, x=0.01, ha="left")
    figure.colorbar(image, ax=axes, label="mean score", format=PercentFormatter(1, decimals=0))
    return figure


def binned(
    placed: list[Asked], cases: list[Case], num_bins: int
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], list[int]]:
    """Mean scores [cases, bins], NaN where there is no question, and questions in each bin."""
    found: dict[tuple[Case, int], list[float]] = {}
    for one in placed:
        assert one.depth is not None
        place = min(int(one.depth * num_bins), num_bins - 1)
        found.setdefault((one.case, place), []).append(one.score)
    scores = np.full((len(cases), num_bins), math.nan)
    for (case, place), own in found.items():
        scores[cases.index(case), place] = np.mean(own)
    most = [
        max((len(found.get((case, place), ())) for case in cases), default=0)
        for place in range(num_bins)
    ]
    return scores, most


def _named(case: Case) -> str:
    name = "full cache" if case.method == FULL else case.method
    return name if case.budget == "-" else f"{name} at {case.budget}"
