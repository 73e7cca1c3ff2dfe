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
def load_codes(codes_ptr, index, channel, mask, BITS: tl.constexpr, PLANE_DIM: tl.constexpr):
    """The codes [tokens, channels] of a part, in fp32."""
    offsets = index[:, None] * PLANE_DIM + (channel % PLANE_DIM)[None, :]
    packed = tl.load(codes_ptr + offsets, mask, other=0).to(tl.int32)
    shift = (channel // PLANE_DIM * BITS)[None, :]
    return ((packed >> shift) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def load_keys(
    elements_ptr, meta_ptr, codes_ptr, start, index, channel, valid,
    DIM: tl.constexpr, BITS: tl.constexpr, PLANE_DIM: tl.constexpr, ELEMENT_BYTES: tl.constexpr,
):  # fmt: skip
    """Keys [tokens, channels] of the page whose bytes begin at `start`."""
    in_key = channel < DIM
    mask = valid[:, None] & in_key[None, :]
    if BITS == 16:
        offsets = start // ELEMENT_BYTES + index[:, None] * DIM + channel[None, :]
        return tl.load(elements_ptr + offsets, mask, other=0.0)
    else:
        meta_ptr += start // 2
        step = widen(tl.load(meta_ptr + channel, in_key, other=0.0))
        zero = widen(tl.load(meta_ptr + DIM + channel, in_key, other=0.0))
        codes = load_codes(codes_ptr + start + 4 * DIM, index, channel, mask, BITS, PLANE_DIM)
        return round_to(codes * step[None, :] + zero[None, :], elements_ptr.dtype.element_ty)


@triton.jit
def load_values(
    elements_ptr, meta_ptr, codes_ptr, start, index, channel, valid, in_value,
    DIM: tl.constexpr, BITS: tl.constexpr, PLANE_DIM: tl.constexpr, ELEMENT_BYTES: tl.constexpr,
    PAGE_SIZE: tl.constexpr, NUM_SCALES: tl.constexpr,
    BLOCK_SCALES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Values [tokens, channels] of the page whose values' bytes begin at `start`."""
    mask = valid[:, None] & in_value[None, :]
    if BITS == 16:
        offsets = start // ELEMENT_BYTES + index[:, None] * DIM + channel[None, :]
        return tl.load(elements_ptr + offsets, mask, other=0.0)
    else:
        number = tl.arange(0, BLOCK_SCALES)
        scaled = valid[:, None] & (number < NUM_SCALES)[None, :]
        meta_ptrs = meta_ptr + start // 2 + index[:, None] * NUM_SCALES + number[None, :]
        step = widen(tl.load(meta_ptrs, scaled, other=0.0))
        zero = widen(tl.load(meta_ptrs + PAGE_SIZE * NUM_SCALES, scaled, other=0.0))
        codes_ptr += start + 4 * PAGE_SIZE * NUM_SCALES
        codes = load_codes(codes_ptr, index, channel, mask, BITS, PLANE_DIM)
        codes = tl.reshape(codes, (index.shape[0], BLOCK_SCALES, BLOCK_SIZE))
        value = tl.reshape(codes * step[:, :, None] + zero[:, :, None], mask.shape)
        return round_to(value, elements_ptr.dtype.element_ty)
