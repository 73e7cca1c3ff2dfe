"""The engine of a CPU: pages are scored, selected and attended where they lie, by compiled kernels.

On a CPU both tiers are the same memory, so nothing is recalled: what a step reads of a page comes
from the host tier itself. The decode step is `run` in `kernels/numba_step.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import is_
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arkcache.config import MASS_INDEXES
from arkcache.engines.engine import Blocks, Engine, PagedParts, State
from arkcache.engines.native_digests import NativeDigests
from arkcache.engines.native_trace import StepNote
from arkcache.engines.step import Step
from arkcache.engines.traced import attended_mass
from arkcache.engines.views import hidden_pages
from arkcache.errors import IntegrityError
from arkcache.kernels.numba_launch import (
    Counts,
    DecodeStep,
    Digests,
    Lists,
    Query,
    Scratch,
    task_of,
)
from arkcache.kernels.numba_record import (
    ATTEND,
    ATTENDED,
    EVICTED,
    HIT,
    NUM_COUNTERS,
    RECALLED,
    SCORE,
    SELECT,
    TOKEN_ROWS,
)
from arkcache.kernels.numba_select import BY_MEAN, BY_SHARE
from arkcache.pages.bookkeeping import Ids, is_in_order
from arkcache.pages.counts import Counters
from arkcache.pages.windows import ShiftedWindow
from arkcache.stats import CacheStats
from arkcache.tiering.device import DeviceTier, copy_sequences
from arkcache.tracing import recorder
from arkcache.tracing.recorder import LayerTrace

FIRST_PAGES = 64
"""Pages that a row's list has room for at first."""

PHASES = {SCORE: recorder.SCORE, SELECT: recorder.SELECT, ATTEND: recorder.ATTEND}
"""What the parts of a step are called in a trace."""

PARTS = {SCORE: "score", SELECT: "select", ATTEND: "attend"}
"""What they are called elsewhere."""


