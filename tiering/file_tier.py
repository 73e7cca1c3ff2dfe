"""The host tier in a file on a disk: pages are written to it, and RAM holds what is in use of it.

Pieces are of one size, stay where they are, and have checksums, by which they are known to be what
was written when they are read again in another process: see `ready`.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from arkcache.errors import InputError, SessionError
from arkcache.tiering.host import HostTier
from arkcache.tiering.mapped_file import MappedFile, disk_of, free_bytes
from arkcache.tiering.pieces import Ids, lengthened
from arkcache.tiering.saved_pages import Damage, SavedPages


class FileTier(HostTier):
    """An arena of pieces of one size that is a file, mapped.

    Args:
        piece_bytes: size of a piece.
        limit_bytes: the most that the file may take. None: what the disk has free.
        folder: on a disk; made if it is not there.
        resident_bytes: see `MappedFile`.
    """

    folder: Path

    def __init__(
        self,
        piece_bytes: int,
        limit_bytes: int | None,
        folder: Path,
        resident_bytes: int | None = None,
    ) -> None:
        self.folder, self._is_limited = folder, limit_bytes is not None
        self._resident_bytes = resident_bytes
        super().__init__([piece_bytes], free_bytes(folder) if limit_bytes is None else limit_bytes)

    def _forget(self) -> None:
        """See `HostTier`: the file goes too, unless it has a name."""
        super()._forget()
        self._file: MappedFile | None = None
        self._saved: SavedPages | None = None
        self._checksums: Ids = np.zeros(0, dtype=np.int64)

    def _map(self, size: int) -> mmap.mmap:
        taken = 0 if self._saved is None else self._saved.nbytes
        self._file = MappedFile(self.folder, size, taken, self._resident_bytes)
        return self._file.mapping

    def _set_aside(self, nbytes: int) -> None:
        if self._file is not None:
            self._file.reserve(nbytes)

    def _given_back(self, handles: Ids) -> None:
        if self._saved is not None:
            self._saved.forget(self._position[handles])

    def compact(self) -> None:
        """A file stays as it is."""

    def extract(self, _handles: Ids) -> HostTier:
        """Raises `InputError`."""
        raise InputError(
            f"this cache keeps its pages in a file in {self.folder}, which no pickle can hold: "
            "use save(folder) and load(folder)"
        )

    # -- what is written and read -----------------------------------------------------------------

    def written(self, handles: Ids) -> None:
        """See `HostTier`."""
        if len(self._checksums) < len(self._references):
            self._checksums = lengthened(self._checksums, len(self._references))
        pieces = self._pieces[0].numpy()
        self._checksums[handles] = [zlib.crc32(pieces[at].data) for at in self._position[handles]]
        self.touch(len(handles))

    def touch(self, num_pieces: int) -> None:
        """See `HostTier`."""
        if self._file is None or not self._file.touch(num_pieces, self.piece_bytes[0]):
            return
        if self._saved is not None and self._file.drops:
            self._saved.drop_from_memory()

    def resident_bytes(self, handles: Ids) -> int:
        """See `HostTier`."""
        touched = 0 if self._file is None else self._file.touched
        return min(self.bytes_of(handles), touched)

    @property
    def has_unread(self) -> bool:
        """Whether pieces that were taken up are still to be compared."""
        return self._saved is not None and self._saved.num_unread > 0

    @property
    def wants_ready(self) -> bool:
        """See `HostTier`: also where pages that were dropped from memory are best announced."""
        return self.has_unread or (self._file is not None and self._file.is_dropped)

    def ready(self, handles: Ids, name: Callable[[int], str]) -> None:
        """See `HostTier`."""
        if self._saved is not None and self._saved.num_unread:
            positions, checksums = self._position[handles], self._checksums[handles]
            self._refuse(self._saved.compare_unread(positions, checksums), handles, name)
        if self._file is not None and self._file.is_dropped:
            positions = np.unique(self._position[handles])
            if self._saved is not None:
                self._saved.will_need(positions)
            own = positions[positions >= self._sides[0].fixed]
            self._file.will_need(own, self.piece_bytes[0])

    def compare(self, handles: Ids, name: Callable[[int], str]) -> None:
        """See `HostTier`."""
        if self._saved is not None:
            positions, checksums = self._position[handles], self._checksums[handles]
            self._refuse(self._saved.compare(positions, checksums), handles, name)
        own = np.flatnonzero(self._position[handles] >= self._sides[0].fixed)
        pieces = self._pieces[0].numpy()
        for number, handle in zip(own.tolist(), handles[own].tolist(), strict=True):
            if zlib.crc32(pieces[self._position[handle]].data) != self._checksums[handle]:
                self._refuse(Damage(number, self.folder), handles, name)
            self.touch(1)

    def _refuse(self, damage: Damage | None, handles: Ids, name: Callable[[int], str]) -> None:
        if damage is not None:
            raise SessionError(
                f"{name(int(handles[damage.number]))} is damaged: its checksum in {damage.path} is "
                "another. The sequences that have it cannot read it: drop them, or read their text "
                "again"
            )

    # -- what is saved, and loaded ----------------------------------------------------------------

    def checksums(self, handles: Ids) -> Ids:
        """The CRC-32 of pieces as they were written."""
        return self._checksums[handles]

    @property
    def file_starts(self) -> list[int]:
        """The first position of each file that has pieces, those of a loaded state first."""
        if self._file is None:
            return []
        loaded = [] if self._saved is None else [*self._saved.starts]
        return loaded if self._file.is_empty else [*loaded, self._sides[0].fixed]

    def keep_in(self, paths: Sequence[Path], handles: Ids) -> bool:
        """Give the tier's files these names, one for each of `file_starts`, so that they outlive it
        with these pieces in them: none of them is ever overwritten. Returns False where a name
        cannot be given, some may have been then."""
        assert self._file is not None
        loaded = 0 if self._saved is None else len(self._saved.paths)
        if self._saved is not None and not self._saved.link(paths[:loaded]):
            return False
        if not all(map(self._file.link, paths[loaded:])):
            return False
        own = handles[self._position[handles] >= self._sides[0].fixed]
        new = np.setdiff1d(own, self._kept)
        self.retain(new)
        self._kept = np.concatenate((self._kept, new))
        return True

    def take_up(self, saved: SavedPages, positions: Ids, checksums: Ids) -> Ids | None:
        """Hold the pieces of a saved state where they lie, in a tier that holds nothing.

        positions, checksums: int64 [pieces], of them. Returns their handles, each held by one
        reference; None where they are on another disk: nothing has happened then. Each is compared
        with its checksum when it is first read, see `ready`. Raises `HostTierFullError`.
        """
        if self.num_pieces or not saved.is_on(disk_of(self.folder)):
            return None
        size, count, limit = self.piece_bytes[0], len(positions), self.limit_bytes
        if not self._is_limited:
            self.limit_bytes += count * size
        self._check_limit(count, count * size)
        self._capacity = (saved.num_positions + limit // size,)
        self._end, self._saved = self._capacity[0] * size, saved
        self._reserve()
        saved.map_into(self._pieces[0].data_ptr())
        self._grow(count - len(self._free))
        handles = self._free.pop(count)
        self._references[handles] = 1
        self._position[handles] = positions
        self._sides[0].begin_with(handles, positions, saved.num_positions)
        self._checksums = lengthened(self._checksums, len(self._references))
        self._checksums[handles] = checksums
        return handles
