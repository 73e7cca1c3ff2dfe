"""Pages of a saved cache, read where they lie: mapped, and compared when they are first read.

A saved state has its pages in one file or in several, each of which was the tier of one process.
Together they are one run of positions: a page has the same offset in its file as in the arena that
it is mapped into, so that mapping is all there is to loading.
"""

from __future__ import annotations

import os
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from arkcache.errors import SessionError
from arkcache.tiering.mapped_file import drop_from_memory, link_descriptor, will_need
from arkcache.tiering.mapping import map_over
from arkcache.tiering.pieces import Ids

BOUNDARY = 64 << 10
"""Files begin and end in an arena at multiples of this: whatever a system's page is, it divides."""

READ_BYTES = 16 << 20
"""Pages are compared so many bytes at a time."""


class Damage(NamedTuple):
    """A page that is not what was saved: which of those asked for, and the file that it is in."""

    number: int
    path: Path


class SavedPages:
    """The pages of a saved state in their files, which are opened and stay as they are.

    Args:
        paths: the files.
        starts: the first position of each: the first file's is 0.
        positions: int64 [pages], where those pages are that are wanted.
        size: bytes of a page.

    Attributes:
        size: bytes of a page.
        num_unread: those wanted that were not compared yet.

    Raises `SessionError` where positions lie in no file, and `OSError`.
    """

    def __init__(
        self, paths: Sequence[Path], starts: Sequence[int], positions: Ids, size: int
    ) -> None:
        self.paths, self.starts, self.size = tuple(paths), tuple(starts), size
        self._files = [_OpenFile(path) for path in paths]
        ends = [*starts[1:], int(positions.max(initial=-1)) + 1]
        self._edges = [start * size // BOUNDARY * BOUNDARY for start in starts]
        # Where the last file has none of the pages, what is free begins where it would.
        self._edges.append(max(self._edges[-1], -(-ends[-1] * size // BOUNDARY) * BOUNDARY))
        for path, file, start, end, edge in zip(
            paths, self._files, starts, ends, self._edges[1:], strict=True
        ):
            own = positions[(positions >= start) & (positions < end)]
            last = (int(own.max(initial=-1)) + 1) * size
            if last > edge or os.fstat(file.descriptor).st_size < last:
                raise _damaged(path, "it ends too early")
        if len(np.unique(positions)) != len(positions) or (positions < 0).any():
            raise _damaged(paths[0], "two of its pages share a place")
        self._unread: NDArray[np.bool_] = np.zeros(ends[-1], dtype=np.bool_)
        self._unread[positions] = True
        self.num_unread = len(positions)

    @property
    def nbytes(self) -> int:
        """Bytes of the arena that the files take."""
        return self._edges[-1]

    @property
    def num_positions(self) -> int:
        """Positions that the files take: the first behind them is free for others."""
        return -(-self.nbytes // self.size)

    def is_on(self, device: int) -> bool:
        """Whether all files lie on the disk of this number."""
        return all(os.fstat(file.descriptor).st_dev == device for file in self._files)

    def map_into(self, address: int) -> None:
        """Have the pages from this address on, where `nbytes` of a mapping give way; nothing can be
        written there. Raises `OSError`."""
        for file, start, stop in zip(self._files, self._edges, self._edges[1:], strict=False):
            if stop > start:
                map_over(address + start, stop - start, file.descriptor, start)

    def link(self, paths: Sequence[Path]) -> bool:
        """Give each file another name; False where one cannot get it."""
        files = zip(self._files, paths, strict=True)
        return all(link_descriptor(file.descriptor, path) for file, path in files)

    def drop_from_memory(self) -> None:
        """Have the system's page cache drop what no process has mapped of the files."""
        for file in self._files:
            drop_from_memory(file.descriptor)

    # -- reading ----------------------------------------------------------------------------------

    def will_need(self, positions: Ids) -> None:
        """See `mapped_file.will_need`; what is beyond the files is none of theirs."""
        numbers = np.searchsorted(self.starts, positions, side="right") - 1
        for number, file in enumerate(self._files):
            own = positions[(numbers == number) & (positions < self.num_positions)]
            will_need(file.descriptor, own, self.size)

    def read(self, positions: Ids) -> NDArray[np.uint8]:
        """Pages [pages, size], a read for each run of them.

        Raises `SessionError` where the disk cannot read them, or a file has become shorter.
        """
        pages = np.zeros((len(positions), self.size), dtype=np.uint8)
        files = np.searchsorted(self.starts, positions, side="right") - 1
        breaks = (np.diff(positions, prepend=-2) != 1) | (np.diff(files, prepend=-1) != 0)
        first = np.flatnonzero(breaks)
        for start, stop in zip(first, [*first[1:], len(positions)], strict=True):
            number, run = int(files[start]), pages[start:stop]
            offset = int(positions[start]) * self.size
            try:
                count = os.preadv(self._files[number].descriptor, [run.data], offset)
            except OSError as error:
                raise SessionError(f"cannot read {self.paths[number]}: {error.strerror}") from error
            if count < run.nbytes:
                raise _damaged(self.paths[number], "it ends too early")
        return pages

    def compare(self, positions: Ids, checksums: Ids) -> Damage | None:
        """Compare pages with their CRC-32; the first that differs, if any. What is beyond
        `num_positions` is none of these pages."""
        own = np.flatnonzero(positions < len(self._unread))
        own = own[np.argsort(positions[own])]
        per_chunk = max(1, READ_BYTES // self.size)
        for first in range(0, len(own), per_chunk):
            chunk = own[first : first + per_chunk]
            self.will_need(positions[chunk])
            found = checksums_of(self.read(positions[chunk]))
            wrong = np.flatnonzero(found != checksums[chunk])
            self._note(positions[chunk if not len(wrong) else chunk[: wrong[0]]])
            if len(wrong):
                index = int(chunk[wrong[0]])
                return Damage(index, self.path_of(int(positions[index])))
        return None

    def compare_unread(self, positions: Ids, checksums: Ids) -> Damage | None:
        """`compare` of those that were not compared yet."""
        inside = np.flatnonzero(positions < len(self._unread))
        unread = inside[self._unread[positions[inside]]]
        _, once = np.unique(positions[unread], return_index=True)
        unread = unread[once]
        damage = self.compare(positions[unread], checksums[unread])
        return None if damage is None else damage._replace(number=int(unread[damage.number]))

    def path_of(self, position: int) -> Path:
        """The file that a page is in."""
        return self.paths[int(np.searchsorted(self.starts, position, side="right")) - 1]

    def forget(self, positions: Ids) -> None:
        """These will not be read any more."""
        self._note(positions[positions < len(self._unread)])

    def _note(self, positions: Ids) -> None:
        """These need not be compared any more."""
        self.num_unread -= int(np.count_nonzero(self._unread[np.unique(positions)]))
        self._unread[positions] = False


def checksums_of(pages: NDArray[np.uint8]) -> Ids:
    """The CRC-32 of every page [pages, bytes of a page]."""
    return np.array([zlib.crc32(page.data) for page in pages], dtype=np.int64)


class _OpenFile:
    """A file that is read; closed with the object."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)


def _damaged(path: Path, why: str) -> SessionError:
    return SessionError(f"{path} is damaged: {why}. What it held must be read again")
