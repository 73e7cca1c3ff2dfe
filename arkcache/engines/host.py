"""The engine that decides on the host: plain torch on any device, counting in numpy.

The decode step is `HostEngine.attend`: rate all pages by their digests, select the best, recall
those that are missing into the places of pages that are not selected, attend.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from arkcache.engines.engine import Blocks, Engine, PagedParts, State
from arkcache.engines.missed import MissedLog, log_mass, true_missed_mass
from arkcache.engines.places import Places
from arkcache.engines.rating import PageRatings
from arkcache.engines.retained import Retained
from arkcache.engines.step import Step, attend_parts, attend_view, page_mass
from arkcache.engines.summaries import PageSummaries, PseudoTokens
from arkcache.engines.traced import attended_mass, note
from arkcache.engines.views import Held, pages_left_out, view_mask, view_tokens
from arkcache.pages.bookkeeping import Ids, is_in_order
from arkcache.pages.importance import Importance
from arkcache.pages.index import PageIndex
from arkcache.pages.policy import fewest_pages, ranked_pages, top_pages
from arkcache.pages.windows import ShiftedWindow
from arkcache.stats import CacheStats
from arkcache.tiering.device import DeviceTier, PackedWorkingSet
from arkcache.tracing.recorder import ATTEND, RECALL, SCORE, SELECT, LayerTrace


class HostEngine(Engine):
    """Selects pages on the host, and attends the working set.

    Args:
        parts: what it shares with the layer.
        num_selected: pages that a step selects, per KV head.
        latent: rate pages by key and value side by side (multi-head latent attention).

    Attributes:
        places: of the working set, and which pages they hold.
    """

    def __init__(self, parts: PagedParts, num_selected: Ids, *, latent: bool = False) -> None:
        super().__init__(parts)
        config, geometry = parts.config, parts.geometry
        self.places = Places(parts, num_selected)
        self._ratings = PageRatings(config, geometry, latent, parts.page_tokens)
        self._summaries = None
        if config.estimates:
            self._summaries = PageSummaries(config, geometry, parts.page_tokens)
        two_formats = len(parts.store.packers) > 1
        self._importance = Importance(geometry.num_rows) if two_formats else None
        self._may_demote = False
        keeper = config.keeper if config.retention is not None else None
        self._retained = None if keeper is None else Retained(keeper, parts, self.places)
        self._missed: MissedLog | None = None
        self._is_audit = False
        self._chosen: Held | None = None
        if config.target_missed_mass is not None or config.audit_every is not None:
            num_layers = len(parts.device_tier.working_sets)
            every, heads = config.audit_every, geometry.num_kv_heads
            self._missed = MissedLog(heads, every, parts.number, num_layers)

    @property
    def window(self) -> ShiftedWindow:
        """See `Engine`."""
        return ShiftedWindow(*self.parts.working_set.windows)

    # -- seal -------------------------------------------------------------------------------------

    def seal(self, seqs: slice, first: int, key: Tensor, value: Tensor) -> None:
        """See `Engine`."""
        parts = self.parts
        self.digest(seqs, first, key, value)
        packed = parts.packer.pack(key, value)
        begun = parts.counters.copy_begins()
        parts.store.append(seqs, first, packed.cpu())
        parts.counters.store_ns += parts.counters.since(begun)
        parts.counters.bytes_backed_up += packed.numel()
        if self._importance is not None:
            self._importance.seal(parts.geometry.rows_of(seqs), first, first + key.shape[2])
        self.places.fill(seqs, first, packed)
        self._may_demote = True

    def demote(self) -> None:
        """See `Engine`; done on the device as well, when a page was sealed since the last time."""
        config, importance = self.parts.config, self._importance
        num_sink_pages, sealed = config.num_sink_pages, int(self.parts.tokens.sealed.max())
        if importance is None or not self._may_demote or sealed <= num_sink_pages:
            return
        self._may_demote = False
        fine = self.parts.store.is_fine(sealed)[:, num_sink_pages:]
        demoted = importance.demotable(
            num_sink_pages, fine, config.demote_below, config.demote_after
        )
        rows, pages = np.nonzero(demoted)
        self._demote(rows, pages, sealed - num_sink_pages)

    def _demote(self, rows: Ids, pages: Ids, num_selectable: int) -> None:
        """Keep these selectable pages in the coarse format from now on."""
        places, num_sink_pages = self.places, self.parts.config.num_sink_pages
        if not len(rows):
            return
        demoted = np.zeros((self.parts.geometry.num_rows, num_selectable), dtype=np.bool_)
        demoted[rows, pages] = self.parts.store.demote(rows, pages + num_sink_pages)
        self.parts.counters.pages_demoted += int(np.count_nonzero(demoted))
        self.parts.store.host.compact()
        numbers = np.maximum(places.page_of - num_sink_pages, 0)
        stale = places.held & np.take_along_axis(demoted, numbers, axis=1)
        rows, stale_places = np.nonzero(stale)
        places.copy_in(rows, stale_places, places.page_of[rows, stale_places])

    # -- the decode step: score, select, recall, attend -------------------------------------------

    def attend(self, step: Step, everything: Callable[[], Blocks]) -> Tensor:
        """See `Engine`."""
        if self._trace is not None:
            return self._attend_traced(self._trace, step, everything)
        return self._attend(step, everything)

    def _attend(self, step: Step, everything: Callable[[], Blocks]) -> Tensor:
        target, places = self.parts.config.target_missed_mass, self.places
        if self._missed is not None:
            self._is_audit = self._missed.begin_step()
        if self._retained is not None:
            return self._attend_kept(self._retained, step, everything)
        if places.plain and self.parts.tokens.uniform and step.bias is None:
            return self._attend_alike(step, everything)
        selectable = np.maximum(self.parts.tokens.sealed - self.parts.config.num_sink_pages, 0)
        max_selectable = int(selectable.max())
        chosen, rating = None, None
        if max_selectable > (places.least_selected if target is None else 0):
            chosen, rating = self._select(step, selectable, max_selectable)
        else:
            places.complete(selectable)
            self._lap(RECALL)
            if self._missed is not None and target is not None:
                rows = self.parts.geometry.num_rows
                self._missed.note(np.zeros(rows), np.zeros(rows, dtype=np.bool_))
        return self._attend_rows(step, chosen, rating, everything)

    def _attend_alike(self, step: Step, everything: Callable[[], Blocks]) -> Tensor:
        """`attend` where all rows have as much to select from and to attend: the usual case."""
        tokens, config, geometry = self.parts.tokens, self.parts.config, self.parts.geometry
        sealed, num_sink_pages = int(tokens.sealed[0]), config.num_sink_pages
        selectable, num_selected = sealed - num_sink_pages, self.places.num_places
        rating, summaries = None, self._summaries
        if selectable > num_selected and (num_selected > 0 or summaries is not None):
            rating = self._score(step, selectable)
            self._lap(SCORE)
        if rating is not None and num_selected > 0:
            selected = top_pages(rating, num_selected)
            self._lap(SELECT)
            self.places.recall(selected, None, None)
        elif 0 < selectable <= num_selected:
            self.places.complete(np.full(geometry.batch, selectable))
        self._lap(RECALL)
        held, estimated, self._chosen = None, None, None
        if self._importance is not None or summaries is not None or self._is_audit:
            held = self.places.held
            estimated = self._leave_out(step, held, rating, everything)
        num_pages = min(sealed, num_sink_pages + num_selected)
        recent = int(tokens.lengths[0]) - sealed * config.page_size
        attended = num_pages * config.page_size + recent
        self.parts.counters.attended_tokens = attended * geometry.batch
        return self._attend_places(step, num_pages, recent, None, held, estimated)

    def _attend_kept(
        self, retained: Retained, step: Step, everything: Callable[[], Blocks]
    ) -> Tensor:
        """`attend` where pages may be lost: those that are kept are chosen from."""
        sealed, first = int(self.parts.tokens.sealed.max()), self.parts.config.num_sink_pages
        rows, pages = retained.settle(everything)
        self._demote(rows, pages - first, sealed - first)
        step, places = retained.hide(step), self.places
        if sealed <= first:
            return self._attend_rows(step, None, None, everything)
        kept = retained.kept(sealed - first)
        num_kept = kept.sum(axis=1)
        rating = torch.from_numpy(kept.astype(np.float32))
        if (num_kept > places.num_selected).any():
            hidden = torch.from_numpy(~kept).to(self.parts.geometry.device)
            rating = self._score(step, sealed - first).masked_fill(hidden, float("-inf"))
        self._lap(SCORE)
        count = np.minimum(places.num_selected, num_kept)
        selected = ranked_pages(rating, int(count.max()))
        self._lap(SELECT)
        places.recall(selected, count, rating)
        self._lap(RECALL)
        return self._attend_rows(step, places.chosen(selected, count), rating, everything)

    def _score(self, step: Step, max_selectable: int) -> Tensor:
        """What pages are chosen by, sinks apart: ratings [rows, pages], or shares of attention."""
        config, tokens = self.parts.config, self.parts.tokens
        group = step.query.shape[1] // self.parts.geometry.num_kv_heads
        if not (config.orders_by_share(group) and self._ratings.are_mass):
            return self._ratings.rate(step, tokens.sealed, max_selectable, uniform=tokens.uniform)
        shares = self._shares(step, max_selectable)
        if tokens.uniform or config.target_missed_mass is not None:
            return shares  # to meet a target they are added up
        return self._ratings.rank_last(shares, tokens.sealed)

    def _shares(self, step: Step, max_selectable: int) -> Tensor:
        """Estimate which share of attention each selectable page holds [rows, pages]."""
        tokens = self.parts.tokens
        sink_pages, recent = self._fixed()
        num_pages = int(sink_pages.max())
        mask = self._view_mask(step, self.places.held, num_pages, alike=tokens.uniform)
        mass = log_mass(step, self.places.tokens(num_pages, int(recent.max())), mask)
        fixed = mass.reshape(self.parts.geometry.num_rows, -1)
        return self._ratings.shares(
            step, tokens.sealed, max_selectable, fixed, uniform=tokens.uniform
        )

    def _fixed(self) -> tuple[Ids, Ids]:
        """Sink pages and window tokens of each sequence."""
        tokens, config = self.parts.tokens, self.parts.config
        sink_pages = np.minimum(tokens.sealed, config.num_sink_pages)
        return sink_pages, tokens.lengths - tokens.sealed * config.page_size

    def _select(
        self, step: Step, selectable: Ids, max_selectable: int
    ) -> tuple[Held | None, Tensor]:
        """Make the best pages resident; returns which places hold them, where places are spare,
        and all ratings."""
        places, heads = self.places, self.parts.geometry.num_kv_heads
        count = np.minimum(places.num_selected, np.repeat(selectable, heads))
        rating = self._score(step, max_selectable)
        self._lap(SCORE)
        target = self.parts.config.target_missed_mass
        if target is None:
            selected = ranked_pages(rating, int(count.max()))
        else:
            cover = fewest_pages(rating, target, count)
            selected, count = cover.pages, cover.num_taken
            assert self._missed is not None
            self._missed.note(cover.missed, cover.is_capped)
        self._lap(SELECT)
        places.recall(selected, count, rating if places.spare else None)
        self._lap(RECALL)
        return places.chosen(selected, count) if places.spare else None, rating

    def _attend_rows(
        self,
        step: Step,
        chosen: Held | None,
        rating: Tensor | None,
        everything: Callable[[], Blocks],
    ) -> Tensor:
        """Attend what each row has selected; chosen: `None` is all that its places hold."""
        tokens = self.parts.tokens
        sink_pages, recent = self._fixed()
        held, self._chosen = self.places.held if chosen is None else chosen, chosen
        estimated = self._leave_out(step, held, rating, everything)
        per_row = held.sum(axis=1)
        self._count_attended(per_row, sink_pages, recent)
        # Places fill from the first on, so the last held one bounds the view.
        widest = int(per_row.max(initial=0))
        if chosen is not None:
            widest = int((held * np.arange(1, held.shape[1] + 1)).max(initial=0))
        num_pages = int(sink_pages.max()) + widest
        alike = tokens.uniform and chosen is None and int(per_row.min()) == widest
        mask = self._view_mask(step, held, num_pages, alike=alike)
        output = self._attend_places(step, num_pages, int(recent.max()), mask, held, estimated)
        return tokens.clear_empty(output)

    def _count_attended(self, per_row: Ids, sink_pages: Ids, recent: Ids) -> None:
        pages = int(per_row.sum()) / self.parts.geometry.num_kv_heads + int(sink_pages.sum())
        attended = round(pages * self.parts.config.page_size) + int(recent.sum())
        self.parts.counters.attended_tokens = attended

    def _view_mask(self, step: Step, held: Held, num_pages: int, *, alike: bool) -> Tensor | None:
        """The mask of the first slots and the window; alike: all rows attend all of them."""
        config, geometry = self.parts.config, self.parts.geometry
        sink_pages, recent = self._fixed()
        mask = None
        if not alike:
            mask = view_mask(config, geometry, held, sink_pages, recent, num_pages)
        if step.bias is None:
            return mask
        page_of, sealed = self.places.page_of, self.parts.tokens.sealed
        listed = self.parts.page_tokens
        tokens = view_tokens(config, geometry, page_of, sealed, recent, num_pages, listed)
        bias = step.bias(tokens)[:, :, :, 0]
        return bias if mask is None else mask + bias

    def _attend_places(
        self,
        step: Step,
        num_pages: int,
        recent: int,
        mask: Tensor | None,
        held: Held | None,
        estimated: PseudoTokens | None = None,
    ) -> Tensor:
        """Attend the first slots and the window, and what stands for pages that are left out.

        held [rows, places]: which places hold selected pages.
        """
        config, working_set = self.parts.config, self.parts.working_set
        if isinstance(working_set, PackedWorkingSet):
            parts = working_set.parts(num_pages, recent)
            if estimated is not None:
                num_tokens = num_pages * config.page_size + recent
                parts, mask = estimated.after_parts(parts, mask, num_tokens)
            return attend_parts(step, parts, self.parts.geometry.num_kv_heads, mask)
        key, value = working_set.view(num_pages, recent)
        if estimated is not None:
            key, value, mask = estimated.after(key, value, mask)
        if self._retained is not None and self._retained.observes:
            self._retained.observe(step, key, value, mask, num_pages)
        if self._importance is not None and num_pages > config.num_sink_pages:
            assert held is not None
            num_tokens = num_pages * config.page_size
            mass = page_mass(step, key, value, mask, num_tokens, config.page_size)
            self._observe(self._importance, mass, held)
        return attend_view(step, key, value, mask)

    def _observe(self, importance: Importance, mass: Tensor, held: Held) -> None:
        """Note what the selected pages received: mass [batch, kv_heads, pages of the view]."""
        # Places run right to left.
        received = mass.flatten(0, 1).flip(1)[:, self.parts.config.num_sink_pages :].cpu().numpy()
        places = slice(0, received.shape[1])
        pages = np.where(held, self.places.page_of, -1)[:, places]
        importance.observe(pages, received)

    # -- a traced step ----------------------------------------------------------------------------

    def _attend_traced(
        self, trace: LayerTrace, step: Step, everything: Callable[[], Blocks]
    ) -> Tensor:
        """Attend, and tell what that was; audits count to attending."""
        places, counters = self.places, self.parts.counters
        before, earlier = places.page_of.astype(np.int32), counters.moved
        trace.begin()
        output = self._attend(step, everything)
        self._lap(ATTEND)
        trace.stop()
        held = places.held if self._chosen is None else self._chosen
        pages, mass = np.where(held, places.page_of, -1).astype(np.int32), None
        if trace.wants_mass:
            with trace.apart():
                mass = attended_mass(self.parts, self.window, step, pages)
        hits, recalled, evicted, moved = np.subtract(counters.moved, earlier).tolist()
        own = (hits, recalled, evicted, moved)
        note(trace, self.parts, counters.attended_tokens, own, (pages, before, mass))
        return output

    def _lap(self, phase: int) -> None:
        if self._trace is not None:
            self._trace.lap(phase)

    # -- what is left out -------------------------------------------------------------------------

    def _leave_out(
        self, step: Step, held: Held, rating: Tensor | None, everything: Callable[[], Blocks]
    ) -> PseudoTokens | None:
        """Audit a step that attends the places of `held`, if it is one to be audited.

        Returns what stands for the pages that no such place holds; None where nothing does.
        """
        if self._summaries is None and not self._is_audit:
            return None
        num_sink_pages, heads = self.parts.config.num_sink_pages, self.parts.geometry.num_kv_heads
        selectable = np.repeat(self.parts.tokens.sealed - num_sink_pages, heads)
        left_out = pages_left_out(self.places.page_of, held, selectable, num_sink_pages)
        if self._is_audit:
            self._audit(step, left_out, everything)
        return None if self._summaries is None else self._summaries.estimate(step, left_out, rating)

    def _audit(self, step: Step, left_out: Held, everything: Callable[[], Blocks]) -> None:
        """Note what a step really misses, and what the index makes of it."""
        assert self._missed is not None
        geometry, are_mass = self.parts.geometry, self._ratings.are_mass
        nothing = np.zeros(geometry.num_rows)
        if not left_out.any():
            self._missed.audit(nothing, nothing if are_mass else None)
            return
        estimate = None
        if are_mass:
            share = self._shares(step, left_out.shape[1]).double().cpu().numpy()
            estimate = np.where(left_out, share, 0).sum(axis=1)
        truth = true_missed_mass(
            step, everything(), left_out, self.parts.config, geometry, self._pages_of
        )
        self._missed.audit(truth, estimate)

    def _pages_of(self, numbers: Ids) -> Ids:
        """The pages of token numbers [batch, tokens]: [batch, kv_heads or 1, tokens]."""
        listed = self.parts.page_tokens
        if listed is None:
            return numbers[:, None] // self.parts.config.page_size
        return listed.pages_of(numbers, self.parts.tokens.sealed)

    # -- several new tokens, and changes of shape -------------------------------------------------

    def read(self, sequence: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """See `Engine`."""
        return self.parts.read(sequence, first, last)

    def prompt_step(self, step: Step, visible: Ids, everything: Callable[[], Blocks]) -> Step:
        """See `Engine`."""
        if self._retained is None:
            return step
        self._retained.ask(step, visible, everything)
        return self._retained.hide(step)

    def crop(self, lengths: Ids) -> None:
        """See `Engine`."""
        if self._retained is not None:
            self._retained.crop(lengths)

    def unseal(self, sequence: int, first: int) -> None:
        """See `Engine`."""
        rows = self.parts.geometry.rows_of(slice(sequence, sequence + 1))
        if self._importance is not None:
            self._importance.unseal(rows, first)
        self.places.drop_from(rows, first)

    def keep_sequences(self, index: Ids, device_tier: DeviceTier, num_selected: Ids) -> None:
        """See `Engine`."""
        if not is_in_order(index, self.parts.geometry.batch):
            on_device = torch.from_numpy(index).to(device_tier.geometry.device)
            self._ratings.keep_sequences(on_device, device_tier.geometry)
            if self._summaries is not None:
                self._summaries.keep_sequences(on_device, device_tier.geometry)
            if self._importance is not None:
                self._importance.keep_rows(self.parts.rows_from(index))
            if self._retained is not None:
                self._retained.keep_sequences(index)
        self.places.keep_sequences(index, device_tier, num_selected)

    # -- what is written down, and read again -----------------------------------------------------

    @property
    def digest_kind(self) -> str:
        """See `Engine`."""
        return f"torch {self.parts.geometry.device.type} {self._ratings.name}"

    def digest(self, seqs: slice, first: int, key: Tensor, value: Tensor) -> None:
        """See `Engine`."""
        self._ratings.write(seqs, first, key, value)
        if self._summaries is not None:
            self._summaries.write(seqs, first, key, value)

    def state(self) -> State:
        """See `Engine`."""
        num_pages = int(self.parts.tokens.sealed.max())
        state = {"resident": torch.from_numpy(self.places.page_of)}
        if num_pages:
            state["digests"] = self._ratings.first(num_pages)
        if self._summaries is not None:
            state |= self._summaries.state(num_pages)
        if self._importance is not None:
            importance = self._importance.state(num_pages)
            state |= {name: torch.from_numpy(array) for name, array in importance.items()}
        return state

    def restore(self, state: State) -> None:
        """See `Engine`."""
        if "digests" in state:
            self._ratings.restore(state["digests"])
            if self._summaries is not None:
                self._summaries.restore(state)
        else:
            self.digest_anew()
        if self._importance is not None:
            self._importance.restore(
                {name: state[name].numpy() for name in state if name.startswith("importance")}
            )
        resident = state.get("resident")
        self.places.restore(None if resident is None else resident.long().numpy())

    # -- to look at -------------------------------------------------------------------------------

    def check(self) -> None:
        """See `Engine`."""
        self.places.check()

    def stats(self) -> CacheStats:
        """See `Engine`."""
        digest_bytes = self._ratings.nbytes
        digest_bytes += 0 if self._summaries is None else self._summaries.nbytes
        missed = () if self._missed is None else (tuple(self._missed.heads),)
        return self.parts.counters.stats(self.parts.tokens) + CacheStats(
            digest_bytes=digest_bytes, missed_by_layer=missed
        )

    def rate_with(self, make: Callable[[], PageIndex]) -> None:
        """See `Engine`; what is sealed is digested anew."""
        self._ratings.use(make())
        for sequence, count in enumerate(self.parts.tokens.sealed.tolist()):
            if count:
                shape = (count, self.parts.config.page_size)
                pages = (plane[None].unflatten(2, shape) for plane in self.read(sequence, 0, count))
                self._ratings.write(slice(sequence, sequence + 1), 0, *pages)

    def ratings(self, step: Step) -> Tensor:
        """See `Layer.ratings`."""
        parts = self.parts
        max_selectable = int(np.maximum(parts.tokens.sealed - parts.config.num_sink_pages, 0).max())
        if max_selectable == 0:
            return torch.empty((parts.geometry.num_rows, 0), device=parts.geometry.device)
        step = step if self._retained is None else self._retained.hide(step)
        return self._score(step, max_selectable)

    def log_missed(self, log: MissedLog) -> None:
        """See `Engine`; the log says which steps are audited."""
        self._missed = log
