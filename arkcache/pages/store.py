"""The sealed pages of one layer in the host tier: packed when sealed, unpacked when read.

A page of all KV heads is one piece of the host tier. Where pages may be of two formats, or be given
up, each head's part is a piece of its own, because each head demotes and gives up by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arkcache.kernels.torch_pages import PagePacker
from arkcache.pages.bookkeeping import Ids
from arkcache.tiering.host import HostTier
from arkcache.tiering.pieces import take

DEMOTED_PAGES = 256
"""Pages demoted at a time: bounds the temporaries, and what is free before it is used again."""


NONE, GONE = -1, -2
"""In place of a handle: there is no such page; it was given up."""


class PackedPages(NamedTuple):
    """Pages of one format: which of those asked for, their bytes [count, nbytes], how to unpack."""

    which: Ids | slice
    packed: Tensor
    packer: PagePacker

    @property
    def nbytes(self) -> int:
        """Bytes of the pages."""
        return self.packed.numel()


class PageStore:
    """Which pieces of the host tier hold a layer's pages.

    A row is a (sequence, KV head) pair.

    Args:
        host: the host tier.
        packers: of the first format and, if there is one, of the coarse one.
        batch, num_kv_heads: rows.
        layer: what errors call the layer.
        gives_up: whether pages may be given up.
    """

    def __init__(
        self,
        host: HostTier,
        packers: list[PagePacker],
        batch: int,
        num_kv_heads: int,
        layer: int = 0,
        *,
        gives_up: bool = False,
    ) -> None:
        self.host, self.packers, self.num_kv_heads = host, packers, num_kv_heads
        self._layer = layer
        per_piece = _heads_per_piece(packers, num_kv_heads, gives_up)
        self._by_head = gives_up or len(packers) > 1
        self._handles: Ids = np.full((batch, num_kv_heads // per_piece, 64), NONE, dtype=np.int64)

    @staticmethod
    def piece_bytes(
        packers: list[PagePacker], num_kv_heads: int, *, gives_up: bool = False
    ) -> list[int]:
        """Sizes of the pieces that a host tier for such pages holds."""
        per_piece = _heads_per_piece(packers, num_kv_heads, gives_up)
        return [packer.layout.nbytes * per_piece for packer in packers]

    @property
    def pieces_per_page(self) -> int:
        """Pieces of the host tier that a page of all KV heads takes."""
        return int(self._handles.shape[1])

    def append(self, seqs: slice, first: int, packed: Tensor) -> None:
        """Keep pages [seqs, kv_heads, pages, nbytes] from number `first` on."""
        handles = self.allot(seqs, first, packed.shape[2])
        by_page = packed.transpose(1, 2).reshape(len(handles), -1)
        self.host.write(handles, by_page)

    def allot(self, seqs: slice, first: int, count: int) -> Ids:
        """Take pieces for `count` pages of some sequences from number `first` on, to be written.

        Returns their handles, sequence by sequence and page by page.
        """
        batch, pieces = seqs.stop - seqs.start, self.pieces_per_page
        handles = self.host.allocate(batch * count * pieces)
        self._widen(first + count)
        by_piece = handles.reshape(batch, count, pieces).transpose(0, 2, 1)
        self._handles[seqs, :, first : first + count] = by_piece
        return handles

    def enter(self, seqs: Ids, pages: Ids, handles: Ids) -> None:
        """Hold pieces that were allocated, one as page `pages[i]` of sequence `seqs[i]`.

        For pages of one format, of which a piece holds all KV heads.
        """
        self._widen(int(pages.max(initial=0)) + 1)
        self._handles[seqs, 0, pages] = handles

    def adopt(self, handles: Ids) -> None:
        """Hold these pieces, each listing with a reference of its own, and no others; -1 is none
        [batch, pieces_per_page, pages]."""
        self._widen(handles.shape[2])
        self._handles[:, :, : handles.shape[2]] = handles

    def _widen(self, num_pages: int) -> None:
        """Make room for so many pages of every sequence."""
        width = self._handles.shape[2]
        if width < num_pages:
            more = max(num_pages, 2 * width) - width
            self._handles = np.pad(self._handles, ((0, 0), (0, 0), (0, more)), constant_values=NONE)

    @property
    def handles(self) -> Ids:
        """The piece of each page [batch, pieces_per_page, pages]; -1 where there is none."""
        return self._handles

    def lines(self, sequence: int, first: int, last: int) -> Ids:
        """Where pages first..last are in `pieces()`, for pages of one format [kv_heads, pages]."""
        rows = self.host.positions(self._handles[sequence, 0, first:last]) * self.num_kv_heads
        lines: Ids = rows + np.arange(self.num_kv_heads)[:, None]
        return lines

    def locate(self, rows: Ids, pages: Ids) -> Ids:
        """Where pages are in `pieces()`: pages of one format only."""
        sequence, head = np.divmod(rows, self.num_kv_heads)
        located: Ids = (
            self.host.positions(self._handles[sequence, 0, pages]) * self.num_kv_heads + head
        )
        return located

    def pieces(self) -> Tensor:
        """The host tier with one line of bytes per page and head, for pages of one format."""
        return self.host.pieces().view(-1, self.packers[0].layout.nbytes)

    def ready(self, rows: Ids, pages: Ids) -> None:
        """Before page `pages[i]` of row `rows[i]` is read: see `HostTier.ready`."""
        if self.host.wants_ready:
            self.host.ready(self._handles[rows // self.num_kv_heads, 0, pages], self.name_of)

    def ready_run(self, sequence: int, first: int, last: int) -> None:
        """The same for pages first..last of a sequence."""
        if self.host.wants_ready:
            self.host.ready(self._handles[sequence, 0, first:last], self.name_of)

    def name_of(self, handle: int) -> str:
        """What an error calls a piece that is held; empty for one that is not."""
        for sequence, _, page in np.argwhere(self._handles == handle).tolist():
            return f"page {page} of layer {self._layer} (sequence {sequence})"
        return ""

    def check(self) -> None:
        """Raise `SessionError` unless a tier in a file has all pages as they were written."""
        self.host.compare(np.unique(self.held()), self.name_of)

    def read(self, rows: Ids, pages: Ids) -> Iterator[PackedPages]:
        """The bytes of page `pages[i]` of row `rows[i]`, format by format.

        Raises `SessionError` for pages of a saved state that are not what was saved.
        """
        self.ready(rows, pages)
        self.host.touch(-(-len(rows) // self.num_kv_heads))
        if not self._by_head:
            packed = take(self.pieces(), self.locate(rows, pages))
            yield PackedPages(slice(None), packed, self.packers[0])
            return
        handles = self._handles[*np.divmod(rows, self.num_kv_heads), pages]
        kinds = self.host.kinds(handles)
        for kind, packer in enumerate(self.packers):
            which = np.flatnonzero(kinds == kind)
            if len(which):
                packed = take(self.host.pieces(kind), self.host.positions(handles[which]))
                yield PackedPages(which, packed, packer)

    def read_run(
        self, sequence: int, first: int, last: int, device: torch.device
    ) -> tuple[Tensor, Tensor, int]:
        """Pages first..last of a sequence, unpacked on a device: key, value [kv_heads, tokens,
        dim], zeros for those that were given up, and the bytes that were moved there."""
        heads, count = self.num_kv_heads, last - first
        rows = np.repeat(sequence * heads + np.arange(heads), count)
        pages = np.tile(np.arange(first, last), heads)
        if self._by_head and (gone := self.gone(last)[rows, pages]).any():
            return self._read_held(rows, pages, ~gone, device)
        parts = list(self.read(rows, pages))
        unpacked = [part.packer.unpack(part.packed.to(device)) for part in parts]
        planes = []
        for plane in zip(*unpacked, strict=True):
            pages = plane[0]
            if len(parts) > 1:
                pages = pages.new_empty((len(rows), *pages.shape[1:]))
                for part, states in zip(parts, plane, strict=True):
                    pages[part.which] = states
            planes.append(pages.unflatten(0, (heads, count)).flatten(1, 2))
        return planes[0], planes[1], sum(part.nbytes for part in parts)

    def _read_held(
        self, rows: Ids, pages: Ids, held: NDArray[np.bool_], device: torch.device
    ) -> tuple[Tensor, Tensor, int]:
        """`read_run` of pages that are listed, of which some are `held`."""
        size, moved = self.packers[0].layout.nbytes, 0
        nothing = torch.zeros((len(rows), size), dtype=torch.uint8, device=device)
        key, value = self.packers[0].unpack(nothing)
        at = np.flatnonzero(held)
        for part in self.read(rows[at], pages[at]):
            where = torch.from_numpy(at[part.which]).to(device)
            key[where], value[where] = part.packer.unpack(part.packed.to(device))
            moved += part.nbytes
        by_head = (self.num_kv_heads, -1)
        key, value = (plane.unflatten(0, by_head).flatten(1, 2) for plane in (key, value))
        return key, value, moved

    # -- pages that are given up ------------------------------------------------------------------

    def give_up(self, rows: Ids, pages: Ids) -> None:
        """Give pages back to the host tier for good: what they held is lost, their numbers stay."""
        index = (*np.divmod(rows, self.num_kv_heads), pages)
        self.host.release(self._handles[index])
        self._handles[index] = GONE

    def gone(self, num_pages: int) -> NDArray[np.bool_]:
        """Which of the first pages were given up [rows, num_pages], where any may be."""
        gone: NDArray[np.bool_] = self._handles[:, :, :num_pages] == GONE
        return gone.reshape(len(self._handles) * self.num_kv_heads, -1)

    @property
    def num_gone(self) -> int:
        """Pages of one KV head that were given up."""
        return int(np.count_nonzero(self._handles == GONE))

    # -- two formats ------------------------------------------------------------------------------

    def is_fine(self, num_pages: int) -> NDArray[np.bool_]:
        """Which of the first pages are in the first format [rows, num_pages]."""
        handles = self._handles[:, :, :num_pages]
        fine: NDArray[np.bool_] = handles >= 0
        fine &= self.host.kinds(np.maximum(handles, 0)) == 0
        return fine.reshape(len(self._handles) * self.num_kv_heads, num_pages)

    def demote(self, rows: Ids, pages: Ids) -> NDArray[np.bool_]:
        """Keep pages of the first format in the coarse one from now on; returns which now are.

        A page that is shared is demoted once, for all who share it, and only if all of them are
        listed: another sequence or cache that wants it fine keeps it fine for all.
        """
        handles = self._handles[*np.divmod(rows, self.num_kv_heads), pages]
        listed, which, listings = np.unique(handles, return_inverse=True, return_counts=True)
        agreed = self.host.references(listed) == listings
        for start in range(0, len(listed), DEMOTED_PAGES):
            some = np.flatnonzero(agreed[start : start + DEMOTED_PAGES]) + start
            listed[some] = self._demote(listed[some], listings[some])
        self._handles[*np.divmod(rows, self.num_kv_heads), pages] = listed[which]
        demoted: NDArray[np.bool_] = agreed[which]
        return demoted

    def _demote(self, handles: Ids, references: Ids) -> Ids:
        """New handles, of the coarse format and with these references, in place of these."""
        fine, coarse = self.packers
        states = fine.unpack(take(self.host.pieces(0), self.host.positions(handles)))
        # Released first: pages make room for themselves, even in a full tier.
        self.host.release(np.repeat(handles, references))
        fresh = self.host.allocate(len(handles), kind=1)
        self.host.write(fresh, coarse.pack(*states))
        self.host.retain(np.repeat(fresh, references - 1))
        return fresh

    def forget(self, sequence: int, first: int, last: int) -> None:
        """Give pages first..last of a sequence back to the host tier."""
        handles = self._handles[sequence, :, first:last]
        self.host.release(handles[handles >= 0])
        handles[:] = NONE

    def forget_from(self, sequence: int, first: int) -> None:
        """Give the pages that are held of a sequence from `first` on back to the host tier."""
        handles = self._handles[sequence, :, first:]
        self.host.release(handles[handles >= 0])
        handles[:] = NONE

    def keep_sequences(self, index: Ids) -> None:
        """Make sequence i what sequence `index[i]` was; pages are shared, not copied."""
        held = self.held()
        self._handles = self._handles[index]
        self.host.retain(self.held())
        self.host.release(held)

    def release(self) -> None:
        """Give everything back to the host tier."""
        self.host.release(self.held())
        self._handles[:] = NONE

    def move(self, host: HostTier) -> None:
        """Follow the pages into a tier that was extracted from the present one."""
        held = self._handles >= 0
        before = self._handles[held]
        self._handles[held] = host.extracted(before)
        self.host.release(before)
        self.host = host

    def held(self) -> Ids:
        """Handles in the host tier, one entry per sequence and piece."""
        held: Ids = self._handles[self._handles >= 0]
        return held

    def counts(self) -> Ids:
        """Pages of each sequence that are held, or were given up."""
        counts: Ids = (self._handles != NONE).all(axis=1).sum(axis=1)
        return counts


def _heads_per_piece(packers: list[PagePacker], num_kv_heads: int, gives_up: bool) -> int:
    """KV heads whose page is one piece: all where no head demotes or gives up by itself."""
    return num_kv_heads if len(packers) == 1 and not gives_up else 1
