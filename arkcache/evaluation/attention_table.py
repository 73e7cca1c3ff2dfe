"""Renders the attention task: what steps miss, and which pages their index finds."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from arkcache.evaluation.attention_figures import AttentionRow, Spread, attention_rows
from arkcache.evaluation.records import Result

_SHOWN = (1, 4, 10, 40)
"""The k of the table: ArkVale's. The JSON has all."""
_KINDS = ("recall", "recall_alone", "recall_peak")
_MISSED_LEGEND = (
    "Error: norm of the output's difference to full attention's, as a share of that one's norm. "
    "Missed: share of attention of what is not attended, what the index makes of it, and how "
    "often that is too low by more than 0.01. Means over steps, KV heads and the layers that do "
    "not attend everything; in brackets the worst layer. Queries and keys are the full cache's in "
    "every layer."
)
_RECALL_LEGEND = (
    "Recall at k: share of the k best pages that the k best by rating hold. Group: pages of the "
    "most attention, as a KV head's query heads agree on them. Alone: the same, of each query head "
    "by itself. Peak: likewise, pages of the highest logit, which is what boxes bound."
)


def attention_tables(result: Result) -> Iterator[RenderableType]:
    """Two tables for each length, and how to read them; nothing without the task."""
    rows = attention_rows(result)
    if not rows:
        return
    for length, group in groupby(rows, lambda row: row.case.length):
        own = list(group)
        title = f"attention, {length:,} tokens, {own[0].num_steps} steps looked at"
        yield Padding(Text(title, style="bold"), (1, 1, 0, 1))
        yield _missed_table(own)
        yield Padding(Text(_MISSED_LEGEND), (0, 1, 1, 1))
        if any(row.ladder for row in own):
            yield _recall_table([row for row in own if row.ladder])
            yield Padding(Text(_RECALL_LEGEND), (0, 1, 1, 1))


def _missed_table(rows: list[AttentionRow]) -> Table:
    table = _table("budget", "error", "missed", "estimated", "too low")
    for row in rows:
        estimates = ["-" if row.estimated is None else f"{row.estimated:.3f}"]
        estimates.append("-" if row.low is None else f"{row.low:.1%}")
        both = map(_worst, (row.error, row.missed))
        table.add_row(row.case.method, row.case.budget, *both, *estimates)
    return table


def _recall_table(rows: list[AttentionRow]) -> Table:
    """One row for each method: of its ratings, which do not depend on the budget."""
    shown = [k for k in _SHOWN if any(k in row.ladder for row in rows)]
    ladder = " ".join(f"@{k}".rjust(3) for k in shown)
    table = _table("pages", *(f"{name}\n{ladder}" for name in ("group", "alone", "peak")))
    for method, group in groupby(rows, lambda row: row.case.method):
        row = next(group)
        recalls = [
            " ".join(_at(getattr(row, kind), row.ladder, k) for k in shown) for kind in _KINDS
        ]
        table.add_row(method, str(row.num_pages), *recalls)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, collapse_padding=True, pad_edge=False)
    table.add_column("method", overflow="fold", min_width=14, vertical="bottom")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True, vertical="bottom")
    return table


def _worst(spread: Spread) -> str:
    return f"{spread.value:.3f} [{spread.worst:.3f}]"


def _at(recalls: list[Spread], ladder: list[int], k: int) -> str:
    """A recall in three characters: .94, 1.0, or none."""
    if k not in ladder:
        return "  -"
    value = recalls[ladder.index(k)].value
    return "1.0" if value >= 0.995 else f"{value:.2f}"[1:]
