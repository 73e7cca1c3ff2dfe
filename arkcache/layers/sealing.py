"""What layers with sealed pages share: the recent window, and when a page of it is full.

Knows nothing of where sealed pages are kept, nor of which are attended.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.engines.step import Counters, Lengths
from arkcache.errors import IntegrityError
from arkcache.pages.bookkeeping import Ids, sealed_pages
from arkcache.pages.windows import Window
from arkcache.tiering.device import Geometry
from arkcache.tiering.host import HostTier

SEAL_PAGES = 64
"""Pages sealed at a time: bounds the temporaries of a long prompt."""


class SealingLayer(ABC):
    """A layer whose newest tokens wait in a window, in full precision, until a page is full.

    Args:
        config: the cache's settings.
        geometry: sizes.
    """

    takes_ragged = False
    """Whether one token may be appended to sequences of different lengths at once."""

    def __init__(self, config: CacheConfig, geometry: Geometry) -> None:
        self.config, self.geometry = config, geometry
        self.columns = 0
        self.lengths = Lengths(np.zeros(geometry.batch, dtype=np.int64))
        self.sealed: Ids = np.zeros(geometry.batch, dtype=np.int64)
        self.counters = Counters()

    @property
    @abstractmethod
    def window(self) -> Window:
        """The recent window."""

    @abstractmethod
    def _seal(self, seqs: slice, first: int, key: Tensor, value: Tensor) -> None:
        """Keep pages [seqs, kv_heads, pages, page_size, dim] from number `first` on."""

    @abstractmethod
    def _read(self, sequence: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Tokens of pages first..last as they were kept: key, value [kv_heads, tokens, dim]."""

    @abstractmethod
    def _unseal(self, sequence: int, first: int, last: int) -> None:
        """Forget pages first..last, the newest of a sequence."""

    @abstractmethod
    def _page_blocks(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Sealed pages block by block: first and last page, key, value [batch, kv_heads, tokens,
        dim]. Undefined beyond a sequence's last sealed page."""

    def append(self, seqs: slice, key: Tensor, value: Tensor) -> None:
        """Append tokens [seqs, kv_heads, new, dim] to sequences of equal length."""
        length, first = int(self.lengths.of[seqs.start]), int(self.sealed[seqs.start])
        page_size = self.config.page_size
        oldest, new_tokens = first * page_size, key.shape[2]
        last = sealed_pages(length + new_tokens, self.config.num_recent_tokens, page_size)
        if last == first:
            self.window.write(seqs, oldest, length, key, value)
        else:
            if length > oldest:
                before = self.window.read(seqs, oldest, length - oldest)
                key = torch.cat((before[0], key), dim=2)
                value = torch.cat((before[1], value), dim=2)
            cut = (last - first) * page_size
            for start in range(first, last, SEAL_PAGES):
                stop = min(start + SEAL_PAGES, last)
                tokens = slice((start - first) * page_size, (stop - first) * page_size)
                pages = (
                    states[:, :, tokens].unflatten(2, (-1, page_size)) for states in (key, value)
                )
                self._seal(seqs, start, *pages)
            self.sealed[seqs] = last
            oldest = last * page_size
            self.window.write(seqs, oldest, oldest, key[:, :, cut:], value[:, :, cut:])
        self.lengths.set(seqs, length + new_tokens)

    def rows_of(self, seqs: slice) -> slice:
        """The rows, (sequence, KV head) pairs, of these sequences."""
        heads = self.geometry.num_kv_heads
        return slice(seqs.start * heads, seqs.stop * heads)

    def pages_to_seal(self, new_lengths: Ids) -> int:
        """Pages, over all sequences, that growing to these lengths seals."""
        sealed = (new_lengths - self.config.num_recent_tokens) // self.config.page_size
        return int(np.maximum(sealed - self.sealed, 0).sum())

    def pieces_needed(self, _new_lengths: Ids) -> int:
        """Pieces of the host tier that growing to these lengths takes: none, unless it is used."""
        return 0

    def release(self) -> None:  # noqa: B027 - most layers hold nothing outside themselves
        """Free what the layer holds outside itself: nothing, unless it uses the host tier."""

    def move_pieces(self, _host: HostTier) -> None:  # noqa: B027
        """Follow the layer's pages into another host tier, if it uses one."""

    def held_pieces(self) -> Ids:
        """Pieces of the host tier that the layer refers to: none, unless it is used."""
        return np.zeros(0, dtype=np.int64)

    def _check_sealed(self, counts: Ids) -> None:
        """Raise `IntegrityError` unless `counts` are the pages that the lengths say are sealed."""
        config = self.config
        for sequence, length in enumerate(self.lengths.of.tolist()):
            expected = sealed_pages(length, config.num_recent_tokens, config.page_size)
            if counts[sequence] != expected:
                raise IntegrityError(
                    f"sequence {sequence} of {length} tokens should have {expected} sealed pages"
                )

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Ids]]:
        """All tokens, block by block: key, value [batch, kv_heads, tokens, dim] and token numbers
        [batch, tokens], -1 where a sequence has none.

        A block may be overwritten when the next one is asked for.
        """
        self.counters.attended_tokens = int(self.lengths.of.sum())
        page_size = self.config.page_size
        ends = (self.sealed * page_size)[:, None]
        for first, last, key, value in self._page_blocks():
            tokens = np.arange(first * page_size, last * page_size)
            yield key, value, np.where(tokens < ends, tokens, -1)
        recent = self.lengths.of - self.sealed * page_size
        tokens = np.arange(int(recent.max()))
        numbers = np.where(tokens < recent[:, None], tokens + ends, -1)
        firsts = torch.from_numpy(self.sealed * page_size)
        yield *self.window.recent(firsts, len(tokens)), numbers

    def crop(self, lengths: Ids) -> None:
        """Shorten every sequence to `lengths`; unsealed pages go back to the window, as they were
        kept: quantised pages do not regain what quantising took."""
        for sequence, length in enumerate(lengths.tolist()):
            self._crop_sequence(sequence, length)
        self.lengths = Lengths(lengths.copy())

    def _crop_sequence(self, sequence: int, length: int) -> None:
        page_size, sealed = self.config.page_size, int(self.sealed[sequence])
        left = sealed_pages(length, self.config.num_recent_tokens, page_size)
        if left >= sealed:
            return
        seqs, oldest = slice(sequence, sequence + 1), sealed * page_size
        newest = self.window.read(seqs, oldest, int(self.lengths.of[sequence]) - oldest)
        key, value = (
            torch.cat((tokens[None], recent), dim=2)[:, :, : length - left * page_size]
            for tokens, recent in zip(self._read(sequence, left, sealed), newest, strict=True)
        )
        self.window.write(seqs, left * page_size, left * page_size, key, value)
        self._unseal(sequence, left, sealed)
        self.sealed[sequence] = left
