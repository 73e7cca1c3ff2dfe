"""A manager and its dense oracle, driven together and compared after every step."""

import math

import numpy as np
import torch
from torch import Tensor

from arkcache import CacheConfig, KVCacheManager
from tests.oracle import Oracle

SMALL = {
    "page_size": 4,
    "budget_tokens": 32,
    "num_sink_tokens": 4,
    "num_recent_tokens": 4,
    "num_dense_layers": 0,
    "stream_block_tokens": 16,
}
"""Sinks of one page, five selected pages and a window of at most seven tokens."""


def small_config(**settings: object) -> CacheConfig:
    return CacheConfig(**(SMALL | settings))  # type: ignore[arg-type]


class Twins:
    """A `KVCacheManager` on random data beside its `Oracle`.

    Every random tensor follows from `seed` and the number of tensors drawn before it, so that two
    twins of one seed which draw the same tensors hold the same cache.
    """

    def __init__(
        self,
        config: CacheConfig,
        *,
        num_layers: int = 1,
        num_kv_heads: int = 2,
        head_dim: int = 8,
        value_dim: int | None = None,
        batch: int = 2,
        group: int = 2,
        seed: int = 0,
    ) -> None:
        self.manager = KVCacheManager(
            num_layers, num_kv_heads, head_dim, config, value_dim=value_dim
        )
        self.oracle = Oracle(num_layers, num_kv_heads, config)
        self.config, self.num_layers, self.num_kv_heads = config, num_layers, num_kv_heads
        self.head_dim, self.value_dim = head_dim, value_dim or head_dim
        self.start_batch, self.group, self.seed = batch, group, seed

    @property
    def batch(self) -> int:
        return self.oracle.batch or self.start_batch

    def randn(self, *shape: int) -> Tensor:
        self.seed += 1
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))

    def query(self, new_tokens: int = 1, size: float = 1.0) -> Tensor:
        heads = self.num_kv_heads * self.group
        return self.randn(self.batch, heads, new_tokens, self.head_dim) * size

    def append(self, new_tokens: int, mask: Tensor | None = None) -> None:
        """The same number of random tokens to every layer."""
        for layer in range(self.num_layers):
            self.append_layer(layer, new_tokens, mask)

    def append_layer(self, layer: int, new_tokens: int, mask: Tensor | None = None) -> None:
        shape = (self.batch, self.num_kv_heads, new_tokens)
        key, value = self.randn(*shape, self.head_dim), self.randn(*shape, self.value_dim)
        self.manager.append(layer, key, value, mask)
        self.oracle.append(layer, key, value, mask)

    def attend(self, new_tokens: int = 1, *, size: float = 1.0, **how: object) -> list[Tensor]:
        """Attend in every layer with random queries; fails where manager and oracle differ."""
        tolerance = 3e-5 * max(1.0, size)  # the rounding of the logits grows with them
        return [
            self.attend_layer(layer, self.query(new_tokens, size), tolerance=tolerance, **how)
            for layer in range(self.num_layers)
        ]

    def attend_layer(
        self, layer: int, query: Tensor, *, tolerance: float = 3e-5, **how: object
    ) -> Tensor:
        output = self.manager.attend(layer, query, **how)  # type: ignore[arg-type]
        assert output.shape == (*query.shape[:3], self.value_dim)
        if query.shape[2] == 1:
            self.oracle.attend_one(layer, query, **how).check(output, tolerance)
        else:
            expected = self.oracle.attend_many(layer, query, **how)
            assert float((output - expected).abs().max()) <= tolerance * max(
                1.0, float(expected.abs().max())
            )
        return output

    def crop(self, num_columns: int) -> None:
        self.manager.crop(num_columns)
        self.oracle.crop(num_columns)

    def keep_sequences(self, index: list[int]) -> None:
        self.manager.keep_sequences(torch.tensor(index))
        self.oracle.keep_sequences(torch.tensor(index))

    def reset(self) -> None:
        self.manager.reset()
        self.oracle.reset()

    def check(self) -> None:
        """The manager's books agree, nothing it holds differs by a bit, sizes are what they are."""
        self.manager.check_integrity()
        assert self.manager.batch == self.oracle.batch
        assert self.manager.num_columns == self.oracle.num_columns
        stats = self.manager.stats()
        if self.oracle.real is None:
            assert (stats.device_bytes, stats.host_bytes, stats.total_tokens) == (0, 0, 0)
            return
        for layer in range(self.num_layers):
            held, expected = self.manager.gather(layer), self.oracle.gather(layer)
            assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))
        assert stats.total_tokens == sum(
            len(self.oracle.columns(layer, sequence))
            for layer in range(self.num_layers)
            for sequence in range(self.batch)
        )
        assert stats.host_bytes == self.held_pages * self.block_bytes
        assert self.held_pages <= self.oracle.host_pages()
        assert stats.device_bytes == self.pool_bytes + self.dense_bytes

    @property
    def held_pages(self) -> int:
        """Host blocks that the layers refer to; one that sequences share counts once."""
        blocks = [state.held_blocks() for state in self.manager._layers]
        return len(np.unique(np.concatenate(blocks))) if blocks else 0

    @property
    def block_bytes(self) -> int:
        """A sealed page of all KV heads."""
        return self.config.page_size * self.num_kv_heads * (self.head_dim + self.value_dim) * 4

    @property
    def pool_bytes(self) -> int:
        """What the configuration implies for slots, windows and the streaming block."""
        config = self.config
        slots = [
            math.ceil(config.num_sink_tokens / config.page_size)
            + math.ceil(
                max(self.oracle.num_selected(layer, h) for h in range(self.num_kv_heads))
                * config.device_pool_factor
            )
            + math.ceil((config.num_recent_tokens + config.page_size) / config.page_size)
            for layer in range(self.num_layers)
            if config.budget_of(layer) is not None
        ]
        if slots:
            slots.append(config.stream_block_tokens // config.page_size)
        return sum(slots) * self.block_bytes * self.batch

    @property
    def dense_bytes(self) -> int:
        """What the layers that attend everything have allocated."""
        return sum(
            state.stats().device_bytes
            for layer, state in enumerate(self.manager._layers)
            if self.config.budget_of(layer) is None
        )
