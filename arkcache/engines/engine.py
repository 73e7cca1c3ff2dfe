"""The seam between a paged layer and who runs its steps.

A layer keeps tokens: it counts them, seals pages, streams them, gives them back. Its engine decides
which pages a step attends, has them at hand, and attends. An engine may keep whatever it needs for
that, beside what it shares with the layer (`PagedParts`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.engines.capture import Capturable
from arkcache.engines.missed import MissedLog
from arkcache.engines.step import Step
from arkcache.kernels.torch_pages import PagePacker
from arkcache.pages.bookkeeping import Ids
from arkcache.pages.counts import Counters, LayerTokens
from arkcache.pages.grouping import PageTokens
from arkcache.pages.index import PageIndex
from arkcache.pages.store import PageStore
from arkcache.pages.windows import Window
from arkcache.stats import CacheStats
from arkcache.tiering.device import DeviceTier, Geometry, PackedWorkingSet, WorkingSet
from arkcache.tracing.recorder import LayerTrace

Blocks: TypeAlias = Iterator[tuple[Tensor, Tensor, Ids]]
"""Tokens block by block: key, value [batch, kv_heads, tokens, dim] and token numbers [batch,
tokens], -1 where a sequence has none."""


State: TypeAlias = dict[str, Tensor]
"""What a layer or its engine holds, by name."""

DIGEST_PAGES = 64
"""Pages digested anew at a time: bounds the temporaries."""


@dataclass
class PagedParts:
    """What a paged layer and its engine share.

    Attributes:
        config: the cache's settings.
        tokens, counters: of the layer.
        store: its sealed pages in the host tier.
        device_tier: the device tier.
        number: which of its working sets is this layer's.
        page_tokens: which tokens its pages hold, where they are grouped; None: as they came.
    """

    config: CacheConfig
    tokens: LayerTokens
    counters: Counters
    store: PageStore
    device_tier: DeviceTier
    number: int
    page_tokens: PageTokens | None = None

    @property
    def geometry(self) -> Geometry:
        """Sizes."""
        return self.device_tier.geometry

    @property
    def working_set(self) -> WorkingSet | PackedWorkingSet:
        """This layer's part of the device tier."""
        return self.device_tier.working_sets[self.number]

    @property
    def packer(self) -> PagePacker:
        """Of the pages as they are sealed."""
        return self.store.packers[0]

    def read(self, sequence: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """`Engine.read` from the host tier."""
        begun = self.counters.copy_begins()
        key, value, moved = self.store.read_run(sequence, first, last, self.geometry.device)
        self.counters.load_ns += self.counters.since(begun)
        self.counters.bytes_streamed += moved
        return key, value

    def rows_from(self, index: Ids) -> Ids:
        """The rows that become rows 0, 1, ... when sequence i becomes what `index[i]` was."""
        heads = self.geometry.num_kv_heads
        rows: Ids = (index[:, None] * heads + np.arange(heads)).reshape(-1)
        return rows


class Engine(ABC):
    """Runs the steps of one paged layer.

    Args:
        parts: what it shares with the layer.
    """

    def __init__(self, parts: PagedParts) -> None:
        self.parts = parts
        self._trace: LayerTrace | None = None

    @property
    def capturable(self) -> Capturable | None:
        """What counts and launches steps in two halves; None where nothing does."""
        return None

    @property
    @abstractmethod
    def window(self) -> Window:
        """The recent window."""

    @abstractmethod
    def seal(self, seqs: slice, first: int, key: Tensor, value: Tensor) -> None:
        """Digest pages [seqs, kv_heads, pages, page_size, dim] from number `first` on, back them up
        and, where there is room, have them at hand."""

    def write_next(self, _key: Tensor, _value: Tensor) -> bool:
        """Write a token [batch, kv_heads, 1, dim] into the windows of all sequences, which may
        differ in length, and count it; False where the engine has no short way to, and nothing was
        done."""
        return False

    def seal_next(self, _key: Tensor, _value: Tensor) -> bool:
        """The same for a token with which pages are full, which are sealed and counted."""
        return False

    @abstractmethod
    def attend(self, step: Step, everything: Callable[[], Blocks]) -> Tensor:
        """Attend one new token over sinks, selected pages and recent window.

        everything: gives all tokens of the layer, to compare with what the step attends.
        """

    @abstractmethod
    def read(self, sequence: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Tokens of pages first..last as they were sealed, page by page: key, value [kv_heads,
        tokens, dim]."""

    @abstractmethod
    def unseal(self, sequence: int, first: int) -> None:
        """Forget the pages of a sequence from `first` on, which the store has forgotten."""

    @abstractmethod
    def keep_sequences(self, index: Ids, device_tier: DeviceTier, num_selected: Ids) -> None:
        """Make sequence i what sequence `index[i]` was, in a new device tier, which becomes that of
        the parts; tokens and store have it behind them. See `Layer.keep_sequences`."""

    @abstractmethod
    def check(self) -> None:
        """Raise `IntegrityError` if the metadata contradicts itself or the tiers differ."""

    @abstractmethod
    def stats(self) -> CacheStats:
        """Counters and sizes; the device tier and the host tier are counted by the manager."""

    # -- what is written down, and read again -----------------------------------------------------

    @property
    @abstractmethod
    def digest_kind(self) -> str:
        """Says how digests are laid out: those of an engine that says the same can be restored."""

    @abstractmethod
    def state(self) -> State:
        """What is known of the sealed pages beside their bytes, on any device: "digests", and
        names that begin with "digest", for engines of the same `digest_kind`, others for all."""

    @abstractmethod
    def restore(self, state: State) -> None:
        """Know of the pages that tokens and store hold what `state` says, in an engine that has
        sealed nothing. Without "digests" in it, the pages are digested anew."""

    def digest_anew(self) -> None:
        """Digest all sealed pages as they were kept: what quantising took is not in digests."""
        for sequence, sealed in enumerate(self.parts.tokens.sealed.tolist()):
            seqs = slice(sequence, sequence + 1)
            for first in range(0, sealed, DIGEST_PAGES):
                last = min(first + DIGEST_PAGES, sealed)
                shape = (last - first, self.parts.config.page_size)
                key, value = (
                    plane[None].unflatten(2, shape) for plane in self.read(sequence, first, last)
                )
                self.digest(seqs, first, key, value)

    @abstractmethod
    def digest(self, seqs: slice, first: int, key: Tensor, value: Tensor) -> None:
        """Digest pages [seqs, kv_heads, pages, page_size, dim] from number `first` on."""

    # -- what an engine may have to know; nothing, where it works in step with the host -----------

    def begin_blocks(self) -> None:  # noqa: B027
        """Everything will be attended, block by block."""

    def moved(self) -> None:  # noqa: B027
        """The store has followed its pages into another host tier."""

    def prompt_step(self, step: Step, _visible: Ids, _everything: Callable[[], Blocks]) -> Step:
        """Several new tokens, or one that is attended exactly, are about to attend everything, or
        did so elsewhere; the step as it is to be attended here.

        visible: the number of the last token that each attends [batch, new], -1 for padding.
        """
        return step

    def crop(self, lengths: Ids) -> None:  # noqa: B027
        """Sequences are shortened to `lengths`; pages go back to the window by `unseal`."""

    # -- what not every engine can do ------------------------------------------------------------

    def demote(self) -> None:  # noqa: B027
        """Keep pages that were attended little in the coarse format, if there is one."""

    def rate_with(self, make: Callable[[], PageIndex]) -> None:  # noqa: B027
        """Rate pages by another index from now on."""

    def ratings(self, _step: Step) -> Tensor | None:
        """See `Layer.ratings`."""
        return None

    def time_parts(self, _step: Step) -> dict[str, float] | None:
        """See `Layer.time_parts`."""
        return None

    def log_missed(self, log: MissedLog) -> None:  # noqa: B027
        """Note what steps miss in this log from now on."""

    def trace(self, trace: LayerTrace | None) -> None:
        """Tell this what decode steps do from now on; None is nothing."""
        self._trace = trace
