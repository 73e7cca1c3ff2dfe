"""Page indexes for comparison alone: the best that pages can be rated, and the worst."""

from __future__ import annotations

import torch
from torch import Tensor

from arkcache.kernels.torch_tokens import TokenIndex


class OracleIndex(TokenIndex):
    """Rates a page by its true softmax mass: the token index with keys as they are.

    The ceiling of what any index can do at a page size and a budget, as far as mass is the aim.

    Args:
        page_size: tokens per page.
    """

    def __init__(self, page_size: int) -> None:
        # Unpacked, it takes the number of elements from the keys.
        super().__init__(page_size, head_dim=0, bits=8, packed=False)

    def digest(self, key: Tensor) -> Tensor:
        """Keep pages [batch, kv_heads, pages, page_size, head_dim] in fp32, channels outermost."""
        return key.float().permute(0, 1, 4, 2, 3)


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
