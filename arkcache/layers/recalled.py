"""The decode step on a GPU: score, select, recall and attend by kernels, without waiting for them.

Where pages are chosen by the share of attention that they hold, what is attended anyhow is attended
once more before them, for its mass.

`RecalledLayer.launch_attend` is the step. What `PagedLayer` decides on the host is decided on the
device here, by the same rules: which pages are selected, which of them are missing, whose places
they take. Slots hold pages as the host tier does, byte for byte, so that recall is a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.engines.step import Step
from arkcache.engines.views import hidden_pages, page_bias
from arkcache.kernels.arguments import (
    Counts,
    Estimates,
    HostPages,
    PageSet,
    Scores,
    Selection,
    Window,
)
from arkcache.kernels.torch_pages import PagePacker
from arkcache.kernels.triton_attention import paged_attention
from arkcache.kernels.triton_copy import gather
from arkcache.layers.offloaded import OffloadedLayer
from arkcache.layers.ring import by_row_and_head, sink_logits_by_row, user_bias
from arkcache.pages.bookkeeping import Ids
from arkcache.stats import CacheStats, MissedMass
from arkcache.tiering.device import DeviceTier
from arkcache.tiering.host import HostTier
from arkcache.tiering.streams import Event, Streams, streams_of


class Speculation(NamedTuple):
    """A recall that runs beside the main stream; its tensors live until it is over."""

    over: Event
    scores: Scores
    fixed: Tensor | None
    selections: list[Selection]


class RecalledLayer(OffloadedLayer):
    """A layer whose steps attend the pages that they select, recalled where they are missing.

    Args:
        config, num_selected, device_tier, number, host, packer: as for `OffloadedLayer`.
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
        super().__init__(config, num_selected, device_tier, number, host, packer)
        self._speculation: Speculation | None = None

    def _make_buffers(self) -> None:
        super()._make_buffers()
        rows, device = self.geometry.num_rows, self.geometry.device
        with torch.inference_mode(False):
            no_list = torch.zeros((rows, 0), dtype=torch.int32, device=device)
            no_pages = torch.zeros(rows, dtype=torch.int32, device=device)
        # What is attended anyhow: no page chosen.
        self._nothing = Selection(no_list, no_list, no_pages, no_list, no_pages)

    @property
    def _streams(self) -> Streams:
        return streams_of(self.geometry.device)

    # -- one new token: score, select, recall, attend ---------------------------------------------

    def launch_attend(self, step: Step) -> Tensor:
        """Queue the attention of one new token over sinks, selected pages and recent window, and
        over what stands for the other pages where they are estimated."""
        self.join()
        bias = user_bias(step, self.geometry, int(self.lengths.of.max()))
        fixed = self._fixed_mass(step, bias)
        scores = self._score(step, bias)
        selection = self._page_table.select(scores, self._metadata.sealed, fixed)
        self._recall(selection)
        output = self._attend(
            step,
            bias,
            selection,
            self._page_table.page_of,
            estimates=self._estimates(step, selection),
        )
        if self.config.speculative_recall and self._page_table.has_spare:
            self._speculate(scores, fixed)
        return output.view(self.geometry.batch, -1, 1, output.shape[-1])

    def _attend(
        self,
        step: Step,
        bias: Tensor | None,
        selection: Selection,
        page_of: Tensor,
        *,
        estimates: Estimates | None = None,
        log_mass: Tensor | None = None,
    ) -> Tensor:
        """Attend sinks, selected pages and recent window; see `paged_attention`."""
        return paged_attention(
            self.grouped(step.query),
            PageSet(self._slots, selection.chosen, selection.num_chosen, page_of),
            Window(*self.by_row(self.window)),
            Counts(self._metadata.lengths, self._metadata.sealed),
            layout=self._packer.layout,
            num_sink_pages=self.config.num_sink_pages,
            scale=step.scale,
            softcap=step.softcap,
            sink_logits=sink_logits_by_row(step, self.geometry),
            bias=bias,
            estimates=estimates,
            log_mass=log_mass,
            tickets=self._metadata.tickets,
        )

    def _fixed_mass(self, step: Step, bias: Tensor | None) -> Tensor | None:
        """Log mass of what the step attends anyhow [rows, group]; None where pages are not chosen
        by share."""
        query = self.grouped(step.query)
        if not self.config.orders_by_share(query.shape[1]):
            return None
        mass = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        self._attend(step, bias, self._nothing, self._nothing.chosen, log_mass=mass)
        return mass

    def _score(self, step: Step, bias: Tensor | None) -> Scores:
        query, sealed = self.grouped(step.index_query), self._metadata.sealed
        if self.config.orders_by_share(query.shape[1]):  # all that attention does is part of it
            return self._directory.score(query, sealed, step.scale, None, step.softcap, bias)
        max_selectable = self._directory.num_pages - self.config.num_sink_pages
        hidden = hidden_pages(step, self.config, self.geometry, max_selectable)
        mask = hidden if isinstance(hidden, Tensor) else None
        return self._directory.score(query, sealed, step.scale, mask)

    def _estimates(self, step: Step, selection: Selection) -> Estimates | None:
        """What stands for the pages that are not selected; None where none is estimated."""
        means, estimated = self._directory.means, selection.estimated
        if means is None:
            return None
        assert estimated is not None, "both are there where `estimate_pages` is not 0"
        return Estimates(means, estimated, self._page_bias(step))

    def _page_bias(self, step: Step) -> Tensor | None:
        """The user's mask over estimates by page number [rows, group, pages]; None without one."""
        num_pages = int(self.sealed.max())
        if step.bias is None or not self.config.estimates or num_pages == 0:
            return None
        numbers = np.arange(num_pages)
        pages = np.broadcast_to(numbers, (self.geometry.batch, 1, len(numbers)))
        return by_row_and_head(page_bias(step, self.config, pages), step, self.geometry)

    def _recall(self, selection: Selection) -> None:
        """Copy what is missing from the host tier into its places."""
        gather(
            HostPages(self._store.pieces(), self._directory.located),
            selection,
            self._slots,
            num_sink_pages=self.config.num_sink_pages,
        )

    # -- speculative recall -----------------------------------------------------------------------

    def _speculate(self, scores: Scores, fixed: Tensor | None) -> None:
        """Recall what the present query rates next into the spare places, beside the main stream.

        The next step selects afresh: it only finds fewer pages missing.
        """
        streams = self._streams
        streams.side.wait(streams.main.record())
        chosen: list[Selection] = []

        def choose() -> None:
            sealed = self._metadata.sealed
            chosen.append(self._page_table.select(scores, sealed, fixed, speculative=True))

        try:
            streams.side.run(choose)
            streams.side.run(lambda: self._recall(chosen[0]))
        finally:  # interrupted, too: what was queued is under way
            self._speculation = Speculation(streams.side.record(), scores, fixed, chosen)

    def join(self) -> None:
        """Have the main stream wait for the speculative recall and for the newest backup."""
        if self._speculation is not None:
            self._streams.main.wait(self._speculation.over)
            self._speculation = None
        super().join()

    def abandon(self) -> None:
        """Forget a speculative recall that was recorded and never done."""
        self._speculation = None

    # -- several new tokens, and what was done ----------------------------------------------------

    def _page_blocks(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        self._page_table.forget_spared()
        return super()._page_blocks()

    def stats(self) -> CacheStats:
        """Counters and sizes; waits for the device, which counts hits and recalls."""
        self.join()
        heads, counted = self.geometry.num_kv_heads, replace(self.counters)
        missed: tuple[tuple[MissedMass, ...], ...] = ()
        if self.config.target_missed_mass is not None:
            missed = (tuple(self._page_table.missed_by_head(heads)),)
            spared = self._page_table.num_spared * self.config.page_size
            counted.attended_tokens -= round(spared / heads)
        return (
            counted.stats(int(self.lengths.of.sum()))
            + self._page_table.stats(self._packer.layout.nbytes)
            + CacheStats(digest_bytes=self._directory.nbytes, missed_by_layer=missed)
        )
