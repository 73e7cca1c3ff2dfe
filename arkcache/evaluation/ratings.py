"""Page indexes for comparison alone: the best that pages can be rated, and the worst."""

from __future__ import annotations

import torch
from torch import Tensor

from arkcache.kernels.torch_tokens import page_log_mass


class OracleIndex:
    """Rates a page by its true softmax mass: a token index with keys as they are.

    The ceiling of what any index can do at a page size and a budget, as far as mass is the aim.
    """

    page_dim = 3
    rates = "mass"

    def digest(self, key: Tensor) -> Tensor:
        """Keep pages [batch, kv_heads, pages, page_size, head_dim] in fp32, channels outermost."""
        return key.float().permute(0, 1, 4, 2, 3)

    def score(self, query: Tensor, digests: Tensor) -> Tensor:
        """The log of each page's mass [rows, group, pages]."""
        return self.log_mass(query, digests, None, None)

    def log_mass(
        self, query: Tensor, digests: Tensor, softcap: float | None, bias: Tensor | None
    ) -> Tensor:
        """As `TokenIndex.log_mass`, of digests [rows, head_dim, pages, page_size]."""
        logits = torch.bmm(query.float(), digests.flatten(2)).unflatten(2, digests.shape[2:])
        return page_log_mass(logits, softcap, bias)


class RandomIndex:
    """Rates pages by lot, anew in every step: what sinks and the recent window alone are worth.

    Args:
        seed: of the lots.
    """

    page_dim = 3
    rates = "bound"

    def __init__(self, seed: int) -> None:
        self._lots = torch.Generator().manual_seed(seed)

    def digest(self, key: Tensor) -> Tensor:
        """Nothing of pages [batch, kv_heads, pages, ...]: zeros [batch, kv_heads, 1, pages]."""
        return key.new_zeros((*key.shape[:2], 1, key.shape[2]))

    def score(self, query: Tensor, digests: Tensor) -> Tensor:
        """Random numbers [rows, group, pages], the same for all heads of a group."""
        rows, _, num_pages = digests.shape
        lots = torch.rand((rows, 1, num_pages), generator=self._lots).to(query.device)
        return lots.expand(-1, query.shape[1], -1)
