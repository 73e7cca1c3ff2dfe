"""The cache of one attention layer: dense (everything on the device) or paged (two tiers).

Both kinds take the same calls from the manager: `append`, `attend_one` for a decode step,
`blocks` for several new tokens, `crop`, `keep_sequences`. Tokens are numbered per sequence without
padding; the manager knows which columns of a batch they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.errors import IntegrityError
from arkcache.kernels.torch_attention import Block, decode_attention
from arkcache.kernels.torch_digest import BoundingVolumes
from arkcache.kernels.torch_tokens import TokenIndex
from arkcache.pages import Ids, Residency, sealed_pages
from arkcache.policy import aggregate, ranked_pages, top_pages
from arkcache.stats import CacheStats
from arkcache.tiering.device import Geometry, WorkingSet
from arkcache.tiering.growing import GrowingTensor
from arkcache.tiering.host import HostTier

SEAL_PAGES = 64
"""Pages digested and backed up at a time: bounds the temporaries of a long prompt."""

Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Turns stored keys and values into those to attend (multi-head latent attention)."""


class PageIndex(Protocol):
    """What decides which pages matter. `page_dim` is the dimension of a digest that counts pages."""

    page_dim: int

    def digest(self, key: Tensor) -> Tensor:
        """Digest pages of keys [batch, kv_heads, pages, page_size, dim]."""
        ...

    def score(self, query: Tensor, digests: Tensor) -> Tensor:
        """Rate pages for a scaled query [rows, group, dim]: [rows, group, pages]."""
        ...


def make_index(config: CacheConfig, head_dim: int) -> PageIndex:
    """The page index that `config.index` names."""
    if config.index == "tokens":
        return TokenIndex(config.page_size, head_dim, config.index_bits)
    return BoundingVolumes(config.index)


@dataclass(frozen=True)
class Step:
    """How a query is to be attended.

    query [batch, heads, new, head_dim]. index_query is what pages are rated by: the query itself,
    or its image in the latent space. positions(tokens) gives the additive mask of the user for
    token numbers [batch, kv_heads, tokens], or is None.
    """

    query: Tensor
    scale: float
    index_query: Tensor
    softcap: float | None = None
    sinks: Tensor | None = None
    expand: Expand | None = None
    bias: Callable[[Ids], Tensor] | None = None


@dataclass
class Counters:
    """What a layer did since the last reset; see `CacheStats` for the units."""

    attended_tokens: int = 0
    pages_hit: int = 0
    pages_recalled: int = 0
    pages_evicted: int = 0
    bytes_recalled: int = 0
    bytes_streamed: int = 0
    bytes_backed_up: int = 0

    def stats(self, total_tokens: int) -> CacheStats:
        """As `CacheStats`, without sizes."""
        return CacheStats(total_tokens=total_tokens, **vars(self))


@dataclass
class Lengths:
    """Tokens per sequence of a layer, without padding."""

    of: Ids
    uniform: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        self.uniform = bool((self.of == self.of[0]).all())

    def groups(self) -> list[slice]:
        """Runs of sequences of equal length, to be handled together."""
        if self.uniform:
            return [slice(0, len(self.of))]
        return [slice(b, b + 1) for b in range(len(self.of))]

    def set(self, rows: slice, length: int) -> None:
        """Sequences `rows` now hold `length` tokens; call `__post_init__` after the last of them."""
        self.of[rows] = length


