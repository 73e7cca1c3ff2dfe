"""The kernel that rates pages by bounding volumes, and what ends every rating kernel.

A volume's score is linear in its digest once the query is mapped to features (see
`kernels/torch_digest.py`), so a block of pages is one matrix product, read once and in order.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from arkcache.kernels.triton_pack import widen

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""The interpreter multiplies the bits of bf16: there operands are widened first."""


@triton.jit
def dot(x: tl.tensor, y: tl.tensor, total: tl.tensor) -> tl.tensor:
    """total + x @ y in fp32."""
    if INTERPRETED:
        return tl.dot(widen(x), widen(y), total, input_precision="ieee")
    else:
        return tl.dot(x, y, total, input_precision="ieee")


@triton.jit
def _magnitude(x: tl.tensor) -> tl.tensor:
    if x.dtype == tl.float32:
        return tl.abs(x)
    else:  # by hand: the interpreter takes bf16 for integers
        return (x.to(tl.int16, bitcast=True) & 0x7FFF).to(x.dtype, bitcast=True)


@triton.jit
def finish_block(
    score_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    mass_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    score: tl.tensor,
    row: tl.tensor,
    page: tl.tensor,
    exists: tl.tensor,
    num_pages: tl.tensor,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    MASKED: tl.constexpr,
    HIDDEN: tl.constexpr,
) -> None:
    """Store scores [HEADS, PAGES] of a block, its peak and its mass."""
    counts = exists
    if MASKED:
        counts = tl.load(hidden_ptr + row * num_pages + page, mask=exists, other=1) == 0
        score = tl.where(counts[None, :], score, HIDDEN)
    head = tl.arange(0, HEADS)
    entry = (row * GROUP + head)[:, None] * num_pages + page[None, :]
    tl.store(score_ptr + entry, score, mask=(head < GROUP)[:, None] & exists[None, :])
    score = tl.where(counts[None, :], score, -float("inf"))
    peak = tl.max(score, axis=1)
    base = tl.where(peak == -float("inf"), 0.0, peak)
    mass = tl.sum(tl.exp(score - base[:, None]), axis=1)
    entry = (row * GROUP + head) * tl.num_programs(1) + tl.program_id(1)
    tl.store(peak_ptr + entry, peak, mask=head < GROUP)
    tl.store(mass_ptr + entry, mass, mask=head < GROUP)


@triton.jit
def finish_empty_block(
    peak_ptr: tl.tensor,
    mass_ptr: tl.tensor,
    row: tl.tensor,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    """What a block without a page leaves."""
    head = tl.arange(0, HEADS)
    entry = (row * GROUP + head) * tl.num_programs(1) + tl.program_id(1)
    mass = tl.zeros([HEADS], tl.float32)
    tl.store(peak_ptr + entry, mass - float("inf"), mask=head < GROUP)
    tl.store(mass_ptr + entry, mass, mask=head < GROUP)


@triton.jit(do_not_specialize=["num_pages"])  # it grows: no value is worth compiling anew for
def score_volumes_kernel(
    query_ptr: tl.tensor,
    digests_ptr: tl.tensor,
    sealed_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    score_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    mass_ptr: tl.tensor,
    query_stride_row: tl.tensor,
    query_stride_head: tl.tensor,
    digests_stride_row: tl.tensor,
    digests_stride_page: tl.tensor,
    num_pages: tl.tensor,
    num_sinks: tl.tensor,
    scale: tl.tensor,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    SHAPE: tl.constexpr,
    MASKED: tl.constexpr,
    HIDDEN: tl.constexpr,
    PAGES: tl.constexpr,
    HEADS: tl.constexpr,  # GROUP padded
    CHANNELS: tl.constexpr,
) -> None:
    """Scores [HEADS, PAGES] of one block of pages; CHANNELS of the digests are read at a time."""
    row = tl.program_id(0).to(tl.int64)
    selectable = tl.load(sealed_ptr + row) - num_sinks
    if tl.program_id(1) * PAGES >= selectable:
        finish_empty_block(peak_ptr, mass_ptr, row, GROUP, HEADS)
        return
    head = tl.arange(0, HEADS)
    page = tl.program_id(1) * PAGES + tl.arange(0, PAGES)
    exists = page < selectable
    query_ptr += row * query_stride_row + head[:, None] * query_stride_head
    digests_ptr += row * digests_stride_row
    digests_ptr += (num_sinks + page).to(tl.int64)[None, :] * digests_stride_page
    score = tl.zeros([HEADS, PAGES], tl.float32)
    square = tl.zeros([HEADS], tl.float32)
    for start in tl.static_range(0, HEAD_DIM, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        inside = channel < HEAD_DIM
        mask = (head < GROUP)[:, None] & inside[None, :]
        query = tl.load(query_ptr + channel[None, :], mask=mask, other=0.0)
        mask = inside[:, None] & exists[None, :]
        center = tl.load(digests_ptr + channel[:, None], mask=mask, other=0.0)
        score = dot(query, center, score)
        if SHAPE == "cuboid":
            radius = tl.load(digests_ptr + HEAD_DIM + channel[:, None], mask=mask, other=0.0)
            score = dot(_magnitude(query), radius, score)
        if SHAPE == "sphere":
            square += tl.sum(widen(query) * widen(query), axis=1)
    if SHAPE == "sphere":
        radius = tl.load(digests_ptr + HEAD_DIM, mask=exists[None, :], other=0.0)
        score += tl.sqrt(square)[:, None] * widen(radius)
    finish_block(
        score_ptr,
        peak_ptr,
        mass_ptr,
        hidden_ptr,
        score * scale,
        row,
        page,
        exists,
        num_pages,
        GROUP,
        HEADS,
        MASKED,
        HIDDEN,
    )
