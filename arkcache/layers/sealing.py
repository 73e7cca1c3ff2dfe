"""What layers with sealed pages share: the recent window, and when a page of it is full.

Knows nothing of where sealed pages are kept, nor of which are attended.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.engines.engine import Blocks, State
from arkcache.layers.layer import Layer
from arkcache.pages.bookkeeping import Ids, check_sealed, page_runs, sealed_pages
from arkcache.pages.windows import Window
from arkcache.tiering.device import Geometry

SEAL_PAGES = 64
"""Pages sealed at a time: bounds the temporaries of a long prompt."""


class SealingLayer(Layer):
    """A layer whose newest tokens wait in a window, in full precision, until a page is full.

    Args:
        config: the cache's settings.
        geometry: sizes.
    """

    def __init__(self, config: CacheConfig, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.config = config

    @property
    @abstractmethod
    def window(self) -> Window:
        """The recent window."""

    @abstractmethod
    def _seal(self, seqs: slice, first: int, key: Tensor, value: Tensor) -> None:
        """Keep pages [seqs, kv_heads, pages, page_size, dim] from number `first` on."""

    @abstractmethod
    def _read(self, sequence: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Tokens of pages first..last as they were kept, in the order in which they came: key,
        value [kv_heads, tokens, dim]."""

    @abstractmethod
    def _unseal(self, sequence: int, first: int, last: int) -> None:
        """Forget pages first..last, the newest of a sequence."""

    @abstractmethod
    def _page_blocks(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Sealed pages block by block: first and last page, key, value [batch, kv_heads, tokens,
        dim]. Undefined beyond a sequence's last sealed page."""

    def _append(self, seqs: slice, key: Tensor, value: Tensor) -> None:
        """See `Layer`."""
        length, first = int(self.tokens.lengths[seqs.start]), int(self.tokens.sealed[seqs.start])
        page_size = self.config.page_size
        oldest, new_tokens = first * page_size, key.shape[2]
        last = sealed_pages(length + new_tokens, *self.config.sealing)
        if last == first:
            self.window.write(seqs, oldest, length, key, value)
        else:
            if length > oldest:
                before = self.window.read(seqs, oldest, length - oldest)
                key = torch.cat((before[0], key), dim=2)
                value = torch.cat((before[1], value), dim=2)
            cut = (last - first) * page_size
            for start, stop in self._runs(first, last):
                tokens = slice((start - first) * page_size, (stop - first) * page_size)
                pages = (
                    states[:, :, tokens].unflatten(2, (-1, page_size)) for states in (key, value)
                )
                self._seal(seqs, start, *pages)
            self.tokens.sealed[seqs] = last
            oldest = last * page_size
            self.window.write(seqs, oldest, oldest, key[:, :, cut:], value[:, :, cut:])
        self.tokens.set(seqs, length + new_tokens)
        self.tokens.until_seal -= new_tokens
        if self.tokens.until_seal <= 0:
            self._foresee()

    def _runs(self, first: int, last: int) -> list[tuple[int, int]]:
        """Pages first..last as they are sealed together: no segment is cut."""
        sinks, segment = self.config.num_sink_pages, self.config.segment_pages
        most = SEAL_PAGES if segment == 1 else max(SEAL_PAGES, sinks + segment)
        return page_runs(first, last, most, sinks, segment)

    def _foresee(self) -> None:
        """Count how many columns may come before the next page is full."""
        tokens, config = self.tokens, self.config
        more = 1 if config.grouping is None else self._next_pages()
        full = (tokens.sealed + more) * config.page_size + config.num_recent_tokens
        tokens.until_seal = int((full - tokens.lengths).min())

    def _next_pages(self) -> Ids:
        """Pages that each sequence seals next: one of the sinks, then segments [batch]."""
        in_sinks = self.tokens.sealed < self.config.num_sink_pages
        return np.where(in_sinks, 1, self.config.segment_pages)

    def _check_sealed(self, counts: Ids) -> None:
        """Raise `IntegrityError` unless `counts` are the pages that the lengths say are sealed."""
        check_sealed(counts, self.tokens.lengths, self.config.sealing)

    def blocks(self) -> Blocks:
        """See `Layer`."""
        self.counters.attended_tokens = self.tokens.total
        page_size = self.config.page_size
        ends = (self.tokens.sealed * page_size)[:, None]
        for first, last, key, value in self._page_blocks():
            tokens = np.arange(first * page_size, last * page_size)
            yield key, value, np.where(tokens < ends, tokens, -1)
        recent = self.tokens.lengths - self.tokens.sealed * page_size
        tokens = np.arange(int(recent.max()))
        numbers = np.where(tokens < recent[:, None], tokens + ends, -1)
        firsts = torch.from_numpy(self.tokens.sealed * page_size)
        yield *self.window.recent(firsts, len(tokens)), numbers

    def _state(self) -> State:
        """See `Layer`."""
        sealed = torch.from_numpy(self.tokens.sealed.copy())
        most = int((self.tokens.lengths - self.tokens.sealed * self.config.page_size).max())
        key, value = self.window.recent(sealed * self.config.page_size, most)
        return {"sealed": sealed, "window_key": key, "window_value": value, **self._page_state()}

    @abstractmethod
    def _page_state(self) -> State:
        """What is to be known of the sealed pages."""

    def _restore(self, state: State) -> None:
        """See `Layer`."""
        self.tokens.sealed = state["sealed"].numpy().copy()
        self._restore_pages(state)
        counts = state["lengths"].numpy() - self.tokens.sealed * self.config.page_size
        for sequence, (sealed, recent) in enumerate(zip(self.tokens.sealed, counts, strict=True)):
            seqs, oldest = slice(sequence, sequence + 1), int(sealed) * self.config.page_size
            key, value = (
                state[name][seqs, :, : int(recent)].to(self.geometry.device)
                for name in ("window_key", "window_value")
            )
            self.window.write(seqs, oldest, oldest, key, value)

    @abstractmethod
    def _restore_pages(self, state: State) -> None:
        """Know what `_page_state` said; how many are sealed is known by now."""

    def _crop(self, lengths: Ids) -> None:
        """See `Layer`."""
        self.tokens.until_seal = 0  # counted anew with the next token
        for sequence, length in enumerate(lengths.tolist()):
            self._crop_sequence(sequence, length)

    def _unsealed(self, sequence: int, length: int) -> tuple[int, int]:
        """First and last of the sealed pages whose tokens go back to the window when a sequence is
        shortened to `length`; those from the last on are not among what is left."""
        page_size, sealed = self.config.page_size, int(self.tokens.sealed[sequence])
        left = min(sealed_pages(length, *self.config.sealing), sealed)
        return left, min(max(-(-length // page_size), left + 1), sealed)

    def _crop_sequence(self, sequence: int, length: int) -> None:
        page_size, sealed = self.config.page_size, int(self.tokens.sealed[sequence])
        left, last = self._unsealed(sequence, length)
        if left >= sealed:
            return
        seqs, oldest = slice(sequence, sequence + 1), sealed * page_size
        newest = self.window.read(seqs, oldest, int(self.tokens.lengths[sequence]) - oldest)
        key, value = (
            torch.cat((tokens[None], recent), dim=2)[:, :, : length - left * page_size]
            for tokens, recent in zip(self._read(sequence, left, last), newest, strict=True)
        )
        self.window.write(seqs, left * page_size, left * page_size, key, value)
        self._unseal(sequence, left, sealed)
        self.tokens.sealed[sequence] = left
