"""Renders an evaluation: questions, real texts, what was dropped and what was skipped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import groupby

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from arkcache.evaluation.attention_table import attention_tables
from arkcache.evaluation.figures import (
    CLAIMED_FROM,
    Interval,
    LanguageRow,
    Spent,
    TaskRow,
    language_rows,
    task_rows,
)
from arkcache.evaluation.records import Result

_SPENT = ("tokens\nattended", "device\nMiB", "ms per\ntoken")


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
        parts += [*_task_tables(tasks), Padding(Text(_TASK_LEGEND), (0, 1, 1, 1))]
    if language:
        parts += [*_language_tables(language), Padding(Text(_LANGUAGE_LEGEND), (0, 1, 1, 1))]
    parts += attention_tables(result)
    notes = list(remarks(result, tasks))
    if notes:
        parts.append(Padding(Text("\n".join(notes)), (0, 1, 1, 1)))
    return Group(*parts)


_TASK_LEGEND = (
    "Right: questions answered in full, in a greedy answer. Kept: of those that the full cache "
    "answers in full, the share that is still answered, with Wilson's interval of 95 %. Retention: "
    "the mean score as a share of the full cache's, with a paired bootstrap interval of 95 %. By "
    "length, worst task first."
)
_LANGUAGE_LEGEND = (
    "KL: of the next token to the full cache, nats. NLL: how much less likely what really follows "
    "became; after ± half of the bootstrap's interval of 95 %. Top 1: how often the most likely "
    "token is the full cache's. Free run: for how many tokens the method's own greedy continuation "
    "is the full cache's, the mean over passages."
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
            "Dropped from any claim on retention, because the full cache itself is right less than "
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


def _task_tables(rows: list[TaskRow]) -> Iterator[RenderableType]:
    """A table for each task and length, which its title names with what the full cache can do."""
    for (length, task), group in groupby(rows, lambda row: (row.case.length, row.case.task)):
        own = list(group)
        dropped = "" if own[0].claimed else " (dropped)"
        title = (
            f"{task}, {length:,} tokens{dropped}: the full cache answers "
            f"{own[0].num_full_right} of {own[0].num_asked}, a score of {own[0].full_accuracy:.0%}"
        )
        table = _table("right", "kept", "retention", *_SPENT)
        for row in own:
            shares = _between(row.kept), _between(row.retention)
            named = (row.case.method, row.case.budget, str(row.num_right))
            table.add_row(*named, *shares, *_spent(row.spent))
        yield Padding(Text(title, style="bold" if own[0].claimed else "dim"), (1, 1, 0, 1))
        yield table


def _language_tables(rows: list[LanguageRow]) -> Iterator[RenderableType]:
    """A table for each length."""
    for length, group in groupby(rows, lambda row: row.case.length):
        own = list(group)
        title = f"language, {length:,} tokens, {own[0].num_tokens} tokens predicted after them"
        title += f", free runs of {own[0].num_free}" if own[0].num_free else ""
        table = _table(
            "KL", "NLL", "top 1", "free\nrun", *_SPENT[::2]
        )  # bytes are the tasks' as well
        for row in own:
            table.add_row(
                row.case.method,
                row.case.budget,
                _give_or_take(row.kl, ".4f"),
                _give_or_take(row.nll_difference, "+.4f"),
                f"{row.agreement:.1%}",
                "-" if math.isnan(row.free_run.value) else f"{row.free_run.value:.1f}",
                *_spent(row.spent)[::2],
            )
        yield Padding(Text(title, style="bold"), (1, 1, 0, 1))
        yield table


def _table(*figures: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, collapse_padding=True, pad_edge=False)
    table.add_column("\nmethod", overflow="fold", min_width=12)
    for column in ("budget", *figures):
        table.add_column(column, justify="right", no_wrap=True, vertical="bottom")
    return table


def _between(interval: Interval) -> str:
    if math.isnan(interval.value):
        return "-"
    return f"{interval.value:.0%} ({100 * interval.low:.0f}-{100 * interval.high:.0f})"


def _give_or_take(interval: Interval, form: str) -> str:
    return f"{interval.value:{form}} ±{(interval.high - interval.low) / 2:.4f}"


def _spent(spent: Spent) -> tuple[str, str, str]:
    return (
        f"{spent.attended_tokens:,.0f}",
        f"{spent.device_bytes / 2**20:,.1f}",
        f"{spent.ms_per_token:.1f}",
    )
