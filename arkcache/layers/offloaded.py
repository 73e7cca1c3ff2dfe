"""A layer of the GPU engine whose sealed pages leave the device for pinned host memory, and return.

Which pages a step wants is not decided here: see `RecalledLayer`. A prompt's pages leave through
the staging blocks of the backup engine; a page that a step seals is written by a kernel of that
step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.engines.capture import Bools, Rule
from arkcache.engines.device_page_table import DevicePageTable
from arkcache.engines.page_directory import PageDirectory
from arkcache.engines.step import Lengths
from arkcache.errors import IntegrityError
from arkcache.kernels.arguments import Counts, HostPages, Places, Summaries, Window
from arkcache.kernels.torch_hadamard import rotate
from arkcache.kernels.torch_pages import PagePacker
from arkcache.kernels.triton_copy import scatter
from arkcache.kernels.triton_seal import seal_newest, seal_pages
from arkcache.layers.ring import RingLayer
from arkcache.layers.tiered import TieredLayer
from arkcache.pages.bookkeeping import Ids
from arkcache.pages.windows import RingWindow
from arkcache.tiering.backup import BackupEngine, Ticket, backup_engine_of
from arkcache.tiering.device import DeviceTier, PackedWorkingSet
from arkcache.tiering.host import HostTier
from arkcache.tiering.reading import read_lines
from arkcache.tiering.transfer import upload


class OffloadedLayer(RingLayer, TieredLayer):
    """A layer whose sealed pages live in pinned host memory, with slots for some on the device.

    Args:
        config: the cache's settings.
        num_selected: pages that a step selects, per KV head.
        device_tier: the device tier, its slots packed.
        number: which of its working sets is this layer's.
        host: the host tier, of one format, readable by the device.
        packer: of its pages.
    """

    def __init__(
        self,
        config: CacheConfig,
        num_selected: Ids,
        device_tier: DeviceTier,
        number: int,
        host: HostTier,
        packer: PagePacker,
    ) -> None:
        super().__init__(config, device_tier, number, host, [packer])
        self._make_metadata()
        self._directory = PageDirectory(config, self.geometry)
        self._ticket: Ticket | None = None
        self._page_table = self._make_page_table(num_selected)
        self._make_buffers()

    def _make_page_table(self, num_selected: Ids) -> DevicePageTable:
        """Places for this working set, all empty; num_selected: pages, per KV head."""
        selected = np.tile(num_selected, self.geometry.batch)
        num_places = self._working_set.num_slots - self.config.num_sink_pages
        factor = self.device_tier.plan.pool_factor
        return DevicePageTable(self.config, selected, num_places, factor, self.geometry.device)

    def _make_buffers(self) -> None:
        """Allocate the buffer that a sealed page passes through on its way to the host."""
        shape = (self.geometry.num_rows, self._packer.layout.nbytes)
        with torch.inference_mode(False):  # written to in and out of it
            self._newest = torch.zeros(shape, dtype=torch.uint8, device=self.geometry.device)

    @property
    def _working_set(self) -> PackedWorkingSet:
        working_set = self.working_set
        assert isinstance(working_set, PackedWorkingSet)
        return working_set

    @property
    def _slots(self) -> Tensor:
        """Slots of every row [rows, slots, nbytes]: sinks first, then the places."""
        return self._working_set.slots.flatten(0, 1)

    @property
    def window(self) -> RingWindow:
        """The recent window."""
        return RingWindow(*self.working_set.windows)

    @property
    def _backups(self) -> BackupEngine:
        return backup_engine_of(self.geometry.device)

    def join(self) -> None:
        """Have the next kernel wait for what other streams do for this layer."""
        self._settle()

    def _settle(self) -> None:
        """Have the main stream wait for the newest backup: what it holds may be recalled."""
        if self._ticket is not None:
            ticket, self._ticket = self._ticket, None
            self._backups.settle(ticket)

    # -- append and seal ------------------------------------------------------------------------

    def reserve(self, tokens: int) -> None:
        """Make room for sequences of so many tokens, so that no address changes until then."""
        self._directory.reserve(
            max(tokens - self.config.num_recent_tokens, 0) // self.config.page_size
        )

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the tensors that grow are now."""
        # All else is new when the metadata is.
        return self._metadata.number, *self._directory.addresses, self.host.pieces().data_ptr()

    @property
    def rule(self) -> Rule:
        """When it seals a page and how much it attends."""
        config, batch = self.config, self.geometry.batch
        selected = self._page_table.selected.reshape(batch, -1)
        pieces = self._store.pieces_per_page
        return Rule(
            config.num_recent_tokens, config.page_size, config.num_sink_pages, selected, pieces
        )

    @property
    def _lines(self) -> Tensor:
        """Where the pages that a step seals go on the host: a line of `pieces` for each row."""
        return self.device_tier.lines[self.number]

    @staticmethod
    def make_ready(layers: Sequence[OffloadedLayer], seals: Bools, _tokens: int) -> None:
        """Take places in the host tier for the pages that seal: of which layer and sequence
        [layers, batch]."""
        if not seals.any():
            return
        first, heads = layers[0], layers[0].geometry.num_kv_heads
        pages = np.stack([layer.sealed for layer in layers])[seals]
        num_pages = int(pages.max()) + 1
        for layer in layers:
            layer._directory.reserve(num_pages)
        handles = first.host.allocate(len(pages))
        try:
            OffloadedLayer._hold(layers, seals, pages, handles)
        except BaseException:  # interrupted: give back what no layer has entered yet
            held = np.concatenate([layer.held_pieces() for layer in layers])
            first.host.release(np.setdiff1d(handles, held))
            raise
        lines = np.full((*seals.shape, heads), -1, dtype=np.int64)
        lines[seals] = first.host.rows(handles)[:, None] * heads + np.arange(heads)
        on_device = upload(lines.reshape(len(layers), -1), first.geometry.device)
        # One copy, however many layers: they are one, or all of this class, numbered in a row.
        numbers = slice(first.number, layers[-1].number + 1)
        first.device_tier.lines[numbers].copy_(on_device)

    @staticmethod
    def _hold(layers: Sequence[OffloadedLayer], seals: Bools, pages: Ids, handles: Ids) -> None:
        """Enter pieces of the host tier as pages with these numbers, layer by layer."""
        sequences = np.nonzero(seals)[1]
        page_bytes = layers[0]._packer.layout.nbytes * layers[0].geometry.num_kv_heads
        stop = 0
        for layer, number in zip(layers, seals.sum(axis=1).tolist(), strict=True):
            own = slice(stop, stop := stop + number)
            layer._store.enter(sequences[own], pages[own], handles[own])
            layer.counters.bytes_backed_up += number * page_bytes

    def _launch_seal(self, rows: slice, digest_window: Tensor) -> None:
        metadata, means = self._metadata, self._directory.means
        key, value = self.by_row(self.window)
        seal_newest(
            Window(key[rows], value[rows]),
            digest_window,
            Counts(metadata.lengths[rows], metadata.sealed[rows]),
            self._slots[rows],
            self._newest[rows],
            Places(self._page_table.page_of[rows], self._page_table.may_hold[rows]),
            Summaries(self._directory.digests[rows], None if means is None else means[rows]),
            recent=self.config.num_recent_tokens,
            num_sink_pages=self.config.num_sink_pages,
            layout=self._packer.layout,
            index=self.config.index,
            index_bits=self.config.packed_index_bits,
        )
        scatter(
            self._newest[rows],
            self._lines[rows],
            HostPages(self._store.pieces(), self._directory.located[rows]),
            metadata.sealed[rows],
        )

    def _seal(self, seqs: slice, first: int, key: Tensor, value: Tensor) -> None:
        """Digest, pack, back up and, where there is room, place pages from number `first` on."""
        heads, count = key.shape[1:3]
        nbytes, layout = self._packer.layout.nbytes, self._packer.layout
        handles = self._store.allot(seqs, first, count).reshape(key.shape[0], -1)
        self._directory.locate(
            seqs, first, np.stack([self._store.lines(s, first, first + count) for s in _each(seqs)])
        )
        digest_key = rotate(key) if self.config.rotates_keys else key
        digests = self._directory.digests.unflatten(0, (-1, heads))
        means = (
            None
            if self._directory.means is None
            else self._directory.means.unflatten(0, (-1, heads))
        )
        for number, sequence in enumerate(_each(seqs)):
            block = self._backups.borrow(count * heads * nbytes)
            packed = block.data.view(count, heads, nbytes).transpose(0, 1)
            seal_pages(
                key[number],
                value[number],
                digest_key[number],
                packed,
                Summaries(digests[sequence], None if means is None else means[sequence]),
                first=first,
                layout=layout,
                index=self.config.index,
                index_bits=self.config.packed_index_bits,
            )
            self._place(slice(sequence, sequence + 1), first, packed[None])
            self._ticket = self._backups.submit(block, self.host, handles[number])
            self.counters.bytes_backed_up += packed.numel()

    def _place(self, seqs: slice, first: int, packed: Tensor) -> None:
        """Put new pages [seqs, kv_heads, pages, nbytes] where `seal_newest` would."""
        working_set = self._working_set
        last = min(first + packed.shape[2], working_set.num_slots)
        if last > first:
            working_set.slots[seqs, :, first:last] = packed[:, :, : last - first]
            self._page_table.place(self.rows_of(seqs), first, last)

    # -- several new tokens: everything, streamed -------------------------------------------------

    def _page_blocks(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        self._settle()  # on the main stream: blocks are read on another
        return super()._page_blocks()

    def _read(self, sequence: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        self._settle()
        lines = self._store.lines(sequence, first, last)
        packed = read_lines(
            self.host, self._store.pieces(), lines.reshape(-1), self.geometry.device
        )
        self.counters.bytes_streamed += packed.numel()
        key, value = self._packer.unpack(packed.view(*lines.shape, -1))
        return key.flatten(1, 2), value.flatten(1, 2)

    # -- changes of shape -------------------------------------------------------------------------

    def _unseal(self, sequence: int, first: int, last: int) -> None:
        rows = self.rows_of(slice(sequence, sequence + 1))
        self._store.forget(sequence, first, last)
        self._page_table.drop_from(rows, first)

    def undo(self, lengths: Ids, sealed: Ids) -> None:
        """Go back to these counts, from before a step that did not come to its end."""
        super().undo(lengths, sealed)
        for sequence, first in enumerate(sealed.tolist()):
            self._store.forget_from(sequence, first)
            self._page_table.drop_from(self.rows_of(slice(sequence, sequence + 1)), first)

    def keep_sequences(self, index: Ids, device_tier: DeviceTier, num_selected: Ids) -> None:
        """Make sequence i what sequence `index[i]` was; pages are shared, not copied.

        See `PagedLayer.keep_sequences`.
        """
        self.join()
        before, old_table = self._working_set, self._page_table
        self._store.keep_sequences(index)
        self.sealed, self.lengths = self.sealed[index], Lengths(self.lengths.of[index])
        self.device_tier, self.geometry = device_tier, device_tier.geometry
        on_device = upload(index, self.geometry.device)
        self._directory.keep_sequences(on_device, self.geometry)
        self._make_metadata()
        self._metadata.set(slice(0, len(index)), self.lengths.of, self.sealed)
        self._make_buffers()
        self._page_table = self._make_page_table(num_selected)
        heads = self.geometry.num_kv_heads
        rows = (index[:, None] * heads + np.arange(heads)).reshape(-1)
        self._page_table.inherit(old_table, upload(rows, self.geometry.device), heads)
        for plane, other in zip(self.working_set.windows, before.windows, strict=True):
            plane.copy_(other[on_device])
        kept = self._working_set.slots
        shared = min(kept.shape[2], before.num_slots)
        kept[:, :, :shared] = before.slots[on_device, :, :shared]

    def release(self) -> None:
        """Give the layer's pages back to the host tier, once what is copied there has landed."""
        self.join()
        super().release()

    def move_pieces(self, host: HostTier) -> None:
        """Follow the layer's pages into a tier that was extracted from the present one."""
        super().move_pieces(host)
        for sequence, sealed in enumerate(self.sealed.tolist()):
            if sealed:
                lines = self._store.lines(sequence, 0, sealed)
                self._directory.locate(slice(sequence, sequence + 1), 0, lines[None])

    def __getstate__(self) -> dict[str, Any]:
        self.join()
        return vars(self).copy()

    # -- invariants -----------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `IntegrityError` if the metadata contradicts itself or the tiers differ."""
        self.join()
        self._check_sealed(self.sealed)
        self._check_sealed(self._store.counts())
        heads, num_sink_pages = self.geometry.num_kv_heads, self.config.num_sink_pages
        metadata = self._metadata
        for name, mine, on_device in (
            ("tokens", self.lengths.of, metadata.lengths),
            ("sealed pages", self.sealed, metadata.sealed),
        ):
            theirs = on_device.cpu().numpy()
            if not np.array_equal(theirs, mine.repeat(heads)):
                raise IntegrityError(f"the device counts {theirs} {name}, the host {mine} each")
        located, slots = self._directory.located.cpu().numpy(), self._slots.cpu()
        page_of = self._page_table.check(self.sealed.repeat(heads))
        for row, places in enumerate(page_of):
            sequence, head = divmod(row, heads)
            sealed = int(self.sealed[sequence])
            lines = self._store.lines(sequence, 0, sealed)[head]
            if not np.array_equal(located[row, :sealed], lines):
                raise IntegrityError(f"the device looks for pages of row {row} in wrong places")
            first = np.arange(num_sink_pages)
            pages = np.concatenate((np.where(first < sealed, first, -1), places))
            for slot in np.flatnonzero(pages >= 0).tolist():
                if not torch.equal(slots[row, slot], self._store.pieces()[lines[pages[slot]]]):
                    raise IntegrityError(f"page {pages[slot]} of row {row} differs from its backup")


def _each(seqs: slice) -> range:
    return range(seqs.start, seqs.stop)
