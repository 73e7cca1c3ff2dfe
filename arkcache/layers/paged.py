"""The cache of a layer in two tiers: sealed pages on the host, a working set on the device.

The decode step is `PagedLayer.attend_one`: rate all pages by their digests, select the best, recall
those that are missing into the places of pages that are not selected, attend.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.engines.missed import MissedLog, log_mass, true_missed_mass
from arkcache.engines.rating import PageRatings
from arkcache.engines.step import Lengths, Step, attend_parts, attend_view, page_mass
from arkcache.engines.summaries import PageSummaries, PseudoTokens
from arkcache.engines.views import Held, pages_left_out, view_mask, view_tokens
from arkcache.errors import IntegrityError
from arkcache.kernels.torch_pages import PagePacker
from arkcache.layers.tiered import TieredLayer
from arkcache.pages.bookkeeping import Ids, PageTable
from arkcache.pages.importance import Importance
from arkcache.pages.index import PageIndex
from arkcache.pages.policy import fewest_pages, ranked_pages, top_pages
from arkcache.pages.windows import ShiftedWindow
from arkcache.stats import CacheStats
from arkcache.tiering.device import DeviceTier, PackedWorkingSet, WorkingSet, copy_sequences
from arkcache.tiering.host import HostTier

RELOAD_SHARE = 0.6
"""On a CPU, with more than this share of the selection missing, all of it is copied in one pass
straight into place: 116 pages of 16 KiB take 0.19 ms so, and 104 of them 0.31 ms one by one."""


class PagedLayer(TieredLayer):
    """A layer whose sealed pages live in the host tier, with a working set on the device.

    Args:
        config: the cache's settings.
        num_selected: pages that a step selects, per KV head.
        device_tier: the device tier.
        number: which of its working sets is this layer's.
        host: the host tier.
        packers: of its pages' first format and, if there is one, of the coarse one.
        latent: rate pages by key and value side by side (multi-head latent attention).
    """

    def __init__(
        self,
        config: CacheConfig,
        num_selected: Ids,
        device_tier: DeviceTier,
        number: int,
        host: HostTier,
        packers: list[PagePacker],
        latent: bool = False,
    ) -> None:
        super().__init__(config, device_tier, number, host, packers)
        geometry = device_tier.geometry
        self._importance = Importance(geometry.num_rows) if len(packers) > 1 else None
        self._missed: MissedLog | None = None
        if config.target_missed_mass is not None or config.audit_every is not None:
            num_layers = len(device_tier.working_sets)
            self._missed = MissedLog(geometry.num_kv_heads, config.audit_every, number, num_layers)
        self._is_audit = False
        self._may_demote = False
        self._allot(num_selected)
        self._may_reload = geometry.device.type == "cpu" and config.format.is_raw
        self._may_reload &= len(packers) == 1 and isinstance(self.working_set, WorkingSet)
        self._page_table = PageTable(geometry.num_rows, self._num_places)
        # Whether every selectable page is resident, as far as places go: then nothing is recalled.
        self._complete = True
        self._ratings = PageRatings(config, geometry, latent)
        self._summaries = PageSummaries(config, geometry) if config.estimates else None

    @property
    def window(self) -> ShiftedWindow:
        """The recent window."""
        return ShiftedWindow(*self.working_set.windows)

    def _allot(self, num_selected: Ids) -> None:
        """Share out the places of the working set; num_selected: pages, per KV head."""
        self._num_selected = np.tile(num_selected, self.geometry.batch)
        self._num_places = self.working_set.num_slots - self.config.num_sink_pages
        self._least_selected = int(num_selected.min())
        self._may_hold = np.minimum(
            np.ceil(self._num_selected * self.device_tier.plan.pool_factor), self._num_places
        ).astype(np.int64)
        varies = self.config.target_missed_mass is not None
        # Where places are spare, a page that is not selected now may stay for a later step: who
        # gives way is decided by rating then. A selection of varying size leaves places, too.
        self._spare = varies or self._num_places > int(num_selected.max())
        # Plain: a selection fills all places of every row, so `_attend_alike` needs no mask.
        self._plain = self._least_selected == self._num_places and not varies

    # -- append and seal ------------------------------------------------------------------------

    def append(self, seqs: slice, key: Tensor, value: Tensor) -> None:
        """Append tokens [seqs, kv_heads, new, dim] to sequences of equal length."""
        sealed = int(self.sealed[seqs.start])
        super().append(seqs, key, value)
        self._may_demote |= sealed < int(self.sealed[seqs.start])

    def _seal(self, seqs: slice, first: int, key: Tensor, value: Tensor) -> None:
        """Digest, back up and, where there is room, place pages from number `first` on."""
        self._ratings.write(seqs, first, key, value)
        if self._summaries is not None:
            self._summaries.write(seqs, first, key, value)
        packed = self._packer.pack(key, value)
        self._store.append(seqs, first, packed.cpu())
        self.counters.bytes_backed_up += packed.numel()
        last, working_set = first + key.shape[2], self.working_set
        num_sink_pages, rows = self.config.num_sink_pages, self.rows_of(seqs)
        if self._importance is not None:
            self._importance.seal(rows, first, last)
        room = min(last, working_set.num_slots) - first
        if room <= 0:
            return
        if isinstance(working_set, PackedWorkingSet):
            working_set.fill_places(seqs, first, packed[:, :, :room])
        else:
            # What is attended must not depend on whether the page stayed or was recalled.
            working_set.fill_places(seqs, first, *self._packer.unpack(packed[:, :, :room]))
        for page in range(max(first, num_sink_pages), first + room):
            self._page_table.place(rows, page - num_sink_pages, page, self._may_hold)

    def rate_with(self, index: PageIndex) -> None:
        """Rate pages by another index from now on; what is sealed is digested anew."""
        self._ratings.use(index)
        for sequence, count in enumerate(self.sealed.tolist()):
            if count:
                shape = (count, self.config.page_size)
                pages = (
                    plane[None].unflatten(2, shape) for plane in self._read(sequence, 0, count)
                )
                self._ratings.write(slice(sequence, sequence + 1), 0, *pages)

    def demote(self) -> None:
        """Keep pages that were attended little in the coarse format, on the device as well.

        Done when a page was sealed since the last time.
        """
        config, importance = self.config, self._importance
        num_sink_pages = config.num_sink_pages
        if importance is None or not self._may_demote or int(self.sealed.max()) <= num_sink_pages:
            return
        self._may_demote = False
        fine = self._store.is_fine(int(self.sealed.max()))[:, num_sink_pages:]
        demoted = importance.demotable(
            num_sink_pages, fine, config.demote_below, config.demote_after
        )
        rows, pages = np.nonzero(demoted)
        if not len(rows):
            return
        demoted[rows, pages] = self._store.demote(rows, pages + num_sink_pages)
        self.counters.pages_demoted += int(np.count_nonzero(demoted))
        self.host.compact()
        resident = self._page_table.page_of
        numbers = np.maximum(resident - num_sink_pages, 0)
        stale = (resident >= 0) & np.take_along_axis(demoted, numbers, axis=1)
        rows, places = np.nonzero(stale)
        self._copy_in(rows, places, resident[rows, places])

    # -- one new token: score, select, recall, attend ---------------------------------------------

    def attend_one(self, step: Step) -> Tensor:
        """Attend one new token over the sinks, the selected pages and the recent window."""
        if self._missed is not None:
            self._is_audit = self._missed.begin_step()
        if self._plain and self.lengths.uniform and step.bias is None:
            return self._attend_alike(step)
        selectable = np.maximum(self.sealed - self.config.num_sink_pages, 0)
        max_selectable = int(selectable.max())
        chosen, rating = None, None
        least = self._least_selected if self.config.target_missed_mass is None else 0
        if max_selectable > least:
            chosen, rating = self._select(step, selectable, max_selectable)
        else:
            self._complete_residents(selectable)
            if self._missed is not None and self.config.target_missed_mass is not None:
                rows = self.geometry.num_rows
                self._missed.note(np.zeros(rows), np.zeros(rows, dtype=np.bool_))
        return self._attend(step, chosen, rating)

    def _attend_alike(self, step: Step) -> Tensor:
        """`attend_one` where all rows have as much to select from and to attend: the usual case."""
        sealed, length = int(self.sealed[0]), int(self.lengths.of[0])
        num_sink_pages, page_size = self.config.num_sink_pages, self.config.page_size
        selectable, num_selected = sealed - num_sink_pages, self._num_places
        rating, summaries = None, self._summaries
        if selectable > num_selected and (num_selected > 0 or summaries is not None):
            rating = self._ordering(step, selectable)
        if rating is not None and num_selected > 0:
            self._recall(top_pages(rating, num_selected), None, None)
        elif 0 < selectable <= num_selected:
            self._complete_residents(np.full(self.geometry.batch, selectable))
        held, estimated = None, None
        if self._importance is not None or summaries is not None or self._is_audit:
            held = self._page_table.page_of >= 0
            estimated = self._leave_out(step, held, rating)
        num_pages = min(sealed, num_sink_pages + num_selected)
        recent = length - sealed * page_size
        self.counters.attended_tokens = (num_pages * page_size + recent) * self.geometry.batch
        return self._attend_places(step, num_pages, recent, None, held, estimated)

    def _complete_residents(self, selectable: Ids) -> None:
        """Have all selectable pages resident: there are places for all of them."""
        count = np.repeat(selectable, self.geometry.num_kv_heads)
        if self._complete:
            self.counters.pages_hit += int(count.sum())
            return
        everything = np.broadcast_to(np.arange(count.max()), (len(count), int(count.max())))
        self._recall(everything, count, None)
        self._complete = True

    def ratings(self, step: Step) -> Tensor:
        """What selects for a step: all selectable pages [rows, pages], the best the highest."""
        max_selectable = int(np.maximum(self.sealed - self.config.num_sink_pages, 0).max())
        if max_selectable == 0:
            return torch.empty((self.geometry.num_rows, 0), device=self.geometry.device)
        return self._ordering(step, max_selectable)

    def log_missed(self, log: MissedLog) -> None:
        """Note what steps miss in this log from now on; it says which of them are audited."""
        self._missed = log

    def _ordering(self, step: Step, max_selectable: int) -> Tensor:
        """What pages are chosen by: ratings [rows, pages], or shares of attention."""
        group = step.query.shape[1] // self.geometry.num_kv_heads
        if not (self.config.orders_by_share(group) and self._ratings.are_mass):
            return self._rate(step, max_selectable)
        shares = self._shares(step, max_selectable)
        if self.lengths.uniform or self.config.target_missed_mass is not None:
            return shares  # to meet a target they are added up
        return self._ratings.rank_last(shares, self.sealed)

    def _rate(self, step: Step, max_selectable: int) -> Tensor:
        """Rate the first `max_selectable` pages of every row, sinks apart, [rows, pages]."""
        return self._ratings.rate(step, self.sealed, max_selectable, uniform=self.lengths.uniform)

    def _shares(self, step: Step, max_selectable: int) -> Tensor:
        """Estimate which share of attention each selectable page holds [rows, pages]."""
        sink_pages, recent = self._fixed()
        num_pages, uniform = int(sink_pages.max()), self.lengths.uniform
        held = self._page_table.page_of >= 0
        mask = self._view_mask(step, held, num_pages, alike=uniform)
        mass = log_mass(step, self._parts(num_pages, int(recent.max())), mask)
        fixed = mass.reshape(self.geometry.num_rows, -1)
        return self._ratings.shares(step, self.sealed, max_selectable, fixed, uniform=uniform)

    def _fixed(self) -> tuple[Ids, Ids]:
        """Sink pages and window tokens of each sequence."""
        sink_pages = np.minimum(self.sealed, self.config.num_sink_pages)
        return sink_pages, self.lengths.of - self.sealed * self.config.page_size

    def _parts(self, num_pages: int, recent: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The first places and the window, unpacked: in one part, or some pages at a time."""
        working_set = self.working_set
        if isinstance(working_set, PackedWorkingSet):
            return working_set.parts(num_pages, recent)
        return iter([working_set.view(num_pages, recent)])

    def _select(
        self, step: Step, selectable: Ids, max_selectable: int
    ) -> tuple[Held | None, Tensor]:
        """Make the best pages resident; returns which places hold them, where places are spare,
        and all ratings."""
        count = np.minimum(self._num_selected, np.repeat(selectable, self.geometry.num_kv_heads))
        rating = self._ordering(step, max_selectable)
        target = self.config.target_missed_mass
        if target is None:
            selected = ranked_pages(rating, int(count.max()))
        else:
            cover = fewest_pages(rating, target, count)
            selected, count = cover.pages, cover.num_taken
            assert self._missed is not None
            self._missed.note(cover.missed, cover.is_capped)
        self._recall(selected, count, rating if self._spare else None)
        return self._chosen_places(selected, count) if self._spare else None, rating

    def _recall(self, selected: Ids, count: Ids | None, rating: Tensor | None) -> None:
        """Bring what is selected and not resident into the working set.

        selected: selectable pages [rows, max_selected], of which row r wants the first `count[r]`
        (None is all). rating [rows, pages] decides who stays where places are spare.
        """
        num_sink_pages = self.config.num_sink_pages
        keep = None
        if rating is not None:
            resident = np.maximum(self._page_table.page_of - num_sink_pages, 0)
            keep = np.take_along_axis(rating.float().cpu().numpy(), resident, axis=1)
        moves = self._page_table.fetch(
            selected + num_sink_pages, int(self.sealed.max()), count, keep
        )
        num_wanted = selected.size if count is None else int(count.sum())
        num_recalled = len(moves.pages)
        alike = self._plain and count is None
        if alike and self._may_reload and num_recalled > RELOAD_SHARE * num_wanted:
            self._reload()
        elif num_recalled:
            self._copy_in(moves.rows, moves.places, moves.pages)
        self.counters.pages_hit += num_wanted - num_recalled
        self.counters.pages_recalled += num_recalled
        self.counters.pages_evicted += moves.num_evicted

    def _copy_in(self, rows: Ids, places: Ids, pages: Ids) -> None:
        """Copy pages from the host tier into places."""
        device, num_sink_pages = self.geometry.device, self.config.num_sink_pages
        working_set = self.working_set
        for part in self._store.read(rows, pages):
            row = torch.from_numpy(rows[part.which]).to(device)
            place = torch.from_numpy(places[part.which] + num_sink_pages).to(device)
            packed = part.packed.to(device)
            if isinstance(working_set, PackedWorkingSet):
                working_set.write_pages(row, place, packed)
            else:
                working_set.write_pages(row, place, *part.packer.unpack(packed))
            self.counters.bytes_recalled += part.nbytes

    def _reload(self) -> None:
        """Copy all resident pages anew, in one pass straight into the working set."""
        assert isinstance(self.working_set, WorkingSet)
        rows = np.arange(self.geometry.num_rows)[:, None]
        pieces = self._store.locate(rows, self._page_table.page_of)
        source = self._store.pieces().view(self.geometry.dtype)
        num_sink_pages = self.config.num_sink_pages
        self.working_set.load_places(num_sink_pages, source, torch.from_numpy(pieces))
        self.counters.bytes_recalled += pieces.size * self._packer.layout.nbytes

    def _chosen_places(self, selected: Ids, count: Ids) -> Held:
        """Which places [rows, places] hold selected pages."""
        wanted = np.zeros((self.geometry.num_rows, int(self.sealed.max()) + 1), dtype=np.bool_)
        valid = np.arange(selected.shape[1]) < count[:, None]
        pages = np.where(valid, selected + self.config.num_sink_pages, -1)
        np.put_along_axis(wanted, pages, True, axis=1)
        wanted[:, -1] = False
        chosen: Held = wanted[np.arange(len(wanted))[:, None], self._page_table.page_of]
        return chosen

    def _leave_out(self, step: Step, held: Held, rating: Tensor | None) -> PseudoTokens | None:
        """Audit a step that attends the places of `held`, if it is one to be audited.

        Returns what stands for the pages that no such place holds; None where nothing does.
        """
        if self._summaries is None and not self._is_audit:
            return None
        num_sink_pages = self.config.num_sink_pages
        selectable = np.repeat(self.sealed - num_sink_pages, self.geometry.num_kv_heads)
        left_out = pages_left_out(self._page_table.page_of, held, selectable, num_sink_pages)
        if self._is_audit:
            self._audit(step, left_out)
        return None if self._summaries is None else self._summaries.estimate(step, left_out, rating)

    def _audit(self, step: Step, left_out: Held) -> None:
        """Note what a step really misses, and what the index makes of it."""
        assert self._missed is not None
        nothing = np.zeros(self.geometry.num_rows)
        if not left_out.any():
            self._missed.audit(nothing, nothing if self._ratings.are_mass else None)
            return
        estimate = None
        if self._ratings.are_mass:
            share = self._shares(step, left_out.shape[1]).double().cpu().numpy()
            estimate = np.where(left_out, share, 0).sum(axis=1)
        truth = true_missed_mass(step, self.blocks(), left_out, self.config, self.geometry)
        self._missed.audit(truth, estimate)

    def _view_mask(self, step: Step, held: Held, num_pages: int, *, alike: bool) -> Tensor | None:
        """The mask of the first places and the window; alike: all rows attend all of them."""
        sink_pages, recent = self._fixed()
        mask = None
        if not alike:
            mask = view_mask(self.config, self.geometry, held, sink_pages, recent, num_pages)
        if step.bias is None:
            return mask
        page_of = self._page_table.page_of
        tokens = view_tokens(self.config, self.geometry, page_of, self.sealed, recent, num_pages)
        bias = step.bias(tokens)[:, :, :, 0]
        return bias if mask is None else mask + bias

    def _attend(self, step: Step, chosen: Held | None, rating: Tensor | None) -> Tensor:
        sink_pages, recent = self._fixed()
        held = self._page_table.page_of >= 0 if chosen is None else chosen
        estimated = self._leave_out(step, held, rating)
        per_row = held.sum(axis=1)
        self._count_attended(per_row, sink_pages, recent)
        # Places fill from the first on, so the last held one bounds the view.
        widest = int(per_row.max(initial=0))
        if chosen is not None:
            widest = int((held * np.arange(1, self._num_places + 1)).max(initial=0))
        num_pages = int(sink_pages.max()) + widest
        alike = self.lengths.uniform and chosen is None and int(per_row.min()) == widest
        mask = self._view_mask(step, held, num_pages, alike=alike)
        output = self._attend_places(step, num_pages, int(recent.max()), mask, held, estimated)
        return self.lengths.clear_empty(output)

    def _attend_places(
        self,
        step: Step,
        num_pages: int,
        recent: int,
        mask: Tensor | None,
        held: Held | None,
        estimated: PseudoTokens | None = None,
    ) -> Tensor:
        """Attend the first places and the window, and what stands for pages that are left out.

        held [rows, places]: which places hold selected pages.
        """
        if isinstance(self.working_set, PackedWorkingSet):
            parts = self._parts(num_pages, recent)
            if estimated is not None:
                num_tokens = num_pages * self.config.page_size + recent
                parts, mask = estimated.after_parts(parts, mask, num_tokens)
            return attend_parts(step, parts, self.geometry.num_kv_heads, mask)
        key, value = self.working_set.view(num_pages, recent)
        if estimated is not None:
            key, value, mask = estimated.after(key, value, mask)
        if self._importance is not None and num_pages > self.config.num_sink_pages:
            assert held is not None
            page_size = self.config.page_size
            mass = page_mass(step, key, value, mask, num_pages * page_size, page_size)
            self._observe(self._importance, mass, held)
        return attend_view(step, key, value, mask)

    def _observe(self, importance: Importance, mass: Tensor, held: Held) -> None:
        """Note what the selected pages received: mass [batch, kv_heads, pages of the view]."""
        # Places run right to left.
        received = mass.flatten(0, 1).flip(1)[:, self.config.num_sink_pages :].cpu().numpy()
        places = slice(0, received.shape[1])
        pages = np.where(held, self._page_table.page_of, -1)[:, places]
        importance.observe(pages, received)

    def _count_attended(self, per_row: Ids, sink_pages: Ids, recent: Ids) -> None:
        pages = int(per_row.sum()) / self.geometry.num_kv_heads + int(sink_pages.sum())
        self.counters.attended_tokens = round(pages * self.config.page_size) + int(recent.sum())

    # -- several new tokens: everything, streamed -------------------------------------------------

    def _read(self, sequence: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        device = self.geometry.device
        key, value, moved = self._store.read_run(sequence, first, last, device)
        self.counters.bytes_streamed += moved
        return key, value

    # -- changes of shape -------------------------------------------------------------------------

    def _unseal(self, sequence: int, first: int, last: int) -> None:
        rows = self.rows_of(slice(sequence, sequence + 1))
        self._store.forget(sequence, first, last)
        if self._importance is not None:
            self._importance.unseal(rows, first)
        num_left = max(0, first - self.config.num_sink_pages)
        self._page_table.drop_from(rows, first, num_left)
        self._complete = False

    def keep_sequences(self, index: Ids, device_tier: DeviceTier, num_selected: Ids) -> None:
        """Make sequence i what sequence `index[i]` was; pages are shared, not copied.

        device_tier: a new one, for as many sequences as `index` has; num_selected: pages that a
        step may select there, per KV head.
        """
        self._store.keep_sequences(index)
        self.sealed = self.sealed[index]
        self.lengths = Lengths(self.lengths.of[index])
        heads = self.geometry.num_kv_heads
        rows = (index[:, None] * heads + np.arange(heads)).reshape(-1)
        on_device = torch.from_numpy(index).to(device_tier.geometry.device)
        self._ratings.keep_sequences(on_device, device_tier.geometry)
        if self._summaries is not None:
            self._summaries.keep_sequences(on_device, device_tier.geometry)
        if self._importance is not None:
            self._importance.keep_rows(rows)
        before = self.working_set
        self.device_tier, self.geometry = device_tier, device_tier.geometry
        self._allot(num_selected)
        if before.num_slots == self.working_set.num_slots:
            self._page_table.keep_rows(rows)
            copy_sequences(before.planes, self.working_set.planes, on_device)
        else:
            copy_sequences(before.windows, self.working_set.windows, on_device)
            self._start_anew()

    def _start_anew(self) -> None:
        """Fill a working set of another size: sinks now, pages when they are selected."""
        self._page_table = PageTable(self.geometry.num_rows, self._num_places)
        self._complete = False
        num_sink_pages = self.config.num_sink_pages
        held = np.minimum(self.sealed, num_sink_pages).repeat(self.geometry.num_kv_heads)
        rows, pages = np.nonzero(np.arange(num_sink_pages) < held[:, None])
        self._copy_in(rows, pages - num_sink_pages, pages)

    def check(self) -> None:
        """Raise `IntegrityError` if the metadata contradicts itself or the tiers differ."""
        self._page_table.check()
        self._check_sealed(self.sealed)
        self._check_sealed(self._store.counts())
        self._check_residents()

    def _check_residents(self) -> None:
        """Every page on the device, sinks included, must be bit-equal to its backup on the host."""
        sink_pages = np.arange(self.config.num_sink_pages)
        for row, places in enumerate(self._page_table.page_of):
            sequence = row // self.geometry.num_kv_heads
            own_sinks = np.where(sink_pages < self.sealed[sequence], sink_pages, -1)
            for place, page in enumerate(np.concatenate((own_sinks, places)).tolist()):
                if page >= 0 and not self._same(row, place, page):
                    raise IntegrityError(f"page {page} of row {row} differs from its backup")

    def _same(self, row: int, place: int, page: int) -> bool:
        sequence, head = divmod(row, self.geometry.num_kv_heads)
        (backup,) = self._store.read(np.array([row]), np.array([page]))
        working_set = self.working_set
        if isinstance(working_set, PackedWorkingSet):
            slot = working_set.num_slots - 1 - place
            return torch.equal(working_set.slots[sequence, head, slot].cpu(), backup.packed[0])
        unpacked = backup.packer.unpack(backup.packed)
        resident = working_set.view(place + 1, 0)
        return all(
            torch.equal(
                mine[sequence, head, : self.config.page_size].cpu().view(torch.uint8),
                other[0].view(torch.uint8),
            )
            for mine, other in zip(resident, unpacked, strict=True)
        )

    def stats(self) -> CacheStats:
        """Counters and sizes; the device tier and the host tier are counted by the manager."""
        digest_bytes = self._ratings.nbytes
        digest_bytes += 0 if self._summaries is None else self._summaries.nbytes
        missed = () if self._missed is None else (tuple(self._missed.heads),)
        return self.counters.stats(int(self.lengths.of.sum())) + CacheStats(
            digest_bytes=digest_bytes, missed_by_layer=missed
        )
