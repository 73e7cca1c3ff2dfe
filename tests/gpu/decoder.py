"""A manager with random tokens for all its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arkcache import CacheConfig, KVCacheManager
from arkcache.engines.capture import CapturableSteps
from tests.gpu.card import Card


def captured(manager: KVCacheManager) -> CapturableSteps:
    """The steps of a manager that runs on kernels, in two halves."""
    assert manager.steps is not None, "decode steps run on plain torch"
    return manager.steps


class Decoder:
    """A manager with 8 query heads over 4 KV heads of 64, and random tokens for all its layers."""

    def __init__(self, card: Card, **settings: Any) -> None:
        sizes = card.pick((32, 32, 64, 512, 4), (4, 4, 4, 32, 2))
        names = ("page_size", "num_sink_tokens", "num_recent_tokens", "budget_tokens")
        given = dict(zip(names, sizes, strict=False)) | {"num_dense_layers": 1} | settings
        self.card, self.num_layers = card, sizes[-1]
        self.config = CacheConfig(backend="triton", **given)
        self.dtype = card.pick(torch.bfloat16, torch.float32)
        self.manager = KVCacheManager(
            self.num_layers, 4, 64, self.config, device=card.device, dtype=self.dtype
        )

    def tokens(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and queries of every layer [layers, 2, heads, count, 64]."""
        shapes = ((self.num_layers, 2, heads, count, 64) for heads in (4, 4, 8))
        key, value, query = (self.card.randn(*shape, dtype=self.dtype) for shape in shapes)
        return key, value, query

    def step(self, key: Tensor, value: Tensor, query: Tensor) -> list[Tensor]:
        """Append to and attend in every layer."""
        outputs = []
        for layer in range(self.num_layers):
            self.manager.append(layer, key[layer], value[layer])
            outputs.append(self.manager.attend(layer, query[layer]))
        return outputs

    def steps(self, count: int) -> None:
        """So many tokens, one at a time."""
        for _ in range(count):
            self.step(*self.tokens(1))
