"""The cache of a layer that attends everything, in the device tier."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from arkcache.engines.engine import Blocks, State
from arkcache.engines.step import Step, additive, attend_view
from arkcache.errors import IntegrityError
from arkcache.layers.layer import Layer
from arkcache.pages.bookkeeping import Ids
from arkcache.stats import CacheStats
from arkcache.tiering.device import DeviceTier, Geometry
from arkcache.tiering.growing import FIRST_ENTRIES, GrowingTensor
from arkcache.tiering.transfer import upload


class DenseLayer(Layer):
    """A layer that attends everything: its keys and values stay in the device tier, contiguous."""

    BLOCK_TOKENS = 4096

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        shape = (geometry.batch, geometry.num_kv_heads, FIRST_ENTRIES)
        self._key = GrowingTensor((*shape, geometry.head_dim), 2, geometry.dtype, geometry.device)
        self._value = GrowingTensor(
            (*shape, geometry.value_dim), 2, geometry.dtype, geometry.device
        )

    def _append(self, seqs: slice, key: Tensor, value: Tensor) -> None:
        """See `Layer`."""
        length = int(self.tokens.lengths[seqs.start])
        self._key.write(seqs, length, key)
        self._value.write(seqs, length, value)
        self.tokens.set(seqs, length + key.shape[2])

    def attend_one(self, step: Step) -> Tensor:
        """See `Layer`."""
        longest = self.tokens.longest
        mask = None
        if not self.tokens.uniform or step.bias is not None:
            tokens = np.arange(longest)[None, None, :]
            mask = additive(tokens < self.tokens.lengths[:, None, None], self.geometry.device)
            if step.bias is not None:
                tokens = np.broadcast_to(tokens, (self.geometry.batch, 1, longest))
                mask = mask + step.bias(tokens)[:, :, :, 0]
        self.counters.attended_tokens = self.tokens.total
        output = attend_view(step, self._key.first(longest), self._value.first(longest), mask)
        return self.tokens.clear_empty(output)

    def blocks(self) -> Blocks:
        """See `Layer`."""
        self.counters.attended_tokens = self.tokens.total
        longest = self.tokens.longest
        for start in range(0, max(1, longest), self.BLOCK_TOKENS):
            stop = min(start + self.BLOCK_TOKENS, longest)
            tokens = np.broadcast_to(np.arange(start, stop), (self.geometry.batch, stop - start))
            tokens = np.where(tokens < self.tokens.lengths[:, None], tokens, -1)
            yield (
                self._key.read(start, stop),
                self._value.read(start, stop),
                tokens,
            )

    def _state(self) -> State:
        """See `Layer`."""
        longest = self.tokens.longest
        return {"key": self._key.first(longest), "value": self._value.first(longest)}

    def _restore(self, state: State) -> None:
        """See `Layer`."""
        self._key.write(slice(None), 0, state["key"])
        self._value.write(slice(None), 0, state["value"])

    def keep_sequences(self, index: Ids, device_tier: DeviceTier, _num_selected: Ids) -> None:
        """See `Layer`."""
        self.geometry = geometry = device_tier.geometry
        on_device = upload(index, geometry.device)
        self._key.keep_sequences(on_device)
        self._value.keep_sequences(on_device)
        self.tokens.keep_sequences(index)

    def check(self) -> None:
        """See `Layer`."""
        if self.tokens.longest > self._key.capacity:
            raise IntegrityError("a dense layer counts more tokens than it has room for")

    def stats(self) -> CacheStats:
        """See `Layer`."""
        size = CacheStats(device_bytes=self._key.nbytes + self._value.nbytes)
        return self.counters.stats(self.tokens) + size
