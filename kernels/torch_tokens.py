"""The token index: a low-bit copy of the keys, for contexts where one token of a page decides.

Each page's keys are quantised per channel over the page's tokens (KIVI, equation 1) and packed;
a page's score is the log-sum-exp of q.k over its quantised tokens, which is its softmax mass up to
a constant. A box bounds a page of 32 near-isotropic keys too loosely to find one token in it; two
bits per key element do.

Packed, the digest of a page is one run of bytes: scales and zeros (bf16, head_dim each), then the
codes, `8 / bits` channels to the byte: byte (c, t) holds channels c, c + n, c + 2n ... of token t,
with n = head_dim * bits / 8, so that unpacking is one shift and mask per plane.

A GPU unpacks them in registers (`triton_score_tokens`). Plain torch takes ten times as long to
unpack as to multiply, so on a CPU `torch_token_rows` is there for those who do not ask for bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAGES_PER_BLOCK = 64
"""Pages unpacked at a time: 64 pages of 32 tokens and head_dim 64 are 512 KiB of fp32 per head,
which stay in the L2 cache between unpacking and the matrix product."""


def digest_bytes(head_dim: int, page_size: int, bits: int) -> int:
    """Bytes of a page's digest: scales and zeros of its channels, then the codes of its tokens."""
    return 4 * head_dim + -(-head_dim * bits // 8) * page_size


class TokenIndex:
    """The index named "tokens".

    Args:
        page_size: tokens per page.
        head_dim: elements per key; the codes of a token are padded to whole bytes.
        bits: bits per key element, 2, 4 or 8.
    """

    rates = "mass"
    page_dim = 2

    def __init__(self, page_size: int, head_dim: int, bits: int) -> None:
        self.page_size, self.head_dim, self.bits = page_size, head_dim, bits
        self.planes = 8 // bits
        self.plane_dim = -(-head_dim // self.planes)

    def digest(self, key: Tensor) -> Tensor:
        """Quantise pages [batch, kv_heads, pages, page_size, head_dim].

        Returns uint8 [batch, kv_heads, pages, bytes].
        """
        key = key.float()
        low, high = torch.aminmax(key, dim=-2, keepdim=True)
        levels = 2**self.bits - 1
        # Rounded to what is stored first, so that the codes fit the scale they are read with.
        zero = low.bfloat16()
        scale = ((high - zero.float()) / levels).bfloat16()
        safe = scale.float().masked_fill(scale == 0, 1.0)
        codes = ((key - zero.float()) / safe).round_().clamp_(0, levels).to(torch.uint8)
        header = torch.cat((scale, zero), dim=-1).flatten(-2).contiguous().view(torch.uint8)
        return torch.cat((header, self._pack(codes)), dim=-1)

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
        num_pages = digests.shape[1]
        score = query.new_empty((rows, group, num_pages), dtype=torch.float32)
        block_pages = PAGES_PER_BLOCK if digests.device.type == "cpu" else num_pages
        for start in range(0, num_pages, block_pages):
            block = slice(start, start + block_pages)
            logits = self._logits(query.float(), digests[:, block])
            own = None if bias is None else bias[:, :, block]
            score[:, :, block] = page_log_mass(logits, softcap, own)
        return score

    def _pack(self, codes: Tensor) -> Tensor:
        """Codes [..., page_size, head_dim] to bytes [..., plane_dim * page_size]."""
        codes = codes.transpose(-1, -2)
        padding = self.plane_dim * self.planes - self.head_dim
        if padding:
            codes = torch.nn.functional.pad(codes, (0, 0, 0, padding))
        packed = codes[..., : self.plane_dim, :].clone()
        for plane in range(1, self.planes):
            first = plane * self.plane_dim
            packed |= codes[..., first : first + self.plane_dim, :] << (plane * self.bits)
        return packed.flatten(-2)

    def _logits(self, query: Tensor, block: Tensor) -> Tensor:
        """q.k of every token: query [rows, group, dim], block [rows, pages, bytes].

        Returns [rows, group, pages, page_size]. With k = code*scale + zero, the scale is folded
        into the query and the zero is one number per page, so codes are multiplied as they are.
        """
        rows, group, _ = query.shape
        pages, dim = block.shape[1], self.head_dim
        header = block[..., : 4 * dim].contiguous().view(torch.bfloat16).float()
        scale, zero = header[..., :dim], header[..., dim:]
        packed = block[..., 4 * dim :].unflatten(-1, (self.plane_dim, self.page_size))
        codes = block.new_empty(
            (rows, pages, self.planes * self.plane_dim, self.page_size), dtype=torch.float32
        )
        mask = 2**self.bits - 1
        for plane in range(self.planes):
            first = plane * self.plane_dim
            codes[:, :, first : first + self.plane_dim] = (packed >> (plane * self.bits)) & mask
        scaled = query[:, None] * scale[:, :, None]  # [rows, pages, group, dim]
        logits = scaled.flatten(0, 1) @ codes[:, :, :dim].flatten(0, 1)
        logits = logits.view(rows, pages, group, self.page_size)
        offset = torch.einsum("rgd,rpd->rpg", query, zero)
        return (logits + offset[..., None]).transpose(1, 2)


def page_log_mass(logits: Tensor, softcap: float | None, bias: Tensor | None) -> Tensor:
    """Of pages whose logits are [rows, group, pages, page_size]; see `TokenIndex.log_mass`."""
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        logits = logits + bias
    return logits.logsumexp(dim=-1)
