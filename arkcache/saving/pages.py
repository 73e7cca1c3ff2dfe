"""The pages of a host tier as files: their bytes one after another, and a checksum of each."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arkcache.pages.bookkeeping import Ids
from arkcache.saving.folder import FolderReader, FolderWriter, damaged
from arkcache.tiering.host import HostTier
from arkcache.tiering.pieces import take

CHUNK_BYTES = 16 << 20
"""Pages are moved in chunks of about this size: so much memory a save or a load takes."""

Progress = Callable[[int, int], None]
"""Told how many bytes of the pages are written or read, and of how many."""


def write_pages(
    writer: FolderWriter, name: str, host: HostTier, handles: Ids, progress: Progress
) -> dict[str, Tensor]:
    """Write pieces of a host tier, a file for each kind; returns, kind by kind, their checksums and
    where they are in it.

    The file of a tier on the same disk gets another name, and nothing is copied.

    handles: each once, in ascending order. Those of a kind keep their order.
    """
    table: dict[str, Tensor] = {}
    kinds, done, total = host.kinds(handles), 0, host.bytes_of(handles)
    for kind, size in enumerate(host.piece_bytes):
        own, file_name = handles[kinds == kind], f"{name}-pages{kind}"
        if writer.add_link(file_name, partial(host.keep_in, handles=own)):
            sums, positions = host.checksums(own), host.positions(own)
        else:
            progress(done, total)
            with writer.add_bytes(file_name) as file:
                sums = _write(file, host, own, kind, lambda now: progress(now, total), done)
            positions = np.arange(len(own))
        done += len(own) * size
        table |= {
            f"checksums{kind}": torch.from_numpy(np.ascontiguousarray(sums)),
            f"positions{kind}": torch.from_numpy(np.ascontiguousarray(positions)),
        }
    progress(total, total)
    return table


def _write(
    file: BinaryIO,
    host: HostTier,
    handles: Ids,
    kind: int,
    progress: Callable[[int], None],
    done: int,
) -> Ids:
    """Write pieces of a kind one after another; their checksums."""
    sums: list[int] = []
    per_chunk = max(1, CHUNK_BYTES // host.piece_bytes[kind])
    for first in range(0, len(handles), per_chunk):
        own = handles[first : first + per_chunk]
        chunk = take(host.pieces(kind), host.positions(own))
        host.touch(len(own))
        sums += checksums_of(chunk.numpy())
        file.write(chunk.numpy().data)
        done += chunk.numel()
        progress(done)
    return np.array(sums, dtype=np.int64)


def read_pages(
    reader: FolderReader,
    name: str,
    host: HostTier,
    table: dict[str, Tensor],
    progress: Progress,
) -> Ids:
    """Read what `write_pages` wrote into an empty host tier; returns the pieces' handles, kind by
    kind, each held by one reference.

    Raises `SessionError` for a page that is not what was written, and `HostTierFullError`.
    """
    counts = [len(table[f"checksums{kind}"]) for kind in range(len(host.piece_bytes))]
    host.check_room(counts)
    sizes = zip(counts, host.piece_bytes, strict=True)
    done, total = 0, sum(count * size for count, size in sizes)
    every = []
    for kind, (count, size) in enumerate(zip(counts, host.piece_bytes, strict=True)):
        handles, per_chunk = host.allocate(count, kind), max(1, CHUNK_BYTES // size)
        expected = table[f"checksums{kind}"].numpy()
        positions = table[f"positions{kind}"].numpy()
        path = reader.path(f"{name}-pages{kind}")
        if path.stat().st_size < (int(positions.max(initial=-1)) + 1) * size:
            raise damaged(path, "it ends too early")
        with path.open("rb") as file:
            for first in range(0, count, per_chunk):
                progress(done, total)
                own = slice(first, min(first + per_chunk, count))
                pieces = _read(file, positions[own], size)
                wrong = np.flatnonzero(checksums_of(pieces) != expected[own])
                if len(wrong):
                    raise damaged(path, f"the checksum of page {first + wrong[0]} is another")
                host.write(handles[own], torch.from_numpy(pieces))
                done += pieces.size
        every.append(handles)
    progress(total, total)
    return np.concatenate(every)


def _read(file: BinaryIO, positions: Ids, size: int) -> NDArray[np.uint8]:
    """Pieces of so many bytes at positions of a file, run by run [pieces, size]; zeros behind its
    end, whose checksum is no page's."""
    pieces = np.zeros((len(positions), size), dtype=np.uint8)
    starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
    for start, stop in zip(starts, [*starts[1:], len(positions)], strict=True):
        file.seek(int(positions[start]) * size)
        file.readinto(pieces[start:stop].data)  # type: ignore[attr-defined]
    return pieces


def checksums_of(pieces: NDArray[np.uint8]) -> list[int]:
    """The CRC-32 of every piece [pieces, bytes of a piece]."""
    return [zlib.crc32(piece.data) for piece in pieces]
