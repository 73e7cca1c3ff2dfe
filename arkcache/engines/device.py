"""The engine that decides on the device: score, select, recall and attend by kernels.

`DeviceEngine.launch_attend` is the decode step. What `HostEngine` decides on the host is decided on
the device here, by the same rules: which pages are selected, which of them are missing, whose
places they take. Nothing in it waits for the device, so that a CUDA graph can replay it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from arkcache.engines.capture import Bools, Capturable, CountingRule
from arkcache.engines.device_tokens import DeviceTokens
from arkcache.engines.engine import Blocks, Engine, PagedParts, State
from arkcache.engines.offloaded_pages import OffloadedPages
from arkcache.engines.step import Step
from arkcache.engines.traced import attended_mass, note
from arkcache.engines.views import hidden_pages, page_bias
from arkcache.kernels.arguments import Estimates, PageSet, Scores, Selection
from arkcache.pages.bookkeeping import Ids, sealed_pages
from arkcache.pages.windows import RingWindow
from arkcache.stats import CacheStats, MissedMass
from arkcache.tiering.device import DeviceTier
from arkcache.tiering.streams import Event, Streams, streams_of
from arkcache.tracing.recorder import LayerTrace


class Speculation(NamedTuple):
    """A recall that runs beside the main stream; its tensors live until it is over."""

    over: Event
    scores: Scores
    fixed: Tensor | None
    selections: list[Selection]


class DeviceEngine(Engine, Capturable):
    """Selects pages on the device, and attends the slots where they lie.

    Args:
        parts: what it shares with the layer.
        num_selected: pages that a step selects, per KV head.

    Attributes:
        pages: on the host, and those that are on the device as well.
    """

    def __init__(self, parts: PagedParts, num_selected: Ids) -> None:
        super().__init__(parts)
        self.tokens, self.counters, config = parts.tokens, parts.counters, parts.config
        self._tokens = DeviceTokens(
            parts.geometry, parts.tokens, config.num_recent_tokens, config.page_size
        )
        self.pages = OffloadedPages(parts, num_selected)
        self._nothing = self._make_nothing()
        self._speculation: Speculation | None = None
        self._latest: Selection | None = None

    def _make_nothing(self) -> Selection:
        """No page chosen: what is attended anyhow."""
        geometry = self.parts.geometry
        with torch.inference_mode(False):
            no_list = torch.zeros((geometry.num_rows, 0), dtype=torch.int32, device=geometry.device)
            no_pages = torch.zeros(geometry.num_rows, dtype=torch.int32, device=geometry.device)
        return Selection(no_list, no_list, no_pages, no_list, no_pages)

    @property
    def capturable(self) -> Capturable:
        """See `Engine`."""
        return self

    @property
    def window(self) -> RingWindow:
        """See `Engine`."""
        return RingWindow(*self.parts.working_set.windows)

    # -- one new token: append, and seal ----------------------------------------------------------

    @property
    def rule(self) -> CountingRule:
        """See `Capturable`."""
        config, table = self.parts.config, self.pages.page_table
        selected = table.selected.reshape(self.parts.geometry.batch, -1)
        pieces = self.parts.store.pieces_per_page
        return CountingRule(
            config.num_recent_tokens, config.page_size, config.num_sink_pages, selected, pieces
        )

    @staticmethod
    def make_ready(layers: Sequence[DeviceEngine], seals: Bools, _tokens: int) -> None:
        """See `Capturable`."""
        OffloadedPages.make_ready([layer.pages for layer in layers], seals)

    def launch_append(self, seqs: slice, key: Tensor, value: Tensor, seals: bool) -> None:
        """See `Capturable`."""
        window = self.window
        self._tokens.append(seqs, key, value, window)
        if seals:
            self.pages.launch_seal(seqs, self._tokens, window)

    # -- the decode step: score, select, recall, attend -------------------------------------------

    def attend(self, step: Step, everything: Callable[[], Blocks]) -> Tensor:
        """See `Engine`; the kernels do not audit, so that nothing is compared with everything."""
        if self._trace is not None:
            return self._attend_traced(self._trace, step)
        return self.attend_token(step)

    def _attend_traced(self, trace: LayerTrace, step: Step) -> Tensor:
        """Attend, wait, and tell what that was; phases are not timed."""
        before, earlier = self._page_of(), self.stats()
        trace.begin()
        output = self.attend_token(step)
        assert self._latest is not None
        number = self._latest.num_chosen.cpu().numpy()
        trace.stop()
        chosen, self._latest = self._latest.chosen.cpu().numpy(), None
        is_one = np.arange(chosen.shape[1]) < number[:, None]
        # A speculative recall takes places that the step did not choose.
        held = np.take_along_axis(self._page_of(), np.where(is_one, chosen, 0), axis=1)
        pages, mass = np.where(is_one, held, -1), None
        if trace.wants_mass:
            with trace.apart():
                mass = attended_mass(self.parts, self.window, step, pages)
        now = self.stats()
        own = (
            now.pages_hit - earlier.pages_hit,
            now.pages_recalled - earlier.pages_recalled,
            now.pages_evicted - earlier.pages_evicted,
            now.bytes_recalled - earlier.bytes_recalled,
        )
        told = pages, before, mass
        note(trace, self.parts, now.attended_tokens, own, told, has_phases=False)
        return output

    def _page_of(self) -> Ids:
        """The page in each place [rows, places], once what is under way is over."""
        self.join()
        page_of: Ids = self.pages.page_table.page_of.cpu().numpy()
        return page_of.copy()

    def launch_attend(self, step: Step) -> Tensor:
        """Queue the attention of one new token over sinks, selected pages and recent window, and
        over what stands for the other pages where they are estimated.

        Where pages are chosen by the share of attention that they hold, what is attended anyhow is
        attended once more before them, for its mass.
        """
        self.join()
        pages, bias = self.pages, self._tokens.bias(step)
        fixed = self._fixed_mass(step, bias)
        scores = self._score(step, bias)
        selection = pages.page_table.select(scores, self._tokens.counts.sealed, fixed)
        if self._trace is not None:
            self._latest = selection
        pages.recall(selection)
        output = self._attend(
            step,
            selection,
            pages.page_table.page_of,
            bias=bias,
            estimates=self._estimates(step, selection),
        )
        if self.parts.config.speculative_recall and pages.page_table.has_spare:
            self._speculate(scores, fixed)
        return output

    def _attend(
        self,
        step: Step,
        selection: Selection,
        page_of: Tensor,
        *,
        bias: Tensor | None,
        estimates: Estimates | None = None,
        log_mass: Tensor | None = None,
    ) -> Tensor:
        """Attend sinks, selected pages and recent window; see `paged_attention`."""
        return self._tokens.attend(
            step,
            self.window,
            self.parts.packer.layout,
            PageSet(self.pages.slots, selection.chosen, selection.num_chosen, page_of),
            num_sink_pages=self.parts.config.num_sink_pages,
            bias=bias,
            estimates=estimates,
            log_mass=log_mass,
        )

    def _fixed_mass(self, step: Step, bias: Tensor | None) -> Tensor | None:
        """Log mass of what the step attends anyhow [rows, group]; None where pages are not chosen
        by share."""
        query = self._tokens.grouped(step.query)
        if not self.parts.config.orders_by_share(query.shape[1]):
            return None
        mass = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        self._attend(step, self._nothing, self._nothing.chosen, bias=bias, log_mass=mass)
        return mass

    def _score(self, step: Step, bias: Tensor | None) -> Scores:
        config, directory = self.parts.config, self.pages.directory
        sealed = self._tokens.counts.sealed
        query = self._tokens.grouped(step.index_query)
        if config.orders_by_share(query.shape[1]):  # all that attention does is part of it
            return directory.score(query, sealed, step.scale, None, step.softcap, bias)
        max_selectable = directory.num_pages - config.num_sink_pages
        hidden = hidden_pages(step, config, self.parts.geometry, max_selectable)
        mask = hidden if isinstance(hidden, Tensor) else None
        return directory.score(query, sealed, step.scale, mask)

    def _estimates(self, step: Step, selection: Selection) -> Estimates | None:
        """What stands for pages that are not selected; None where nothing does."""
        means, estimated = self.pages.directory.means, selection.estimated
        if means is None:
            return None
        assert estimated is not None
        return Estimates(means, estimated, self._page_bias(step))

    def _page_bias(self, step: Step) -> Tensor | None:
        """The user's mask over estimates by page number [rows, group, pages]; None without one."""
        config, num_pages = self.parts.config, int(self.tokens.sealed.max())
        if step.bias is None or not config.estimates or num_pages == 0:
            return None
        pages = np.broadcast_to(np.arange(num_pages), (self.parts.geometry.batch, 1, num_pages))
        return self._tokens.by_row_and_head(page_bias(step, config, pages), step)

    # -- speculative recall -----------------------------------------------------------------------

    @property
    def _streams(self) -> Streams:
        return streams_of(self.parts.geometry.device)

    def _speculate(self, scores: Scores, fixed: Tensor | None) -> None:
        """Recall what the present query rates next into the spare places, beside the main stream.

        The next step selects afresh: it only finds fewer pages missing.
        """
        streams, table = self._streams, self.pages.page_table
        streams.side.wait(streams.main.record())
        chosen: list[Selection] = []

        def choose() -> None:
            chosen.append(table.select(scores, self._tokens.counts.sealed, fixed, speculative=True))

        try:
            streams.side.run(choose)
            streams.side.run(lambda: self.pages.recall(chosen[0]))
        finally:  # interrupted, too: what was queued is under way
            self._speculation = Speculation(streams.side.record(), scores, fixed, chosen)

    def join(self) -> None:
        """Have the main stream wait for the speculative recall and for the newest backup."""
        if self._speculation is not None:
            self._streams.main.wait(self._speculation.over)
            self._speculation = None
        self.pages.settle()

    def abandon(self) -> None:
        """Forget a speculative recall that was recorded and never done."""
        self._speculation = None

    # -- several new tokens -----------------------------------------------------------------------

    def seal(self, seqs: slice, first: int, key: Tensor, value: Tensor) -> None:
        """See `Engine`."""
        self.pages.seal(seqs, first, key, value)

    def counted(self, seqs: slice) -> None:
        """See `Capturable`."""
        self._tokens.counted(seqs)

    def begin_blocks(self) -> None:
        """See `Engine`."""
        self.pages.page_table.forget_spared()
        self.pages.settle()  # on the main stream: blocks are read on another

    def read(self, sequence: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """See `Engine`."""
        return self.pages.read(sequence, first, last)

    # -- changes of shape -------------------------------------------------------------------------

    def reserve(self, tokens: int) -> None:
        """See `Capturable`."""
        config = self.parts.config
        self.pages.directory.reserve(
            sealed_pages(tokens, config.num_recent_tokens, config.page_size)
        )

    @property
    def addresses(self) -> tuple[int, ...]:
        """See `Capturable`; all else is new when the tokens are."""
        return self._tokens.number, *self.pages.addresses

    def unseal(self, sequence: int, first: int) -> None:
        """See `Engine`."""
        self.pages.drop_from(sequence, first)

    def undo(self, lengths: Ids, sealed: Ids) -> None:
        """See `Capturable`."""
        super().undo(lengths, sealed)
        for sequence, first in enumerate(sealed.tolist()):
            self.parts.store.forget_from(sequence, first)
            self.pages.drop_from(sequence, first)

    def keep_sequences(self, index: Ids, device_tier: DeviceTier, num_selected: Ids) -> None:
        """See `Engine`."""
        self.pages.keep_sequences(index, device_tier, num_selected)
        self._tokens.renew(device_tier.geometry)
        self._nothing = self._make_nothing()

    def moved(self) -> None:
        """See `Engine`."""
        self.pages.moved()

    # -- what is written down, and read again -----------------------------------------------------

    @property
    def digest_kind(self) -> str:
        """See `Engine`."""
        return "triton"

    def digest(self, seqs: slice, first: int, key: Tensor, value: Tensor) -> None:
        """See `Engine`."""
        self.pages.digest(seqs, first, key, value)

    def state(self) -> State:
        """See `Engine`."""
        self.join()
        digests = self.pages.directory.state(int(self.parts.tokens.sealed.max()))
        return {"resident": self.pages.page_table.page_of, **digests}

    def restore(self, state: State) -> None:
        """See `Engine`."""
        self.pages.moved()
        if "digests" in state:
            self.pages.directory.restore(state)
        else:
            self.digest_anew()
        self.pages.fetch(state.get("resident"))

    # -- to look at -------------------------------------------------------------------------------

    def check(self) -> None:
        """See `Engine`."""
        self._tokens.check()
        self.pages.check()

    def stats(self) -> CacheStats:
        """See `Engine`; waits for the device, which counts hits and recalls."""
        self.join()
        config, table = self.parts.config, self.pages.page_table
        heads, counted = self.parts.geometry.num_kv_heads, replace(self.counters)
        missed: tuple[tuple[MissedMass, ...], ...] = ()
        if config.target_missed_mass is not None:
            missed = (tuple(table.missed_by_head(heads)),)
            counted.attended_tokens -= round(table.num_spared * config.page_size / heads)
        return (
            counted.stats(self.tokens)
            + table.stats(self.parts.packer.layout.nbytes)
            + CacheStats(digest_bytes=self.pages.directory.nbytes, missed_by_layer=missed)
        )
