"""An answer in a terminal as it comes, with what the cache does below it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from arkcache.chat.session import Session
from arkcache.huggingface.cache import ArkCache, PagedCacheLayer
from arkcache.sizes import bytes_text
from arkcache.stats import CacheStats

REFRESH_SECONDS = 0.2
"""Between two looks at the cache."""


@contextmanager
def live_answer(console: Console, session: Session) -> Iterator[Callable[[str], None]]:
    """Shows what it is given, above a panel of figures, which goes with the block.

    Rows that are full scroll up as they are; the last row is the panel's upper neighbour.
    """
    before, row = session.cache.stats(), ""
    shown = panel(session, before)
    looked = time.monotonic()
    live = Live(shown, console=console, transient=True, auto_refresh=False)

    def show(part: str) -> None:
        nonlocal row, shown, looked
        *lines, row = (row + part).split("\n")
        rows = [full for line in lines for full in Text(line).wrap(console, console.width)]
        *full, last = Text(row).wrap(console, console.width) or [Text()]
        if full:
            row = last.plain.rstrip(" ") + " " * (len(row) - len(row.rstrip(" ")))
        for text in (*rows, *full):
            console.print(text)
        if time.monotonic() - looked > REFRESH_SECONDS:
            shown, looked = panel(session, before), time.monotonic()
        live.update(Group(Text(row), shown), refresh=True)

    try:
        try:
            live.start(refresh=True)  # not `with live`: Ctrl-C may come while it starts
            yield show
        finally:
            live.update(Text())
            live.stop()  # draws once more
    finally:
        console.print(Text(row))


def panel(session: Session, before: CacheStats) -> Panel:
    """What the session's cache holds, and what it has done since `before`."""
    return boxed(figures(session.cache, before))


def boxed(lines: list[str]) -> Panel:
    """Lines in the frame of a live panel."""
    return Panel(Text("\n".join(lines)), border_style="dim")


def figures(cache: ArkCache, before: CacheStats) -> list[str]:
    """What a cache holds, and what it has done since `before`: two lines."""
    stats = cache.stats()
    layers = max(1, sum(isinstance(one, PagedCacheLayer) for one in cache.layers))
    steps = (stats.decode_steps - before.decode_steps) // layers
    hits, recalled, copied = (
        getattr(stats, name) - getattr(before, name)
        for name in ("pages_hit", "pages_recalled", "bytes_recalled")
    )
    holds = [
        f"{cache.get_seq_length():,} tokens",
        f"device {bytes_text(stats.device_bytes)} + index {bytes_text(stats.digest_bytes)}",
        f"host {bytes_text(stats.host_bytes)}",
    ]
    does = [f"{steps:,} steps"]
    if hits + recalled:
        does.append(f"{hits / (hits + recalled):.0%} of pages at hand")
    if steps:
        does.append(f"{bytes_text(copied / steps)} recalled a step")
    if stats.missed.estimated is not None:
        does.append(f"{stats.missed.estimated:.1%} missed")
    return [", ".join(holds), ", ".join(does)]
