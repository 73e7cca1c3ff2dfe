"""Renders a sweep: one table for each comparison, and how to read them."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from arkcache.demo.sweep import EQUAL_BYTES, EQUAL_TOKENS, Result, Row
from arkcache.sizes import bytes_text

_COLUMNS = (
    "right\nanswers",
    "tokens\nattended",
    "device\nKiB",
    "host B\nper token",
    "KL,\nanswers",
    "KL,\nall",
    "ms per\ntoken",
)


def render(result: Result) -> RenderableType:
    """The tables of a sweep, what was run above them, and how to read them below."""
    settings = result.settings
    text = settings["file"] or "Python's help topics"
    model = settings["model"] or "the demonstration model"
    draws = settings["num_draws"]
    heading = (
        f"{settings['num_facts']} facts hidden in {settings['context_tokens']:,} tokens of {text}, "
        f"read once by {model} ({settings['dtype']})"
        + (f"; {draws} such texts, averaged." if draws > 1 else ".")
    )
    limit = bytes_text(settings["device_bytes"])
    parts: list[RenderableType] = [Padding(Text(heading), (1, 1, 0, 1))]
    for mode, title in (
        (EQUAL_TOKENS, f"Equal tokens, a budget of {settings['budget_tokens']}: the cost of bits"),
        (EQUAL_BYTES, f"Equal bytes, a device tier of {limit}: what fits attends"),
    ):
        rows = [row for row in result.rows if row.mode in ("full", mode)]
        parts += [Padding(Text(title, style="bold"), (1, 1, 0, 1)), _table(rows)]
    parts.append(Padding(Text(_LEGEND), (0, 1, 1, 1)))
    return Group(*parts)


_LEGEND = (
    "16 bits are the model's own dtype. KL: of the next token to the full cache, in nats, along "
    "the full cache's conversation: where an answer comes next, and after every token of questions "
    "and answers. Device: slots and windows; the page index is the same for all formats and not "
    "counted."
)


def _table(rows: list[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, collapse_padding=True, pad_edge=False)
    table.add_column("\nformat", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        rotated = ", rotated" if row.rotation != "none" else ""
        table.add_row(row.format + rotated, *_cells(row))
    return table


def _cells(row: Row) -> list[str]:
    is_full = row.mode == "full"
    return [
        f"{row.num_right}/{row.num_questions}",
        f"{row.attended_tokens:,.0f}",
        f"{row.device_bytes / 1024:,.0f}",
        f"{row.host_bytes_per_token:,.0f}",
        "-" if is_full else f"{row.kl_answers:.4f}",
        "-" if is_full else f"{row.kl:.4f}",
        f"{row.ms_per_token:.1f}",
    ]
