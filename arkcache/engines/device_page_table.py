"""The page table of the device engine: which page each place holds, kept where kernels change it.

The host engine's is `bookkeeping.PageTable`; where a page itself lies in the host tier, the page
directory says.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.errors import IntegrityError
from arkcache.kernels.arguments import Places, Scores, Selection
from arkcache.kernels.triton_select import NUM_COUNTERS, NUM_MISSED, select
from arkcache.pages.bookkeeping import Ids
from arkcache.stats import CacheStats, MissedMass
from arkcache.tiering.transfer import upload

WORST, SPARED = 2, 4
"""Columns of `DevicePageTable.missed`."""


class DevicePageTable:
    """Which page each place of every row holds, on the device.

    A row's places are numbered from 0; a row with a smaller budget than others leaves its last ones
    empty. Sinks are not counted here: they never move.

    Args:
        config: the cache's settings.
        selected: pages that a step selects, of each row.
        num_places: places of a row.
        pool_factor: places for each page that a step selects.
        device: where the kernels run.

    Attributes:
        max_selected: pages that any row selects.
        selected: pages that a step selects, of each row, on the host.
        page_of: int32 [rows, places], -1 where a place is empty.
        may_hold: int32 [rows], places that a row may use.
        has_spare: whether a row may hold more pages than it selects.
        missed: float64 [rows, 5], what steps missed by the index (see `triton_select.NUM_MISSED`);
            None without a target.
    """

    def __init__(
        self,
        config: CacheConfig,
        selected: Ids,
        num_places: int,
        pool_factor: float,
        device: torch.device,
    ) -> None:
        self._config, self.selected, self.max_selected = config, selected, int(selected.max())
        may_hold = np.ceil(selected * pool_factor).astype(np.int64)
        self.has_spare = bool((may_hold > selected).any())
        rows = len(selected)
        with torch.inference_mode(False):  # written to in and out of it
            self._num_selected = upload(selected.astype(np.int32), device)
            self.may_hold = upload(np.minimum(may_hold, num_places).astype(np.int32), device)
            self.page_of = torch.full((rows, num_places), -1, dtype=torch.int32, device=device)
            self._speculated = torch.zeros_like(self.page_of, dtype=torch.int8)
            self._counters = torch.zeros((rows, NUM_COUNTERS), dtype=torch.int64, device=device)
            self.missed: Tensor | None = None
            if config.target_missed_mass is not None:
                self.missed = torch.zeros((rows, NUM_MISSED), dtype=torch.float64, device=device)

    def select(
        self,
        scores: Scores,
        sealed: Tensor,
        fixed: Tensor | None = None,
        *,
        speculative: bool = False,
    ) -> Selection:
        """Choose pages, and places for those that are missing.

        fixed: log mass of what is attended anyhow [rows, group], where pages are chosen by share.
        speculative: as many as there are places for, after the step attended what it chose.
        """
        return select(
            scores,
            sealed,
            Places(self.page_of, self.may_hold),
            self.may_hold if speculative else self._num_selected,
            self._speculated,
            self._counters,
            num_sink_pages=self._config.num_sink_pages,
            max_selected=self.page_of.shape[1] if speculative else self.max_selected,
            reduction=self._config.score_reduction,
            speculative=speculative,
            num_estimated=0 if speculative else self._config.estimate_pages,
            fixed=fixed,
            target=None if speculative else self._config.target_missed_mass,
            missed=None if speculative else self.missed,
        )

    def place(self, rows: slice, first: int, last: int) -> None:
        """Enter new pages first..last: page p in place p - num_sink_pages, in rows that have it."""
        num_sink_pages = self._config.num_sink_pages
        if last <= num_sink_pages:
            return
        start = max(first, num_sink_pages)
        places = torch.arange(
            start - num_sink_pages, last - num_sink_pages, device=self.page_of.device
        )
        fits = places < self.may_hold[rows, None]
        held = self.page_of[rows, start - num_sink_pages : last - num_sink_pages]
        held.copy_(torch.where(fits, places + num_sink_pages, -1))

    def drop_from(self, rows: slice, page: int) -> None:
        """Forget the pages of `rows` from `page` on."""
        held = self.page_of[rows]
        held.masked_fill_(held >= page, -1)

    def inherit(self, before: DevicePageTable, rows: Tensor, num_heads: int) -> None:
        """Hold in row i what row `rows[i]` of another held, in as many places as both have.

        What was counted goes on; of each of `num_heads` KV heads by itself, where that matters.
        """
        shared = min(before.page_of.shape[1], self.page_of.shape[1])
        held = before.page_of[rows, :shared]
        fits = torch.arange(shared, device=held.device) < self.may_hold[:, None]
        self.page_of[:, :shared] = torch.where(fits, held, -1)
        self._counters[0] = before._counters.sum(dim=0)
        if self.missed is not None and before.missed is not None:
            log = before.missed.unflatten(0, (-1, num_heads))
            self.missed[:num_heads] = log.sum(dim=0)
            self.missed[:num_heads, WORST] = log[:, :, WORST].amax(dim=0)

    def inherit_pages(self, page_of: Tensor) -> None:
        """Hold pages as they were in another table's places, if it had as many."""
        if page_of.shape == self.page_of.shape:
            places = torch.arange(page_of.shape[1], device=self.page_of.device)
            held = page_of.to(self.page_of)
            self.page_of.copy_(torch.where(places < self.may_hold[:, None], held, -1))

    def forget_spared(self) -> None:
        """Note that a step attended everything: it left out no page."""
        if self.missed is not None:
            self.missed[:, SPARED] = 0

    def missed_by_head(self, num_heads: int) -> list[MissedMass]:
        """What steps missed by the index, of each KV head; waits for the device."""
        assert self.missed is not None
        log = self.missed.unflatten(0, (-1, num_heads))
        worst = log[:, :, WORST].amax(dim=0)
        heads = torch.cat((log.sum(dim=0), worst[:, None]), dim=1).tolist()
        return [
            MissedMass(
                num_estimates=int(steps),
                estimated_sum=total,
                estimated_worst=highest,
                num_capped=int(capped),
            )
            for steps, total, _, capped, _, highest in heads
        ]

    @property
    def num_spared(self) -> int:
        """Pages, of all rows, that the latest step did without though it had places for them, as it
        met its target; waits for the device."""
        return 0 if self.missed is None else int(self.missed[:, SPARED].sum())

    def stats(self, page_bytes: int) -> CacheStats:
        """What was selected and copied; waits for the device, which counts it."""
        hits, recalled, evicted, guessed, speculated = self._counters.sum(dim=0).tolist()
        return CacheStats(
            pages_hit=hits,
            pages_recalled=recalled,
            pages_evicted=evicted,
            pages_speculated=speculated,
            speculative_hits=guessed,
            bytes_recalled=(recalled + speculated) * page_bytes,
        )

    def check(self, sealed: Ids) -> Ids:
        """Raise `IntegrityError` if a row holds a page twice, or one that it has not sealed.

        sealed: pages of each row. Returns `page_of`, on the host.
        """
        page_of: Ids = self.page_of.cpu().numpy().astype(np.int64)
        for row, places in enumerate(page_of):
            held = places[places >= 0]
            if len(np.unique(held)) != len(held) or (held >= sealed[row]).any():
                raise IntegrityError(f"row {row} holds a page twice, or one that is not: {held}")
        return page_of
