"""The decode step on a GPU: score, select, recall and attend by kernels, without waiting for them.

`RecalledLayer.launch_attend` is the step. What `PagedLayer` decides on the host is decided on the
device here, by the same rules: which pages are selected, which of them are missing, whose places
they take. Slots hold pages as the host tier does, byte for byte, so that recall is a copy.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.kernels.torch_pages import PagePacker
from arkcache.kernels.triton_attention import paged_attention
from arkcache.kernels.triton_copy import gather
from arkcache.kernels.triton_score import Scores
from arkcache.kernels.triton_select import Selection
from arkcache.offloaded import OffloadedLayer
from arkcache.pages import Ids
from arkcache.ring import sink_logits, user_bias
from arkcache.stats import CacheStats
from arkcache.step import Step
from arkcache.tiering.device import DeviceTier
from arkcache.tiering.host import HostTier
from arkcache.tiering.lanes import Event, Lanes, lanes_of
from arkcache.views import hidden_pages


class Speculation(NamedTuple):
    """A recall that runs beside the main lane; its tensors live until it is over."""

    over: Event
    scores: Scores
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

    @property
    def _lanes(self) -> Lanes:
        return lanes_of(self.geometry.device)

    # -- one new token: score, select, recall, attend ---------------------------------------------

    def launch_attend(self, step: Step) -> Tensor:
        """Queue the attention of one new token over sinks, selected pages and recent window."""
        self.join()
        config, books = self.config, self._books
        sinks = config.num_sink_pages
        scores = self._score(step)
        selection = self._residents.select(scores, books.sealed)
        self._recall(selection)
        key, value = self.by_row(self.window)
        output = paged_attention(
            self.grouped(step.query),
            self._slots,
            selection.chosen,
            selection.num_chosen,
            self._residents.page_of,
            key,
            value,
            books.lengths,
            books.sealed,
            layout=self._packer.layout,
            num_sinks=sinks,
            scale=step.scale,
            softcap=step.softcap,
            sinks=sink_logits(step, self.geometry),
            bias=user_bias(step, self.geometry, int(self.lengths.of.max())),
            tickets=books.tickets,
        )
        if self.config.speculative_recall and self._residents.has_spare:
            self._speculate(scores)
        return output.view(self.geometry.batch, -1, 1, output.shape[-1])

    def _score(self, step: Step) -> Scores:
        most = self._table.num_pages - self.config.num_sink_pages
        hidden = hidden_pages(step, self.config, self.geometry, most)
        return self._table.score(
            self.grouped(step.index_query),
            self._books.sealed,
            step.scale,
            hidden if isinstance(hidden, Tensor) else None,
        )

    def _recall(self, selection: Selection) -> None:
        """Copy what is missing from the host tier into its places."""
        gather(
            self._store.pieces(),
            self._table.located,
            selection.pages,
            selection.places,
            selection.num_missing,
            self._slots,
            num_sinks=self.config.num_sink_pages,
        )

    # -- speculative recall -----------------------------------------------------------------------

    def _speculate(self, scores: Scores) -> None:
        """Recall what the present query rates next into the spare places, beside the main lane.

        The next step selects afresh: it only finds fewer pages missing.
        """
        lanes = self._lanes
        lanes.side.wait(lanes.main.record())
        chosen: list[Selection] = []

        def choose() -> None:
            chosen.append(self._residents.select(scores, self._books.sealed, speculative=True))

        try:
            lanes.side.run(choose)
            lanes.side.run(lambda: self._recall(chosen[0]))
        finally:  # interrupted, too: what was queued is under way
            self._speculation = Speculation(lanes.side.record(), scores, chosen)

    def join(self) -> None:
        """Have the main lane wait for the speculative recall and for the newest backup."""
        if self._speculation is not None:
            self._lanes.main.wait(self._speculation.over)
            self._speculation = None
        super().join()

    def abandon(self) -> None:
        """Forget a speculative recall that was recorded and never done."""
        self._speculation = None

    def stats(self) -> CacheStats:
        """Counters and sizes; waits for the device, which counts hits and recalls."""
        self.join()
        return (
            self.counters.stats(int(self.lengths.of.sum()))
            + self._residents.stats(self._packer.layout.nbytes)
            + CacheStats(digest_bytes=self._table.nbytes)
        )
