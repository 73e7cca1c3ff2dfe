"""The pages of a host tier as files: their bytes one after another, and a checksum of each."""

from __future__ import annotations

import zlib
from collections.abc import Callable

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
    """Write pieces of a host tier, a file for each kind; returns their checksums, kind by kind.

    handles: each once, in ascending order. Those of a kind keep their order.
    """
    kinds, checksums = host.kinds(handles), {}
    done, total = 0, host.bytes_of(handles)
    for kind, size in enumerate(host.piece_bytes):
        own, per_chunk = handles[kinds == kind], max(1, CHUNK_BYTES // size)
        sums: list[int] = []
        with writer.add_bytes(f"{name}-pages{kind}") as file:
            for first in range(0, len(own), per_chunk):
                progress(done, total)
                chunk = take(host.pieces(kind), host.positions(own[first : first + per_chunk]))
                sums += checksums_of(chunk.numpy())
                file.write(chunk.numpy().data)
                done += chunk.numel()
        checksums[f"pages{kind}"] = torch.tensor(sums, dtype=torch.int64)
    progress(total, total)
    return checksums


def read_pages(
    reader: FolderReader,
    name: str,
    host: HostTier,
    checksums: dict[str, Tensor],
    progress: Progress,
) -> Ids:
    """Read what `write_pages` wrote into an empty host tier; returns the pieces' handles, kind by
    kind, each held by one reference.

    Raises `SessionError` for a page that is not what was written, and `HostTierFullError`.
    """
    counts = [len(checksums[f"pages{kind}"]) for kind in range(len(host.piece_bytes))]
    host.check_room(counts)
    sizes = zip(counts, host.piece_bytes, strict=True)
    done, total = 0, sum(count * size for count, size in sizes)
    every = []
    for kind, (count, size) in enumerate(zip(counts, host.piece_bytes, strict=True)):
        handles, per_chunk = host.allocate(count, kind), max(1, CHUNK_BYTES // size)
        expected = checksums[f"pages{kind}"].numpy()
        path = reader.path(f"{name}-pages{kind}")
        if path.stat().st_size != count * size:
            raise damaged(path, f"{count} pages of {size} bytes are not what it holds")
        with path.open("rb") as file:
            for first in range(0, count, per_chunk):
                progress(done, total)
                own = slice(first, min(first + per_chunk, count))
                pieces = np.empty((own.stop - first, size), dtype=np.uint8)
                if file.readinto(pieces.data) != pieces.size:
                    raise damaged(path, "it ends too early")
                wrong = np.flatnonzero(checksums_of(pieces) != expected[own])
                if len(wrong):
                    raise damaged(path, f"the checksum of page {first + wrong[0]} is another")
                host.write(handles[own], torch.from_numpy(pieces))
                done += pieces.size
        every.append(handles)
    progress(total, total)
    return np.concatenate(every)


def checksums_of(pieces: NDArray[np.uint8]) -> list[int]:
    """The CRC-32 of every piece [pieces, bytes of a piece]."""
    return [zlib.crc32(piece.data) for piece in pieces]
