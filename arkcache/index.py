"""The page index: what decides which pages matter to a query."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.kernels.torch_digest import BoundingVolumes
from arkcache.kernels.torch_tokens import TokenIndex


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
