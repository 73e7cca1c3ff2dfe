"""The token index as a CPU keeps it: every key rotated, in 4 bits with a scale of its own.

A scale per channel and page, as packed codes have it (`torch_tokens`), takes more than the codes
where pages are small. A scale per token takes half a bit per element; what outliers of single
channels would make of it a rotation prevents (QuaRot, section 4), and queries are rotated alike.

The digest of a page is `page_size` rows of uint8: the codes, two to the byte, channel j beside
channel j + half, and the four bytes of the scale (fp32), a seventh of the rotated key's largest
magnitude. Codes are kept with 8 added, which the score takes off again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arkcache.kernels.torch_hadamard import rotate
from arkcache.kernels.torch_tokens import page_log_mass

SCALE_BYTES = 4
LEVELS = 7
OFFSET = 8

TOKENS_PER_BLOCK = 4096
"""Tokens of all rows together that are converted at a time: with head_dim 64 they are 1 MiB of
fp32, which stay in a processor's cache between the conversion and the product."""


def half_dim(head_dim: int) -> int:
    """Bytes of a token's codes: half as many as channels, in whole words of four bytes."""
    return -(-head_dim // 8) * 4


class TokenRows:
    """The index named "tokens" where `index_bits` is left open and pages are rated on a CPU.

    Args:
        page_size: tokens per page.
        head_dim: elements per key.
    """

    rates = "mass"
    page_dim = 2

    def __init__(self, page_size: int, head_dim: int) -> None:
        self.page_size, self.head_dim, self.half = page_size, head_dim, half_dim(head_dim)

    def digest(self, key: Tensor) -> Tensor:
        """Quantise pages [batch, kv_heads, pages, page_size, head_dim].

        Returns uint8 [batch, kv_heads, pages, page_size, row bytes].
        """
        key = rotate(key.float())
        scale = key.abs().amax(dim=-1, keepdim=True) / LEVELS
        codes = (key / scale.masked_fill(scale == 0, 1.0)).round_().clamp_(-LEVELS, LEVELS)
        codes = torch.nn.functional.pad(codes, (0, 2 * self.half - self.head_dim)).add_(OFFSET)
        low, high = codes.to(torch.uint8).chunk(2, dim=-1)
        return torch.cat((low | (high << 4), scale.contiguous().view(torch.uint8)), dim=-1)

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
        num_pages, page_size, half = digests.shape[1], self.page_size, self.half
        query = rotate(query.float())
        offset = -OFFSET * query.sum(dim=-1)[:, :, None]
        query = torch.nn.functional.pad(query, (0, 2 * half - self.head_dim))
        score = query.new_empty((rows, group, num_pages), dtype=torch.float32)
        block_pages = max(1, TOKENS_PER_BLOCK // (rows * page_size))
        codes = query.new_empty((rows, min(block_pages, num_pages), page_size, 2 * half))
        for start in range(0, num_pages, block_pages):
            pages = slice(start, start + block_pages)
            block = digests[:, pages]
            own = codes[:, : block.shape[1]]
            own[..., :half].copy_(block[..., :half] & 15)
            own[..., half:].copy_(block[..., :half] >> 4)
            logits = torch.baddbmm(offset, query, own.flatten(1, 2).transpose(1, 2))
            scale = block.view(torch.float32)[..., -1]
            logits = logits.unflatten(2, scale.shape[1:]).mul_(scale[:, None])
            added = None if bias is None else bias[:, :, pages]
            score[:, :, pages] = page_log_mass(logits, softcap, added)
        return score
