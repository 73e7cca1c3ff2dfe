"""A decode step in two halves: counting on the host, and launches that a CUDA graph can replay.

The launches of a step depend on no token count, so that they can be recorded once and replayed
while only the counting goes on. All layers of a manager count alike in such a step, so that their
counts are kept together: to count a token costs the same for two layers as for eighty.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from arkcache.engines.step import Step
from arkcache.pages.bookkeeping import Ids, TokenLog, sealed_counts
from arkcache.pages.counts import Counters, LayerTokens
from arkcache.tiering.host import HostTier

Bools = NDArray[np.bool_]


class CountingRule(NamedTuple):
    """What a layer seals and attends, as far as it follows from token counts.

    Of several layers its numbers are arrays [layers, 1], and `selected` is [layers, ...].

    Attributes:
        recent: tokens that stay unsealed.
        page_size: tokens per page.
        num_sink_pages: pages that are always attended.
        selected: pages that a step selects beside them, of each sequence and KV head
            [batch, kv_heads].
        pieces: of the host tier that a sealed page takes.
    """

    recent: Any
    page_size: Any
    num_sink_pages: Any
    selected: Ids
    pieces: Any


def attended_tokens(lengths: Ids, sealed: Ids, rule: CountingRule) -> Ids:
    """Tokens that a step attends, summed over sequences, the mean over KV heads.

    lengths, sealed: tokens and sealed pages of each sequence [..., batch], of as many layers as the
    rule is for. Returns [...].
    """
    sink_pages = np.minimum(sealed, rule.num_sink_pages)
    num_heads = rule.selected.shape[-1]
    pages = (
        np.minimum((sealed - sink_pages)[..., None], rule.selected).sum(axis=-1)
        + num_heads * sink_pages
    )
    per_head = np.rint((pages * rule.page_size).sum(axis=-1) / num_heads).astype(np.int64)
    attended: Ids = per_head + (lengths - sealed * rule.page_size).sum(axis=-1)
    return attended


class Capturable(ABC):
    """The steps of one layer in two halves: counting on the host, and launches.

    A token is counted for this layer (`count_token`) or for all layers at once (`CapturableSteps`):
    whether a page seals follows from token counts alone. `launch_append` and `launch_attend` queue
    kernels whose shapes and addresses depend on no token count, so that a CUDA graph can replay
    them while the counts go on. Nothing in either waits for the device.

    Attributes:
        tokens, counters: of the layer.
    """

    tokens: LayerTokens
    counters: Counters

    @property
    @abstractmethod
    def rule(self) -> CountingRule:
        """When it seals a page and how much it attends."""

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Make room for sequences of so many tokens, so that no address changes until then."""

    @property
    @abstractmethod
    def addresses(self) -> tuple[int, ...]:
        """Where the tensors that grow are now."""

    @staticmethod
    @abstractmethod
    def make_ready(layers: Sequence[Any], seals: Bools, tokens: int) -> None:
        """Make room in layers of this class for sequences of up to so many tokens, and for the
        pages that seal: of which layer and sequence [layers, batch]."""

    @abstractmethod
    def launch_append(self, seqs: slice, key: Tensor, value: Tensor, seals: bool) -> None:
        """Queue the storing of one token of each sequence; `seals` is what counting it said."""

    @abstractmethod
    def launch_attend(self, step: Step) -> Tensor:
        """Queue the attention of one new token."""

    @abstractmethod
    def counted(self, seqs: slice) -> None:
        """Tokens and sealed pages of these sequences are others now, and no launch says so."""

    def join(self) -> None:  # noqa: B027 - many layers use the main stream alone
        """Have the next kernel wait for what other streams do for this layer."""

    def abandon(self) -> None:  # noqa: B027
        """Forget work that was queued on other streams: recording it failed, so it never runs."""

    def undo(self, lengths: Ids, sealed: Ids) -> None:
        """Go back to these counts, from before a step that did not come to its end."""
        self.join()
        self.tokens.lengths[:], self.tokens.sealed[:] = lengths, sealed
        self.counted(slice(0, len(lengths)))

    def append_token(self, seqs: slice, key: Tensor, value: Tensor) -> None:
        """Append one token of each sequence, of whatever lengths."""
        self.join()  # before anything moves that other streams read
        self.launch_append(seqs, key, value, self.count_token(seqs))

    def attend_token(self, step: Step) -> Tensor:
        """Attend one new token."""
        attended = attended_tokens(self.tokens.lengths, self.tokens.sealed, self.rule)
        self.counters.attended_tokens = int(attended)
        return self.launch_attend(step)

    def count_token(self, seqs: slice) -> bool:
        """Enter one more token of these sequences; returns whether any seals a page with it."""
        tokens, rule = self.tokens, self.rule
        lengths = tokens.lengths[seqs] + 1
        sealed = sealed_counts(lengths, rule.recent, rule.page_size)
        seals = np.zeros((1, len(tokens.lengths)), dtype=np.bool_)
        seals[0, seqs] = sealed > tokens.sealed[seqs]
        self.make_ready([self], seals, int(lengths.max()))
        tokens.lengths[seqs], tokens.sealed[seqs] = lengths, sealed
        return bool(seals.any())


