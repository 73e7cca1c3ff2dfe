"""Reading a long past block by block: one is attended while the next is on its way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor

from arkcache.tiering.lanes import Event, Lanes

Block = Sequence[Tensor]


def read_ahead(
    lanes: Lanes, blocks: Sequence[Block], loads: Sequence[Callable[[Block], None]]
) -> Iterator[Block]:
    """Yield a filled block for each load, in turn; its content holds until the next is asked for.

    Args:
        lanes: the side lane loads, the main lane may read a block once it is yielded.
        blocks: memory to load into, used in turn. With two, the next load runs beside what is
            queued on the main lane for the block at hand; with one, after it.
        loads: fill a block; called with the side lane current.
    """
    ahead = len(blocks) - 1
    loaded: list[Event] = []
    try:
        for number in range(len(loads)):
            for following in range(len(loaded), min(number + ahead + 1, len(loads))):
                block = blocks[following % len(blocks)]
                loaded.append(_start(lanes, block, loads[following]))
            lanes.main.wait(loaded[number])
            yield blocks[number % len(blocks)]
    finally:
        # Interrupted: what is still being loaded must not outlast what comes next.
        lanes.main.wait(lanes.side.record())


def _start(lanes: Lanes, block: Block, load: Callable[[Block], None]) -> Event:
    """Queue a load after all that the main lane does so far, such as to attend the block."""
    lanes.side.wait(lanes.main.record())
    for plane in block:
        lanes.side.keep(plane)
    lanes.side.run(partial(load, block))
    return lanes.side.record()
