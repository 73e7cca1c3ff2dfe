"""Renders the memory paths: a table for each, and what this machine does not have."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from arkcache.bench.tiers import PeakRow, Result, Row
from arkcache.sizes import bytes_text


def render(result: Result) -> RenderableType:
    """All paths, of each the rate and the time of a piece; then what is absent and why."""
    parts: list[RenderableType] = [Padding(Text(_heading(result)), (1, 1))]
    peaks = {peak.name: peak for peak in result.peaks}
    for route in dict.fromkeys(row.route for row in result.rows):
        own = [row for row in result.rows if row.route == route]
        parts.append(_table(route, own, peaks[result.peak_of[route]]))
    if result.absent:
        reasons = dict.fromkeys(reason for _, reason in result.absent)
        lines = []
        for reason in reasons:
            names = "; ".join(name for name, why in result.absent if why == reason)
            lines.append(f"Not here: {names}. Why: {reason}.")
        parts.append(Padding(Text("\n".join(lines)), (0, 1, 1, 1)))
    return Group(*parts)


def _heading(result: Result) -> str:
    settings = result.settings
    said = (
        f"Random pieces out of {bytes_text(settings['pool_bytes'])}, {settings['num_threads']} "
        f"threads, median of {result.rounds} rounds ± half of what lies between the quartiles. "
        "GB/s are 1e9 bytes that arrive; below are the microseconds of one piece. The best rate of "
        "a line is compared with the peak, which small steps may pass: they arrive in the "
        "processor's cache."
    )
    if not result.finished:
        said += f" Interrupted after {result.rounds} of {settings['rounds']} rounds."
    return said


def _table(route: str, rows: list[Row], peak: PeakRow) -> RenderableType:
    counts = list(dict.fromkeys(row.num_pieces for row in rows))
    spread = (peak.high_gb_s - peak.low_gb_s) / 2 / peak.gb_s
    title = Text.assemble(
        (f" {route}", "bold"), f"   peak: {peak.name}, {rate_text(peak.gb_s)} GB/s ±{spread:.0%}"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("piece", justify="right", no_wrap=True)
    for count in counts:
        table.add_column(f"{count} per step", justify="right", no_wrap=True)
    table.add_column("of peak", justify="right", no_wrap=True)
    for size in dict.fromkeys(row.piece_bytes for row in rows):
        own = {row.num_pieces: row for row in rows if row.piece_bytes == size}
        best = max(row.of_peak for row in own.values())
        cells = (cell(own[count]) if count in own else "-" for count in counts)
        table.add_row(bytes_text(size), *cells, f"{best:.0%}")
    return Group(title, table)


def cell(row: Row) -> str:
    """GB/s; microseconds of a piece; how far the rounds are apart."""
    spread = (row.high_us - row.low_us) / 2 / row.median_us
    return f"{rate_text(row.gb_s)} GB/s\n{time_text(row.us_per_piece)} ±{spread:.0%}"


def rate_text(rate: float) -> str:
    """A rate with two digits or more that count."""
    return f"{rate:.1f}" if rate >= 10 else f"{rate:.2f}" if rate >= 0.1 else f"{rate:.3f}"


def time_text(microseconds: float) -> str:
    """A time with a digit behind the point where it is short."""
    return f"{microseconds:.1f}" if microseconds < 100 else f"{microseconds:,.0f}"
