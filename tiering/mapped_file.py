"""A file on a disk as memory: the third tier, behind the pages of the host tier."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from arkcache.errors import ConfigError, HostTierFullError, InputError
from arkcache.tiering.pieces import Ids
from arkcache.tiering.pinned import runs_of

STEP_BYTES = 64 << 20
"""The file grows by so much at a time, where the disk has it: what it has, is set aside."""

RESIDENT_BYTES = 1 << 30
"""About as much of the file as this process has in RAM at a time, unless it is told how much. The
system may keep more of it, as of any file, for as long as nothing else needs the memory."""

AROUND_BYTES = 64 << 10
"""Linux maps so much around what is read, of what it has in RAM anyhow."""

ONE_CHUNK = 1 << 62
"""More pieces than any file has: runs of them cross no boundary."""


class MappedFile:
    """A file without a name, mapped: gone with the process, whatever becomes of that, unless `link`
    has given it one.

    What the mapping holds beyond `nbytes` must not be touched: the disk may have no room for it.
    At most `touched` bytes of it are mapped. Once `is_dropped`, `will_need` is worth its while.

    Args:
        folder: on the disk; made if it is not there.
        size: bytes of address space, the most that the file may have.
        start: how many of them the file has nothing of: pages of other files lie there.
        resident_bytes: about how many of them may be in RAM, the system's page cache included.
            None: `RESIDENT_BYTES`, whatever the page cache has.

    Raises `ConfigError` where no file can be made there.
    """

    def __init__(
        self, folder: Path, size: int, start: int = 0, resident_bytes: int | None = None
    ) -> None:
        self.folder, self.nbytes, self.start, self.touched = folder, start, start, 0
        self.is_dropped = False
        self.drops = resident_bytes is not None and hasattr(os, "posix_fadvise")
        self.resident_bytes = RESIDENT_BYTES if resident_bytes is None else resident_bytes
        self._process = os.getpid()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = _open_unnamed(folder)
        except OSError as error:
            raise ConfigError(
                f"host_path={str(folder)!r}: no file can be made there ({error.strerror or error})"
            ) from None
        self.close = weakref.finalize(self, os.close, self._descriptor)
        try:
            os.ftruncate(self._descriptor, size)  # a mapping may not be longer when it is made
            self.mapping = mmap.mmap(self._descriptor, size)
            os.ftruncate(self._descriptor, 0)
        except (OSError, ValueError, OverflowError) as error:
            self.close()
            raise HostTierFullError(
                f"the system refused a file of {size} bytes in {folder} ({error}): set host_bytes "
                "to what the disk may hold"
            ) from error

    def check_process(self) -> None:
        """Raise `InputError` in a fork: both would write to the same file."""
        if os.getpid() != self._process:
            raise InputError(
                f"this cache keeps its pages in a file of process {self._process}, which has "
                "forked: build a cache in each process, or load a saved one"
            )

    def reserve(self, nbytes: int) -> None:
        """Have the disk set aside so many bytes in all.

        Raises `HostTierFullError` where it has no room; what was there stays.
        """
        self.check_process()
        if self.nbytes >= nbytes:
            return
        ahead = min(max(nbytes, self.nbytes + STEP_BYTES), len(self.mapping))
        try:
            self._set_aside(ahead)
        except OSError:
            try:
                self._set_aside(nbytes)
            except OSError as error:
                raise HostTierFullError(
                    f"the disk of {self.folder} has no room for {nbytes} bytes of pages "
                    f"({error.strerror}): free some, shorten the context, or release another cache "
                    "with reset()"
                ) from error

    def _set_aside(self, nbytes: int) -> None:
        os.posix_fallocate(self._descriptor, self.nbytes, nbytes - self.nbytes)
        self.nbytes = nbytes

    def touch(self, count: int, nbytes: int) -> bool:
        """Note that so many runs of so many bytes were read or written, and let go of all when it
        is much: what was written is the file's, and comes back when it is read. Returns whether
        that was so."""
        # What is announced, and read at random, is not read around.
        around = nbytes + mmap.PAGESIZE if self.is_dropped else max(nbytes, AROUND_BYTES)
        self.touched += count * around
        if self.touched <= self.resident_bytes or not hasattr(mmap, "MADV_DONTNEED"):
            return False
        self.mapping.madvise(mmap.MADV_DONTNEED)
        self.touched = 0
        if self.drops:
            os.fdatasync(self._descriptor)  # what the disk does not have stays in memory
            drop_from_memory(self._descriptor)
            self.mapping.madvise(mmap.MADV_RANDOM)  # a fault would read up to some MiB around it
            self.is_dropped = True
        return True

    def will_need(self, positions: Ids, size: int) -> None:
        """See `will_need`."""
        will_need(self._descriptor, positions, size)

    def link(self, path: Path) -> bool:
        """Give the file a name, once all that was written is on the disk; False where that cannot
        be: on another disk, or where files without a name cannot get one."""
        self.check_process()
        self.mapping.flush()
        os.fsync(self._descriptor)
        return link_descriptor(self._descriptor, path)

    @property
    def is_empty(self) -> bool:
        """Whether no room was set aside yet."""
        return self.nbytes == self.start


def drop_from_memory(descriptor: int) -> None:
    """Have the system's page cache drop what no process has mapped of a file."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def will_need(descriptor: int, positions: Ids, size: int) -> None:
    """Have the system begin to read pieces of a file, all at a time, that are soon to be read.

    One after another, as a mapping reads them where they are touched, they take several times as
    long (docs/tiers.md). positions: ascending.
    """
    if hasattr(os, "posix_fadvise"):
        for first, _, count in runs_of(positions, ONE_CHUNK):
            os.posix_fadvise(descriptor, first * size, count * size, os.POSIX_FADV_WILLNEED)


def link_descriptor(descriptor: int, path: Path) -> bool:
    """Give an open file a name, another one if it has some; False where that cannot be."""
    own = f"/proc/self/fd/{descriptor}"
    try:
        # With a folder beside it, though it has no part in an absolute path: only then does Python
        # follow the link.
        os.link(own, path, src_dir_fd=descriptor, follow_symlinks=True)
    except OSError:
        return False
    return True


def free_bytes(folder: Path) -> int:
    """Bytes that the disk of a folder has free; the folder need not be there yet."""
    return shutil.disk_usage(_existing(folder)).free


def disk_of(folder: Path) -> int:
    """The number of the disk of a folder, which need not be there yet."""
    return _existing(folder).stat().st_dev


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.absolute().parent
    return folder


def _open_unnamed(folder: Path) -> int:
    if hasattr(os, "O_TMPFILE"):
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
    descriptor, name = tempfile.mkstemp(prefix="arkcache-", dir=folder)
    Path(name).unlink()
    return descriptor
