"""The cache of a layer in two tiers: sealed pages on the host, a working set on the device.

The decode step is `PagedLayer.attend_one`: rate all pages by their digests, select the best, recall
those that are missing into the places of those nobody wants, attend.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.errors import IntegrityError
from arkcache.kernels.torch_digest import BoundingVolumes
from arkcache.kernels.torch_tokens import TokenIndex
from arkcache.pages import Ids, Moves, Residency, sealed_pages
from arkcache.policy import aggregate, ranked_pages, top_pages
from arkcache.stats import CacheStats
from arkcache.step import Counters, Lengths, Step, additive, attend_view
from arkcache.tiering.device import DeviceTier, WorkingSet
from arkcache.tiering.growing import GrowingTensor
from arkcache.tiering.host import HostTier

SEAL_PAGES = 64
"""Pages digested and backed up at a time: bounds the temporaries of a long prompt."""

RELOAD_SHARE = 0.6
"""On a CPU, with more than this share of the selection missing, all of it is copied in one pass
straight into place: 116 pages of 16 KiB take 0.19 ms so, and 104 of them 0.31 ms one by one."""


Held = NDArray[np.bool_]


class PageIndex(Protocol):
    """What decides which pages matter. `page_dim` is the dimension of a digest that is the page."""

    page_dim: int

    def digest(self, key: Tensor) -> Tensor:
        """Digest pages of keys [batch, kv_heads, pages, page_size, dim]."""
        ...

    def score(self, query: Tensor, digests: Tensor) -> Tensor:
        """Rate pages for a scaled query [rows, group, dim]: [rows, group, pages]."""
        ...


def make_index(config: CacheConfig, head_dim: int, device: torch.device) -> PageIndex:
    """The page index that `config.index` names."""
    if config.index == "tokens":
        packed = device.type != "cpu"
        return TokenIndex(config.page_size, head_dim, config.index_bits, packed)
    return BoundingVolumes(config.index)


class PagedLayer:
    """A layer whose sealed pages live in the host tier, with a working set on the device.

    Args:
        config: the cache's settings.
        num_selected: pages that a step selects, per KV head.
        device_tier: the device tier.
        number: which of its working sets is this layer's.
        host: the host tier.
        latent: rate pages by key and value side by side (multi-head latent attention).
    """

    def __init__(
        self,
        config: CacheConfig,
        num_selected: Ids,
        device_tier: DeviceTier,
        number: int,
        host: HostTier,
        latent: bool = False,
    ) -> None:
        geometry = device_tier.geometry
        self.config, self.geometry, self.latent = config, geometry, latent
        self.device_tier, self.number, self.host = device_tier, number, host
        self.columns = 0
        self.lengths = Lengths(np.zeros(geometry.batch, dtype=np.int64))
        self.sealed: Ids = np.zeros(geometry.batch, dtype=np.int64)
        self.counters = Counters()
        self._num_selected = np.tile(num_selected, geometry.batch)
        self._num_places = self.working_set.num_slots - config.num_sink_pages
        self._least_selected = int(num_selected.min())
        self._may_hold = np.minimum(
            np.ceil(self._num_selected * config.device_pool_factor), self._num_places
        ).astype(np.int64)
        self._spare = self._num_places > int(num_selected.max())
        self._plain = self._least_selected == self._num_places
        self._on_cpu = geometry.device.type == "cpu"
        self._piece_bytes = host.block_bytes // geometry.num_kv_heads
        self._residency = Residency(geometry.num_rows, self._num_places)
        self._complete = True  # every selectable page is resident, as far as places go
        self._blocks: Ids = np.full((geometry.batch, 64), -1, dtype=np.int64)
        index_dim = geometry.head_dim + (geometry.value_dim if latent else 0)
        self._index = make_index(config, index_dim, geometry.device)
        self._digests: GrowingTensor | None = None

    @property
    def working_set(self) -> WorkingSet:
        """This layer's part of the device tier."""
        return self.device_tier.working_sets[self.number]

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
        sealed = (new_lengths - self.config.num_recent_tokens) // self.config.page_size
        return int(np.maximum(sealed - self.sealed, 0).sum())

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
                self._residency.place(cache_rows, page - sinks, page, self._may_hold)
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
        if self._plain and self.lengths.uniform and step.bias is None:
            return self._attend_alike(step)
        selectable = np.maximum(self.sealed - self.config.num_sink_pages, 0)
        most = int(selectable.max())
        chosen = None
        if most > self._least_selected:
            chosen = self._select(step, selectable, most)
        else:
            self._complete_residents(selectable)
        return self._attend(step, chosen)

    def _attend_alike(self, step: Step) -> Tensor:
        """`attend_one` where all rows have as much to select from and to attend: the usual case."""
        sealed, length = int(self.sealed[0]), int(self.lengths.of[0])
        sinks, page_size = self.config.num_sink_pages, self.config.page_size
        selectable, num_selected = sealed - sinks, self._num_places
        if selectable > num_selected > 0:
            rating = self._rate(step, selectable)
            self._recall(top_pages(rating, num_selected), None, None)
        elif 0 < selectable <= num_selected:
            self._complete_residents(np.full(self.geometry.batch, selectable))
        num_pages = min(sealed, sinks + num_selected)
        recent = length - sealed * page_size
        self.counters.attended_tokens = (num_pages * page_size + recent) * self.geometry.batch
        key, value = self.working_set.view(num_pages, recent)
        return attend_view(step, key, value, None)

    def _complete_residents(self, selectable: Ids) -> None:
        """Have all selectable pages resident: there are places for all of them."""
        count = np.repeat(selectable, self.geometry.num_kv_heads)
        if self._complete:
            self.counters.pages_hit += int(count.sum())
            return
        everything = np.broadcast_to(np.arange(count.max()), (len(count), int(count.max())))
        self._recall(everything, count, None)
        self._complete = True

    def _rate(self, step: Step, most: int) -> Tensor:
        """Rate the first `most` selectable pages of every row [rows, pages]."""
        assert self._digests is not None
        digests = self._digests.first(self.config.num_sink_pages + most)
        digests = digests.narrow(self._digests.dim, self.config.num_sink_pages, most)
        _, heads, _, dim = step.index_query.shape
        group = heads // self.geometry.num_kv_heads
        query = step.index_query.reshape(self.geometry.num_rows, group, dim)
        score = self._index.score(query * step.scale, digests.flatten(0, 1))
        if self.lengths.uniform and step.bias is None:
            return aggregate(score, self.config.group_reduction)
        sealed = np.repeat(self.sealed, self.geometry.num_kv_heads)[:, None]
        outside = torch.from_numpy(np.arange(most) >= sealed - self.config.num_sink_pages)
        outside = outside.to(score.device)
        hidden = self._hidden_pages(step, most) | outside
        score = score.masked_fill(hidden[:, None], torch.finfo(score.dtype).min)
        rating = aggregate(score, self.config.group_reduction)
        # Again, because a share of a page that exists may underflow to 0 too; pages that do not
        # exist come after those that the user's mask hides.
        rating = rating.masked_fill(hidden, torch.finfo(rating.dtype).min)
        return rating.masked_fill(outside, float("-inf"))

    def _hidden_pages(self, step: Step, most: int) -> Tensor | bool:
        """Which selectable pages the user's mask hides whole [rows, pages]; False for none."""
        if step.bias is None:
            return False
        sinks, page_size = self.config.num_sink_pages, self.config.page_size
        tokens = np.arange(sinks * page_size, (sinks + most) * page_size)
        bias = step.bias(np.broadcast_to(tokens, (self.geometry.batch, 1, len(tokens))))
        # Some models hide with the most negative number rather than with -inf.
        seen = (bias[:, :, :, 0] > torch.finfo(bias.dtype).min / 2).any(dim=2)
        seen = seen.unflatten(2, (most, page_size)).any(dim=3)
        if seen.shape[1] > self.geometry.num_kv_heads:  # expanded latents share their pages
            seen = seen.any(dim=1, keepdim=True)
        hidden: Tensor = ~seen.expand(-1, self.geometry.num_kv_heads, -1).flatten(0, 1)
        return hidden

    def _select(self, step: Step, selectable: Ids, most: int) -> Held | None:
        """Make the best pages resident; returns which places hold them where places are spare."""
        rating = self._rate(step, most)
        count = np.minimum(self._num_selected, np.repeat(selectable, self.geometry.num_kv_heads))
        selected = ranked_pages(rating, int(count.max()))
        self._recall(selected, count, rating if self._spare else None)
        return self._chosen_places(selected, count) if self._spare else None

    def _recall(self, selected: Ids, count: Ids | None, rating: Tensor | None) -> None:
        """Bring what is selected and not resident into the working set.

        selected: selectable pages [rows, most], of which row r wants the first `count[r]` (None is
        all). rating [rows, pages] decides who stays where places are spare.
        """
        sinks = self.config.num_sink_pages
        keep = None
        if rating is not None:
            resident = np.maximum(self._residency.page_of - sinks, 0)
            keep = np.take_along_axis(rating.float().cpu().numpy(), resident, axis=1)
        moves = self._residency.fetch(selected + sinks, int(self.sealed.max()), count, keep)
        num_wanted = selected.size if count is None else int(count.sum())
        num_recalled = len(moves.pages)
        alike = self._plain and count is None
        num_copied = num_recalled
        if alike and self._on_cpu and num_recalled > RELOAD_SHARE * num_wanted:
            self._reload()
            num_copied = num_wanted
        elif num_recalled:
            self._copy_in(moves)
        self.counters.pages_hit += num_wanted - num_recalled
        self.counters.pages_recalled += num_recalled
        self.counters.bytes_recalled += num_copied * self._piece_bytes
        self.counters.pages_evicted += moves.num_evicted

    def _copy_in(self, moves: Moves) -> None:
        """Copy the missing pages from the host tier into their places."""
        sequence, head = np.divmod(moves.rows, self.geometry.num_kv_heads)
        pieces = self._blocks[sequence, moves.pages] * self.geometry.num_kv_heads + head
        pages = self._host_pieces().index_select(0, torch.from_numpy(pieces))
        device = self.geometry.device
        self.working_set.write_pages(
            torch.from_numpy(moves.rows).to(device),
            torch.from_numpy(moves.places + self.config.num_sink_pages).to(device),
            pages.to(device),
        )

    def _reload(self) -> None:
        """Copy all resident pages anew, in one pass straight into the working set."""
        heads = self.geometry.num_kv_heads
        rows = np.arange(self.geometry.num_rows)[:, None]
        pieces = self._blocks[rows // heads, self._residency.page_of] * heads + rows % heads
        self.working_set.load_places(
            self.config.num_sink_pages, self._host_pieces(), torch.from_numpy(pieces)
        )

    def _host_pieces(self) -> Tensor:
        """The host tier with one row per page and head: keys, then values."""
        return self.host.blocks.view(-1, self.host.block_shape[-1])

    def _chosen_places(self, selected: Ids, count: Ids) -> Held:
        """Which places [rows, places] hold selected pages."""
        wanted = np.zeros((self.geometry.num_rows, int(self.sealed.max()) + 1), dtype=np.bool_)
        valid = np.arange(selected.shape[1]) < count[:, None]
        pages = np.where(valid, selected + self.config.num_sink_pages, -1)
        np.put_along_axis(wanted, pages, True, axis=1)
        wanted[:, -1] = False
        chosen: Held = wanted[np.arange(len(wanted))[:, None], self._residency.page_of]
        return chosen

    def _attend(self, step: Step, chosen: Held | None) -> Tensor:
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
        if not self.lengths.uniform or chosen is not None or int(per_row.min()) < widest:
            mask = self._view_mask(held, sinks, recent, num_pages)
        if step.bias is not None:
            tokens = self._view_tokens(num_pages, recent)
            bias = step.bias(tokens)[:, :, :, 0]
            mask = bias if mask is None else mask + bias
        return self.lengths.clear_empty(attend_view(step, key, value, mask))

    def _count_attended(self, per_row: Ids, sinks: Ids, recent: Ids) -> None:
        pages = int(per_row.sum()) / self.geometry.num_kv_heads + int(sinks.sum())
        self.counters.attended_tokens = round(pages * self.config.page_size) + int(recent.sum())

    def _view_mask(self, held: Held, sinks: Ids, recent: Ids, num_pages: int) -> Tensor:
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
        stream = (self.device_tier.stream_key, self.device_tier.stream_value)
        per_block = max(1, stream[0].shape[2] // page_size)
        for first in range(0, int(self.sealed.max()), per_block):
            last = min(first + per_block, int(self.sealed.max()))
            tokens = np.arange(first * page_size, last * page_size)
            for sequence in range(batch):
                self._stream(sequence, first, min(last, int(self.sealed[sequence])))
            inside = tokens < self.sealed[:, None] * page_size
            count = len(tokens)
            key, value = (plane[:, :, :count] for plane in stream)
            yield key, value, np.where(inside, tokens, -1)
        recent = self.lengths.of - self.sealed * page_size
        tokens = np.arange(int(recent.max()))
        numbers = np.where(tokens < recent[:, None], tokens + self.sealed[:, None] * page_size, -1)
        yield *self.working_set.view(0, len(tokens)), numbers

    def _stream(self, sequence: int, first: int, last: int) -> None:
        """Copy pages first..last of a sequence from the host tier into the streaming block."""
        if last <= first:
            return
        packed = self.host.blocks[torch.from_numpy(self._blocks[sequence, first:last])]
        packed = packed.to(self.geometry.device)
        cut = self.config.page_size * self.geometry.head_dim
        for plane, part in (
            (self.device_tier.stream_key, packed[..., :cut]),
            (self.device_tier.stream_value, packed[..., cut:]),
        ):
            pages = part.unflatten(2, (self.config.page_size, -1)).transpose(0, 1)
            plane[sequence, :, : pages.shape[1] * pages.shape[2]] = pages.flatten(1, 2)
        self.counters.bytes_streamed += packed.numel() * packed.element_size()

    # -- changes of shape -------------------------------------------------------------------------

    def crop(self, lengths: Ids) -> None:
        """Shorten every sequence to `lengths`; unsealed pages go back to the window."""
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

    def keep_sequences(self, index: Ids, device_tier: DeviceTier) -> None:
        """Make sequence i what sequence `index[i]` was; pages are shared, not copied.

        device_tier: a new one, for as many sequences as `index` has.
        """
        held = self.held_blocks()
        self._blocks = self._blocks[index]
        self.sealed = self.sealed[index]
        self.lengths = Lengths(self.lengths.of[index])
        self.host.retain(self.held_blocks())
        self.host.release(held)
        heads = self.geometry.num_kv_heads
        rows = (index[:, None] * heads + np.arange(heads)).reshape(-1)
        self._residency.keep_rows(rows)
        self._num_selected, self._may_hold = self._num_selected[rows], self._may_hold[rows]
        on_device = torch.from_numpy(index).to(device_tier.geometry.device)
        if self._digests is not None:
            self._digests.keep_sequences(on_device)
        device_tier.working_sets[self.number].copy_sequences(self.working_set, on_device)
        self.device_tier, self.geometry = device_tier, device_tier.geometry

    def release(self) -> None:
        """Give the layer's blocks back to the host tier."""
        self.host.release(self.held_blocks())
        self._blocks[:] = -1

    def move_blocks(self, host: HostTier) -> None:
        """Follow the layer's blocks into a tier that was extracted from the present one."""
        moved = host.extracted(self.held_blocks())
        self.release()
        for sequence, count in enumerate(self.sealed.tolist()):
            self._blocks[sequence, :count], moved = moved[:count], moved[count:]
        self.host = host

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
        """Every page on the device, sinks included, must be bit-equal to its block on the host."""
        size, cut = self.config.page_size, self.config.page_size * self.geometry.head_dim
        sinks = np.arange(self.config.num_sink_pages)
        for row, places in enumerate(self._residency.page_of):
            sequence, head = divmod(row, self.geometry.num_kv_heads)
            own_sinks = np.where(sinks < self.sealed[sequence], sinks, -1)
            for place, page in enumerate(np.concatenate((own_sinks, places)).tolist()):
                if page < 0:
                    continue
                block = self.host.blocks[int(self._blocks[sequence, page]), head]
                key, value = self.working_set.view(place + 1, 0)
                same = torch.equal(key[sequence, head, :size].cpu().flatten(), block[:cut])
                same &= torch.equal(value[sequence, head, :size].cpu().flatten(), block[cut:])
                if not same:
                    raise IntegrityError(f"page {page} of row {row} differs from its backup")

    def stats(self) -> CacheStats:
        """Counters and sizes; the device tier and the host tier are counted by the manager."""
        digest_bytes = 0 if self._digests is None else self._digests.nbytes
        return self.counters.stats(int(self.lengths.of.sum())) + CacheStats(
            digest_bytes=digest_bytes
        )
