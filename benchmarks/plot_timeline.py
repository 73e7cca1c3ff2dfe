"""Draws docs/timeline.png: what runs where during a decode step, and what waits for what.

    python benchmarks/plot_timeline.py

A drawing of the design, not of a measurement: widths say what overlaps, not how long it takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

PICTURE = Path(__file__).parents[1] / "docs" / "timeline.png"

TRACKS = ("host", "main stream", "side stream", "backup stream", "pinned memory")
COLOURS = {
    "count": "#8d99ae",
    "replay": "#8d99ae",
    "model": "#dfe3ea",
    "append": "#9ad1d4",
    "seal": "#9ad1d4",
    "score": "#4f9da6",
    "select": "#2c7a87",
    "gather": "#e07a5f",
    "attend": "#3d5a80",
    "speculate": "#f2b8a0",
    "scatter": "#e9c46a",
    "copy of blocks": "#e9c46a",
    "pages read": "#e07a5f",
    "pages read ahead": "#f2b8a0",
    "pages written": "#e9c46a",
}


class Bar(NamedTuple):
    """Work of one track: what it is, when it starts, how long it is drawn."""

    track: str
    what: str
    start: float
    width: float


def layer(start: float, *, seals: bool) -> tuple[list[Bar], float]:
    """The kernels of one layer, and where they end."""
    bars, now = [], start
    work = [("model", 1.6), ("append", 1.0)]
    work += [("seal", 0.8), ("scatter", 1.2)] if seals else []
    work += [("score", 1.0), ("select", 0.9), ("gather", 1.3), ("attend", 1.1), ("model", 2.6)]
    for what, width in work:
        bars.append(Bar("main stream", what, now, width))
        if what == "gather":
            bars.append(Bar("pinned memory", "pages read", now + 0.1, width - 0.2))
        if what == "scatter":
            bars.append(Bar("pinned memory", "pages written", now + 0.1, width - 0.2))
        if what == "attend":
            bars.append(Bar("side stream", "speculate", now + width + 0.1, 2.3))
            bars.append(Bar("pinned memory", "pages read ahead", now + width + 0.9, 1.4))
        now += width
    return bars, now


def draw(axes: Axes, bars: list[Bar]) -> None:
    """The bars, each in the row of its track."""
    for track, what, start, width in bars:
        row = len(TRACKS) - 1 - TRACKS.index(track)
        axes.add_patch(
            Rectangle((start, row - 0.36), width, 0.72, facecolor=COLOURS[what], edgecolor="white")
        )
        dark = what in ("score", "select", "attend")
        axes.text(
            start + width / 2,
            row,
            what.replace(" ", "\n", 1),
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if dark else "#222222",
        )


def arrow(axes: Axes, start: tuple[float, str], end: tuple[float, str]) -> None:
    """An event: the end of the arrow waits for its start."""
    points = [(x, len(TRACKS) - 1 - TRACKS.index(track)) for x, track in (start, end)]
    (x0, y0), (x1, y1) = points
    shift = 0.36 if y1 < y0 else -0.36
    axes.add_patch(
        FancyArrowPatch(
            (x0, y0 - shift),
            (x1, y1 + shift),
            arrowstyle="-|>",
            mutation_scale=9,
            color="#b00020",
            linewidth=1.1,
            shrinkA=0,
            shrinkB=0,
        )
    )


def main() -> None:
    """Draw a step of two layers after a prompt; the first layer seals a page."""
    figure, axes = plt.subplots(figsize=(13, 4.4))
    first, middle = layer(3.2, seals=True)
    second, end = layer(middle, seals=False)
    bars = [
        Bar("host", "count", 1.4, 1.0),
        Bar("host", "replay", 2.4, 0.8),
        Bar("host", "count", end - 1.6, 1.0),
        Bar("host", "replay", end - 0.6, 0.8),
        Bar("main stream", "model", 0.0, 2.0),
        Bar("backup stream", "copy of blocks", 0.6, 2.4),
        Bar("pinned memory", "pages written", 0.7, 2.2),
    ]
    bars += first + second
    draw(axes, bars)
    attends = [bar for bar in bars if bar.what == "attend"]
    guesses = [bar for bar in bars if bar.what == "speculate"]
    for attend, guess in zip(attends, guesses, strict=True):
        done = attend.start + attend.width
        arrow(axes, (done, "main stream"), (guess.start + 0.05, "side stream"))
    last = guesses[-1]
    arrow(axes, (last.start + last.width, "side stream"), (end + 0.15, "main stream"))
    arrow(axes, (0.5, "main stream"), (0.65, "backup stream"))
    arrow(axes, (3.0, "backup stream"), (3.25, "main stream"))
    axes.text(0.0, len(TRACKS) - 0.45, "end of the prompt", fontsize=8, color="#555555")
    axes.text(3.3, len(TRACKS) - 0.45, "layer 0, which seals a page", fontsize=8, color="#555555")
    axes.text(middle + 0.1, len(TRACKS) - 0.45, "layer 1", fontsize=8, color="#555555")
    axes.axvline(middle, color="#cccccc", linewidth=0.8, zorder=0)
    axes.axvline(3.2, color="#cccccc", linewidth=0.8, zorder=0)
    axes.set_xlim(-0.2, end + 0.6)
    axes.set_ylim(-0.7, len(TRACKS) - 0.2)
    axes.set_yticks(range(len(TRACKS)), TRACKS[::-1])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_xlabel("time (a drawing, not a measurement); red: an event that is waited for")
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=140)


if __name__ == "__main__":
    main()
