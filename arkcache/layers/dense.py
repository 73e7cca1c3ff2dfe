"""The cache of a layer that attends everything, in the device tier."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from arkcache.engines.step import Counters, Lengths, Step, additive, attend_view
from arkcache.errors import IntegrityError
from arkcache.pages.bookkeeping import Ids
from arkcache.stats import CacheStats
from arkcache.tiering.device import DeviceTier, Geometry
from arkcache.tiering.growing import FIRST_ENTRIES, GrowingTensor
from arkcache.tiering.host import HostTier


class DenseLayer:
    """A layer that attends everything: its keys and values stay in the device tier, contiguous."""

    BLOCK_TOKENS = 4096
    takes_ragged = False
    """Whether one token may be appended to sequences of different lengths at once."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.columns = 0
        self.lengths = Lengths(np.zeros(geometry.batch, dtype=np.int64))
        self.counters = Counters()
        shape = (geometry.batch, geometry.num_kv_heads, FIRST_ENTRIES)
        self._key = GrowingTensor((*shape, geometry.head_dim), 2, geometry.dtype, geometry.device)
        self._value = GrowingTensor(
            (*shape, geometry.value_dim), 2, geometry.dtype, geometry.device
        )

    def append(self, seqs: slice, key: Tensor, value: Tensor) -> None:
        """Append tokens [seqs, kv_heads, new, dim] to sequences of equal length."""
        length = int(self.lengths.of[seqs.start])
        self._key.write(seqs, length, key)
        self._value.write(seqs, length, value)
        self.lengths.set(seqs, length + key.shape[2])

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
        output = attend_view(step, self._key.first(longest), self._value.first(longest), mask)
        return self.lengths.clear_empty(output)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Ids]]:
        """All tokens, block by block: key, value [batch, kv_heads, tokens, dim] and token numbers
        [batch, tokens], -1 where a sequence has none."""
        self.counters.attended_tokens = int(self.lengths.of.sum())
        longest = int(self.lengths.of.max())
        for start in range(0, max(1, longest), self.BLOCK_TOKENS):
            stop = min(start + self.BLOCK_TOKENS, longest)
            tokens = np.broadcast_to(np.arange(start, stop), (self.geometry.batch, stop - start))
            tokens = np.where(tokens < self.lengths.of[:, None], tokens, -1)
            yield (
                self._key.first(longest)[:, :, start:stop],
                self._value.first(longest)[:, :, start:stop],
                tokens,
            )

    def pieces_needed(self, _new_lengths: Ids) -> int:
        """Pieces of the host tier that growing to these lengths takes: none."""
        return 0

    def crop(self, lengths: Ids) -> None:
        """Shorten every sequence to `lengths`."""
        self.lengths = Lengths(lengths.copy())

    def keep_sequences(self, index: Ids, device_tier: DeviceTier) -> None:
        """Make sequence i what sequence `index[i]` was."""
        self.geometry = geometry = device_tier.geometry
        on_device = torch.from_numpy(index).to(geometry.device)
        self._key.keep_sequences(on_device)
        self._value.keep_sequences(on_device)
        self.lengths = Lengths(self.lengths.of[index])

    def release(self) -> None:
        """Free what the layer holds outside itself: nothing."""

    def move_pieces(self, _host: HostTier) -> None:
        """Follow the layer's pages into another host tier: it has none there."""

    def held_pieces(self) -> Ids:
        """Pieces of the host tier that the layer refers to: none."""
        return np.zeros(0, dtype=np.int64)

    def check(self) -> None:
        """Raise `IntegrityError` if the metadata contradicts itself."""
        if self.lengths.of.max() > self._key.data.shape[2]:
            raise IntegrityError("a dense layer counts more tokens than it has room for")

    def stats(self) -> CacheStats:
        """Counters and sizes."""
        size = CacheStats(device_bytes=self._key.nbytes + self._value.nbytes)
        return self.counters.stats(int(self.lengths.of.sum())) + size
