"""Sealed pages of the GPU engine: how they leave the device for pinned host memory, and return.

A prompt's pages leave through the staging blocks of the backup engine; a page that a step seals is
written by a kernel of that step. Slots hold pages as the host tier does, byte for byte, so that
recall is a copy. Which pages a step wants is not decided here: see `DeviceEngine`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from arkcache.engines.capture import Bools
from arkcache.engines.device_page_table import DevicePageTable
from arkcache.engines.device_tokens import DeviceTokens
from arkcache.engines.engine import PagedParts
from arkcache.engines.page_directory import PageDirectory
from arkcache.errors import IntegrityError
from arkcache.kernels.arguments import HostPages, Places, Selection, Summaries, Window
from arkcache.kernels.torch_hadamard import rotate
from arkcache.kernels.triton_copy import gather, scatter
from arkcache.kernels.triton_seal import seal_newest, seal_pages
from arkcache.pages.bookkeeping import Ids, is_in_order
from arkcache.pages.windows import RingWindow
from arkcache.tiering.backup import BackupEngine, Ticket, backup_engine_of
from arkcache.tiering.device import DeviceTier, PackedWorkingSet
from arkcache.tiering.reading import read_lines
from arkcache.tiering.transfer import upload


class OffloadedPages:
    """The sealed pages of a layer in pinned host memory, with slots for some on the device.

    Args:
        parts: of the layer; slots are packed, and the host tier is readable by the device.
        num_selected: pages that a step selects, per KV head.

    Attributes:
        directory: digests and addresses of all pages.
        page_table: which page is in which place.
    """

    def __init__(self, parts: PagedParts, num_selected: Ids) -> None:
        self._parts = parts
        self.directory = PageDirectory(parts.config, parts.geometry)
        self._ticket: Ticket | None = None
        self.page_table = self._make_page_table(num_selected)
        self._newest = self._make_newest()

    def _make_page_table(self, num_selected: Ids) -> DevicePageTable:
        """Places for this working set, all empty; num_selected: pages, per KV head."""
        config, geometry = self._parts.config, self._parts.geometry
        selected = np.tile(num_selected, geometry.batch)
        num_places = self._working_set.num_slots - config.num_sink_pages
        factor = self._parts.device_tier.plan.pool_factor
        return DevicePageTable(config, selected, num_places, factor, geometry.device)

    def _make_newest(self) -> Tensor:
        """The buffer that a page which a step seals passes through on its way to the host."""
        geometry = self._parts.geometry
        shape = (geometry.num_rows, self._parts.packer.layout.nbytes)
        with torch.inference_mode(False):  # written to in and out of it
            return torch.zeros(shape, dtype=torch.uint8, device=geometry.device)

    @property
    def _working_set(self) -> PackedWorkingSet:
        working_set = self._parts.working_set
        assert isinstance(working_set, PackedWorkingSet)
        return working_set

    @property
    def slots(self) -> Tensor:
        """Slots of every row [rows, slots, nbytes]: sinks first, then the places."""
        return self._working_set.slots.flatten(0, 1)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the tensors that grow are now."""
        return *self.directory.addresses, self._parts.store.host.pieces().data_ptr()

    @property
    def _backups(self) -> BackupEngine:
        return backup_engine_of(self._parts.geometry.device)

    @property
    def _lines(self) -> Tensor:
        """Where the pages that a step seals go on the host: a line of `pieces` for each row."""
        return self._parts.device_tier.lines[self._parts.number]

    def settle(self) -> None:
        """Have the main stream wait for the newest backup: what it holds may be recalled."""
        if self._ticket is not None:
            ticket, self._ticket = self._ticket, None
            self._backups.settle(ticket)

    # -- a page that a step seals -----------------------------------------------------------------

    @staticmethod
    def make_ready(layers: Sequence[OffloadedPages], seals: Bools) -> None:
        """Take places in the host tier for the pages that seal: of which layer and sequence
        [layers, batch]."""
        if not seals.any():
            return
        first = layers[0]._parts
        heads, host = first.geometry.num_kv_heads, first.store.host
        pages = np.stack([layer._parts.tokens.sealed for layer in layers])[seals]
        num_pages = int(pages.max()) + 1
        for layer in layers:
            layer.directory.reserve(num_pages)
        handles = host.allocate(len(pages))
        try:
            OffloadedPages._hold(layers, seals, pages, handles)
        except BaseException:  # interrupted: give back what no layer has entered yet
            held = np.concatenate([layer._parts.store.held() for layer in layers])
            host.release(np.setdiff1d(handles, held))
            raise
        lines = np.full((*seals.shape, heads), -1, dtype=np.int64)
        lines[seals] = host.positions(handles)[:, None] * heads + np.arange(heads)
        on_device = upload(lines.reshape(len(layers), -1), first.geometry.device)
        # One copy, however many layers: they are one, or all of this class, numbered in a row.
        numbers = slice(first.number, layers[-1]._parts.number + 1)
        first.device_tier.lines[numbers].copy_(on_device)

    @staticmethod
    def _hold(layers: Sequence[OffloadedPages], seals: Bools, pages: Ids, handles: Ids) -> None:
        """Enter pieces of the host tier as pages with these numbers, layer by layer."""
        sequences = np.nonzero(seals)[1]
        first = layers[0]._parts
        page_bytes = first.packer.layout.nbytes * first.geometry.num_kv_heads
        stop = 0
        for layer, number in zip(layers, seals.sum(axis=1).tolist(), strict=True):
            own = slice(stop, stop := stop + number)
            layer._parts.store.enter(sequences[own], pages[own], handles[own])
            layer._parts.counters.bytes_backed_up += number * page_bytes

    def launch_seal(self, seqs: slice, tokens: DeviceTokens, window: RingWindow) -> None:
        """Queue the sealing of the newest page of those rows whose last token completed one."""
        config, rows = self._parts.config, self._parts.geometry.rows_of(seqs)
        means = self.directory.means
        key, value = (plane[rows] for plane in window.by_row())
        counts, table = tokens.counts_of(rows), self.page_table
        seal_newest(
            Window(key, value),
            rotate(key) if config.rotates_keys else key,  # boxes fit keys as the model made them
            counts,
            self.slots[rows],
            self._newest[rows],
            Places(table.page_of[rows], table.may_hold[rows]),
            Summaries(self.directory.digests[rows], None if means is None else means[rows]),
            recent=config.num_recent_tokens,
            num_sink_pages=config.num_sink_pages,
            layout=self._parts.packer.layout,
            index=config.index,
            index_bits=config.packed_index_bits,
        )
        scatter(
            self._newest[rows],
            self._lines[rows],
            HostPages(self._parts.store.pieces(), self.directory.located[rows]),
            counts.sealed,
        )

    # -- pages that a prompt seals ----------------------------------------------------------------

    def seal(self, seqs: slice, first: int, key: Tensor, value: Tensor) -> None:
        """Digest, pack, back up and, where there is room, place pages from number `first` on."""
        store, layout = self._parts.store, self._parts.packer.layout
        heads, count = key.shape[1:3]
        handles = store.allot(seqs, first, count).reshape(key.shape[0], -1)
        sequences = range(seqs.start, seqs.stop)
        lines = np.stack([store.lines(s, first, first + count) for s in sequences])
        self.directory.locate(seqs, first, lines)
        for number, sequence in enumerate(sequences):
            block = self._backups.borrow(count * heads * layout.nbytes)
            packed = block.data.view(count, heads, layout.nbytes).transpose(0, 1)
            self._pack(sequence, first, key[number], value[number], packed)
            self._place(slice(sequence, sequence + 1), first, packed[None])
            self._ticket = self._backups.submit(block, store.host, handles[number])
            self._parts.counters.bytes_backed_up += packed.numel()

    def _pack(self, sequence: int, first: int, key: Tensor, value: Tensor, packed: Tensor) -> None:
        """Digest pages of a sequence [kv_heads, pages, page_size, dim], and pack them into `packed`
        [kv_heads, pages, nbytes]."""
        config, rows = (
            self._parts.config,
            self._parts.geometry.rows_of(slice(sequence, sequence + 1)),
        )
        means = self.directory.means
        seal_pages(
            key,
            value,
            rotate(key) if config.rotates_keys else key,
            packed,
            Summaries(self.directory.digests[rows], None if means is None else means[rows]),
            first=first,
            layout=self._parts.packer.layout,
            index=config.index,
            index_bits=config.packed_index_bits,
        )

    def digest(self, seqs: slice, first: int, key: Tensor, value: Tensor) -> None:
        """See `Engine.digest`: what the kernel packs beside it is not needed."""
        heads, count = key.shape[1:3]
        packed = key.new_empty((heads, count, self._parts.packer.layout.nbytes), dtype=torch.uint8)
        for number, sequence in enumerate(range(seqs.start, seqs.stop)):
            self._pack(sequence, first, key[number], value[number], packed)

    def _place(self, seqs: slice, first: int, packed: Tensor) -> None:
        """Put new pages [seqs, kv_heads, pages, nbytes] where `seal_newest` would."""
        working_set = self._working_set
        last = min(first + packed.shape[2], working_set.num_slots)
        if last > first:
            working_set.slots[seqs, :, first:last] = packed[:, :, : last - first]
            self.page_table.place(self._parts.geometry.rows_of(seqs), first, last)

    def fetch(self, resident: Tensor | None) -> None:
        """Fill empty slots from the host tier: the sinks and, if `resident` is of as many places,
        the pages that it names [rows, places]."""
        table, store, heads = self.page_table, self._parts.store, self._parts.geometry.num_kv_heads
        num_sink_pages, sealed = self._parts.config.num_sink_pages, self._parts.tokens.sealed
        if resident is not None:
            table.inherit_pages(resident)
        sinks = np.arange(num_sink_pages)
        for row, places in enumerate(table.page_of.cpu().numpy().astype(np.int64)):
            sequence, head = divmod(row, heads)
            pages = np.concatenate((np.where(sinks < sealed[sequence], sinks, -1), places))
            slots = np.flatnonzero(pages >= 0)
            lines = store.lines(sequence, 0, int(sealed[sequence]))[head, pages[slots]]
            device = self._parts.geometry.device
            packed = read_lines(store.host, store.pieces(), lines, device)
            self.slots[row, upload(slots, device)] = packed

    # -- pages return -----------------------------------------------------------------------------

    def recall(self, selection: Selection) -> None:
        """Queue the copy of what is missing from the host tier into its places."""
        gather(
            HostPages(self._parts.store.pieces(), self.directory.located),
            selection,
            self.slots,
            num_sink_pages=self._parts.config.num_sink_pages,
        )

    def read(self, sequence: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """See `Engine.read`."""
        self.settle()
        store, device = self._parts.store, self._parts.geometry.device
        lines = store.lines(sequence, first, last)
        packed = read_lines(store.host, store.pieces(), lines.reshape(-1), device)
        self._parts.counters.bytes_streamed += packed.numel()
        key, value = self._parts.packer.unpack(packed.view(*lines.shape, -1))
        return key.flatten(1, 2), value.flatten(1, 2)

    # -- changes of shape -------------------------------------------------------------------------

    def drop_from(self, sequence: int, first: int) -> None:
        """Forget the pages of a sequence from `first` on, on the device."""
        rows = self._parts.geometry.rows_of(slice(sequence, sequence + 1))
        self.page_table.drop_from(rows, first)

    def keep_sequences(self, index: Ids, device_tier: DeviceTier, num_selected: Ids) -> None:
        """See `Engine.keep_sequences`."""
        before, old_table, rows = self._working_set, self.page_table, self._parts.rows_from(index)
        stays = is_in_order(index, self._parts.geometry.batch)
        self._parts.device_tier, geometry = device_tier, device_tier.geometry
        on_device = upload(index, geometry.device)
        if not stays:
            self.directory.keep_sequences(on_device, geometry)
        self._newest = self._make_newest()
        self.page_table = self._make_page_table(num_selected)
        self.page_table.inherit(old_table, upload(rows, geometry.device), geometry.num_kv_heads)
        for plane, other in zip(self._working_set.windows, before.windows, strict=True):
            plane.copy_(other[on_device])
        kept = self._working_set.slots
        shared = min(kept.shape[2], before.num_slots)
        kept[:, :, :shared] = before.slots[on_device, :, :shared]

    def moved(self) -> None:
        """See `Engine.moved`: pages have other addresses."""
        for sequence, sealed in enumerate(self._parts.tokens.sealed.tolist()):
            if sealed:
                lines = self._parts.store.lines(sequence, 0, sealed)
                self.directory.locate(slice(sequence, sequence + 1), 0, lines[None])

    def check(self) -> None:
        """Raise `IntegrityError` unless pages are where the device looks for them, and those that
        it holds, sinks included, are bit-equal to their backups."""
        parts, heads = self._parts, self._parts.geometry.num_kv_heads
        located, slots = self.directory.located.cpu().numpy(), self.slots.cpu()
        page_of = self.page_table.check(parts.tokens.sealed.repeat(heads))
        for row, places in enumerate(page_of):
            sequence, head = divmod(row, heads)
            sealed = int(parts.tokens.sealed[sequence])
            lines = parts.store.lines(sequence, 0, sealed)[head]
            if not np.array_equal(located[row, :sealed], lines):
                raise IntegrityError(f"the device looks for pages of row {row} in wrong places")
            first = np.arange(parts.config.num_sink_pages)
            pages = np.concatenate((np.where(first < sealed, first, -1), places))
            for slot in np.flatnonzero(pages >= 0).tolist():
                if not torch.equal(slots[row, slot], parts.store.pieces()[lines[pages[slot]]]):
                    raise IntegrityError(f"page {pages[slot]} of row {row} differs from its backup")
