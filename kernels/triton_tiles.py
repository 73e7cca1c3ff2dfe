"""Tiles of keys and values as attention multiplies them: loaded from packed pages, in registers.

What the interpreter does otherwise than a GPU (bf16) is evened out here.
"""

# Triton reads annotations of kernels as its own: parameters of a kernel can have none.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from arkcache.kernels.triton_pack import narrow, widen

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""The interpreter truncates to bf16 and multiplies its bits: there both are done by hand."""


@triton.jit
def tanh(x):
    """To rounding everywhere: the exponentials cancel near zero, where the series is short."""
    near = tl.minimum(tl.maximum(x, -0.25), 0.25)
    square = near * near
    series = 2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))
    series = near + near * square * (-1.0 / 3.0 + square * series)
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(near == x, series, tl.where(x < 0, -far, far))


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """fp32 to another dtype."""
    if INTERPRETED:
        return narrow(x, DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def dot(x, y, total):
    """x @ y + total, in fp32."""
    if INTERPRETED:
        return tl.dot(widen(x), widen(y), total, input_precision="ieee")
    else:
        return tl.dot(x, y, total, input_precision="ieee")


@triton.jit
def _load_codes(
    codes_ptr, token, channel, in_part,
    DIM: tl.constexpr, BITS: tl.constexpr, PLANE_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """The codes [tokens, channels] of a part, in fp32."""
    PLANES: tl.constexpr = 8 // BITS
    valid = (token < PAGE_SIZE)[:, None]
    if channel.shape[0] == DIM and PLANES * PLANE_DIM == DIM:
        # Each byte once and in order: only so the compiler fetches them pages ahead.
        offsets = token[:, None] * PLANE_DIM + tl.arange(0, PLANE_DIM)[None, :]
        packed = tl.load(codes_ptr + offsets, valid, other=0).to(tl.int32)
        if BITS == 8:
            planes = packed.to(tl.float32)
        elif BITS == 4:
            planes = tl.join((packed & 15).to(tl.float32), (packed >> 4).to(tl.float32))
            planes = tl.permute(planes, (0, 2, 1))
        else:
            even = tl.join((packed & 3).to(tl.float32), ((packed >> 4) & 3).to(tl.float32))
            odd = tl.join(((packed >> 2) & 3).to(tl.float32), (packed >> 6).to(tl.float32))
            planes = tl.permute(tl.join(even, odd), (0, 2, 3, 1))
        return tl.reshape(planes, (token.shape[0], DIM))
    else:
        offsets = token[:, None] * PLANE_DIM + (channel % PLANE_DIM)[None, :]
        packed = tl.load(codes_ptr + offsets, valid & in_part[None, :], other=0).to(tl.int32)
        shift = (channel // PLANE_DIM * BITS)[None, :]
        return ((packed >> shift) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _load_meta(meta_ptr, offset, mask, SIZE: tl.constexpr):
    """Steps and zeros, in fp32, which lie `SIZE` elements apart.

    In one load: two of them would each be too narrow for the compiler to fetch them pages ahead.
    """
    which = tl.arange(0, 2)[:, None]
    meta = tl.load(meta_ptr + which * SIZE + offset[None, :], mask[None, :], other=0.0)
    return tl.split(tl.trans(widen(meta)))


@triton.jit
def load_keys(
    elements_ptr, meta_ptr, codes_ptr, start, token, channel,
    DIM: tl.constexpr, BITS: tl.constexpr, PLANE_DIM: tl.constexpr, ELEMENT_BYTES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """Keys [tokens, channels] of the page whose bytes begin at `start`."""
    in_key = channel < DIM
    if BITS == 16:
        mask = (token < PAGE_SIZE)[:, None] & in_key[None, :]
        offsets = start // ELEMENT_BYTES + token[:, None] * DIM + channel[None, :]
        return tl.load(elements_ptr + offsets, mask, other=0.0)
    else:
        step, zero = _load_meta(meta_ptr + start // 2, channel, in_key, DIM)
        codes_ptr += start + 4 * DIM
        codes = _load_codes(codes_ptr, token, channel, in_key, DIM, BITS, PLANE_DIM, PAGE_SIZE)
        return round_to(codes * step[None, :] + zero[None, :], elements_ptr.dtype.element_ty)


@triton.jit
def load_values(
    elements_ptr, meta_ptr, codes_ptr, start, first, channel, in_value,
    DIM: tl.constexpr, BITS: tl.constexpr, PLANE_DIM: tl.constexpr, ELEMENT_BYTES: tl.constexpr,
    PAGE_SIZE: tl.constexpr, NUM_SCALES: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_SCALES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Values [TOKENS, channels] from token `first` of the page whose values begin at `start`."""
    token = first + tl.arange(0, TOKENS)
    if BITS == 16:
        mask = (token < PAGE_SIZE)[:, None] & in_value[None, :]
        offsets = start // ELEMENT_BYTES + token[:, None] * DIM + channel[None, :]
        return tl.load(elements_ptr + offsets, mask, other=0.0)
    else:
        lane = tl.arange(0, TOKENS * BLOCK_SCALES)
        of_token, number = first + lane // BLOCK_SCALES, lane % BLOCK_SCALES
        scaled = (of_token < PAGE_SIZE) & (number < NUM_SCALES)
        offset = of_token * NUM_SCALES + number
        step, zero = _load_meta(meta_ptr + start // 2, offset, scaled, PAGE_SIZE * NUM_SCALES)
        step = tl.reshape(step, (TOKENS, BLOCK_SCALES, 1))
        zero = tl.reshape(zero, (TOKENS, BLOCK_SCALES, 1))
        codes_ptr += start + 4 * PAGE_SIZE * NUM_SCALES
        codes = _load_codes(codes_ptr, token, channel, in_value, DIM, BITS, PLANE_DIM, PAGE_SIZE)
        codes = tl.reshape(codes, (TOKENS, BLOCK_SCALES, BLOCK_SIZE))
        value = tl.reshape(codes * step + zero, (TOKENS, BLOCK_SCALES * BLOCK_SIZE))
        return round_to(value, elements_ptr.dtype.element_ty)