class NativeEngine(Engine):
    """Attends pages in the host tier.

    Args:
        parts: what it shares with the layer.
        num_selected: pages that a step selects, per KV head.
        scratch: of all layers of the cache.
    """

    def __init__(self, parts: PagedParts, num_selected: Ids, scratch: Scratch) -> None:
        super().__init__(parts)
        task_of(parts.geometry.dtype)  # compiled now rather than in the middle of an answer
        self._scratch = scratch
        self._digests = NativeDigests(parts.config, parts.geometry)
        self._allot(num_selected)
        rows = parts.geometry.num_rows
        width = parts.config.num_sink_pages + FIRST_PAGES
        self._lists = Lists(
            np.zeros((rows, width), np.int64),
            np.zeros(rows, np.int64),
            np.zeros((rows, NUM_COUNTERS), np.int64),
        )
        self._steps: dict[int, DecodeStep] = {}
        self._is_bound = False
        self._seals_itself = self._digests.kind == TOKEN_ROWS and parts.config.format.is_raw
        self._attended_all = True
        config, geometry = parts.config, parts.geometry
        sizes = geometry.num_kv_heads, config.num_sink_pages, config.page_size
        self._of_trace = (*sizes, parts.packer.layout.nbytes)

    def _allot(self, num_selected: Ids) -> None:
        self._budgets: Ids = np.tile(num_selected, self.parts.geometry.batch).astype(np.int64)

    @property
    def window(self) -> ShiftedWindow:
        """See `Engine`."""
        return ShiftedWindow(*self.parts.working_set.windows)

    def __getstate__(self) -> dict[str, Any]:
        """Without what points into memory."""
        return vars(self) | {"_steps": {}, "_is_bound": False}

    # -- seal -------------------------------------------------------------------------------------

    def seal(self, seqs: slice, first: int, key: Tensor, value: Tensor) -> None:
        """See `Engine`."""
        parts = self.parts
        self.digest(seqs, first, key, value)
        packed = parts.packer.pack(key, value)
        begun = parts.counters.copy_begins()
        parts.store.append(seqs, first, packed)
        parts.counters.store_ns += parts.counters.since(begun)
        parts.counters.bytes_backed_up += packed.numel()
        self._make_room(first + key.shape[2])
        self._is_bound = False

    def _make_room(self, sealed: int) -> None:
        """Have lists for as many pages as a row may attend of so many."""
        sinks, pages = self.parts.config.num_sink_pages, self._lists.pages
        needed = min(sealed, sinks + int(self._budgets.max()))
        if needed > pages.shape[1]:
            more = max(needed, 2 * pages.shape[1]) - pages.shape[1]
            self._lists = self._lists._replace(pages=np.pad(pages, ((0, 0), (0, more))))

    def write_next(self, key: Tensor, value: Tensor) -> bool:
        """See `Engine`: as soon as a step knows where the windows are."""
        runner = self._bound_step
        if runner is None:
            return False
        runner.write(key, value, self._counts(self._budgets))
        return True

    @property
    def _bound_step(self) -> DecodeStep | None:
        """Any step that knows where everything is."""
        return next(iter(self._steps.values()), None) if self._is_bound else None

    def seal_next(self, key: Tensor, value: Tensor) -> bool:
        """See `Engine`: for what the kernels seal."""
        runner = self._bound_step
        if runner is None or not self._seals_itself:
            return False
        parts, tokens, config = self.parts, self.parts.tokens, self.parts.config
        full = (tokens.sealed + 1) * config.page_size + config.num_recent_tokens
        seqs = np.flatnonzero(tokens.lengths + 1 >= full)
        if not len(seqs):  # `until_seal` may be less than it could
            return False
        pages = tokens.sealed[seqs]
        before = parts.store.handles, self._digests.data, self._lists
        handles = parts.store.host.allocate(len(seqs))
        parts.store.enter(seqs, pages, handles)
        self._digests.reserve(int(pages.max()) + 1)
        self._make_room(int(pages.max()) + 1)
        after = parts.store.handles, self._digests.data, self._lists
        if not all(map(is_, before, after)):
            self._bind(next(iter(self._steps)))
        runner.write(key, value, self._counts(self._budgets))
        begun = parts.counters.copy_begins()
        runner.seal(parts.store.host.pieces())
        parts.counters.store_ns += parts.counters.since(begun)
        parts.store.host.written(handles)
        parts.counters.bytes_backed_up += len(seqs) * parts.store.host.piece_bytes[0]
        return True

    # -- the decode step --------------------------------------------------------------------------

    def attend(self, step: Step, everything: Callable[[], Blocks]) -> Tensor:
        """See `Engine`; nothing is audited."""
        if self._trace is not None:
            return self._attend_traced(self._trace, step)
        return self._run(step)

    def _run(self, step: Step, lap: Callable[[int], None] | None = None) -> Tensor:
        """Run a step; lap: told after each part of it, which are then launched one by one."""
        parts, heads = self.parts, self.parts.geometry.num_kv_heads
        group = step.query.shape[1] // heads
        runner = self._steps.get(group)
        if runner is None or not self._is_bound:
            runner = self._bind(group)
        self._attended_all = False
        host, query, counts = (
            parts.store.host,
            self._query(step, group),
            self._counts(self._budgets),
        )
        if host.folder is None:
            return runner.attend(query, host.pieces(), counts, lap)
        if host.wants_ready:
            lap = partial(self._ready_selected, lap)
            self._ready_sinks()
        recalled = self._lists.counters[:, RECALLED]
        before = int(recalled.sum())
        output = runner.attend(query, host.pieces(), counts, lap)
        host.touch((int(recalled.sum()) - before) // heads)
        return output

    def _ready_selected(self, lap: Callable[[int], None] | None, part: int) -> None:
        """Before pages are attended that were selected; lap: is told then."""
        if part == SELECT:
            pages, num_pages, _ = self._lists
            rows, at = np.nonzero(np.arange(pages.shape[1]) < num_pages[:, None])
            self.parts.store.ready(rows, pages[rows, at])
        if lap is not None:
            lap(part)

    def _ready_sinks(self) -> None:
        """Before pages are selected: what sinks hold of attention counts there."""
        parts = self.parts
        for sequence, sealed in enumerate(parts.tokens.sealed.tolist()):
            parts.store.ready_run(sequence, 0, min(sealed, parts.config.num_sink_pages))

    def _attend_traced(self, trace: LayerTrace, step: Step) -> Tensor:
        """Attend, and tell what that was; what is read for the first time counts to attending."""
        parts, (pages, num_pages, counters) = self.parts, self._lists
        before = None if trace.follows else (pages.copy(), num_pages.copy())
        earlier = counters.tolist()  # lists: less work than copies of small arrays
        lap = trace.begin()
        output = self._run(step, None if lap is None else lambda part: lap(PHASES[part]))
        trace.stop()
        noted = StepNote(
            self._of_trace,
            pages.astype(np.int32),
            num_pages.tolist(),
            (earlier, counters.tolist()),
            parts.tokens.lengths.tolist(),
            parts.tokens.sealed.tolist(),
            before,
        )
        if trace.wants_mass:
            with trace.apart():
                noted = noted._replace(
                    mass=attended_mass(parts, self.window, step, noted.told().pages)
                )
        trace.note(noted.told, noted.nbytes)
        return output

    def time_parts(self, step: Step) -> dict[str, float]:
        """See `Engine`."""
        seconds, begun = {}, perf_counter()

        def lap(part: int) -> None:
            nonlocal begun
            now = perf_counter()
            seconds[PARTS[part]], begun = now - begun, now

        self._run(step, lap)
        return seconds

    def _query(self, step: Step, group: int) -> Query:
        parts, bias, hidden = self.parts, None, None
        if step.bias is not None:
            bias = self._bias(step, group)
            if parts.config.index not in MASS_INDEXES:
                count = int(parts.tokens.sealed.max()) - parts.config.num_sink_pages
                mask = hidden_pages(step, parts.config, parts.geometry, max(count, 0))
                assert isinstance(mask, Tensor)
                hidden = mask.to(torch.uint8)
        sinks = None if step.sink_logits is None else step.sink_logits.float()
        return Query(step.query, step.index_query, step.scale, step.softcap, sinks, bias, hidden)

    def _counts(self, budgets: Ids) -> Counts:
        tokens = self.parts.tokens
        return Counts(tokens.lengths, tokens.sealed, budgets, self.parts.store.host.position_of)

    def _bind(self, group: int) -> DecodeStep:
        """The steps of queries of so many heads for each KV head, told where everything is."""
        if group not in self._steps:
            self._steps[group] = self._make_step(group)
        for step in self._steps.values():
            self._bind_to(step, self._lists)
        self._is_bound = True
        return self._steps[group]

    def _bind_to(self, step: DecodeStep, lists: Lists) -> None:
        windows = self.parts.working_set.windows
        digests = Digests(self._digests.data, self._digests.num_pages)
        step.bind(windows, digests, self.parts.store.handles[:, 0], lists)

    def _make_step(self, group: int) -> DecodeStep:
        config, geometry, digests = self.parts.config, self.parts.geometry, self._digests
        layout = self.parts.packer.layout
        by_share = group > 1 and config.group_reduction != "raw-mean"
        return DecodeStep(
            geometry.dtype,
            self._scratch,
            batch=geometry.batch,
            kv_heads=geometry.num_kv_heads,
            group=group,
            lanes=_lanes(group),
            head_dim=geometry.head_dim,
            value_dim=geometry.value_dim,
            page_size=config.page_size,
            num_sink_pages=config.num_sink_pages,
            num_recent_tokens=config.num_recent_tokens,
            key_bits=config.key_bits,
            value_bits=config.value_bits,
            group_size=config.group_size,
            value_offset=layout.key.nbytes,
            page_bytes=layout.nbytes,
            piece_bytes=layout.nbytes * geometry.num_kv_heads,
            index=digests.kind,
            index_bits=config.packed_index_bits,
            features=digests.features,
            reduction=BY_SHARE if by_share else BY_MEAN,
            needs_fixed=int(by_share and config.orders_by_share(group)),
        )

    def _bias(self, step: Step, group: int) -> Tensor:
        """The user's mask by token number, fp32 [rows, lanes, tokens]."""
        geometry = self.parts.geometry
        longest = self.parts.tokens.longest
        tokens = np.broadcast_to(np.arange(longest), (geometry.batch, 1, longest))
        assert step.bias is not None
        bias = step.bias(tokens)[:, :, :, 0].float()
        shape = (geometry.batch, geometry.num_kv_heads, _lanes(group), longest)
        whole = bias.new_zeros(shape)
        whole[:, :, :group] = bias
        return whole.flatten(0, 1)

    # -- several new tokens, and changes of shape -------------------------------------------------

    def begin_blocks(self) -> None:
        """See `Engine`; the layer counts what it attends."""
        self._attended_all = True

    def read(self, sequence: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """See `Engine`."""
        return self.parts.read(sequence, first, last)

    def unseal(self, sequence: int, first: int) -> None:
        """See `Engine`; what the sequence read before is not there to be read again."""
        rows = self.parts.geometry.rows_of(slice(sequence, sequence + 1))
        self._lists.num_pages[rows] = 0
        self._is_bound = False
        self._break_trace()

    def keep_sequences(self, index: Ids, device_tier: DeviceTier, num_selected: Ids) -> None:
        """See `Engine`."""
        parts, before = self.parts, self.parts.working_set.windows
        rows = parts.rows_from(index)
        on_device = torch.from_numpy(index)
        stays = is_in_order(index, parts.geometry.batch)
        parts.device_tier = device_tier
        copy_sequences(before, parts.working_set.windows, on_device)
        if not stays:
            self._digests.keep_sequences(on_device)
        self._allot(num_selected)
        vars(parts.counters).update(vars(self._counted()))
        pages, num_pages, counters = self._lists
        counters = counters[rows]
        counters[:, HIT:] = 0
        self._lists = Lists(pages[rows], num_pages[rows], counters)
        self._make_room(int(parts.tokens.sealed.max()))
        self._steps.clear()
        self._is_bound = False
        self._break_trace()

    def _break_trace(self) -> None:
        """What the latest step read is not what the next one compares with."""
        if self._trace is not None:
            self._trace.follows = False

    @property
    def digest_kind(self) -> str:
        """See `Engine`."""
        return "numba"

    def digest(self, seqs: slice, first: int, key: Tensor, _value: Tensor) -> None:
        """See `Engine`."""
        self._digests.write(seqs, first, key)

    def state(self) -> State:
        """See `Engine`."""
        return {"digests": self._digests.first(int(self.parts.tokens.sealed.max()))}

    def restore(self, state: State) -> None:
        """See `Engine`."""
        if "digests" in state:
            self._digests.restore(state["digests"])
        else:
            self.digest_anew()
        self._digests.reserve(int(self.parts.tokens.sealed.max()))
        self._make_room(int(self.parts.tokens.sealed.max()))
        self._is_bound = False

    def moved(self) -> None:
        """See `Engine`."""
        self._is_bound = False

    def _counted(self) -> Counters:
        """What the layer has counted, and what its rows have.

        Nothing is moved: another thread may ask while a kernel counts.
        """
        counters, layout = replace(self.parts.counters), self.parts.packer.layout
        total = self._lists.counters.sum(axis=0).tolist()
        if not self._attended_all:
            counters.attended_tokens = round(total[ATTENDED] / self.parts.geometry.num_kv_heads)
        counters.pages_hit += total[HIT]
        counters.pages_recalled += total[RECALLED]
        counters.pages_evicted += total[EVICTED]
        counters.bytes_recalled += total[RECALLED] * layout.nbytes
        return counters

    # -- to look at -------------------------------------------------------------------------------

    def check(self) -> None:
        """See `Engine`: pages lie in one tier only."""
        sealed = self.parts.tokens.sealed
        if int(sealed.max(initial=0)) > self._digests.num_pages:
            raise IntegrityError("a layer counts more sealed pages than it has digests of")
        heads = self.parts.geometry.num_kv_heads
        for row, (pages, count) in enumerate(zip(*self._lists[:2], strict=True)):
            read = pages[:count]
            if count and (read[-1] >= sealed[row // heads] or (np.diff(read) <= 0).any()):
                raise IntegrityError(f"row {row} read pages twice, or such as do not exist")

    def ratings(self, step: Step) -> Tensor:
        """See `Layer.ratings`."""
        parts, geometry = self.parts, self.parts.geometry
        selectable = np.maximum(parts.tokens.sealed - parts.config.num_sink_pages, 0)
        count, group = int(selectable.max()), step.query.shape[1] // geometry.num_kv_heads
        if count == 0:
            return torch.empty((geometry.num_rows, 0))
        runner, none = self._make_step(group), np.full_like(self._budgets, -1)
        self._bind_to(runner, Lists(*(array.copy() for array in self._lists)))
        self._ready_sinks()
        pieces = parts.store.host.pieces()
        rating = runner.ratings(self._query(step, group), pieces, self._counts(none), count)
        own = torch.from_numpy(np.repeat(selectable, geometry.num_kv_heads))[:, None]
        return rating.masked_fill(torch.arange(count) >= own, float("-inf"))

    def stats(self) -> CacheStats:
        """See `Engine`."""
        return self._counted().stats(self.parts.tokens) + CacheStats(
            digest_bytes=self._digests.nbytes
        )


def _lanes(group: int) -> int:
    """Query heads of a KV head as the kernels take them: one, or whole fours."""
    return 1 if group == 1 else -(-group // 4) * 4
