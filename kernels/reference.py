"""The obvious version of every kernel, in fp32: the oracle of the tests.

Same signatures as the fast versions, no views shared with their inputs, nothing clever. Rows are
(sequence, KV head) pairs; `group` is the number of query heads that share a KV head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bounding_volume(key: Tensor, kind: str) -> Tensor:
    """Digest pages of keys [..., page_size, head_dim] into [..., features].

    ArkVale section 5.2: a center c and a radius r, equations 2 (sphere, r a number) and 4 (cuboid,
    r a vector). Stored as [c, r], for the centroid as [mean].
    """
    key = key.float()
    if kind == "centroid":
        return key.mean(dim=-2)
    shape, radius_kind = kind.split("-")
    center = (key.amin(dim=-2) + key.amax(dim=-2)) / 2
    distance = (key - center.unsqueeze(-2)).abs()
    if shape == "sphere":
        distance = distance.pow(2).sum(dim=-1, keepdim=True).sqrt()
    if radius_kind == "max":
        radius = distance.amax(dim=-2)
    elif radius_kind == "mean":
        radius = distance.mean(dim=-2)
    else:
        radius = (distance.amin(dim=-2) + distance.amax(dim=-2)) / 2
    return torch.cat((center, radius), dim=-1)


def volume_score(query: Tensor, digest: Tensor, kind: str) -> Tensor:
    """Rate pages: query [rows, group, head_dim], digest [rows, pages, features].

    Returns [rows, group, pages]: the largest q.k that a key inside the volume could have.
    """
    query, digest = query.float(), digest.float()
    head_dim = query.shape[-1]
    center = digest[..., :head_dim]
    score = (query[:, :, None] * center[:, None]).sum(dim=-1)
    if kind == "centroid":
        return score
    radius = digest[..., head_dim:]
    size = query.abs() if kind.startswith("cuboid") else query.norm(dim=-1, keepdim=True)
    return score + (size[:, :, None] * radius[:, None]).sum(dim=-1)


def quantize_page(key: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise pages of keys [..., page_size, head_dim] per channel over the page (KIVI, eq. 1).

    Returns integer codes of the same shape, scale and zero [..., 1, head_dim]: k = code*scale+zero.
    """
    key = key.float()
    low, high = key.amin(dim=-2, keepdim=True), key.amax(dim=-2, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    codes = torch.where(scale > 0, (key - low) / scale, torch.zeros_like(key))
    return codes.round().clamp(0, 2**bits - 1), scale, low


def token_score(query: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Rate pages by the softmax mass of their quantised keys: log-sum-exp of q.k over the page.

    query [rows, group, head_dim] already scaled, codes [rows, pages, page_size, head_dim].
    Returns [rows, group, pages].
    """
    key = codes * scale + zero
    logits = torch.einsum("rgd,rptd->rgpt", query.float(), key.float())
    return logits.logsumexp(dim=-1)


def aggregate(score: Tensor, reduction: str) -> Tensor:
    """Reduce scores [rows, group, pages] over the query heads of a group to [rows, pages]."""
    if reduction == "softmax-mean":
        score = score.float().softmax(dim=-1)
    return score.float().mean(dim=1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Dense attention of query [batch, heads, new, dim] over [batch, kv_heads, tokens, dim].

    mask, broadcast to [batch, heads, new, tokens], is True where a token may be attended or is
    added to the logits. sinks [heads] are extra logits that take probability and give nothing. A
    query that may attend nothing gets zeros. Returns [batch, heads, new, value_dim] in fp32.
    """
    group = query.shape[1] // key.shape[1]
    key = key.float().repeat_interleave(group, dim=1)
    value = value.float().repeat_interleave(group, dim=1)
    logits = query.float() @ key.transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        additive = torch.zeros_like(logits)
        if mask.dtype == torch.bool:
            additive = additive.masked_fill(~mask, float("-inf"))
        else:
            additive = additive + mask.float()
        logits = logits + additive
    num_tokens = logits.shape[-1]
    if sinks is not None:
        extra = sinks.float().reshape(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat((logits, extra), dim=-1)
    probability = torch.nan_to_num(logits.softmax(dim=-1))
    return probability[..., :num_tokens] @ value
