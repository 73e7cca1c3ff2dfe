"""A temporary file of random bytes that is mapped, and can be dropped from the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from arkcache.errors import InputError
from arkcache.sizes import bytes_text
from arkcache.tiering.pieces import Ids

SPARE_BYTES = 64 << 20
"""What is left free of a disk beside the file."""

BLOCK_BYTES = 4 << 20
"""The file is written and read in blocks of this size."""

RESIDENT_LIMIT = 0.1
"""A file of which more than this share stays in memory when it was dropped is not cold."""


class FilePool:
    """So many random bytes in a file without a name: whatever happens, it is gone with the process.

    Args:
        folder: where the file is made.
        nbytes: its size, a multiple of the system's page size.

    Attributes:
        data: uint8 [nbytes], the mapped file; never written to.

    Raises `InputError` where the folder has too little room or cannot be written to.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.nbytes = nbytes
        _check_room(folder, nbytes)
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        except OSError as error:
            raise InputError(_refusal(folder, nbytes, error)) from None
        try:
            self._write()
            # Writable only because torch warns of memory that is not.
            mapping = mmap.mmap(self._file.fileno(), nbytes)
        except OSError as error:
            self._file.close()
            raise InputError(_refusal(folder, nbytes, error)) from None
        except BaseException:
            self._file.close()
            raise
        self._mapping: mmap.mmap | None = mapping
        self.data = torch.frombuffer(mapping, dtype=torch.uint8)

    def __enter__(self) -> FilePool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._mapping = None  # unmapped with the last tensor that shows it
        self.data = torch.empty(0, dtype=torch.uint8)
        self._file.close()

    def _write(self) -> None:
        rng = np.random.default_rng(0)
        for start in range(0, self.nbytes, BLOCK_BYTES):
            self._file.write(rng.bytes(min(BLOCK_BYTES, self.nbytes - start)))
        self._file.flush()
        os.fsync(self._file.fileno())  # what is not on the disk yet cannot be dropped

    def read(self) -> None:
        """Read the whole file from start to end, not through the mapping."""
        self._advise("POSIX_FADV_SEQUENTIAL")
        self._file.seek(0)
        buffer = memoryview(bytearray(BLOCK_BYTES))
        while os.readv(self._file.fileno(), [buffer]):
            pass

    def read_pieces(self, positions: Ids, target: NDArray[np.uint8]) -> None:
        """Read pieces, a call for each: target[i] = piece positions[i], uint8 [count, bytes]."""
        nbytes = target.shape[1]
        for place, position in enumerate(positions.tolist()):
            os.preadv(self._file.fileno(), [target[place]], position * nbytes)

    def warm(self) -> None:
        """Have the whole file in the page cache and in the process's page table."""
        self.read()
        self.data[:: mmap.PAGESIZE].sum()

    def drop(self) -> None:
        """Have none of the file in memory, neither mapped nor in the page cache; and have the
        system read no more of it than it is asked for."""
        assert self._mapping is not None
        self._mapping.madvise(mmap.MADV_DONTNEED)
        self._mapping.madvise(mmap.MADV_RANDOM)
        self._advise("POSIX_FADV_DONTNEED")
        self._advise("POSIX_FADV_RANDOM")

    def _advise(self, advice: str) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, getattr(os, advice))

    def why_never_cold(self) -> str | None:
        """Why the file cannot be dropped from memory; None where it was, which is looked at."""
        if not hasattr(os, "posix_fadvise") or not hasattr(mmap, "MADV_DONTNEED"):
            return "this system has no posix_fadvise, which drops a file from memory"
        self.drop()
        resident = self.resident_share()
        if resident > RESIDENT_LIMIT:
            return (
                f"{resident:.0%} of the file stays in memory when it is dropped: its file system "
                "is one in memory, or does not drop pages (another is named with --folder)"
            )
        return None

    def resident_share(self) -> float:
        """The share of the file's pages that are in the page cache."""
        library = ctypes.CDLL(None, use_errno=True)
        pages = -(-self.nbytes // mmap.PAGESIZE)
        found = np.zeros(pages, np.uint8)
        address, size = ctypes.c_void_p(self.data.data_ptr()), ctypes.c_size_t(self.nbytes)
        if library.mincore(address, size, ctypes.c_void_p(found.ctypes.data)):
            code = ctypes.get_errno()
            raise OSError(code, f"mincore: {os.strerror(code)}")
        return float((found & 1).mean())


def file_system_of(folder: Path) -> str:
    """The kind of file system that a folder is on, as in ext4."""
    import psutil

    path = folder.resolve()
    kinds = {Path(one.mountpoint): one.fstype for one in psutil.disk_partitions(all=True)}
    return next((kinds[parent] for parent in (path, *path.parents) if parent in kinds), "unknown")


def _check_room(folder: Path, nbytes: int) -> None:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise InputError(_refusal(folder, nbytes, error)) from None
    if free < nbytes + SPARE_BYTES:
        raise InputError(
            f"{folder} has {bytes_text(free)} free, and a temporary file of {bytes_text(nbytes)} "
            f"needs {bytes_text(SPARE_BYTES)} more than that: name another folder with --folder, "
            "or less with --pool"
        )


def _refusal(folder: Path, nbytes: int, error: OSError) -> str:
    return (
        f"cannot make a temporary file of {bytes_text(nbytes)} in {folder} "
        f"({error.strerror or error}): name another folder with --folder"
    )
