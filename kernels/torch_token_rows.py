"""The token index as a CPU keeps it: every key in 8 bits with a scale of its own.

Packed codes of 2 and 4 bits (`torch_tokens`) are smaller, but plain torch unpacks them plane by
plane, which takes ten times as long as the product that follows. A row of 8-bit codes is converted
by one copy, so that it is rated about as fast as fp32 keys are, in a quarter of their bytes; and
what a page holds of a step's attention is known to a hundredth or so.

The digest of a page is `page_size` rows of int8: head_dim codes, zeros up to a multiple of four,
and the four bytes of the scale (fp32), which is the key's largest magnitude over 127.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arkcache.kernels.torch_tokens import page_log_mass

SCALE_BYTES = 4
LEVELS = 127

TOKENS_PER_BLOCK = 4096
"""Tokens of all rows together that are converted at a time: with head_dim 64 they are 1 MiB of
fp32, which stay in a processor's cache between the conversion and the product."""


class TokenRows:
    """The index named "tokens" where `index_bits` is left open and pages are rated on a CPU.

    Args:
        page_size: tokens per page.
        head_dim: elements per key.
    """

    rates = "mass"
    page_dim = 2

    def __init__(self, page_size: int, head_dim: int) -> None:
        self.page_size, self.head_dim = page_size, head_dim
        self._row_bytes = -(-head_dim // 4) * 4 + SCALE_BYTES

    def digest(self, key: Tensor) -> Tensor:
        """Quantise pages [batch, kv_heads, pages, page_size, head_dim].

        Returns int8 [batch, kv_heads, pages, page_size, row bytes].
        """
        key = key.float()
        scale = key.abs().amax(dim=-1, keepdim=True) / LEVELS
        rows = torch.zeros((*key.shape[:-1], self._row_bytes), dtype=torch.int8, device=key.device)
        codes = (key / scale.masked_fill(scale == 0, 1.0)).round_()
        rows[..., : self.head_dim] = codes.clamp_(-LEVELS, LEVELS)
        rows.view(torch.float32)[..., -1:] = scale
        return rows

    def score(self, query: Tensor, digests: Tensor) -> Tensor:
        """Rate pages: query [rows, group, head_dim], scaled; digests with rows for batch and head.

        Returns [rows, group, pages] in fp32: the log of each page's softmax mass, unnormalised.
        """
        return self.log_mass(query, digests)

    def log_mass(
        self,
        query: Tensor,
        digests: Tensor,
        softcap: float | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """`score`, with logits that become softcap * tanh(logits / softcap) before `bias`, additive
        [rows, group or 1, pages, page_size], is added to them."""
        rows, group, _ = query.shape
        num_pages, page_size = digests.shape[1], self.page_size
        score = query.new_empty((rows, group, num_pages), dtype=torch.float32)
        block_pages = max(1, TOKENS_PER_BLOCK // (rows * page_size))
        keys = query.new_empty(
            (rows, min(block_pages, num_pages), page_size, self.head_dim), dtype=torch.float32
        )
        for start in range(0, num_pages, block_pages):
            pages = slice(start, start + block_pages)
            block = digests[:, pages]
            key = keys[:, : block.shape[1]]
            key.copy_(block[..., : self.head_dim])
            logits = torch.bmm(query.float(), key.flatten(1, 2).transpose(1, 2))
            scale = block.view(torch.float32)[..., -1]
            logits = logits.unflatten(2, scale.shape[1:]).mul_(scale[:, None])
            own = None if bias is None else bias[:, :, pages]
            score[:, :, pages] = page_log_mass(logits, softcap, own)
        return score
