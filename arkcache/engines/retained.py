"""What of a layer is kept for good: the part of an engine that carries a retention out.

Pages are given up between steps: at the first step of one token after a prompt, and whenever a step
finds more of them than the budget has room for. What was given up is masked from then on, as a mask
of the user's would be, and its pieces of the host tier are free.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from arkcache.engines.engine import Blocks, PagedParts
from arkcache.engines.places import Places
from arkcache.engines.prompts import PromptQueries, received
from arkcache.engines.step import Step, additive, token_mass
from arkcache.engines.views import Held, view_tokens
from arkcache.errors import ConfigError
from arkcache.methods import Retention, Seen
from arkcache.methods.retention import COARSE, FINE, GONE, Fates
from arkcache.pages.bookkeeping import Ids
from arkcache.pages.evidence import Evidence


class Retained:
    """Which pages of a layer are kept.

    Args:
        retention: who decides.
        parts: of the layer.
        places: of its working set.
    """

    def __init__(self, retention: Retention, parts: PagedParts, places: Places) -> None:
        self._retention, self._parts, self._places = retention, parts, places
        self._evidence = Evidence(
            parts.geometry.num_rows, parts.config.page_size, retention.num_counted
        )
        self._asked: PromptQueries | None = None
        self._probe: NDArray[np.float32] | None = None
        self._prompt_lengths: Ids | None = None

    @property
    def observes(self) -> bool:
        """Whether decode steps are to be looked at."""
        return self._retention.observes

    # -- what is kept -----------------------------------------------------------------------------

    def gone(self) -> Held:
        """Which sealed pages are lost [rows, pages]."""
        return self._parts.store.gone(int(self._parts.tokens.sealed.max()))

    def kept(self, max_selectable: int) -> Held:
        """Which pages behind the sinks there are to select from [rows, max_selectable]."""
        first, heads = self._parts.config.num_sink_pages, self._parts.geometry.num_kv_heads
        there = np.arange(first, first + max_selectable)
        sealed = np.repeat(self._parts.tokens.sealed, heads)[:, None]
        kept: Held = (there < sealed) & ~self.gone()[:, first : first + max_selectable]
        return kept

    def hide(self, step: Step) -> Step:
        """A step that does not see what is lost."""
        gone = self.gone()
        if not gone.any():
            return step
        geometry, page_size = self._parts.geometry, self._parts.config.page_size
        # One more, for all pages that are not sealed.
        lost = np.pad(gone, ((0, 0), (0, 1))).reshape(geometry.batch, geometry.num_kv_heads, -1)
        others, new_tokens = step.bias, step.query.shape[2]

        def bias(tokens: Ids) -> Tensor:
            pages = np.minimum(tokens // page_size, lost.shape[2] - 1)
            pages = np.broadcast_to(pages, (*lost.shape[:2], pages.shape[2]))
            seen = ~np.take_along_axis(lost, pages, axis=2)
            mask = additive(seen, geometry.device)[:, :, :, None].expand(-1, -1, -1, new_tokens, -1)
            return mask if others is None else others(tokens) + mask

        return step._replace(bias=bias)

    # -- what is looked at ------------------------------------------------------------------------

    def ask(self, step: Step, visible: Ids, blocks: Callable[[], Blocks]) -> None:
        """Several new tokens: part of a prompt. visible: see `PromptQueries`."""
        most = self._retention.num_queries
        if most == 0:
            return
        asked = PromptQueries.of(step, visible, most)
        if most is None:
            self._read(asked, blocks)
        else:
            self._asked = asked if self._asked is None else self._asked.then(asked, most)

    def _read(self, asked: PromptQueries, blocks: Callable[[], Blocks]) -> None:
        """Note what all tokens received from queries of a prompt."""
        heads, page_size = self._parts.geometry.num_kv_heads, self._parts.config.page_size
        total, longest = asked.visible.shape[1], int(self._parts.tokens.lengths.max())
        width = -(-longest // page_size) * page_size
        probe = np.zeros((self._parts.geometry.num_rows, width), dtype=np.float32)
        if self._probe is not None:
            probe[:, : self._probe.shape[1]] += self._probe[:, :width]
        self._evidence.begin(total)
        for first, share, numbers in received(asked, blocks, self.hide):
            for row, own in enumerate(share.reshape(-1, *share.shape[2:])):
                tokens = numbers[row // heads]
                count = int(np.count_nonzero(tokens >= 0))
                if count == 0:
                    continue
                start = int(tokens[0])
                probe[row, start : start + count] += own[:, :count].sum(axis=0)
                by_page = np.pad(own[:, :count], ((0, 0), (0, -count % page_size)))
                by_page = by_page.reshape(len(own), -1, page_size).sum(axis=2)
                visible = asked.visible[row // heads, first : first + len(own)]
                self._evidence.note(row, start // page_size, by_page, visible, (first, total))
        self._probe = probe
        self._prompt_lengths = np.repeat(asked.visible.max(axis=1) + 1, heads)

    def observe(
        self, step: Step, key: Tensor, value: Tensor, mask: Tensor | None, num_pages: int
    ) -> None:
        """A decode step that attends a view of so many pages and the window; mask as there."""
        parts = self._parts
        config, tokens, heads = parts.config, parts.tokens, parts.geometry.num_kv_heads
        recent = tokens.lengths - tokens.sealed * config.page_size
        num_tokens = num_pages * config.page_size + int(recent.max())
        share = token_mass(step, key, value, mask, num_tokens).flatten(0, 1).cpu().numpy()
        numbers = view_tokens(
            config, parts.geometry, self._places.page_of, tokens.sealed, recent, num_pages
        )
        pages = numbers.reshape(share.shape) // config.page_size
        # Window tokens beyond a sequence's last have no share, wherever they are added.
        received_by_page = np.zeros((len(share), int(pages.max(initial=0)) + 1), dtype=np.float32)
        np.add.at(received_by_page, (np.arange(len(share))[:, None], pages), share)
        self._evidence.begin(1)
        for row, own in enumerate(received_by_page[:, None]):
            self._evidence.note(row, 0, own, tokens.lengths[row // heads, None] - 1)

    # -- what is given up -------------------------------------------------------------------------

    def settle(self, blocks: Callable[[], Blocks]) -> tuple[Ids, Ids]:
        """Before a decode step: give up what is to be; rows and pages to be kept coarse now."""
        if self._asked is not None:
            self._read(self._asked, blocks)
        ended = self._probe is not None
        sealed, first = self._parts.tokens.sealed, self._parts.config.num_sink_pages
        num_kept = self.kept(max(0, int(sealed.max()) - first)).sum(axis=1)
        nothing = np.zeros(0, dtype=np.int64)
        if not ended and not (num_kept > self._places.num_selected).any():
            return nothing, nothing
        before = self._fates()
        seen = self._seen()
        after = np.maximum(self._retention.fates(seen, before), before)
        after[~seen.candidates(before)] = before[~seen.candidates(before)]
        self._asked = self._probe = self._prompt_lengths = None
        lost = (after == GONE) & (before != GONE)
        if lost.any():
            self._parts.store.give_up(*np.nonzero(lost))
            self._places.give_up(lost)
        if ended:
            self._parts.store.host.compact()
        rows, pages = np.nonzero((after == COARSE) & (before == FINE))
        if len(rows) and len(self._parts.store.packers) == 1:
            raise ConfigError(
                f"retention={self._retention!r} keeps pages in a coarse format, and there is none: "
                "give coarse_key_bits or coarse_value_bits"
            )
        return rows, pages

    def _fates(self) -> Fates:
        """What has become of all sealed pages [rows, pages]."""
        num_pages, store = int(self._parts.tokens.sealed.max()), self._parts.store
        fates = np.where(self.gone(), np.int8(GONE), np.int8(FINE))
        if len(store.packers) > 1:
            fates[(fates == FINE) & ~store.is_fine(num_pages)] = COARSE
        return fates

    def _seen(self) -> Seen:
        """What the retention is told."""
        config, tokens = self._parts.config, self._parts.tokens
        num_pages, heads = int(tokens.sealed.max()), self._parts.geometry.num_kv_heads
        keep, lengths = self._places.num_selected, np.repeat(tokens.lengths, heads)
        fixed = config.num_sink_pages * config.page_size + config.window_tokens - 1
        probe, prompt_lengths = self._probe, self._prompt_lengths
        if probe is not None:
            probe = np.pad(
                probe, ((0, 0), (0, max(0, num_pages * config.page_size - probe.shape[1])))
            )
        return Seen(
            lengths=lengths,
            sealed=np.repeat(tokens.sealed, heads),
            first=config.num_sink_pages,
            page_size=config.page_size,
            keep=keep,
            budget=keep * config.page_size + fixed,
            mass=self._evidence.mass_of(num_pages),
            counters=self._evidence.counters(num_pages),
            probe=probe,
            prompt_lengths=lengths if prompt_lengths is None else prompt_lengths,
        )

    # -- changes of shape -------------------------------------------------------------------------

    def crop(self, lengths: Ids) -> None:
        """Forget what tokens received that are gone when sequences are shortened to `lengths`."""
        heads, page_size = self._parts.geometry.num_kv_heads, self._parts.config.page_size
        for sequence, length in enumerate(lengths.tolist()):
            rows = slice(sequence * heads, (sequence + 1) * heads)
            self._evidence.forget_from(rows, -(-length // page_size))
        if self._asked is not None:
            self._asked = self._asked.cropped(lengths)
        if self._probe is not None:
            visible = np.arange(self._probe.shape[1]) < np.repeat(lengths, heads)[:, None]
            self._probe = np.where(visible, self._probe, np.float32(0))
            assert self._prompt_lengths is not None
            self._prompt_lengths = np.minimum(self._prompt_lengths, np.repeat(lengths, heads))

    def keep_sequences(self, index: Ids) -> None:
        """Make sequence i what sequence `index[i]` was."""
        rows = self._parts.rows_from(index)
        self._evidence.keep_rows(rows)
        if self._asked is not None:
            self._asked.keep_sequences(index)
        if self._probe is not None:
            assert self._prompt_lengths is not None
            self._probe, self._prompt_lengths = self._probe[rows], self._prompt_lengths[rows]
