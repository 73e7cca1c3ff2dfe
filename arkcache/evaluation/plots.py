"""Pictures of an evaluation: what is kept and how far predictions are off, by bytes; by depth.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; markers and lines
repeat what colours say. This module and `plot_recall` need matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, PercentFormatter

from arkcache.errors import InputError
from arkcache.evaluation.attention_figures import attention_rows
from arkcache.evaluation.figures import (
    FULL,
    Interval,
    LanguageRow,
    TaskRow,
    language_rows,
    task_rows,
)
from arkcache.evaluation.plot_recall import plot_recall
from arkcache.evaluation.records import Asked, Case, Result

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F")
_MARKERS = "osD^vP*X<>"
_LINES = ("-", "--", "-.", ":")
_SHARES = tuple(1 / 2**power for power in range(11))
_MOST_COLUMNS = 3
_QUESTIONS_PER_BIN, _MOST_BINS = 5, 10
_LABEL_CHARS = 36
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.7,
    "axes.titlesize": 10,
}

Row = TaskRow | LanguageRow
Figured = Callable[[Any], Interval]
"""What is drawn of a row."""


def prepare(folder: Path) -> None:
    """Make the folder of the pictures. Raises `InputError` where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the folder {folder} for pictures: {error.strerror or error}"
        ) from None


def draw(result: Result, folder: Path) -> list[Path]:
    """Write all pictures that a result has figures for, as PNG; their paths.

    For each length: "kept" and "retention" by bytes on the device, a panel for each task, the worst
    first; "kl" by bytes of real texts; and, for each task, "depth": scores by where in the text the
    answer is. For all together "recall": see `plot_recall`. Raises `InputError` where the folder
    cannot be written to.
    """
    prepare(folder)
    paths = []
    with matplotlib.rc_context(_STYLE):
        for name, figure in figures(result):
            paths.append(folder / f"{name}.png")
            with _writing(paths[-1]):
                figure.savefig(paths[-1], dpi=160)
    if any(row.ladder for row in attention_rows(result)):
        paths.append(folder / "recall.png")
        with _writing(paths[-1]):
            plot_recall(result, paths[-1])
    return paths


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def figures(result: Result) -> Iterator[tuple[str, Figure]]:
    """The pictures that `draw` writes, by name."""
    tasks, language = task_rows(result), language_rows(result)
    cases = [row.case for row in tasks] + [row.case for row in language]
    for length in dict.fromkeys(case.length for case in cases):
        title = f"{result.settings['model'] or 'The demonstration model'}, {length:,} tokens"
        own = [row for row in tasks if row.case.length == length]
        if own:
            known = f"{title}\nof the full cache's right answers, the share kept"
            yield f"kept-{length}", _by_bytes(_panels(own), known, _kept, _percent)
            share = f"{title}\nmean score, as a share of the full cache's"
            yield f"retention-{length}", _by_bytes(_panels(own), share, _retention, _percent)
        predicted = [row for row in language if row.case.length == length]
        if predicted:
            panels = {f"real texts, {predicted[0].num_tokens} tokens predicted": predicted}
            far = f"{title}\ndivergence from the full cache"
            yield f"kl-{length}", _by_bytes(panels, far, _kl, _nats)
        for task in dict.fromkeys(row.case.task for row in own):
            asked = [row.case for row in own if row.case.task == task]
            found = _by_depth(result.asked, asked, f"{title}\n{task}: score by depth of the answer")
            if found is not None:
                yield f"depth-{task}-{length}", found


def _kept(row: TaskRow) -> Interval:
    return row.kept


def _retention(row: TaskRow) -> Interval:
    return row.retention


def _kl(row: LanguageRow) -> Interval:
    return row.kl


# -- figures by bytes -----------------------------------------------------------------------------


def _panels(rows: list[TaskRow]) -> dict[str, list[TaskRow]]:
    """The rows of each task, in their order, by the title of its panel."""
    panels: dict[str, list[TaskRow]] = {}
    for row in rows:
        title = f"{row.case.task}: full cache {row.num_full_right} of {row.num_asked}"
        panels.setdefault(title, []).append(row)
    return panels


def _by_bytes(
    panels: dict[str, Any], title: str, figured: Figured, scaled: Callable[[Axes], None]
) -> Figure:
    """One panel for each group of rows, and in it a line for each method over its budgets."""
    columns = min(len(panels), _MOST_COLUMNS)
    lines = -(-len(panels) // columns)
    rows: list[Row] = [row for own in panels.values() for row in own]
    styles = _styles([row.case.method for row in rows])
    num_named = sum(len(_folded(method).splitlines()) for method in styles)  # below, in two columns
    figure = Figure(
        figsize=(max(7.0, 3.7 * columns), 3.3 * lines + 0.7 + 0.1 * num_named),
        layout="constrained",
    )
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for one, (name, own) in zip(axes.flat, panels.items(), strict=False):
        _draw_panel(one, own, figured, styles)
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
    axes: Axes, rows: Sequence[Row], figured: Figured, styles: dict[str, dict[str, Any]]
) -> None:
    for method, style in styles.items():
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
            label=_folded("full cache" if method == FULL else method),
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


def _folded(label: str) -> str:
    """A label in lines that are short enough, broken after commas where it has any."""
    parts = label.replace(",", ",\0").split("\0")
    lines = [""]
    for part in parts:
        if lines[-1] and len(lines[-1]) + len(part) > _LABEL_CHARS:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(bottom=0)


def _nats(axes: Axes) -> None:
    axes.set_yscale("log", nonpositive="mask")  # the full cache's own is 0
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("KL to the full cache, nats per token")


def _styles(methods: list[str]) -> dict[str, dict[str, Any]]:
    """How each method is drawn: colour, marker and line repeat with different periods."""
    found = {}
    for number, method in enumerate(one for one in dict.fromkeys(methods) if one != FULL):
        found[method] = {
            "color": _COLOURS[number % len(_COLOURS)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "linestyle": _LINES[number % len(_LINES)],
        }
    common: dict[str, Any] = {"linewidth": 1.3, "elinewidth": 0.8, "capsize": 2, "markersize": 6}
    common["markeredgecolor"] = "white"
    common["markeredgewidth"] = 0.6
    full = {FULL: {"color": "black", "marker": "s", "linestyle": "none"}}
    return {method: common | style for method, style in (full | found).items()}


# -- scores by depth ------------------------------------------------------------------------------


def _by_depth(asked: list[Asked], cases: list[Case], title: str) -> Figure | None:
    """A heat map of one task: a row for each case, a column for each part of the text.

    None where no answer stands anywhere in the text.
    """
    placed = [one for one in asked if one.depth is not None and one.case in cases]
    if not placed:
        return None
    num_bins = max(2, min(_MOST_BINS, len(placed) // len(cases) // _QUESTIONS_PER_BIN))
    scores, counts = _binned(placed, cases, num_bins)
    labels = [_folded(_named(case)) for case in cases]
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


def _binned(
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
