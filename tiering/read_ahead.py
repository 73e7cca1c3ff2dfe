"""Reading a long past block by block: one is attended while the next is on its way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor

from arkcache.tiering.streams import Event, Streams

Block = Sequence[Tensor]


def read_ahead(
    streams: Streams, blocks: Sequence[Block], loads: Sequence[Callable[[Block], None]]
) -> Iterator[Block]:
    """Yield a filled block for each load, in turn; its content holds until the next is asked for.

    Args:
        streams: the side stream loads, the main stream may read a block once it is yielded.
        blocks: memory to load into, used in turn. With two, the next load runs beside what is
            queued on the main stream for the block at hand; with one, after it.
        loads: fill a block; called with the side stream current.
    """
    ahead = len(blocks) - 1
    loaded: list[Event] = []
    try:
        for number in range(len(loads)):
            for following in range(len(loaded), min(number + ahead + 1, len(loads))):
                block = blocks[following % len(blocks)]
                loaded.append(_start(streams, block, loads[following]))
            streams.main.wait(loaded[number])
            yield blocks[number % len(blocks)]
    finally:
        # If interrupted, what comes next must wait for the loads that are still running.
        streams.main.wait(streams.side.record())


def _start(streams: Streams, block: Block, load: Callable[[Block], None]) -> Event:
    """Queue a load after all that the main stream does so far, such as to attend the block."""
    streams.side.wait(streams.main.record())
    for plane in block:
        streams.side.keep(plane)
    streams.side.run(partial(load, block))
    return streams.side.record()
