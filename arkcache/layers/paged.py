"""The cache of a layer in two tiers: sealed pages on the host, a working set on the device.

The decode step is its engine's: `HostEngine.attend` in `engines/host.py`, which decides on the
host, and `DeviceEngine.launch_attend` in `engines/device.py`, which decides on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from arkcache.engines.capture import Capturable
from arkcache.engines.engine import Engine, PagedParts, State
from arkcache.engines.missed import MissedLog
from arkcache.engines.step import Step
from arkcache.errors import IntegrityError
from arkcache.layers.sealing import SealingLayer
from arkcache.pages.bookkeeping import Ids, page_runs, sealed_counts
from arkcache.pages.grouping import PageTokens, each_once, grouped_order, tokens_of
from arkcache.pages.index import PageIndex
from arkcache.pages.windows import Window
from arkcache.stats import CacheStats
from arkcache.tiering.device import DeviceTier
from arkcache.tiering.host import HostTier
from arkcache.tiering.read_ahead import read_ahead
from arkcache.tiering.streams import streams_of
from arkcache.tracing.recorder import LayerTrace


class PagedLayer(SealingLayer):
    """A layer whose sealed pages live in the host tier, with a working set on the device.

    Args:
        parts: what it shares with its engine.
        engine: who runs its steps.
    """

    attends_everything = False

    def __init__(self, parts: PagedParts, engine: Engine) -> None:
        super().__init__(parts.config, parts.geometry)
        self.tokens, self.counters = parts.tokens, parts.counters
        self.parts, self.engine = parts, engine

    @property
    def capturable(self) -> Capturable | None:
        """See `Layer`."""
        return self.engine.capturable

    @property
    def window(self) -> Window:
        """The recent window."""
        return self.engine.window

    # -- append and attend ------------------------------------------------------------------------

    def append_next(self, key: Tensor, value: Tensor) -> bool:
        """See `Layer`."""
        tokens = self.tokens
        if tokens.until_seal == 1 and self.engine.seal_next(key, value):
            self._foresee()
            return True
        if tokens.until_seal <= 1 or not self.engine.write_next(key, value):
            return False
        tokens.until_seal -= 1
        return True

    def attend_one(self, step: Step) -> Tensor:
        """Attend one new token over the sinks, the selected pages and the recent window."""
        return self.engine.attend(step, self.blocks)

    def prompt_step(self, step: Step, visible: Ids) -> Step:
        """See `Layer`."""
        return self.engine.prompt_step(step, visible, self.blocks)

    def demote(self) -> None:
        """See `Layer`."""
        self.engine.demote()

    def _seal(self, seqs: slice, first: int, key: Tensor, value: Tensor) -> None:
        if self.parts.page_tokens is not None:
            key, value = self._grouped(self.parts.page_tokens, seqs, first, key, value)
        self.engine.seal(seqs, first, key, value)

    def _grouped(
        self, listed: PageTokens, seqs: slice, first: int, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same tokens in pages of similar ones, the sinks apart; notes which are where."""
        page_size = self.config.page_size
        sinks = min(max(self.config.num_sink_pages - first, 0), key.shape[2]) * page_size
        tokens = key.flatten(2, 3)
        order = grouped_order(tokens, sinks, self.config.segment_tokens, page_size)
        pages = (key.shape[2], page_size)
        numbers = order.unflatten(2, pages) + first * page_size
        listed.write(seqs, first, numbers.cpu().numpy())
        key, value = (_in_order(states, order) for states in (tokens, value.flatten(2, 3)))
        return key.unflatten(2, pages), value.unflatten(2, pages)

    # -- several new tokens: everything, streamed -------------------------------------------------

    def _page_blocks(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """See `SealingLayer`; the next block is read while one is attended."""
        self.engine.begin_blocks()
        page_size, total = self.config.page_size, int(self.tokens.sealed.max())
        blocks = self.parts.device_tier.stream_blocks
        per_block = blocks[0][0].shape[2] // page_size
        runs = page_runs(0, total, per_block, *self.config.sealing[2:])
        loads = [partial(self._load, first, last) for first, last in runs]
        streams = streams_of(self.geometry.device)
        for (first, last), block in zip(runs, read_ahead(streams, blocks, loads), strict=True):
            key, value = (plane[:, :, : (last - first) * page_size] for plane in block)
            yield first, last, key, value

    def _load(self, first: int, last: int, block: Sequence[Tensor]) -> None:
        """Fill a streaming block with pages first..last of every sequence that has them."""
        for sequence in range(self.geometry.batch):
            held = min(last, int(self.tokens.sealed[sequence]))
            if held > first:
                tokens = (held - first) * self.config.page_size
                states = self._read(sequence, first, held)
                for plane, part in zip(block, states, strict=True):
                    plane[sequence, :, :tokens] = part

    def _read(self, sequence: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        listed = self.parts.page_tokens
        if listed is None:
            return self.engine.read(sequence, first, last)
        start, stop = self._whole_segments(first, last)
        page_size = self.config.page_size
        tokens = slice((first - start) * page_size, (last - start) * page_size)
        order = torch.from_numpy(listed.in_order(sequence, start, stop)[:, tokens])
        on_device = order.to(self.geometry.device)
        key, value = self.engine.read(sequence, start, stop)
        return _in_order(key, on_device), _in_order(value, on_device)

    def _whole_segments(self, first: int, last: int) -> tuple[int, int]:
        """The pages of all segments that pages first..last are of."""
        _, _, sinks, segment = self.config.sealing
        if first > sinks:
            first = sinks + (first - sinks) // segment * segment
        if last > sinks:
            last = sinks - (sinks - last) // segment * segment
        return first, last

    # -- changes of shape -------------------------------------------------------------------------

    def ready_to_crop(self, lengths: Ids) -> None:
        """See `Layer`."""
        for sequence, length in enumerate(lengths.tolist()):
            pages = self._whole_segments(*self._unsealed(sequence, length))
            self.parts.store.ready_run(sequence, *pages)

    def name_of(self, handle: int) -> str:
        """See `Layer`."""
        return self.parts.store.name_of(handle)

    def lost_pages(self, lengths: Ids) -> Ids:
        """See `Layer`."""
        if self.config.retention is None:
            return super().lost_pages(lengths)
        config, sealed = self.config, self.tokens.sealed
        first = sealed_counts(lengths, config.num_recent_tokens, config.page_size)
        last = np.minimum(-(-lengths // config.page_size), sealed)
        rows, num_pages = (len(sealed), self.geometry.num_kv_heads), int(sealed.max())
        gone = self.parts.store.gone(num_pages).reshape(*rows, num_pages)
        page = np.arange(num_pages)
        back = (page >= first[:, None]) & (page < last[:, None])
        lost: Ids = np.flatnonzero((gone.any(axis=1) & back).any(axis=0))
        return lost

    def _crop(self, lengths: Ids) -> None:
        """See `Layer`."""
        super()._crop(lengths)
        self.engine.crop(lengths)

    def _unseal(self, sequence: int, first: int, last: int) -> None:
        self.parts.store.forget(sequence, first, last)
        self.engine.unseal(sequence, first)

    def keep_sequences(self, index: Ids, device_tier: DeviceTier, num_selected: Ids) -> None:
        """See `Layer`; pages are shared, not copied."""
        self._join()
        self.parts.store.keep_sequences(index)
        if self.parts.page_tokens is not None:
            self.parts.page_tokens.keep_sequences(index)
        self.tokens.keep_sequences(index)
        self.tokens.until_seal = 0
        self.engine.keep_sequences(index, device_tier, num_selected)
        self.geometry = device_tier.geometry

    # -- what is written down, and read again -----------------------------------------------------

    @property
    def digest_kind(self) -> str:
        """See `Layer`."""
        return self.engine.digest_kind

    def _page_state(self) -> State:
        """See `SealingLayer`; "pieces" are handles of the host tier, by sequence and page,
        "page_tokens" the numbers of grouped tokens [batch, kv_heads, pages, page_size]."""
        most = int(self.tokens.sealed.max())
        state = {"pieces": torch.from_numpy(self.parts.store.handles[:, :, :most].copy())}
        if self.parts.page_tokens is not None:
            state["page_tokens"] = torch.from_numpy(self.parts.page_tokens.first(most)).long()
        return state | self.engine.state()

    def _restore_pages(self, state: State) -> None:
        """See `SealingLayer`."""
        self.parts.store.adopt(state["pieces"].numpy())
        if self.parts.page_tokens is not None:
            self.parts.page_tokens.write(slice(None), 0, state["page_tokens"].numpy())
        self.engine.restore(state)

    # -- pieces of the host tier ------------------------------------------------------------------

    def may_seal(self, columns: int) -> bool:
        """See `Layer`; kernels that count by themselves do not say."""
        return columns >= self.tokens.until_seal or self.capturable is not None

    def pieces_needed(self, new_lengths: Ids) -> int:
        """See `Layer`."""
        sealed = sealed_counts(new_lengths, *self.config.sealing)
        more = int(np.maximum(sealed - self.tokens.sealed, 0).sum())
        return more * self.parts.store.pieces_per_page

    def held_pieces(self) -> Ids:
        """See `Layer`."""
        return self.parts.store.held()

    def move_pieces(self, host: HostTier) -> None:
        """See `Layer`."""
        self.parts.store.move(host)
        self.engine.moved()

    def release(self) -> None:
        """Give the layer's pages back to the host tier, once what is copied there has landed."""
        self._join()
        self.parts.store.release()

    # -- to look at -------------------------------------------------------------------------------

    def check(self) -> None:
        """See `Layer`."""
        self._join()
        self._check_sealed(self.tokens.sealed)
        self._check_sealed(self.parts.store.counts())
        self.parts.store.check()
        listed, sealed = self.parts.page_tokens, self.tokens.sealed
        if listed is not None:
            numbers = listed.first(int(sealed.max()))
            if not each_once(numbers, sealed, *self.config.sealing[2:]):
                raise IntegrityError("a token is on two pages, or on none of its segment")
        self.engine.check()

    def stats(self) -> CacheStats:
        """See `Layer`."""
        pages, listed = int(self.tokens.sealed.sum()), self.parts.page_tokens
        listed_bytes = 0 if listed is None else pages * listed.page_bytes
        num_lost, page_size = self.parts.store.num_gone, self.config.page_size
        lost_tokens = num_lost * page_size // self.geometry.num_kv_heads
        return self.engine.stats() + CacheStats(
            host_tokens=pages * page_size - lost_tokens,
            total_tokens=-lost_tokens,
            pages_lost=num_lost,
            host_bytes=listed_bytes,
            host_resident_bytes=listed_bytes,
        )

    def page_tokens(self) -> Ids | None:
        """See `Layer`."""
        pages = np.arange(int(self.tokens.sealed.max()))[None, None]
        shape = (self.geometry.batch, self.geometry.num_kv_heads, pages.shape[2])
        pages = np.broadcast_to(pages, shape)
        return tokens_of(pages, self.config.page_size, self.parts.page_tokens)

    def rate_with(self, make: Callable[[], PageIndex]) -> None:
        """See `Layer`; what is sealed is digested anew."""
        self.engine.rate_with(make)

    def ratings(self, step: Step) -> Tensor | None:
        """See `Layer`."""
        return self.engine.ratings(step)

    def time_parts(self, step: Step) -> dict[str, float] | None:
        """See `Layer`."""
        return self.engine.time_parts(step)

    def log_missed(self, log: MissedLog) -> None:
        """See `Layer`."""
        self.engine.log_missed(log)

    def trace(self, trace: LayerTrace | None) -> None:
        """See `Layer`."""
        self.engine.trace(trace)


def _in_order(states: Tensor, order: Tensor) -> Tensor:
    """Tokens [..., tokens, dim] in the order [..., count] that their row asks for."""
    return states.gather(-2, order[..., None].expand(*order.shape, states.shape[-1]))
