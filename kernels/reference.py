"""The obvious version of every kernel, in fp32: the oracle of the tests.

Same signatures as the fast versions, no views shared with their inputs, nothing clever. Rows are
(sequence, KV head) pairs; `group` is the number of query heads that share a KV head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arkcache.formats import PageLayout, PartLayout

Group = list[tuple[int, int]]
"""The (token, channel) pairs of the elements that share a scale."""


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
    sink_logits: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Dense attention of query [batch, heads, new, dim] over [batch, kv_heads, tokens, dim].

    mask, broadcast to [batch, heads, new, tokens], is True where a token may be attended or is
    added to the logits. sink_logits [heads] are extra ones that take probability and give nothing.
    A query that may attend nothing gets zeros. Returns [batch, heads, new, value_dim] in fp32.
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
    if sink_logits is not None:
        extra = sink_logits.float().reshape(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat((logits, extra), dim=-1)
    probability = torch.nan_to_num(logits.softmax(dim=-1))
    return probability[..., :num_tokens] @ value


def packed_attention(
    query: Tensor,
    packed: Tensor,
    window_key: Tensor,
    window_value: Tensor,
    layout: PageLayout,
    dtype: torch.dtype,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of query [batch, heads, 1, dim] over packed pages and what comes after them.

    packed [batch, kv_heads, pages, nbytes], window_key and window_value [batch, kv_heads, tokens,
    dim], in full precision. One softmax over all; the rest is that of `attention`.
    """
    keys, values = [], []
    for pages, key, value in zip(
        packed.flatten(0, 1), window_key.flatten(0, 1), window_value.flatten(0, 1), strict=True
    ):
        parts = [unpack_page(bytes(page.tolist()), layout, dtype) for page in pages]
        keys.append(torch.cat([part[0].float() for part in parts] + [key.float()]))
        values.append(torch.cat([part[1].float() for part in parts] + [value.float()]))
    heads = packed.shape[:2]
    return attention(
        query,
        torch.stack(keys).unflatten(0, heads),
        torch.stack(values).unflatten(0, heads),
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        mask=mask,
    )


def pack_page(key: Tensor, value: Tensor, layout: PageLayout, dtype: torch.dtype) -> bytes:
    """One page of one head, key [page_size, head_dim] and value [page_size, value_dim], to bytes.

    Keys per channel, values per token (KIVI, section 3.2), where `arkcache/formats.py` puts them.
    """
    return _pack_part(key, layout.key, _key_groups(layout), dtype) + _pack_part(
        value, layout.value, _value_groups(layout), dtype
    )


def unpack_page(data: bytes, layout: PageLayout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `pack_page` packed, in the dtype of the model."""
    cut = layout.key.nbytes
    return (
        _unpack_part(data[:cut], layout.key, _key_groups(layout), dtype),
        _unpack_part(data[cut:], layout.value, _value_groups(layout), dtype),
    )


def hadamard(x: Tensor) -> Tensor:
    """The fast Walsh-Hadamard transform of [..., dim], by butterflies, divided by sqrt(block).

    In blocks of the largest power of two that divides dim (QuaRot, section 4).
    """
    block = 1
    while x.shape[-1] % (2 * block) == 0:
        block *= 2
    blocks: Tensor = x.float().unflatten(-1, (-1, block))
    half = 1
    while half < block:
        low, high = blocks.unflatten(-1, (-1, 2, half)).unbind(dim=-2)
        blocks = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        half *= 2
    return blocks.flatten(-2).mul(block**-0.5)


def _key_groups(layout: PageLayout) -> list[Group]:
    tokens, channels = range(layout.page_size), range(layout.head_dim)
    return [[(token, channel) for token in tokens] for channel in channels]


def _value_groups(layout: PageLayout) -> list[Group]:
    size = layout.format.group_size
    return [
        [(token, start + channel) for channel in range(size)]
        for token in range(layout.page_size)
        for start in range(0, layout.value_dim, size)
    ]


def _pack_part(states: Tensor, part: PartLayout, groups: list[Group], dtype: torch.dtype) -> bytes:
    if part.bits == 16:
        return bytes(states.to(dtype).contiguous().view(torch.uint8).flatten().tolist())
    meta_dtype = torch.float16 if dtype == torch.float32 else dtype
    scales, zeros, packed = [], [], [0] * (part.num_tokens * part.plane_dim)
    for group in groups:
        tokens, channels = map(list, zip(*group, strict=True))
        elements = states[tokens, channels].float()
        scale, zero, codes = _quantize_group(elements, part.bits, dtype, meta_dtype)
        scales.append(scale)
        zeros.append(zero)
        for (token, channel), code in zip(group, codes, strict=True):
            plane, byte = divmod(channel, part.plane_dim)
            packed[token * part.plane_dim + byte] |= code << (plane * part.bits)
    meta = torch.stack(scales + zeros).view(torch.uint8).tolist()
    return bytes(meta + packed).ljust(part.nbytes, b"\0")


def _quantize_group(
    elements: Tensor, bits: int, dtype: torch.dtype, meta_dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[int]]:
    """Scale and zero as they are stored, and the codes that fit them (KIVI, equation 1)."""
    levels, limits = 2**bits - 1, torch.finfo(meta_dtype)
    low = elements.min().clamp(-limits.max, limits.max)
    high = elements.max().clamp(-limits.max, limits.max)
    zero = low.to(meta_dtype)
    if dtype != meta_dtype and zero.float() > low:
        zero = (low - low.abs() * 2**-10).clamp(-limits.max).to(meta_dtype)
    exact = (high / 2 - zero.float() / 2) / levels * 2
    exact = exact.clamp(max=min(limits.max, torch.finfo(torch.bfloat16).max / levels))
    scale = exact.to(meta_dtype)
    if zero.float() + levels * scale.float() > limits.max:
        scale = (exact - exact * limits.eps).to(meta_dtype)
    step = scale.float() if scale > 0 else torch.tensor(1.0)
    codes = ((elements - zero.float()) / step).round().clamp(0, levels)
    return scale, zero, [int(code) for code in codes.tolist()]


def _unpack_part(data: bytes, part: PartLayout, groups: list[Group], dtype: torch.dtype) -> Tensor:
    shape = (part.num_tokens, part.dim)
    if part.bits == 16:
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
    meta_dtype = torch.float16 if dtype == torch.float32 else dtype
    meta = torch.frombuffer(bytearray(data[: 2 * part.meta_bytes]), dtype=meta_dtype).float()
    packed, states = data[2 * part.meta_bytes :], torch.zeros(shape)
    for number, group in enumerate(groups):
        scale, zero = meta[number], meta[part.num_groups + number]
        codes = []
        for token, channel in group:
            plane, byte = divmod(channel, part.plane_dim)
            bits = packed[token * part.plane_dim + byte] >> (plane * part.bits)
            codes.append(bits % 2**part.bits)
        tokens, channels = map(list, zip(*group, strict=True))
        states[tokens, channels] = torch.tensor(codes) * scale + zero
    return states.to(dtype)
