"""Products of queries and packed codes of the token index: device functions, no kernels.

With k = code * scale + zero, the scales are folded into the query, and the zeros are one number per
page and query. Codes are multiplied as they are, in fp16, which holds them exactly: a code is the
low bits of the fp16 number 1024 + code, so that nothing is converted.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from arkcache.kernels.triton_pack import widen
from arkcache.kernels.triton_score_volumes import dot


@triton.jit
def _load_bfloat16(
    bytes_ptr: tl.tensor, element: tl.tensor, mask: tl.tensor, ALIGNED: tl.constexpr
) -> tl.tensor:
    """Elements of an array of bf16; put together from bytes where it lies at odd addresses."""
    if ALIGNED:
        elements_ptr = bytes_ptr.to(tl.pointer_type(tl.bfloat16))
        return tl.load(elements_ptr + element, mask=mask, other=0.0)
    low = tl.load(bytes_ptr + 2 * element, mask=mask, other=0).to(tl.uint16)
    high = tl.load(bytes_ptr + 2 * element + 1, mask=mask, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.bfloat16, bitcast=True)


@triton.jit
def offsets(
    query_ptr: tl.tensor,
    header_ptr: tl.tensor,
    exists: tl.tensor,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EXACT: tl.constexpr,
    PAGES: tl.constexpr,
    HEADS: tl.constexpr,
) -> tl.tensor:
    """q.(zero + middle code * scale) [HEADS, PAGES]: what all tokens of a page have in common.

    query_ptr [HEADS, 1], header_ptr [1, PAGES].
    """
    CHANNELS: tl.constexpr = 64
    zeros = tl.zeros([HEADS, PAGES], tl.float32)
    steps = tl.zeros([HEADS, PAGES], tl.float32)
    for start in tl.static_range(0, HEAD_DIM, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        inside = channel < HEAD_DIM
        mask = (tl.arange(0, HEADS) < GROUP)[:, None] & inside[None, :]
        query = tl.load(query_ptr + channel[None, :], mask=mask, other=0.0)
        mask = inside[:, None] & exists[None, :]
        step = _load_bfloat16(header_ptr, channel[:, None], mask, ALIGNED)
        zero = _load_bfloat16(header_ptr, HEAD_DIM + channel[:, None], mask, ALIGNED)
        if EXACT:
            zeros = dot(query, widen(zero), zeros)
            steps = dot(query, widen(step), steps)
        else:
            # fp16 is the sum of two bf16.
            high = query.to(tl.bfloat16)
            zeros = dot(high, zero, zeros)
            steps = dot(high, step, steps)
            if query.dtype == tl.float16:
                low = (widen(query) - widen(high)).to(tl.bfloat16)
                zeros = dot(low, zero, zeros)
                steps = dot(low, step, steps)
    return zeros + steps * 2 ** (BITS - 1)


@triton.jit
def _load_plane(
    query_ptr: tl.tensor,
    inverse: tl.tensor,
    byte: tl.tensor,
    head: tl.tensor,
    PLANE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
) -> tl.tensor:
    """Normalised queries at the channels of a plane's bytes, over the worth of its lowest bit."""
    channel = (PLANE * ((HEAD_DIM * BITS + 7) // 8) + byte)[None, :]
    inside = (byte[None, :] < (HEAD_DIM * BITS + 7) // 8) & (channel < HEAD_DIM)
    query = tl.load(query_ptr + channel, mask=(head < GROUP)[:, None] & inside, other=0.0)
    return widen(query) * (inverse * (1.0 / 2 ** (PLANE * BITS)))[:, None]


@triton.jit
def load_planes(
    query_ptr: tl.tensor,
    inverse: tl.tensor,
    byte: tl.tensor,
    head: tl.tensor,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The queries of four planes; where there are less, those that are not used repeat others."""
    PLANES: tl.constexpr = 8 // BITS
    return (
        _load_plane(query_ptr, inverse, byte, head, 0, HEAD_DIM, GROUP, BITS),
        _load_plane(query_ptr, inverse, byte, head, 1 % PLANES, HEAD_DIM, GROUP, BITS),
        _load_plane(query_ptr, inverse, byte, head, 2 % PLANES, HEAD_DIM, GROUP, BITS),
        _load_plane(query_ptr, inverse, byte, head, 3 % PLANES, HEAD_DIM, GROUP, BITS),
    )


@triton.jit
def _add_plane(
    logit: tl.tensor,
    query: tl.tensor,
    header_ptr: tl.tensor,
    byte: tl.tensor,
    exists: tl.tensor,
    packed: tl.tensor,
    PLANE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EXACT: tl.constexpr,
) -> tl.tensor:
    """Add a plane's part of (q * scale).(code - middle code) to `logit` [queries, tokens]."""
    channel = (PLANE * ((HEAD_DIM * BITS + 7) // 8) + byte)[None, :]
    inside = (byte[None, :] < (HEAD_DIM * BITS + 7) // 8) & (channel < HEAD_DIM)
    step = _load_bfloat16(header_ptr, channel, exists[:, None] & inside, ALIGNED)
    codes = (packed & (0x6400 | ((2**BITS - 1) * 2 ** (PLANE * BITS)))).to(tl.float16, bitcast=True)
    codes = codes - (1024 + 2 ** (BITS - 1) * 2 ** (PLANE * BITS))
    scaled = query * widen(step)
    if EXACT:
        return dot(scaled, codes.to(tl.float32), logit)
    return dot(scaled.to(tl.float16), codes, logit)


@triton.jit
def add_planes(
    logit: tl.tensor,
    query0: tl.tensor,
    query1: tl.tensor,
    query2: tl.tensor,
    query3: tl.tensor,
    header_ptr: tl.tensor,
    byte: tl.tensor,
    exists: tl.tensor,
    packed: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EXACT: tl.constexpr,
) -> tl.tensor:
    """Add (q * scale).(code - middle code) of all channels that `packed` holds."""
    packed = packed.to(tl.uint16) | 0x6400  # the fp16 numbers 1024 + byte
    logit = _add_plane(
        logit, query0, header_ptr, byte, exists, packed, 0, HEAD_DIM, BITS, ALIGNED, EXACT
    )
    if BITS <= 4:
        logit = _add_plane(
            logit, query1, header_ptr, byte, exists, packed, 1, HEAD_DIM, BITS, ALIGNED, EXACT
        )
    if BITS == 2:
        logit = _add_plane(
            logit, query2, header_ptr, byte, exists, packed, 2, HEAD_DIM, BITS, ALIGNED, EXACT
        )
        logit = _add_plane(
            logit, query3, header_ptr, byte, exists, packed, 3, HEAD_DIM, BITS, ALIGNED, EXACT
        )
    return logit