class TokenCounts:
    """Tokens and sealed pages of all layers, [layers, batch]: what each layer counts is a row here.

    Args:
        layers: whose counts are kept here from now on. What gives a layer counts of its own
            (`crop`, `keep_sequences`, a copy) ends that: see `is_kept_by`.
    """

    def __init__(self, layers: Sequence[Capturable]) -> None:
        self.lengths: Ids = np.stack([layer.tokens.lengths for layer in layers])
        self.sealed: Ids = np.stack([layer.tokens.sealed for layer in layers])
        self._rows = list(zip(self.lengths, self.sealed, strict=True))
        # From here on each layer counts in its row of the two arrays: views, not copies.
        for layer, rows in zip(layers, self._rows, strict=True):
            layer.tokens.lengths, layer.tokens.sealed = rows
        rules = [layer.rule for layer in layers]
        self._rule = CountingRule(
            recent=np.array([[rule.recent] for rule in rules]),
            page_size=np.array([[rule.page_size] for rule in rules]),
            num_sink_pages=np.array([[rule.num_sink_pages] for rule in rules]),
            selected=np.stack([rule.selected for rule in rules]),
            pieces=np.array([[rule.pieces] for rule in rules]),
        )

    def is_kept_by(self, layers: Sequence[Capturable]) -> bool:
        """Whether the layers still count here."""
        return all(
            layer.tokens.lengths is lengths and layer.tokens.sealed is sealed
            for layer, (lengths, sealed) in zip(layers, self._rows, strict=True)
        )

    def sealing(self) -> Bools:
        """Of which layer and sequence one token more seals a page [layers, batch]."""
        rule = self._rule
        seals: Bools = sealed_counts(self.lengths + 1, rule.recent, rule.page_size) > self.sealed
        return seals

    def pieces(self, seals: Bools) -> int:
        """Pieces of the host tier that these pages take."""
        return int((seals * self._rule.pieces).sum())

    def pieces_until(self, tokens: int) -> int:
        """Pieces of the host tier that growing to so many tokens of every sequence takes."""
        rule, lengths = self._rule, np.full_like(self.lengths, tokens)
        more = sealed_counts(lengths, rule.recent, rule.page_size) - self.sealed
        return int((np.maximum(more, 0) * rule.pieces).sum())

    def enter(self, seals: Bools) -> None:
        """Count one token more of every sequence, and the pages that it seals."""
        self.lengths += 1
        self.sealed += seals

    def attended(self) -> list[int]:
        """Tokens that a step attends now, in each layer."""
        counts: list[int] = attended_tokens(self.lengths, self.sealed, self._rule).tolist()
        return counts


