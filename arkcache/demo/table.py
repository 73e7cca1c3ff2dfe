"""Renders a run of the demonstration: the table, and what it shows in plain sentences."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from arkcache.demo.run import Result, Row
from arkcache.sizes import bytes_text, unit_of


def render(result: Result) -> RenderableType:
    """The table of a run, what was run above it, and what it shows below."""
    settings = result.settings
    model = settings["model"] or "the demonstration model"
    text = settings["file"] or "Python's help topics"
    heading = (
        f"{settings['num_facts']} facts hidden in {result.context_tokens:,} tokens of {text}, "
        f"read once by {model}; then {max(row.num_questions for row in result.rows)} questions in "
        f"one conversation. Budget: {settings['budget_tokens']} tokens, pages of "
        f"{settings['page_size']}."
    )
    return Group(
        Padding(Text(heading), (1, 1, 0, 1)),
        _table(result.rows),
        Padding(Text("\n".join(sentences(result))), (0, 1, 1, 1)),
    )


def sentences(result: Result) -> list[str]:
    """What the rows show, in two or three plain sentences that follow from the figures alone."""
    rows = {row.method: row for row in result.rows if row.skipped is None}
    full = rows["full"]
    arks = [row for row in result.rows if row.pages_recalled is not None]
    lost = [rows[key] for key in ("sinks-and-window", "heavy-hitters") if key in rows]
    said = []
    if arks:
        best = max(arks, key=lambda row: row.num_right)
        share = best.attended_tokens / full.attended_tokens
        said.append(
            f"{best.title}: {best.num_right} of {best.num_questions} right (full cache: "
            f"{full.num_right}), attending {share:.1%} of the tokens in each step. "
            f"{bytes_text(best.device_bytes)} on the device instead of "
            f"{bytes_text(full.device_bytes)}; the pages wait in the host tier, and "
            f"{best.pages_recalled:,} were recalled when a question needed them."
        )
    if arks and lost:
        scores = " and ".join(f"{row.title} answered {row.num_right}" for row in lost)
        said.append(f"With the same budget and nothing to recall from, {scores}.")
    said.append(_remark(result, full))
    said += [f"{row.title} was not run: {row.skipped}." for row in result.rows if row.skipped]
    return [sentence for sentence in said if sentence]


def _remark(result: Result, full: Row) -> str:
    """What keeps a reader from taking a figure for something else."""
    if full.num_right < full.num_questions / 2:
        return (
            "With its full cache this model answers less than half: the text or the model is to "
            "blame, and the other rows say little."
        )
    if result.settings["device"] == "cpu":
        return (
            "Without a GPU both tiers are RAM, and the token index keeps keys in 4 bits, with a "
            "scale per token; on a GPU in 2."
        )
    return ""


def _table(rows: list[Row]) -> Table:
    unit, size = unit_of(max(row.device_bytes for row in rows))
    table = Table(box=box.SIMPLE_HEAD, padding=0, collapse_padding=True, pad_edge=False)
    table.add_column("\nmethod", no_wrap=True)
    for column in (
        "right\nanswers",
        "tokens\nattended",
        f"device\n{unit}",
        f"host\n{unit}",
        "pages\nrecalled",
        "hit\nrate",
        "ms per\ntoken",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if row.skipped is not None:
            table.add_row(row.title, "-", style="dim")
        else:
            style = "bold" if row.pages_recalled is not None else ""
            table.add_row(row.title, *_cells(row, size), style=style)
    return table


def _cells(row: Row, size: int) -> list[str]:
    return [
        f"{row.num_right}/{row.num_questions}",
        f"{row.attended_tokens:,.0f}",
        f"{row.device_bytes / size:,.1f}",
        f"{row.host_bytes / size:,.1f}" if row.host_bytes else "-",
        "-" if row.pages_recalled is None else f"{row.pages_recalled:,}",
        "-" if row.hit_rate is None else f"{row.hit_rate:.0%}",
        f"{row.ms_per_token:.1f}",
    ]
