"""Pictures of an evaluation: what is kept and how far predictions are off, by bytes; by depth.

This module and the others named plot need matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from arkcache.errors import InputError
from arkcache.evaluation.attention_figures import attention_rows
from arkcache.evaluation.figures import Interval, LanguageRow, TaskRow, language_rows, task_rows
from arkcache.evaluation.plot_bytes import by_bytes, nats, panels_by_task, percent
from arkcache.evaluation.plot_depth import by_depth
from arkcache.evaluation.plot_recall import rated_methods, recall
from arkcache.evaluation.plot_style import STYLE
from arkcache.evaluation.records import Result


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
    answer is. For all together "recall": see `plot_recall.py`. Raises `InputError` where the folder
    cannot be written to.
    """
    prepare(folder)
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, figure in figures(result):
            path = folder / f"{name}.png"
            try:
                figure.savefig(path, dpi=160)
            except OSError as error:
                raise InputError(f"cannot write {path}: {error.strerror or error}") from None
            paths.append(path)
    return paths


def figures(result: Result) -> Iterator[tuple[str, Figure]]:
    """The pictures that `draw` writes, by name."""
    tasks, language = task_rows(result), language_rows(result)
    cases = [row.case for row in tasks] + [row.case for row in language]
    for length in dict.fromkeys(case.length for case in cases):
        title = f"{result.settings['model'] or 'The demonstration model'}, {length:,} tokens"
        own = [row for row in tasks if row.case.length == length]
        if own:
            known = f"{title}\nof the full cache's right answers, the share kept"
            yield f"kept-{length}", by_bytes(panels_by_task(own), known, _kept, percent)
            share = f"{title}\nmean score, as a share of the full cache's"
            yield f"retention-{length}", by_bytes(panels_by_task(own), share, _retention, percent)
        predicted = [row for row in language if row.case.length == length]
        if predicted:
            panels = {f"real texts, {predicted[0].num_tokens} tokens predicted": predicted}
            far = f"{title}\ndivergence from the full cache"
            yield f"kl-{length}", by_bytes(panels, far, _kl, nats)
        for task in dict.fromkeys(row.case.task for row in own):
            asked = [row.case for row in own if row.case.task == task]
            found = by_depth(result.asked, asked, f"{title}\n{task}: score by depth of the answer")
            if found is not None:
                yield f"depth-{task}-{length}", found
    rated = rated_methods(attention_rows(result))
    if rated:
        yield "recall", recall(rated)


def _kept(row: TaskRow) -> Interval:
    return row.kept


def _retention(row: TaskRow) -> Interval:
    return row.retention


def _kl(row: LanguageRow) -> Interval:
    return row.kl