class CapturableSteps:
    """The steps of a manager whose layers all come in two halves.

    Args:
        layers: all of them.
        log: the manager's columns.

    Attributes:
        host: the manager's host tier; None where no layer uses it.
        running: the planned step that is being launched; None otherwise. Meanwhile a manager's
            `append` and `attend` launch, and count nothing.
        saw_mask: whether a step was attended with a mask, which a recording would keep as it was.
        recordings: of these steps, of whoever replays them; freed with them, and not copied.
    """

    def __init__(self, layers: Sequence[Capturable], log: TokenLog, host: HostTier | None) -> None:
        self.layers = layers
        self.running: PlannedStep | None = None
        self.saw_mask = False
        self.recordings: object = None
        self._log, self.host = log, host
        self._cached_counts: TokenCounts | None = None
        numbers: dict[type[Capturable], list[int]] = {}
        for number, layer in enumerate(layers):
            numbers.setdefault(type(layer), []).append(number)
        self._kinds = [(kind, [layers[i] for i in own], own) for kind, own in numbers.items()]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"recordings": None, "_cached_counts": None}

    @property
    def _counts(self) -> TokenCounts:
        if self._cached_counts is None or not self._cached_counts.is_kept_by(self.layers):
            self._cached_counts = TokenCounts(self.layers)
        return self._cached_counts

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where everything is that moves when it grows: what a graph was captured with."""
        return tuple(address for layer in self.layers for address in layer.addresses)

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens of every sequence: until then no step moves anything.

        Raises `HostTierFullError` where the host tier may not hold them.
        """
        for layer in self.layers:
            layer.reserve(tokens)
        if self.host is not None:
            self.host.check_room([max(1, self._counts.pieces_until(tokens))])

    def seals_next(self) -> bool:
        """Whether a step of one token of every sequence seals pages."""
        return bool(self._counts.sealing().any())

    def plan(self) -> PlannedStep:
        """Count one token more of every sequence in all layers: a step to be run, or undone.

        Raises `HostTierFullError` where the host tier has no room for what it seals. Whatever it
        raises, nothing has changed.
        """
        counts = self._counts
        seals, tokens = counts.sealing(), int(counts.lengths.max()) + 1
        needed = counts.pieces(seals)
        if needed and self.host is not None:
            self.host.check_room([needed])
        planned = PlannedStep(self, bool(seals.any()))
        try:
            self.join()  # a graph cannot wait for what was asked for outside it
            for kind, layers, numbers in self._kinds:
                kind.make_ready(layers, seals[numbers], tokens)
            counts.enter(seals)
            for layer, attended in zip(self.layers, counts.attended(), strict=True):
                layer.tokens.columns += 1
                layer.counters.attended_tokens = attended
                layer.counters.decode_steps += 1
            self._log.extend(1, None)
        except BaseException:  # interrupted, too
            planned.undo()
            raise
        return planned

    def undo(self, before: Before) -> None:
        """Go back to what was counted before a step that did not come to its end."""
        self.running = None
        for layer, columns, counters, *held in zip(self.layers, *before[1:], strict=True):
            layer.undo(*held)
            layer.tokens.columns = columns
            vars(layer.counters).update(vars(counters))
        self._log.crop(before.num_columns)

    def before(self) -> Before:
        """What is counted now, for `undo`."""
        counts = self._counts
        return Before(
            num_columns=self._log.num_columns,
            columns=[layer.tokens.columns for layer in self.layers],
            counters=[replace(layer.counters) for layer in self.layers],
            lengths=counts.lengths.copy(),
            sealed=counts.sealed.copy(),
        )

    def join(self) -> None:
        """Have the next kernels wait for what other streams do for any layer."""
        for layer in self.layers:
            layer.join()

    def abandon(self) -> None:
        """Forget work that was queued on other streams in a step that was to be recorded."""
        for layer in self.layers:
            layer.abandon()


class Before(NamedTuple):
    """Counts from before a step: columns of the manager and of each layer, what each layer did,
    tokens and sealed pages [layers, batch]."""

    num_columns: int
    columns: list[int]
    counters: list[Counters]
    lengths: Ids
    sealed: Ids


class PlannedStep:
    """A step of one token that is counted in all layers and not launched yet.

    Args:
        steps: of the manager.
        seals: whether pages seal with it.
    """

    def __init__(self, steps: CapturableSteps, seals: bool) -> None:
        self.seals = seals
        self._steps, self._before = steps, steps.before()

    @contextmanager
    def run(self, *, recorded: bool = False) -> Iterator[None]:
        """Within it the manager's `append` and `attend` launch what was counted.

        recorded: what is launched is not done now but recorded, so that after a failure there is
            nothing to wait for.
        """
        steps, steps.running = self._steps, self
        try:
            yield
            steps.join()
        except BaseException:
            if recorded:
                steps.abandon()
            else:
                steps.join()  # other streams are still at it
            raise
        finally:
            steps.running = None

    def undo(self) -> None:
        """Take the step back, as if it had never been counted."""
        self._steps.undo(self._before)
