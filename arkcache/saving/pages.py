"""The pages of a host tier as files: their bytes one after another, and a checksum of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from arkcache.pages.bookkeeping import Ids
from arkcache.saving.folder import FolderReader, FolderWriter, damaged
from arkcache.tiering.file_tier import FileTier
from arkcache.tiering.host import HostTier
from arkcache.tiering.pieces import take
from arkcache.tiering.saved_pages import SavedPages, checksums_of

CHUNK_BYTES = 16 << 20
"""Pages are moved in chunks of about this size: so much memory a save or a load takes."""

MAX_FILES = 8
"""A cache that is loaded in place and saved again has one file more: from here on, all is copied
into one."""

Progress = Callable[[int, int], None]
"""Told how many bytes of the pages are written or read, and of how many."""


def write_pages(
    writer: FolderWriter,
    name: str,
    host: HostTier,
    handles: Ids,
    name_of: Callable[[int], str],
    progress: Progress,
) -> dict[str, Tensor]:
    """Write pieces of a host tier, a file for each kind; returns, kind by kind, their checksums and
    where they are in it.

    The files of a tier on the same disk get another name, and nothing is copied; "starts" says
    which of them has which positions.

    handles: each once, in ascending order. Those of a kind keep their order. name_of: what an error
    calls a piece.
    """
    table: dict[str, Tensor] = {}
    kinds, done, total = host.kinds(handles), 0, host.bytes_of(handles)
    for kind, size in enumerate(host.piece_bytes):
        own = handles[kinds == kind]
        if isinstance(host, FileTier) and _link(writer, name, host, own):
            sums, positions = host.checksums(own), host.positions(own)
            starts = host.file_starts
        else:
            progress(done, total)
            host.ready(own, name_of)
            with writer.add_bytes(_file_names(name, kind, 1)[0]) as file:
                sums = _write(file, host, own, kind, lambda now: progress(now, total), done)
            positions, starts = np.arange(len(own)), [0]
        done += len(own) * size
        table |= {
            f"checksums{kind}": torch.from_numpy(np.ascontiguousarray(sums)),
            f"positions{kind}": torch.from_numpy(np.ascontiguousarray(positions)),
            f"starts{kind}": torch.tensor(starts),
        }
    progress(total, total)
    return table


def _link(writer: FolderWriter, name: str, host: FileTier, handles: Ids) -> bool:
    """Give the files of a tier names in the folder; False where they cannot be, or are many."""
    names = _file_names(name, 0, len(host.file_starts))
    if not 0 < len(names) <= MAX_FILES:
        return False
    return writer.add_links(names, partial(host.keep_in, handles=handles))


def _file_names(name: str, kind: int, count: int) -> list[str]:
    """What the files of a kind are called."""
    return [f"{name}-pages{kind}" + (f"-{number}" if number else "") for number in range(count)]


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
        sums += checksums_of(chunk.numpy()).tolist()
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
    """Have an empty host tier hold what `write_pages` wrote; returns the pieces' handles, kind by
    kind, each held by one reference.

    A tier in a file on the same disk takes the pages up where they lie, and compares each when it
    is first read; any other tier reads all. Raises `SessionError` for a page that is not what was
    written, and `HostTierFullError`.
    """
    counts = [len(table[f"checksums{kind}"]) for kind in range(len(host.piece_bytes))]
    total = sum(count * size for count, size in zip(counts, host.piece_bytes, strict=True))
    done, every = 0, []
    for kind, (count, size) in enumerate(zip(counts, host.piece_bytes, strict=True)):
        expected = table[f"checksums{kind}"].numpy()
        positions = table[f"positions{kind}"].numpy()
        starts = table[f"starts{kind}"].tolist()
        paths = [reader.path(one) for one in _file_names(name, kind, len(starts))]
        saved = SavedPages(paths, starts, positions, size)
        handles = None
        if isinstance(host, FileTier):
            handles = host.take_up(saved, positions, expected)
        if handles is None:
            if kind == 0:
                host.check_room(counts)
            handles = host.allocate(count, kind)
            _copy(saved, positions, expected, host, handles, lambda now: progress(now, total), done)
        done += count * size
        every.append(handles)
    progress(total, total)
    return np.concatenate(every)


def _copy(
    saved: SavedPages,
    positions: Ids,
    expected: Ids,
    host: HostTier,
    handles: Ids,
    progress: Callable[[int], None],
    done: int,
) -> None:
    """Read saved pages into pieces, comparing each with its checksum."""
    per_chunk = max(1, CHUNK_BYTES // saved.size)
    for first in range(0, len(handles), per_chunk):
        progress(done)
        own = slice(first, first + per_chunk)
        pieces = saved.read(positions[own])
        wrong = np.flatnonzero(checksums_of(pieces) != expected[own])
        if len(wrong):
            path = saved.path_of(int(positions[first + wrong[0]]))
            raise damaged(path, f"the checksum of page {first + wrong[0]} is another")
        host.write(handles[own], torch.from_numpy(pieces))
        done += pieces.size
