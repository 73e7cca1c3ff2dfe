"""The page index: what decides which pages matter to a query."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.kernels.torch_digest import BoundingVolumes
from arkcache.kernels.torch_token_rows import TokenRows
from arkcache.kernels.torch_tokens import TokenIndex


class PageIndex(Protocol):
    """What decides which pages matter.

    `page_dim` is the dimension of a digest that is the page. `rates` says what a score is: "mass",
    the log of a page's softmax mass, or "bound", what a logit of the page may be.
    """

    page_dim: int
    rates: str

    def digest(self, key: Tensor) -> Tensor:
        """Digest pages of keys [batch, kv_heads, pages, page_size, dim]."""
        ...

    def score(self, query: Tensor, digests: Tensor) -> Tensor:
        """Rate pages for a scaled query [rows, group, dim]: [rows, group, pages]."""
        ...


class MassIndex(PageIndex, Protocol):
    """An index that rates mass."""

    def log_mass(
        self, query: Tensor, digests: Tensor, softcap: float | None, bias: Tensor | None
    ) -> Tensor:
        """`score` of logits that went through a softcap and had an additive mask [rows, group or
        1, pages, page_size] added."""
        ...


def mass_index(index: PageIndex) -> MassIndex:
    """An index of which it is known that it rates mass."""
    assert index.rates == "mass"
    return cast(MassIndex, index)


def make_index(config: CacheConfig, head_dim: int, device: torch.device) -> PageIndex:
    """The page index that `config.index` names."""
    if config.index != "tokens":
        return BoundingVolumes(config.index)
    if config.has_token_rows(device.type):
        return TokenRows(config.page_size, head_dim)
    return TokenIndex(config.page_size, head_dim, config.packed_index_bits)
