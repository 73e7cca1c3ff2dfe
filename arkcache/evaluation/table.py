"""Renders an evaluation: questions, real texts, what was dropped and what was skipped."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from arkcache.evaluation.figures import (
    CLAIMED_FROM,
    Interval,
    LanguageRow,
    Spent,
    TaskRow,
    language_rows,
    task_rows,
)
from arkcache.evaluation.records import Case, Result

_SPENT = ("tokens\nattended", "device\nMiB", "host\nMiB", "ms per\ntoken")


def render(result: Result) -> RenderableType:
    """The tables of an evaluation, what was run above them, and how to read them below."""
    settings = result.settings
    model = settings["model"] or "The demonstration model"
    heading = (
        f"{model} ({settings['dtype']}, {settings['device']}), seed {settings['seed']}: every text "
        "is read once with full attention, what comes after it is decoded token by token."
    )
    parts: list[RenderableType] = [Padding(Text(heading), (1, 1, 0, 1))]
    tasks, language = task_rows(result), language_rows(result)
    if tasks:
        parts += [_task_table(tasks), Padding(Text(_TASK_LEGEND), (0, 1, 1, 1))]
    if language:
        parts += [_language_table(language), Padding(Text(_LANGUAGE_LEGEND), (0, 1, 1, 1))]
    notes = list(remarks(result, tasks))
    if notes:
        parts.append(Padding(Text("\n".join(notes)), (0, 1, 1, 1)))
    return Group(*parts)


_TASK_LEGEND = (
    "Right: questions answered in full, in a greedy answer. Retention: the mean score as a share "
    "of the full cache's, with a paired bootstrap interval of 95 %. By length, worst task first."
)
_LANGUAGE_LEGEND = (
    "KL: of the next token to the full cache, nats. NLL: how much less likely what really follows "
    "became. Both with a bootstrap interval of 95 %. Top 1: the most likely token is the full "
    "cache's."
)


def remarks(result: Result, rows: list[TaskRow]) -> Iterable[str]:
    """What keeps a reader from taking a figure for something else."""
    dropped = dict.fromkeys(
        f"{row.case.task} at {row.case.length} ({row.full_accuracy:.0%})"
        for row in rows
        if not row.claimed
    )
    if dropped:
        yield (
            f"Dropped from any claim, because the full cache itself is right less than "
            f"{CLAIMED_FROM:.0%} of the time: {', '.join(dropped)}."
        )
    for reason, cases in _reasons(result).items():
        yield f"Not run: {', '.join(cases)}: {reason}."
    if not result.finished:
        yield "Interrupted: this is what was measured until then."


def _reasons(result: Result) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for skipped in result.skipped:
        name = f"{skipped.case.method} at {skipped.case.budget}"
        cases = found.setdefault(skipped.reason.rstrip("."), [])
        if name not in cases:
            cases.append(name)
    return found


def _task_table(rows: list[TaskRow]) -> Table:
    table = _table("length", "task", "method", "budget")
    for column in ("right", "of the\nfull cache's", "asked", "retention", *_SPENT):
        table.add_column(column, justify="right", no_wrap=True)
    before: Case | None = None
    for row in rows:
        table.add_row(
            *_named(row.case, before, "" if row.claimed else " (dropped)"),
            str(row.num_right),
            str(row.num_full_right),
            str(row.num_asked),
            _interval(row.retention, "{:.0%}"),
            *_spent(row.spent),
            style="" if row.claimed else "dim",
        )
        before = row.case
    return table


def _language_table(rows: list[LanguageRow]) -> Table:
    table = _table("length", "text", "method", "budget")
    for column in ("steps", "KL", "NLL\ndifference", "top 1", *_SPENT):
        table.add_column(column, justify="right", no_wrap=True)
    before: Case | None = None
    for row in rows:
        table.add_row(
            *_named(row.case, before, ""),
            str(row.num_tokens),
            _interval(row.kl, "{:.4f}"),
            _interval(row.nll_difference, "{:+.4f}"),
            f"{row.agreement:.1%}",
            *_spent(row.spent),
        )
        before = row.case
    return table


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True, pad_edge=False)
    for name in names:
        table.add_column(f"\n{name}", overflow="fold", no_wrap=name != "method")
    return table


def _named(case: Case, before: Case | None, remark: str) -> tuple[str, str, str, str]:
    """Length and task where they change, then method and budget."""
    alike = before is not None and (before.length, before.task) == (case.length, case.task)
    length, task = ("", "") if alike else (f"{case.length:,}", case.task + remark)
    return length, task, case.method, case.budget


def _interval(interval: Interval, form: str) -> str:
    if math.isnan(interval.value):
        return "-"
    value, low, high = (
        form.format(number) for number in (interval.value, interval.low, interval.high)
    )
    return f"{value} [{low}, {high}]"


def _spent(spent: Spent) -> tuple[str, str, str, str]:
    mib = 1 << 20
    return (
        f"{spent.attended_tokens:,.0f}",
        f"{spent.device_bytes / mib:,.1f}",
        f"{spent.host_bytes / mib:,.1f}" if spent.host_bytes else "-",
        f"{spent.ms_per_token:.1f}",
    )
