"""The picture of the memory paths: rates by the size of a piece. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from arkcache.bench.tiers import PeakRow, Result, Row
from arkcache.bench.tiers_table import rate_text
from arkcache.errors import InputError
from arkcache.evaluation.plot_style import COLOURS, MARKERS, STYLE
from arkcache.sizes import bytes_text

COLUMNS = 3


def draw(result: Result, path: Path) -> None:
    """Write the picture. Raises `InputError` where the file cannot be written."""
    with matplotlib.rc_context(STYLE):
        drawn = figure(result)
        try:
            drawn.savefig(path, dpi=160)
        except (OSError, ValueError) as error:  # ValueError: a format that is not known
            raise InputError(f"cannot write {path}: {error}") from None


def figure(result: Result) -> Figure:
    """A panel for each path, a line for each number of pieces per step, the peak dashed."""
    routes = list(result.peak_of)
    lines = -(-len(routes) // COLUMNS)
    drawn = Figure(figsize=(9, 0.8 + 2.5 * lines), layout="constrained")
    panels = drawn.subplots(lines, COLUMNS, squeeze=False).ravel()
    peaks = {peak.name: peak for peak in result.peaks}
    counts = list(dict.fromkeys(row.num_pieces for row in result.rows))
    for panel, route in zip(panels, routes, strict=False):
        own = [row for row in result.rows if row.route == route]
        _panel(panel, route, own, counts, peaks[result.peak_of[route]])
    for panel in panels[len(routes) :]:
        panel.set_axis_off()
    first = panels[0]
    drawn.legend(
        *first.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(counts),
        frameon=False,
    )
    drawn.suptitle("A page's paths: bytes that arrive, by the size of a piece", fontsize=11)
    return drawn


def _panel(panel: Axes, route: str, rows: list[Row], counts: list[int], peak: PeakRow) -> None:
    for number, count in enumerate(counts):
        own = [row for row in rows if row.num_pieces == count]
        low = [row.gb_s * (1 - row.median_us / row.high_us) for row in own]
        high = [row.gb_s * (row.median_us / row.low_us - 1) for row in own]
        panel.errorbar(
            [row.piece_bytes for row in own],
            [row.gb_s for row in own],
            yerr=[low, high],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            label=f"{count} per step",
            linewidth=1.3,
            elinewidth=0.8,
            capsize=2,
            markersize=5,
        )
    panel.axhline(peak.gb_s, color="black", linestyle="--", linewidth=0.9)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    sizes = sorted({row.piece_bytes for row in rows})
    panel.set_xticks(sizes, [bytes_text(size).replace(" ", "\n") for size in sizes])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.minorticks_off()
    panel.set_title(f"{route}\npeak (dashed) {rate_text(peak.gb_s)} GB/s", loc="left")
    panel.set_ylabel("GB/s")
