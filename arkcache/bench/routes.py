"""The paths that a page can take in the host's own memory, and from a file; what a path is.

Paths to and from a GPU are in `device_routes.py`.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from arkcache.bench.file_pool import FilePool
from arkcache.errors import InputError
from arkcache.tiering.host import HostTier
from arkcache.tiering.pieces import Ids, copy_pieces, take

MEMORY, DISK = "memory, in one run", "file, cold, in one run"
"""Peaks: what one large copy reaches."""

MOVED_BYTES = 64 << 20
"""The most that a step or a peak's copy moves."""


Step = Callable[[Ids], Tensor]
"""Moves the pieces at some positions of a pool, int64 [count]: what they arrive in, in their order,
uint8 or words [count or more, ...]."""

Bind = Callable[[int], Step]
"""Makes the step for pieces of so many bytes."""


@dataclass(frozen=True)
class Route:
    """A path from one memory to another.

    Attributes:
        name: its name in tables and ledgers.
        peak: the name of the peak that it is compared with.
        bind: what moves pieces along it.
        begin: what is done before the cases of a round, untimed.
        before: what is done before each timed sample.
        finish: waits until all that was moved has arrived.
        max_calls: steps of one sample at most.
    """

    name: str
    peak: str
    bind: Bind
    begin: Callable[[], None] = lambda: None
    before: Callable[[], None] = lambda: None
    finish: Callable[[], None] = lambda: None
    max_calls: int = 64


class Peak(NamedTuple):
    """One large move, of so many bytes. `before`, `finish`: as those of a route."""

    name: str
    nbytes: int
    run: Callable[[], object]
    before: Callable[[], None] = lambda: None
    finish: Callable[[], None] = lambda: None


class Absent(NamedTuple):
    """A path that this machine does not have, and why."""

    name: str
    reason: str


@dataclass
class Paths:
    """All paths of a machine, the peaks that they are compared with, and what is absent."""

    routes: list[Route] = field(default_factory=list)
    peaks: list[Peak] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)


GATHER, MOVE = "RAM to RAM, gather", "RAM to RAM, move"
WARM, COLD, READ = "mapped file, warm", "mapped file, cold", "file, cold, a read per piece"


def make_pool(nbytes: int, device: torch.device | None = None) -> tuple[HostTier, Tensor]:
    """A host tier full of random bytes, and those, uint8 [nbytes]; keep the tier.

    Its memory is what a cache's is: an arena, pinned for `device` where that is possible. Then it
    may hold less, as much as one registration: a copy must not cross from one into the next.
    """
    host = HostTier([mmap.PAGESIZE], nbytes, pin_to=device)
    host.check_room([1])
    count = min(nbytes // mmap.PAGESIZE, host.pieces_per_chunk or nbytes)
    host.allocate(count)
    pool = host.pieces()[:count].view(-1)
    pool.view(torch.int64).random_()
    return host, pool


def pieces_of(pool: Tensor, piece_bytes: int) -> Tensor:
    """A pool as whole pieces: uint8 [count, piece_bytes]."""
    return pool[: len(pool) // piece_bytes * piece_bytes].view(-1, piece_bytes)


def memory_paths(pool: Tensor) -> Paths:
    """What the host tier does in memory: gathers pieces, and moves them within the arena."""
    target = torch.empty(min(len(pool), MOVED_BYTES), dtype=torch.uint8)
    target.zero_()  # its memory is there before it is written to
    chunks = Chunks(pool, len(target))

    def gather(piece_bytes: int) -> Step:
        pieces = pieces_of(pool, piece_bytes)
        return lambda positions: take(pieces, positions)

    def move(piece_bytes: int) -> Step:
        pieces, own = pieces_of(pool, piece_bytes), pieces_of(target, piece_bytes)
        places = np.arange(len(own))  # as pieces that close holes: from anywhere, in order

        def step(positions: Ids) -> Tensor:
            copy_pieces(own, places[: len(positions)], pieces, positions)
            return own

        return step

    return Paths(
        [Route(GATHER, MEMORY, gather), Route(MOVE, MEMORY, move)],
        [Peak(MEMORY, len(target), lambda: target.copy_(chunks.next()))],
    )


class Chunks:
    """Parts of a pool, one after another, so that none is in a cache when it is read."""

    def __init__(self, pool: Tensor, nbytes: int) -> None:
        self._parts = [part for part in pool.split(nbytes) if len(part) == nbytes]
        self._next = 0

    def next(self) -> Tensor:
        """The next part, uint8 [nbytes]."""
        self._next = (self._next + 1) % len(self._parts)
        part: Tensor = self._parts[self._next]
        return part


@contextmanager
def file_paths(make: Callable[[], FilePool], *, required: bool) -> Iterator[Paths]:
    """Pieces of a file, in the system's page cache (warm) and not (cold): through a mapping, and
    by a read for each.

    Args:
        make: makes the file.
        required: whether a file that cannot be made is an `InputError`, or a path that is absent.
    """
    try:
        file = make()
    except InputError as error:
        if required:
            raise
        yield Paths(absent=[Absent(name, str(error)) for name in (WARM, COLD, READ)])
        return
    with file:

        def gather(piece_bytes: int) -> Step:
            pieces = pieces_of(file.data, piece_bytes)
            return lambda positions: take(pieces, positions)

        paths = Paths([Route(WARM, MEMORY, gather, begin=file.warm)])
        reason = file.why_never_cold()
        if reason is not None:
            paths.absent += [Absent(COLD, reason), Absent(READ, reason)]
        else:
            target = torch.zeros(min(file.nbytes, MOVED_BYTES), dtype=torch.uint8)

            def read(piece_bytes: int) -> Step:
                own = pieces_of(target, piece_bytes)
                lines = own.numpy()

                def step(positions: Ids) -> Tensor:
                    file.read_pieces(positions, lines)
                    return own

                return step

            for name, bind in ((COLD, gather), (READ, read)):
                paths.routes.append(Route(name, DISK, bind, before=file.drop, max_calls=8))
            paths.peaks.append(Peak(DISK, file.nbytes, file.read, before=file.drop))
        yield paths
