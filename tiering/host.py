"""The host tier: one arena of bytes that holds sealed pages of all KV heads, in one or two formats.

The arena is a single anonymous mapping, reserved once at its limit and backed by memory only as
pieces are first written. It therefore grows without ever copying what it holds, and its address is
the same for life, which is what a copy kernel and the driver's page registration need. For a CUDA
device it is pinned as it grows, so that kernels and copies of that device reach it by themselves.

A piece is a page as one format stores it, and all pieces of a kind have one size: kind 0 is the
finer format, kind 1 the coarser one that pages are demoted to. Kind 0 grows from the left end of
the arena, kind 1 from the right, and what is free is the run between them. Released pieces leave
holes, which `compact` fills with the last pieces of the same side: equal sizes always fit, so free
memory is one run again however long the tier has served.

Pieces are immutable once written and counted by reference, so that beams, returned sequences and
copies of a cache share them instead of copying the context. Callers name them by handles, which
stay the same when pieces move.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arkcache.errors import HostTierFullError, InputError, IntegrityError
from arkcache.tiering.allowance import Allowance
from arkcache.tiering.mapping import map_anonymous
from arkcache.tiering.pieces import Ids, Side, Stack, copy_pieces, lengthened, put_pieces
from arkcache.tiering.pinned import PinnedArena
from arkcache.tiering.registration import logger
from arkcache.tiering.system_memory import physical_memory_bytes

ALIGNMENT = 16
"""Where the right side starts: kernels read quantised pieces in words of this many bytes."""


class HostTier:
    """An arena of pieces of one or two sizes.

    Args:
        piece_bytes: size of a piece of each kind.
        limit_bytes: the most it may hold, whatever the system has. None: it may grow while the
            system has memory to spare (`Allowance`), which it asks as it grows.
        pin_to: a CUDA device that is to reach the pieces by itself; they are of one size then.

    Attributes:
        folder: where the arena is a file (`FileTier`); None for one in memory.

    Raises `HostTierFullError` from `allocate` before anything has changed.
    """

    folder: Path | None = None

    def __init__(
        self,
        piece_bytes: Sequence[int],
        limit_bytes: int | None,
        *,
        pin_to: torch.device | None = None,
    ) -> None:
        self.piece_bytes, self.pin_to = tuple(piece_bytes), pin_to
        self._allowance = Allowance() if limit_bytes is None else None
        self._pinning = self._new_pinning()
        self.limit_bytes = physical_memory_bytes() if limit_bytes is None else limit_bytes
        self._capacity = tuple(self.limit_bytes // size for size in self.piece_bytes)
        self._starts, self._end = self._lay_out()
        if len(self.piece_bytes) > 1:
            # The right side starts aligned, which may leave a few bytes of the limit unused.
            self.limit_bytes = self._end
            self._capacity = (self._end // self.piece_bytes[0], self._capacity[1])
        self._origin: Ids = np.zeros(0, dtype=np.int64)
        self._extracted: Ids = np.zeros(0, dtype=np.int64)
        self._forget()

    def _lay_out(self) -> tuple[tuple[int, ...], int]:
        """First byte of each kind's pieces, and the bytes to map."""
        if len(self.piece_bytes) == 1:
            return (0,), self._capacity[0] * self.piece_bytes[0]
        right = self._capacity[1] * self.piece_bytes[1]
        start = (self.limit_bytes - right) // ALIGNMENT * ALIGNMENT
        return (0, start), start + right

    def _new_pinning(self) -> PinnedArena:
        if self.pin_to is not None and self.pin_to.type == "cuda" and len(self.piece_bytes) > 1:
            raise InputError(
                f"pin_to={self.pin_to} with pieces of {self.piece_bytes} bytes: pieces of one size "
                "can be pinned; leave pin_to out for two"
            )
        may_take = (self._allowance.covers,) if self._allowance is not None else ()
        pinning = PinnedArena(self.pin_to, self.piece_bytes[0], *may_take)
        pinning.close_with(self)
        return pinning

    def _forget(self) -> None:
        """Go back to the state of a new tier: no pieces and no memory."""
        self._pinning.close()
        if self._allowance is not None:
            self._allowance.give_back(0)
        self._mapping: mmap.mmap | None = None
        self._kept: Ids = np.zeros(0, dtype=np.int64)
        self._pieces = [torch.empty((0, size), dtype=torch.uint8) for size in self.piece_bytes]
        self._sides = [Side() for _ in self.piece_bytes]
        self._references: Ids = np.zeros(0, dtype=np.int64)
        self._kind: NDArray[np.int8] = np.zeros(0, dtype=np.int8)
        self._position: Ids = np.zeros(0, dtype=np.int64)
        self._free = Stack()

    # -- sizes ------------------------------------------------------------------------------------

    @property
    def num_pieces(self) -> int:
        """Pieces held, of all kinds."""
        return sum(side.count for side in self._sides)

    def count(self, kind: int) -> int:
        """Pieces of a kind held."""
        return self._sides[kind].count

    @property
    def used_bytes(self) -> int:
        """Bytes of the pieces held."""
        return sum(
            side.count * size for side, size in zip(self._sides, self.piece_bytes, strict=True)
        )

    def bytes_of(self, handles: Ids) -> int:
        """Bytes of the listed pieces, each counted once however often it is listed."""
        counts = np.bincount(self._kind[np.unique(handles)], minlength=len(self.piece_bytes))
        return int(counts @ np.array(self.piece_bytes))

    def resident_bytes(self, handles: Ids) -> int:
        """Bytes that the listed pieces take of this process's RAM at most."""
        return self.bytes_of(handles)

    @property
    def _gap(self) -> int:
        """Bytes between the two sides."""
        extents = zip(self._sides, self.piece_bytes, strict=True)
        return self._end - sum(side.extent * size for side, size in extents)

    def check_room(self, counts: Sequence[int]) -> None:
        """Raise `HostTierFullError` unless so many more of each kind fit the limit and the system.

        Kinds that are not listed get none. Pins what these pieces will lie in.
        """
        needed = sum(n * size for n, size in zip(counts, self.piece_bytes, strict=False))
        self._check_limit(sum(counts), needed)
        if not needed:
            return  # most steps fill no page
        more = (*counts, *(0 for _ in self.piece_bytes[len(counts) :]))
        self._back(
            [
                (side.extent + max(0, count - len(side.holes))) * size
                for side, count, size in zip(self._sides, more, self.piece_bytes, strict=True)
            ]
        )

    def _check_limit(self, count: int, nbytes: int) -> None:
        if self.used_bytes + nbytes > self.limit_bytes:
            raise HostTierFullError(
                f"the host tier holds {self.used_bytes} bytes of at most {self.limit_bytes} and "
                f"{count} more pages need {nbytes}: raise host_bytes, shorten "
                "the context, or release another cache with reset()"
            )

    def _back(self, extents: Sequence[int]) -> None:
        """Have memory for so many bytes from the end of each side on, and pin it.

        Raises `HostTierFullError` where the system has none to spare, or refuses to pin it.
        """
        # Sides that would overlap are compacted first.
        needed = min(self._pinning.reach(sum(extents)), self._end)
        if self._allowance is not None:
            self._allowance.require(needed)
        if needed and self._mapping is None:
            self._reserve()
        self._set_aside(needed)
        self._pinning.extend(extents[0])  # pieces of two kinds are not pinned
        if self._allowance is not None:
            self._allowance.touch(self._pinning.nbytes)

    def _set_aside(self, _nbytes: int) -> None:
        """Have room behind the first bytes of the arena, which are written next."""

    def _touch(self) -> None:
        """Count what is allocated as touched: it is written next."""
        if self._allowance is not None:
            self._allowance.touch(self._end - self._gap)

    # -- pinned or pageable -----------------------------------------------------------------------

    @property
    def pinned(self) -> bool:
        """Whether `pin_to` may reach the pieces by itself: decided when memory is first reserved
        (by `check_room` or `allocate`), and the same from then on."""
        return self._pinning.why_pageable is None

    @property
    def why_pageable(self) -> str | None:
        """Why the arena is not pinned; None if it is."""
        return self._pinning.why_pageable

    @property
    def pieces_per_chunk(self) -> int | None:
        """Positions between boundaries that no copy may cross; None while pageable."""
        return self._pinning.chunk_bytes // self.piece_bytes[0] if self.pinned else None

    # -- pieces -----------------------------------------------------------------------------------

    def allocate(self, count: int, kind: int = 0) -> Ids:
        """Take `count` pieces of a kind, freed places first; each is held by one reference.

        Moves pieces where what is free suffices only once the holes are closed. That happens with
        two kinds only: the holes of one size alone are always filled by the next pieces.
        """
        counts = [0] * len(self.piece_bytes)
        counts[kind] = count
        self.check_room(counts)
        side = self._sides[kind]
        if max(0, count - len(side.holes)) * self.piece_bytes[kind] > self._gap:
            self._close_holes()
        self._grow(count - len(self._free))
        handles, positions = self._free.pop(count), side.take(count)
        self._references[handles] = 1
        self._kind[handles] = kind
        self._position[handles] = positions
        side.handle_at[positions] = handles
        self._touch()
        return handles

    def _grow(self, missing: int) -> None:
        """Provide handles for so many more pieces."""
        if missing <= 0:
            return
        old = len(self._references)
        size = old + max(missing, old // 2)
        self._references = lengthened(self._references, size)
        self._kind = lengthened(self._kind, size)
        self._position = lengthened(self._position, size)
        self._free.push(np.arange(old, size, dtype=np.int64)[::-1])  # the lowest is taken first

    def write(self, handles: Ids, packed: Tensor) -> None:
        """Fill new pieces of one kind with `packed`, bytes [pieces, bytes of a piece].

        At once, without waiting for what a device may still do with these places of the arena.
        """
        if len(handles):
            pieces = self._pieces[int(self._kind[handles[0]])]
            put_pieces(pieces, self.positions(handles), packed.to(pieces.device))
            self.written(handles)

    # -- what a tier in a file does beside ---------------------------------------------------------

    def written(self, _handles: Ids) -> None:
        """Note that new pieces have been filled, by whoever knows where they are."""

    def touch(self, _num_pieces: int) -> None:
        """Note that so many pieces, anywhere, were read or written."""

    @property
    def has_unread(self) -> bool:
        """Whether there are pieces that are still to be compared when they are first read."""
        return False

    @property
    def wants_ready(self) -> bool:
        """Whether there are pieces for which `ready` has something to do."""
        return False

    def ready(self, _handles: Ids, _name: Callable[[int], str]) -> None:
        """Before pieces are read: compare those with their checksums that never were, and have the
        disk begin to read all that may not be in memory.

        name: what an error calls the piece of a handle. Raises `SessionError`.
        """

    def compare(self, _handles: Ids, _name: Callable[[int], str]) -> None:
        """Read pieces, and compare all that have checksums; see `ready`."""

    # -- where pieces are -------------------------------------------------------------------------

    def pieces(self, kind: int = 0) -> Tensor:
        """The bytes of a kind's pieces, [places, bytes of a piece]: a view of the arena.

        Has none while the tier holds no memory. Not every position is a piece: see `positions`.
        """
        return self._pieces[kind]

    def kinds(self, handles: Ids) -> NDArray[np.int8]:
        """The kind of each piece."""
        return self._kind[handles]

    def positions(self, handles: Ids) -> Ids:
        """Where each piece is in `pieces` of its kind.

        Holds until `compact`, and in a tier of two kinds until the next `allocate`.
        """
        positions = self._position[handles]
        if len(self.piece_bytes) == 1:
            return positions
        return np.where(self._kind[handles] == 0, positions, self._view_positions(1, positions))

    @property
    def position_of(self) -> Ids:
        """The position of every piece by its handle, in a tier of one kind."""
        return self._position

    def _view_positions(self, kind: int, positions: Ids) -> Ids:
        """A side's positions, which count from its end of the arena, as positions of `pieces`."""
        return positions if kind == 0 else self._capacity[1] - 1 - positions

    def retain(self, handles: Ids) -> None:
        """Add one reference per listed piece (a piece may be listed several times)."""
        np.add.at(self._references, handles, 1)

    def release(self, handles: Ids) -> None:
        """Drop one reference per listed piece; the place of one without any is free again.

        The memory of such places serves the next pieces; `compact` gives it back to the system.
        """
        np.add.at(self._references, handles, -1)
        freed = np.unique(handles[self._references[handles] == 0])
        for kind, side in enumerate(self._sides):
            side.give_back(self._position[freed[self._kind[freed] == kind]])
        self._free.push(freed)
        self._given_back(freed)
        if len(freed) and self.num_pieces == 0:
            self._forget()

    def _given_back(self, _handles: Ids) -> None:
        """Note that nobody refers to these pieces any more."""

    def references(self, handles: Ids) -> Ids:
        """How many references each piece has."""
        return self._references[handles]

    # -- compaction -------------------------------------------------------------------------------

    def compact(self) -> None:
        """Close all holes and give the memory between the two sides back to the system.

        Free space is one run afterwards. Rows change, handles do not. What is pinned stays in
        memory: the device would go on seeing what was there.
        """
        self._close_holes()
        if self._mapping is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        left, page = self._sides[0].extent * self.piece_bytes[0], mmap.PAGESIZE
        stop = (left + self._gap) // page * page
        start = -(-max(left, self._pinning.claimed_bytes) // page) * page
        if start >= stop:
            return
        with contextlib.suppress(OSError):  # memory that someone has locked stays
            self._mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)
            if self._allowance is not None:
                self._allowance.give_back(self._end - (stop - start))

    def _close_holes(self) -> None:
        """Move the last pieces of each side into its holes.

        The metadata changes after the bytes: a move that fails for want of memory has done nothing.
        """
        for kind, side in enumerate(self._sides):
            sources, targets = side.moves()
            pieces = self._pieces[kind]
            if len(sources):
                self._pinning.synchronize()
            copy_pieces(
                pieces,
                self._view_positions(kind, targets),
                pieces,
                self._view_positions(kind, sources),
            )
            self._position[side.handle_at[sources]] = targets
            side.move(sources, targets)

    # -- copies -----------------------------------------------------------------------------------

    def extract(self, handles: Ids) -> HostTier:
        """A new tier that holds a copy of the listed pieces, one reference for each listing.

        It is pinned by itself, for the same device.
        """
        limit = self.limit_bytes if self._allowance is None else None
        tier = HostTier(self.piece_bytes, limit, pin_to=self.pin_to)
        self._pinning.synchronize()
        tier._origin, listings = np.unique(handles, return_counts=True)
        tier._extracted = np.zeros_like(tier._origin)
        for kind, pieces in enumerate(self._pieces):
            listed = np.flatnonzero(self._kind[tier._origin] == kind)
            own = tier.allocate(len(listed), kind)
            tier._extracted[listed] = own
            tier._references[own] = listings[listed]
            copy_pieces(
                tier._pieces[kind],
                tier.positions(own),
                pieces,
                self.positions(tier._origin[listed]),
            )
        return tier

    def extracted(self, handles: Ids) -> Ids:
        """What the pieces of the tier that this one was extracted from are called here."""
        return self._extracted[np.searchsorted(self._origin, handles)]

    def __getstate__(self) -> dict[str, object]:
        self._pinning.synchronize()
        held = [pieces[self._used(kind)].clone() for kind, pieces in enumerate(self._pieces)]
        own = {"_mapping": None, "_pinning": None, "_allowance": self._allowance is not None}
        return self.__dict__ | own | {"_pieces": held}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._allowance = Allowance() if state["_allowance"] else None
        self._pinning = self._new_pinning()
        held = self._pieces
        if any(len(pieces) for pieces in held):
            sizes = zip(self._sides, self.piece_bytes, strict=True)
            self._back([side.extent * size for side, size in sizes])
            self._touch()
            for kind, pieces in enumerate(held):
                self._pieces[kind][self._used(kind)] = pieces

    def _used(self, kind: int) -> slice:
        """The positions of `pieces` between the kind's end of the arena and its last piece."""
        extent = self._sides[kind].extent
        if kind == 0:
            return slice(0, extent)
        return slice(len(self._pieces[1]) - extent, None)

    # -- invariants -------------------------------------------------------------------------------

    def check(self, holders: list[Ids]) -> None:
        """Raise `IntegrityError` unless `holders` account for all references and places agree."""
        expected = np.zeros_like(self._references)
        for handles in (*holders, self._kept):
            np.add.at(expected, handles, 1)
        if not np.array_equal(expected, self._references):
            raise IntegrityError("the host tier's references differ from what the caches hold")
        if not np.array_equal(np.sort(self._free.ids), np.flatnonzero(expected == 0)):
            raise IntegrityError("the host tier's free handles are not those without a reference")
        held = np.flatnonzero(expected)
        for kind, side in enumerate(self._sides):
            side.check(held[self._kind[held] == kind], self._position)
        if self.num_pieces != len(held):
            raise IntegrityError("the host tier holds pieces of a kind that it does not have")
        if self._gap < 0:
            raise IntegrityError("the two sides of the host tier overlap")
        if self.used_bytes > self.limit_bytes:
            raise IntegrityError("the host tier holds more than its limit")

    def _map(self, size: int) -> mmap.mmap:
        return map_anonymous(size)

    def _reserve(self) -> None:
        """Map address space for the limit; the mapping goes when the last view of it does."""
        mapping = self._map(max(1, self._end))
        places = zip(self._starts, self._capacity, self.piece_bytes, strict=True)
        with torch.inference_mode(False):
            arena = torch.frombuffer(mapping, dtype=torch.uint8)
            pieces = [arena[at : at + n * size].view(n, size) for at, n, size in places]
        self._pinning.open(mapping, arena.data_ptr(), self._end)
        self._mapping, self._pieces = mapping, pieces
        where = "" if self.folder is None else f", a file in {self.folder}"
        how = (
            f"pinned for {self.pin_to} at the host's own addresses, reached by its kernels and "
            "copies"
            if self.pinned
            else f"pageable ({self.why_pageable}), plain copies"
        )
        most = f"at most {self._end} bytes"
        if self._allowance is not None:
            most += " while the system has memory to spare"
        logger.info("host tier: %s, %s%s", most, how, where)