def attend_view(step: Step, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attend one new token over a view of keys and values [batch, kv_heads, tokens, dim].

    mask is additive [batch, kv_heads or 1, group or 1, tokens]. Returns [batch, heads, 1, dim].
    """
    if step.expand is not None:
        key, value = step.expand(key, value)
    batch, num_heads, _, head_dim = step.query.shape
    num_kv_heads = key.shape[1]
    group = num_heads // num_kv_heads
    sinks = None if step.sinks is None else step.sinks.reshape(num_kv_heads, group)
    output = decode_attention(
        step.query.reshape(batch, num_kv_heads, group, head_dim),
        key,
        value,
        scale=step.scale,
        softcap=step.softcap,
        sinks=sinks,
        mask=mask if mask is None or mask.dtype == step.query.dtype else mask.to(step.query.dtype),
    )
    return output.reshape(batch, num_heads, 1, output.shape[-1])


class DenseLayer:
    """A layer that attends everything: its keys and values stay in the device tier, contiguous."""

    BLOCK_TOKENS = 4096

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.columns = 0
        self.lengths = Lengths(np.zeros(geometry.batch, dtype=np.int64))
        self.counters = Counters()
        shape = (geometry.batch, geometry.num_kv_heads, 64)
        self._key = GrowingTensor((*shape, geometry.head_dim), 2, geometry.dtype, geometry.device)
        self._value = GrowingTensor((*shape, geometry.value_dim), 2, geometry.dtype, geometry.device)

    def append(self, rows: slice, key: Tensor, value: Tensor) -> None:
        """Append tokens [sequences, kv_heads, new, dim] to sequences of equal length."""
        length = int(self.lengths.of[rows.start])
        self._key.write(rows, length, key)
        self._value.write(rows, length, value)
        self.lengths.set(rows, length + key.shape[2])

    def attend_one(self, step: Step) -> Tensor:
        """Attend one new token over all tokens."""
        longest = int(self.lengths.of.max())
        mask = None
        if not self.lengths.uniform or step.bias is not None:
            tokens = np.arange(longest)[None, None, :]
            mask = additive(tokens < self.lengths.of[:, None, None], self.geometry.device)
            if step.bias is not None:
                tokens = np.broadcast_to(tokens, (self.geometry.batch, 1, longest))
                mask = mask + step.bias(tokens)[:, :, :, 0]
        self.counters.attended_tokens = int(self.lengths.of.sum())
        return attend_view(step, self._key.first(longest), self._value.first(longest), mask)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Ids]]:
        """All tokens, block by block: key, value [batch, kv_heads, tokens, dim] and token numbers
        [batch, tokens], -1 where a sequence has none."""
        self.counters.attended_tokens = int(self.lengths.of.sum())
        longest = int(self.lengths.of.max())
        for start in range(0, longest, self.BLOCK_TOKENS):
            stop = min(start + self.BLOCK_TOKENS, longest)
            tokens = np.broadcast_to(np.arange(start, stop), (self.geometry.batch, stop - start))
            tokens = np.where(tokens < self.lengths.of[:, None], tokens, -1)
            yield self._key.first(longest)[:, :, start:stop], self._value.first(longest)[:, :, start:stop], tokens

    def blocks_needed(self, _new_lengths: Ids) -> int:
        """Host blocks that growing to these lengths takes: none."""
        return 0

    def crop(self, lengths: Ids) -> None:
        """Shorten every sequence to `lengths`."""
        self.lengths = Lengths(lengths.copy())

    def keep_sequences(self, index: Ids, geometry: Geometry) -> None:
        """Make sequence i what sequence `index[i]` was."""
        self.geometry = geometry
        on_device = torch.from_numpy(index).to(geometry.device)
        self._key.keep_sequences(on_device)
        self._value.keep_sequences(on_device)
        self.lengths = Lengths(self.lengths.of[index])

    def release(self) -> None:
        """Free what the layer holds outside itself: nothing."""

    def held_blocks(self) -> Ids:
        """Host blocks that the layer refers to: none."""
        return np.zeros(0, dtype=np.int64)

    def check(self) -> None:
        """Raise `IntegrityError` if the books contradict each other."""
        if self.lengths.of.max() > self._key.data.shape[2]:
            raise IntegrityError("a dense layer counts more tokens than it has room for")

    def stats(self) -> CacheStats:
        """Counters and sizes."""
        size = CacheStats(device_bytes=self._key.nbytes + self._value.nbytes)
        return self.counters.stats(int(self.lengths.of.sum())) + size


def additive(attended: np.ndarray, device: torch.device) -> Tensor:  # type: ignore[type-arg]
    """Turn True (attended) and False into 0 and -inf: [batch, kv_heads or 1, 1, tokens]."""
    bias = np.where(attended, np.float32(0), np.float32(-np.inf))
    return torch.from_numpy(bias).to(device)[:, :, None]


class PagedLayer:
    """A layer whose sealed pages live in the host tier, with a working set on the device.

    Args:
        config: the cache's settings.
        num_selected: pages that a step selects, per KV head.
        geometry: sizes shared by the layers.
        working_set: this layer's part of the device tier.
        host: the host tier.
        latent: rate pages by key and value side by side (multi-head latent attention).
        stream: key and value block in the device tier through which the past is streamed.
    """

    def __init__(
        self,
        config: CacheConfig,
        num_selected: Ids,
        geometry: Geometry,
        working_set: WorkingSet,
        host: HostTier,
        stream: tuple[Tensor, Tensor],
        latent: bool = False,
    ) -> None:
        self.config, self.geometry, self.latent = config, geometry, latent
        self.working_set, self.host, self.stream = working_set, host, stream
        self.columns = 0
        self.lengths = Lengths(np.zeros(geometry.batch, dtype=np.int64))
        self.sealed: Ids = np.zeros(geometry.batch, dtype=np.int64)
        self.counters = Counters()
        self._num_selected = np.tile(num_selected, geometry.batch)
        self._num_places = working_set.num_slots - config.num_sink_pages
        self._spare = self._num_places > int(num_selected.min(initial=self._num_places))
        self._residency = Residency(geometry.num_rows, self._num_places)
        self._complete = True  # every selectable page is resident, as far as places go
        self._blocks: Ids = np.full((geometry.batch, 64), -1, dtype=np.int64)
        index_dim = geometry.head_dim + (geometry.value_dim if latent else 0)
        self._index = make_index(config, index_dim)
        self._digests: GrowingTensor | None = None

    # -- append and seal ------------------------------------------------------------------------

    def append(self, rows: slice, key: Tensor, value: Tensor) -> None:
        """Append tokens [sequences, kv_heads, new, dim] to sequences of equal length."""
        config, window = self.config, self.working_set
        length, first = int(self.lengths.of[rows.start]), int(self.sealed[rows.start])
        page_size = config.page_size
        fill, new_tokens = length - first * page_size, key.shape[2]
        last = sealed_pages(length + new_tokens, config.num_recent_tokens, page_size)
        if last == first:
            window.key_window[rows, :, fill : fill + new_tokens] = key
            window.value_window[rows, :, fill : fill + new_tokens] = value
        else:
            if fill:
                key = torch.cat((window.key_window[rows, :, :fill], key), dim=2)
                value = torch.cat((window.value_window[rows, :, :fill], value), dim=2)
            cut = (last - first) * page_size
            self._seal(rows, first, key[:, :, :cut], value[:, :, :cut])
            left = key.shape[2] - cut
            window.key_window[rows, :, :left] = key[:, :, cut:]
            window.value_window[rows, :, :left] = value[:, :, cut:]
        self.lengths.set(rows, length + new_tokens)

    def blocks_needed(self, new_lengths: Ids) -> int:
        """Host blocks that growing to these lengths takes."""
        recent, page_size = self.config.num_recent_tokens, self.config.page_size
        pages = [sealed_pages(int(length), recent, page_size) for length in new_lengths]
        return int((np.array(pages) - self.sealed).clip(min=0).sum())

    def _seal(self, rows: slice, first: int, key: Tensor, value: Tensor) -> None:
        """Digest, back up and, where there is room, place pages from number `first` on."""
        page_size = self.config.page_size
        key = key.unflatten(2, (-1, page_size))
        value = value.unflatten(2, (-1, page_size))
        for start in range(0, key.shape[2], SEAL_PAGES):
            stop = min(start + SEAL_PAGES, key.shape[2])
            part = (key[:, :, start:stop], value[:, :, start:stop])
            self._digest(rows, first + start, *part)
            self._back_up(rows, first + start, *part)
        room = min(first + key.shape[2], self.working_set.num_slots) - first
        if room > 0:
            self.working_set.fill_places(rows, first, key[:, :, :room], value[:, :, :room])
            heads = self.geometry.num_kv_heads
            cache_rows = slice(rows.start * heads, rows.stop * heads)
            sinks = self.config.num_sink_pages
            for page in range(max(first, sinks), first + room):
                self._residency.place(cache_rows, page - sinks, page)
        self.sealed[rows] = first + key.shape[2]

    def _digest(self, rows: slice, first: int, key: Tensor, value: Tensor) -> None:
        digest = self._index.digest(torch.cat((key, value), dim=-1) if self.latent else key)
        dim = self._index.page_dim
        if self._digests is None:
            shape = list(digest.shape)
            shape[0], shape[dim] = self.geometry.batch, 64
            self._digests = GrowingTensor(tuple(shape), dim, digest.dtype, digest.device)
        self._digests.write(rows, first, digest)

    def _back_up(self, rows: slice, first: int, key: Tensor, value: Tensor) -> None:
        count = key.shape[2]
        blocks = self.host.allocate((rows.stop - rows.start) * count).reshape(-1, count)
        packed = torch.cat((key.flatten(3), value.flatten(3)), dim=-1).transpose(1, 2)
        target = torch.from_numpy(blocks.reshape(-1))
        self.host.blocks[target] = packed.flatten(0, 1).to(self.host.blocks.device)
        if self._blocks.shape[1] < first + count:
            missing = max(first + count, 2 * self._blocks.shape[1]) - self._blocks.shape[1]
            self._blocks = np.pad(self._blocks, ((0, 0), (0, missing)), constant_values=-1)
        self._blocks[rows, first : first + count] = blocks
        self.counters.bytes_backed_up += blocks.size * self.host.block_bytes

    # -- one new token: score, select, recall, attend ---------------------------------------------

    def attend_one(self, step: Step) -> Tensor:
        """Attend one new token over the sinks, the selected pages and the recent window."""
        selectable = np.maximum(self.sealed - self.config.num_sink_pages, 0)
        most = int(selectable.max())
        chosen = None
        if most > int(self._num_selected.min()):
            chosen = self._select(step, selectable, most)
        elif not self._complete:
            everything = np.broadcast_to(np.arange(most), (self.geometry.num_rows, most))
            self._recall(everything, np.repeat(selectable, self.geometry.num_kv_heads), None)
            self._complete = True
        else:
            self.counters.pages_hit += int(selectable.sum()) * self.geometry.num_kv_heads
        return self._attend(step, chosen)

    def _select(self, step: Step, selectable: Ids, most: int) -> Ids | None:
        """Rate the pages, make the best resident; returns the selection where places are spare."""
        assert self._digests is not None
        sinks, rows = self.config.num_sink_pages, self.geometry.num_rows
        digests = self._digests.first(sinks + most).narrow(self._digests.dim, sinks, most)
        batch, heads, _, dim = step.index_query.shape
        query = step.index_query.reshape(rows, heads // self.geometry.num_kv_heads, dim)
        score = self._index.score(query * step.scale, digests.flatten(0, 1))
        row_selectable = np.repeat(selectable, self.geometry.num_kv_heads)
        if not self.lengths.uniform:
            outside = np.arange(most) >= row_selectable[:, None]
            score = score + additive(~outside[:, None], self.geometry.device)[:, :, 0]
        rating = aggregate(score, self.config.group_reduction)
        count = np.minimum(self._num_selected, row_selectable)
        same = int(count.min()) == int(count.max())
        choose = top_pages if same else ranked_pages
        selected = choose(rating, int(count.max()))
        self._recall(selected, count, rating if self._spare else None)
        return self._chosen_places(selected, count) if self._spare else None

    def _recall(self, selected: Ids, count: Ids, rating: Tensor | None) -> None:
        """Bring what is selected and not resident into the working set."""
        sinks, heads = self.config.num_sink_pages, self.geometry.num_kv_heads
        keep = None
        if rating is not None:
            resident = np.maximum(self._residency.page_of - sinks, 0)
            keep = np.take_along_axis(rating.float().cpu().numpy(), resident, axis=1)
        moves = self._residency.fetch(selected + sinks, count, int(self.sealed.max()), keep)
        num_recalled = len(moves.pages)
        if num_recalled:
            sequence, head = moves.rows // heads, moves.rows % heads
            pieces = torch.from_numpy(self._blocks[sequence, moves.pages] * heads + head)
            pages = self.host.blocks.view(-1, self.host.block_shape[-1]).index_select(0, pieces)
            device = self.geometry.device
            self.working_set.write_pages(
                torch.from_numpy(moves.rows).to(device),
                torch.from_numpy(moves.places + sinks).to(device),
                pages.to(device),
            )
            self.counters.bytes_recalled += pages.numel() * pages.element_size()
        self.counters.pages_recalled += num_recalled
        self.counters.pages_evicted += moves.num_evicted
        self.counters.pages_hit += int(count.sum()) - num_recalled

    def _chosen_places(self, selected: Ids, count: Ids) -> Ids:
        """Which places [rows, places] hold selected pages (True as 1)."""
        wanted = np.zeros((self.geometry.num_rows, int(self.sealed.max()) + 1), dtype=np.bool_)
        valid = np.arange(selected.shape[1]) < count[:, None]
        pages = np.where(valid, selected + self.config.num_sink_pages, -1)
        np.put_along_axis(wanted, pages, True, axis=1)
        wanted[:, -1] = False
        chosen: Ids = np.take_along_axis(wanted, self._residency.page_of, axis=1)
        return chosen

    def _attend(self, step: Step, chosen: Ids | None) -> Tensor:
        config = self.config
        sinks = np.minimum(self.sealed, config.num_sink_pages)
        recent = self.lengths.of - self.sealed * config.page_size
        held = self._residency.page_of >= 0 if chosen is None else chosen
        per_row = held.sum(axis=1)
        self._count_attended(per_row, sinks, recent)
        # Places fill from the first on, so the last held one bounds the view.
        widest = int(per_row.max(initial=0))
        if chosen is not None:
            widest = int((held * np.arange(1, self._num_places + 1)).max(initial=0))
        num_pages = int(sinks.max()) + widest
        key, value = self.working_set.view(num_pages, int(recent.max()))
        mask = None
        if not self.lengths.uniform or chosen is not None or per_row.min(initial=0) < widest:
            mask = self._view_mask(held, sinks, recent, num_pages)
        if step.bias is not None:
            tokens = self._view_tokens(num_pages, recent)
            bias = step.bias(tokens)[:, :, :, 0]
            mask = bias if mask is None else mask + bias
        return attend_view(step, key, value, mask)

    def _count_attended(self, per_row: Ids, sinks: Ids, recent: Ids) -> None:
        pages = int(per_row.sum()) / self.geometry.num_kv_heads + int(sinks.sum())
        self.counters.attended_tokens = round(pages * self.config.page_size) + int(recent.sum())

    def _view_mask(self, held: Ids, sinks: Ids, recent: Ids, num_pages: int) -> Tensor:
        """The additive mask of a view whose rows differ: [batch, kv_heads, 1, tokens]."""
        batch, heads = self.geometry.batch, self.geometry.num_kv_heads
        num_sinks = self.config.num_sink_pages
        places = np.zeros((batch, heads, self.working_set.num_slots), dtype=np.bool_)
        places[:, :, :num_sinks] = (np.arange(num_sinks) < sinks[:, None])[:, None]
        places[:, :, num_sinks:] = held.reshape(batch, heads, -1)
        pages = places[:, :, :num_pages][:, :, ::-1].repeat(self.config.page_size, axis=2)
        window = np.arange(int(recent.max())) < recent[:, None]
        window = np.broadcast_to(window[:, None], (batch, heads, window.shape[1]))
        return additive(np.concatenate((pages, window), axis=2), self.geometry.device)

    def _view_tokens(self, num_pages: int, recent: Ids) -> Ids:
        """Token numbers of a view [batch, kv_heads, tokens]; 0 for empty places."""
        batch, heads, page_size = (
            self.geometry.batch,
            self.geometry.num_kv_heads,
            self.config.page_size,
        )
        num_sinks = self.config.num_sink_pages
        pages = np.zeros((batch, heads, self.working_set.num_slots), dtype=np.int64)
        pages[:, :, :num_sinks] = np.arange(num_sinks)
        pages[:, :, num_sinks:] = np.maximum(self._residency.page_of, 0).reshape(batch, heads, -1)
        tokens = pages[:, :, :num_pages][:, :, ::-1, None] * page_size + np.arange(page_size)
        window = self.sealed[:, None] * page_size + np.arange(int(recent.max()))
        window = np.broadcast_to(window[:, None], (batch, heads, window.shape[1]))
        return np.concatenate((tokens.reshape(batch, heads, -1), window), axis=2)

    # -- several new tokens: everything, streamed -------------------------------------------------

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Ids]]:
        """All tokens, block by block through the device tier: key, value [batch, kv_heads, tokens,
        dim] and token numbers [batch, tokens], -1 where a sequence has none.

        The sealed pages come from the host tier, the rest from the window. A block is overwritten
        when the next one is asked for.
        """
        self.counters.attended_tokens = int(self.lengths.of.sum())
        page_size, batch = self.config.page_size, self.geometry.batch
        per_block = max(1, self.stream[0].shape[2] // page_size)
        for first in range(0, int(self.sealed.max()), per_block):
            last = min(first + per_block, int(self.sealed.max()))
            tokens = np.arange(first * page_size, last * page_size)
            for sequence in range(batch):
                self._stream(sequence, first, min(last, int(self.sealed[sequence])))
            inside = tokens < self.sealed[:, None] * page_size
            count = len(tokens)
            key, value = (plane[:, :, :count] for plane in self.stream)
            yield key, value, np.where(inside, tokens, -1)
        recent = self.lengths.of - self.sealed * page_size
        tokens = np.arange(int(recent.max()))
        numbers = np.where(
            tokens < recent[:, None], tokens + self.sealed[:, None] * page_size, -1
        )
        yield *self.working_set.view(0, len(tokens)), numbers

    def _stream(self, sequence: int, first: int, last: int) -> None:
        """Copy pages first..last of a sequence from the host tier into the streaming block."""
        if last <= first:
            return
        packed = self.host.blocks[torch.from_numpy(self._blocks[sequence, first:last])]
        packed = packed.to(self.geometry.device)
        cut = self.config.page_size * self.geometry.head_dim
        for plane, part in zip(self.stream, (packed[..., :cut], packed[..., cut:]), strict=True):
            pages = part.unflatten(2, (self.config.page_size, -1)).transpose(0, 1)
            plane[sequence, :, : pages.shape[1] * pages.shape[2]] = pages.flatten(1, 2)
        self.counters.bytes_streamed += packed.numel() * packed.element_size()

    # -- changes of shape -------------------------------------------------------------------------

    def crop(self, lengths: Ids) -> None:
        """Shorten every sequence to `lengths`; pages that are no longer full go back to the window."""
        for sequence, length in enumerate(lengths.tolist()):
            self._crop_sequence(sequence, length)
        self.lengths = Lengths(lengths.copy())

    def _crop_sequence(self, sequence: int, length: int) -> None:
        page_size, heads = self.config.page_size, self.geometry.num_kv_heads
        sealed = int(self.sealed[sequence])
        left = sealed_pages(length, self.config.num_recent_tokens, page_size)
        if left >= sealed:
            return
        rows = slice(sequence, sequence + 1)
        unsealed = self._blocks[sequence, left:sealed]
        fill = int(self.lengths.of[sequence]) - sealed * page_size
        packed = self.host.blocks[torch.from_numpy(unsealed)].to(self.geometry.device)
        cut = page_size * self.geometry.head_dim
        keep = length - left * page_size
        for window, part in (
            (self.working_set.key_window, packed[..., :cut]),
            (self.working_set.value_window, packed[..., cut:]),
        ):
            pages = part.unflatten(2, (page_size, -1)).transpose(0, 1).flatten(1, 2)
            tokens = torch.cat((pages[None], window[rows, :, :fill]), dim=2)[:, :, :keep]
            window[rows, :, :keep] = tokens
        self.host.release(unsealed)
        self._blocks[sequence, left:sealed] = -1
        self.sealed[sequence] = left
        num_left = max(0, left - self.config.num_sink_pages)
        self._residency.drop_from(slice(sequence * heads, (sequence + 1) * heads), left, num_left)
        self._complete = False

    def keep_sequences(
        self, index: Ids, geometry: Geometry, working_set: WorkingSet, stream: tuple[Tensor, Tensor]
    ) -> None:
        """Make sequence i what sequence `index[i]` was; pages are shared, not copied."""
        held = self.held_blocks()
        self._blocks = self._blocks[index]
        self.sealed = self.sealed[index]
        self.lengths = Lengths(self.lengths.of[index])
        self.host.retain(self.held_blocks())
        self.host.release(held)
        heads = self.geometry.num_kv_heads
        rows = (index[:, None] * heads + np.arange(heads)).reshape(-1)
        self._residency.keep_rows(rows)
        self._num_selected = self._num_selected[rows]
        if self._digests is not None:
            self._digests.keep_sequences(torch.from_numpy(index).to(geometry.device))
        self.geometry, self.working_set, self.stream = geometry, working_set, stream

    def release(self) -> None:
        """Give the layer's blocks back to the host tier."""
        self.host.release(self.held_blocks())
        self._blocks[:] = -1

    def held_blocks(self) -> Ids:
        """Host blocks that the layer refers to, one entry per sequence and page."""
        held: Ids = self._blocks[self._blocks >= 0]
        return held

    def check(self) -> None:
        """Raise `IntegrityError` if the books contradict each other or the tiers differ."""
        self._residency.check()
        config = self.config
        for sequence, length in enumerate(self.lengths.of.tolist()):
            expected = sealed_pages(length, config.num_recent_tokens, config.page_size)
            blocks = self._blocks[sequence]
            if expected != self.sealed[sequence] or np.count_nonzero(blocks >= 0) != expected:
                raise IntegrityError(
                    f"sequence {sequence} of {length} tokens should have {expected} sealed pages"
                )
        self._check_residents()

    def _check_residents(self) -> None:
        """Every resident page must be bit-equal to its block in the host tier."""
        heads = self.geometry.num_kv_heads
        cut = self.config.page_size * self.geometry.head_dim
        for row, places in enumerate(self._residency.page_of):
            sequence, head = divmod(row, heads)
            for place, page in enumerate(places.tolist()):
                if page < 0:
                    continue
                block = self.host.blocks[int(self._blocks[sequence, page]), head]
                position = place + 1 + self.config.num_sink_pages
                key, value = self.working_set.view(position, 0)
                size = self.config.page_size
                same = torch.equal(key[sequence, head, :size].cpu().flatten(), block[:cut])
                same &= torch.equal(value[sequence, head, :size].cpu().flatten(), block[cut:])
                if not same:
                    raise IntegrityError(f"page {page} of row {row} differs from its backup")

    def stats(self) -> CacheStats:
        """Counters and sizes; the device tier and the host tier are counted by the manager."""
        digest_bytes = 0 if self._digests is None else self._digests.nbytes
        return self.counters.stats(int(self.lengths.of.sum())) + CacheStats(digest_bytes=digest_bytes)


def causal_blocks(
    layer: DenseLayer | PagedLayer, step: Step, last_visible: Ids
) -> Iterator[Block]:
    """The blocks of a layer with the masks of several new tokens.

    last_visible [batch, new]: the number of the last token that each new token attends.
    """
    device = step.query.device
    visible = torch.from_numpy(last_visible).to(device)
    least = int(last_visible.min())
    new_tokens = last_visible.shape[1]
    for key, value, numbers in layer.blocks():
        if numbers.shape[1] == 0:
            continue
        held = numbers >= 0
        first = int(numbers[held].min()) if held.any() else 0
        seen_from = int(np.argmax((last_visible >= first).any(axis=0)))
        if not (last_visible >= first).any():
            seen_from = new_tokens
        plain = bool(held.all()) and int(numbers.max()) <= least and step.bias is None
        mask = None if plain else _causal_mask(step, numbers, visible)
        if step.expand is not None:
            key, value = step.expand(key, value)
        yield Block(key, value, seen_from, mask)


def _causal_mask(
    step: Step, numbers: Ids, visible: Tensor
) -> Callable[[int, int], Tensor | None]:
    tokens = torch.from_numpy(numbers).to(visible.device)
    bias = None if step.bias is None else step.bias(np.maximum(numbers, 0)[:, None])

    def mask(start: int, stop: int) -> Tensor:
        hidden = (tokens[:, None] > visible[:, start:stop, None]) | (tokens[:, None] < 0)
        block = torch.zeros(hidden.shape, device=visible.device).masked_fill_(hidden, float("-inf"))
        if bias is None:
            return block[:, None, None]
        return block[:, None, None] + bias[..., start:stop, :]

    return mask
