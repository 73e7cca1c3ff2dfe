"""Packs the keys and values of one page: device functions that a program calls, no kernels.

Every function works on `states` [T, DIM], whose tokens lie `stride` elements apart, and writes
from `target` on, a pointer to bytes. Nothing outside a page is read or written.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(x: tl.tensor) -> tl.tensor:
    """To fp32, exactly; bf16 by hand, because the interpreter loses numbers below its normals."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """Finite fp32 to the nearest, ties to even; bf16 by hand: the interpreter drops a carry."""
    if tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def _codes(x: tl.tensor, scale: tl.tensor, zero: tl.tensor, LEVELS: tl.constexpr) -> tl.tensor:
    codes = tl.div_rn(x - zero, tl.where(scale == 0.0, 1.0, scale))
    codes = tl.minimum(tl.maximum(codes, 0.0), LEVELS)
    return ((codes + 12582912.0) - 12582912.0).to(tl.int32)


@triton.jit
def _scale_and_zero(
    low: tl.tensor,
    high: tl.tensor,
    LEVELS: tl.constexpr,
    META: tl.constexpr,
    ROUND_DOWN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """What is stored of groups from low to high: see `kernels/torch_pages.py` for the whys."""
    BOUND: tl.constexpr = 65504.0 if tl.float16 == META else 3.3895313892515355e38
    EPS: tl.constexpr = 0.0009765625 if tl.float16 == META else 0.0078125
    MOST: tl.constexpr = 65504.0 if tl.float16 == META else 3.3895313892515355e38 / LEVELS
    low = tl.minimum(tl.maximum(low, -BOUND), BOUND)
    high = tl.minimum(tl.maximum(high, -BOUND), BOUND)
    zero = narrow(low, META)
    if ROUND_DOWN:
        lower = narrow(tl.maximum(low - tl.abs(low) * 0.0009765625, -BOUND), META)
        zero = tl.where(widen(zero) > low, lower, zero)
    exact = tl.div_rn(high * 0.5 - widen(zero) * 0.5, LEVELS * 1.0) * 2.0
    exact = tl.minimum(exact, MOST)
    scale = narrow(exact, META)
    overflows = widen(zero) + widen(scale) * LEVELS > BOUND
    return tl.where(overflows, narrow(exact - exact * EPS, META), scale), zero


@triton.jit
def _store_halves(target_ptr: tl.tensor, number: tl.tensor, x: tl.tensor, mask: tl.tensor) -> None:
    """16-bit floats as bytes: token digests of odd sizes lie anywhere."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    tl.store(target_ptr + 2 * number, (bits & 255).to(tl.uint8), mask=mask)
    tl.store(target_ptr + 2 * number + 1, ((bits >> 8) & 255).to(tl.uint8), mask=mask)


