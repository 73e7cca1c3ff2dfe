"""The places of a layer's working set: which pages they hold, and how pages get there.

Of the engine that decides on the host. Places are slots for selected pages, numbered from 0 behind
the sinks, which never move.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from arkcache.engines.engine import PagedParts
from arkcache.engines.views import Held
from arkcache.errors import IntegrityError
from arkcache.pages.bookkeeping import Ids, PageTable
from arkcache.tiering.device import DeviceTier, PackedWorkingSet, WorkingSet, copy_sequences

RELOAD_SHARE = 0.6
"""On a CPU, with more than this share of the selection missing, all of it is copied in one pass
straight into place: 116 pages of 16 KiB take 0.19 ms so, and 104 of them 0.31 ms one by one."""


class Places:
    """Which page each place of a layer holds.

    Args:
        parts: of the layer.
        num_selected: pages that a step selects, per KV head.

    Attributes:
        num_selected: pages that a step selects, of each row.
        num_places: places of each row.
        least_selected: pages that any KV head selects at least.
        spare: whether places may hold pages that the step did not select.
        plain: whether a selection fills all places of every row, so that no mask is needed.
    """

    def __init__(self, parts: PagedParts, num_selected: Ids) -> None:
        self._parts = parts
        self._allot(num_selected)
        geometry = parts.geometry
        self._may_reload = geometry.device.type == "cpu" and parts.config.format.is_raw
        self._may_reload &= len(parts.store.packers) == 1
        self._may_reload &= isinstance(parts.working_set, WorkingSet)
        self._table = PageTable(geometry.num_rows, self.num_places)
        # Whether every selectable page is resident, as far as places go: then nothing is recalled.
        self._complete = True

    def _allot(self, num_selected: Ids) -> None:
        """Share out the places of the working set; num_selected: pages, per KV head."""
        config, geometry = self._parts.config, self._parts.geometry
        self.num_selected = np.tile(num_selected, geometry.batch)
        self.num_places = self._parts.working_set.num_slots - config.num_sink_pages
        self.least_selected = int(num_selected.min())
        self._may_hold = np.minimum(
            np.ceil(self.num_selected * self._parts.device_tier.plan.pool_factor), self.num_places
        ).astype(np.int64)
        varies = config.target_missed_mass is not None or config.retention is not None
        # Where places are spare, a page that is not selected now may stay for a later step: who
        # gives way is decided by rating then. A selection of varying size leaves places, too.
        self.spare = varies or self.num_places > int(num_selected.max())
        self.plain = self.least_selected == self.num_places and not varies

    @property
    def page_of(self) -> Ids:
        """The page in each place [rows, places], -1 in an empty one."""
        return self._table.page_of

    @property
    def held(self) -> Held:
        """Which places hold a page [rows, places]."""
        return self.page_of >= 0

    def tokens(self, num_pages: int, recent: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The first slots and the window, unpacked: in one part, or some pages at a time."""
        working_set = self._parts.working_set
        if isinstance(working_set, PackedWorkingSet):
            return working_set.parts(num_pages, recent)
        return iter([working_set.view(num_pages, recent)])

    # -- pages come -------------------------------------------------------------------------------

    def fill(self, seqs: slice, first: int, packed: Tensor) -> None:
        """Put new pages [seqs, kv_heads, pages, nbytes] from number `first` on where room is."""
        working_set, rows = self._parts.working_set, self._parts.geometry.rows_of(seqs)
        room = min(first + packed.shape[2], working_set.num_slots) - first
        if room <= 0:
            return
        if isinstance(working_set, PackedWorkingSet):
            working_set.fill_places(seqs, first, packed[:, :, :room])
        else:
            # What is attended must not depend on whether the page stayed or was recalled.
            unpacked = self._parts.packer.unpack(packed[:, :, :room])
            working_set.fill_places(seqs, first, *unpacked)
        num_sink_pages = self._parts.config.num_sink_pages
        for page in range(max(first, num_sink_pages), first + room):
            self._table.place(rows, page - num_sink_pages, page, self._may_hold)

    def complete(self, selectable: Ids) -> None:
        """Have all selectable pages of every sequence resident: there are places for all."""
        count = np.repeat(selectable, self._parts.geometry.num_kv_heads)
        if self._complete:
            self._parts.counters.pages_hit += int(count.sum())
            return
        everything = np.broadcast_to(np.arange(count.max()), (len(count), int(count.max())))
        self.recall(everything, count, None)
        self._complete = True

    def recall(self, selected: Ids, count: Ids | None, rating: Tensor | None) -> None:
        """Bring what is selected and not resident into the working set.

        selected: selectable pages [rows, max_selected], of which row r wants the first `count[r]`
        (None is all). rating [rows, pages] decides who stays where places are spare.
        """
        num_sink_pages, counters = self._parts.config.num_sink_pages, self._parts.counters
        keep = None
        if rating is not None:
            resident = np.maximum(self.page_of - num_sink_pages, 0)
            keep = np.take_along_axis(rating.float().cpu().numpy(), resident, axis=1)
        self._ready(selected + num_sink_pages, count)
        num_pages = int(self._parts.tokens.sealed.max())
        moves = self._table.fetch(selected + num_sink_pages, num_pages, count, keep)
        num_wanted = selected.size if count is None else int(count.sum())
        num_recalled = len(moves.pages)
        alike = self.plain and count is None
        begun = counters.copy_begins()
        if alike and self._may_reload and num_recalled > RELOAD_SHARE * num_wanted:
            self._reload()
        elif num_recalled:
            self.copy_in(moves.rows, moves.places, moves.pages)
        counters.load_ns += counters.since(begun)
        counters.pages_hit += num_wanted - num_recalled
        counters.pages_recalled += num_recalled
        counters.pages_evicted += moves.num_evicted

    def _ready(self, pages: Ids, count: Ids | None) -> None:
        """Before the page table has them: a page that turns out damaged has changed nothing."""
        store = self._parts.store
        if store.host.has_unread:
            counts = np.full(len(pages), pages.shape[1]) if count is None else count
            rows, at = np.nonzero(np.arange(pages.shape[1]) < counts[:, None])
            store.ready(rows, pages[rows, at])

    def copy_in(self, rows: Ids, places: Ids, pages: Ids) -> None:
        """Copy pages from the host tier into places, as the page table has it already."""
        device, working_set = self._parts.geometry.device, self._parts.working_set
        for part in self._parts.store.read(rows, pages):
            row = torch.from_numpy(rows[part.which]).to(device)
            slot = places[part.which] + self._parts.config.num_sink_pages
            place, packed = torch.from_numpy(slot).to(device), part.packed.to(device)
            if isinstance(working_set, PackedWorkingSet):
                working_set.write_pages(row, place, packed)
            else:
                working_set.write_pages(row, place, *part.packer.unpack(packed))
            self._parts.counters.bytes_recalled += part.nbytes

    def _reload(self) -> None:
        """Copy all resident pages anew, in one pass straight into the working set."""
        parts, working_set = self._parts, self._parts.working_set
        assert isinstance(working_set, WorkingSet)
        rows = np.arange(parts.geometry.num_rows)[:, None]
        pieces = parts.store.locate(rows, self.page_of)
        parts.store.host.touch(len(np.unique(pieces // parts.geometry.num_kv_heads)))
        source = parts.store.pieces().view(parts.geometry.dtype)
        num_sink_pages = parts.config.num_sink_pages
        working_set.load_places(num_sink_pages, source, torch.from_numpy(pieces))
        parts.counters.bytes_recalled += pieces.size * parts.packer.layout.nbytes

    def chosen(self, selected: Ids, count: Ids) -> Held:
        """Which places [rows, places] hold selected pages, as in `recall`."""
        num_pages = int(self._parts.tokens.sealed.max())
        wanted = np.zeros((len(selected), num_pages + 1), dtype=np.bool_)
        valid = np.arange(selected.shape[1]) < count[:, None]
        pages = np.where(valid, selected + self._parts.config.num_sink_pages, -1)
        np.put_along_axis(wanted, pages, True, axis=1)
        wanted[:, -1] = False
        chosen: Held = wanted[np.arange(len(wanted))[:, None], self.page_of]
        return chosen

    # -- pages go ---------------------------------------------------------------------------------

    def drop_from(self, rows: slice, first: int) -> None:
        """Forget the pages of `rows` from `first` on."""
        num_left = max(0, first - self._parts.config.num_sink_pages)
        self._table.drop_from(rows, first, num_left)
        self._complete = False

    def give_up(self, lost: Held) -> None:
        """Forget pages that are lost [rows, pages]."""
        page_of = self._table.page_of
        stale = np.take_along_axis(lost, np.maximum(page_of, 0), axis=1)
        page_of[stale & (page_of >= 0)] = -1

    def keep_sequences(self, index: Ids, device_tier: DeviceTier, num_selected: Ids) -> None:
        """See `Engine.keep_sequences`."""
        parts = self._parts
        rows, before = parts.rows_from(index), parts.working_set
        on_device = torch.from_numpy(index).to(device_tier.geometry.device)
        parts.device_tier = device_tier
        self._allot(num_selected)
        if before.num_slots == parts.working_set.num_slots:
            self._table.keep_rows(rows)
            copy_sequences(before.planes, parts.working_set.planes, on_device)
        else:
            copy_sequences(before.windows, parts.working_set.windows, on_device)
            self.start_anew()

    def start_anew(self) -> None:
        """Fill a working set of another size: sinks now, pages when they are selected."""
        geometry, num_sink_pages = self._parts.geometry, self._parts.config.num_sink_pages
        self._table = PageTable(geometry.num_rows, self.num_places)
        self._complete = False
        held = np.minimum(self._parts.tokens.sealed, num_sink_pages).repeat(geometry.num_kv_heads)
        rows, pages = np.nonzero(np.arange(num_sink_pages) < held[:, None])
        self.copy_in(rows, pages - num_sink_pages, pages)

    def restore(self, page_of: Ids | None) -> None:
        """Hold the sinks and, if these places are as many, what those of an earlier cache held."""
        self.start_anew()
        if page_of is None:
            return
        allowed = np.arange(self.num_places) < self._may_hold[:, None]
        if page_of.shape == self.page_of.shape and not (page_of[~allowed] >= 0).any():
            self.page_of[:] = page_of
            rows, places = np.nonzero(self.held)
            self.copy_in(rows, places, page_of[rows, places])

    # -- invariants -------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise `IntegrityError` if a row holds a page twice, or one, sinks included, that is not
        bit-equal to its backup on the host."""
        self._table.check()
        sink_pages = np.arange(self._parts.config.num_sink_pages)
        for row, places in enumerate(self.page_of):
            sequence = row // self._parts.geometry.num_kv_heads
            sealed = self._parts.tokens.sealed[sequence]
            own_sinks = np.where(sink_pages < sealed, sink_pages, -1)
            for slot, page in enumerate(np.concatenate((own_sinks, places)).tolist()):
                if page >= 0 and not self._same(row, slot, page):
                    raise IntegrityError(f"page {page} of row {row} differs from its backup")

    def _same(self, row: int, slot: int, page: int) -> bool:
        sequence, head = divmod(row, self._parts.geometry.num_kv_heads)
        (backup,) = self._parts.store.read(np.array([row]), np.array([page]))
        working_set = self._parts.working_set
        if isinstance(working_set, PackedWorkingSet):
            held = working_set.slots[sequence, head, working_set.num_slots - 1 - slot]
            return torch.equal(held.cpu(), backup.packed[0])
        unpacked = backup.packer.unpack(backup.packed)
        resident = working_set.view(slot + 1, 0)
        return all(
            torch.equal(
                mine[sequence, head, : self._parts.config.page_size].cpu().view(torch.uint8),
                other[0].view(torch.uint8),
            )
            for mine, other in zip(resident, unpacked, strict=True)
        )