@triton.jit
def pack_raw(
    states_ptr: tl.tensor,
    stride: tl.tensor,
    target_ptr: tl.tensor,
    T: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Elements as they are."""
    target_ptr = target_ptr.to(tl.pointer_type(states_ptr.dtype.element_ty))
    for start in range(0, T * DIM, BLOCK):
        element = start + tl.arange(0, BLOCK)
        inside = element < T * DIM
        x = tl.load(states_ptr + (element // DIM) * stride + element % DIM, mask=inside)
        tl.store(target_ptr + element, x, mask=inside)


@triton.jit
def pack_channels(
    states_ptr: tl.tensor,
    stride: tl.tensor,
    target_ptr: tl.tensor,
    T: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    META: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Keys with scales per channel: of a page, or (INDEX) of the token index, tokens innermost."""
    PLANES: tl.constexpr = 8 // BITS
    PLANE_DIM: tl.constexpr = (DIM + PLANES - 1) // PLANES
    LEVELS: tl.constexpr = 2**BITS - 1
    ROUND_DOWN: tl.constexpr = states_ptr.dtype.element_ty == tl.float32
    token = tl.arange(0, BLOCK_T)[:, None]
    for start in range(0, PLANE_DIM, BLOCK):
        byte = start + tl.arange(0, BLOCK)
        packed = tl.zeros((BLOCK_T, BLOCK), dtype=tl.int32)
        for plane in tl.static_range(PLANES):
            channel = plane * PLANE_DIM + byte
            inside = (byte < PLANE_DIM) & (channel < DIM)
            states = states_ptr + token * stride + channel[None, :]
            x = widen(tl.load(states, mask=(token < T) & inside[None, :], other=0.0))
            low = tl.min(tl.where(token < T, x, float("inf")), axis=0)
            high = tl.max(tl.where(token < T, x, float("-inf")), axis=0)
            if INDEX:
                zero = narrow(low, META)
                scale = narrow(tl.div_rn(high - widen(zero), LEVELS * 1.0), META)
            else:
                scale, zero = _scale_and_zero(low, high, LEVELS, META, ROUND_DOWN)
            _store_halves(target_ptr, channel, scale, inside)
            _store_halves(target_ptr, DIM + channel, zero, inside)
            codes = _codes(x, widen(scale)[None, :], widen(zero)[None, :], LEVELS)
            packed = packed | (codes << (plane * BITS))
        place = byte[None, :] * T + token if INDEX else token * PLANE_DIM + byte[None, :]
        inside = (token < T) & (byte < PLANE_DIM)[None, :]
        tl.store(target_ptr + 4 * DIM + place, packed.to(tl.uint8), mask=inside)


@triton.jit
def pack_tokens(
    states_ptr: tl.tensor,
    stride: tl.tensor,
    target_ptr: tl.tensor,
    T: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    META: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    TOKENS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Values with scales per token over GROUP channels.

    Channels of one byte may lie in different groups and a group in several planes, so scales go
    to memory first and every channel reads those of its group from there.
    """
    PLANES: tl.constexpr = 8 // BITS
    PLANE_DIM: tl.constexpr = (DIM + PLANES - 1) // PLANES
    LEVELS: tl.constexpr = 2**BITS - 1
    ROUND_DOWN: tl.constexpr = states_ptr.dtype.element_ty == tl.float32
    TOKEN_GROUPS: tl.constexpr = DIM // GROUP
    NUM_GROUPS: tl.constexpr = T * TOKEN_GROUPS
    scale_ptr = target_ptr.to(tl.pointer_type(META))
    zero_ptr = scale_ptr + NUM_GROUPS
    member = tl.arange(0, GROUP_BLOCK)[None, :]
    for start in range(0, NUM_GROUPS, GROUPS_BLOCK):
        group = start + tl.arange(0, GROUPS_BLOCK)
        first = (group // TOKEN_GROUPS) * stride + (group % TOKEN_GROUPS) * GROUP
        inside = (group < NUM_GROUPS)[:, None] & (member < GROUP)
        x = widen(tl.load(states_ptr + first[:, None] + member, mask=inside, other=0.0))
        low = tl.min(tl.where(member < GROUP, x, float("inf")), axis=1)
        high = tl.max(tl.where(member < GROUP, x, float("-inf")), axis=1)
        scale, zero = _scale_and_zero(low, high, LEVELS, META, ROUND_DOWN)
        tl.store(scale_ptr + group, scale, mask=group < NUM_GROUPS)
        tl.store(zero_ptr + group, zero, mask=group < NUM_GROUPS)
    tl.debug_barrier()
    byte = tl.arange(0, BLOCK)[None, :]
    for start in range(0, T, TOKENS_BLOCK):
        token = (start + tl.arange(0, TOKENS_BLOCK))[:, None]
        packed = tl.zeros((TOKENS_BLOCK, BLOCK), dtype=tl.int32)
        for plane in tl.static_range(PLANES):
            channel = plane * PLANE_DIM + byte
            inside = (token < T) & (byte < PLANE_DIM) & (channel < DIM)
            x = widen(tl.load(states_ptr + token * stride + channel, mask=inside, other=0.0))
            group = token * TOKEN_GROUPS + channel // GROUP
            scale = widen(tl.load(scale_ptr + group, mask=inside, other=0.0))
            zero = widen(tl.load(zero_ptr + group, mask=inside, other=0.0))
            packed = packed | (_codes(x, scale, zero, LEVELS) << (plane * BITS))
        place = target_ptr + 4 * NUM_GROUPS + token * PLANE_DIM + byte
        tl.store(place, packed.to(tl.uint8), mask=(token < T) & (byte < PLANE_DIM))


@triton.jit
def pad(
    target_ptr: tl.tensor,
    T: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NBYTES: tl.constexpr,
) -> None:
    """Zeros behind the codes, up to NBYTES."""
    PLANES: tl.constexpr = 8 // BITS
    USED: tl.constexpr = 4 * NUM_GROUPS + T * ((DIM + PLANES - 1) // PLANES)
    byte = USED + tl.arange(0, 16)
    tl.store(target_ptr + byte, tl.zeros((16,), dtype=tl.uint8), mask=byte < NBYTES)
