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
    block: tl.tensor,
    num_blocks: tl.tensor,
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
    entry = (row * GROUP + head) * num_blocks + block
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


@triton.jit
def _load_query(
    query_ptr: tl.tensor,
    start: tl.tensor,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> tl.tensor:
    """Channels [HEADS, CHANNELS] of a row's queries, from those at [HEADS, 1] pointers."""
    channel = start + tl.arange(0, CHANNELS)
    mask = (tl.arange(0, HEADS) < GROUP)[:, None] & (channel < HEAD_DIM)[None, :]
    return tl.load(query_ptr + channel[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_pages", "num_blocks", "num_steps"])  # they grow
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
    num_blocks: tl.tensor,
    num_steps: tl.tensor,
    num_sink_pages: tl.tensor,
    scale: tl.tensor,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    SHAPE: tl.constexpr,
    MASKED: tl.constexpr,
    HIDDEN: tl.constexpr,
    PAGES: tl.constexpr,
    HEADS: tl.constexpr,  # GROUP padded
    CHANNELS: tl.constexpr,
    BLOCKS_AHEAD: tl.constexpr,
) -> None:
    """Scores [HEADS, PAGES] of `num_steps` blocks; CHANNELS of the digests are read at a time.

    Blocks without a page are passed over as if they were, so that what is read can be on its way
    while the blocks before it are rated.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * num_steps
    selectable = tl.load(sealed_ptr + row) - num_sink_pages
    head = tl.arange(0, HEADS)
    query_ptr += row * query_stride_row + head[:, None] * query_stride_head
    digests_ptr += row * digests_stride_row
    query = _load_query(query_ptr, 0, HEAD_DIM, GROUP, HEADS, CHANNELS)
    last = tl.minimum(first + num_steps, num_blocks)
    for block in tl.range(first, last, num_stages=BLOCKS_AHEAD + 1):
        page = block * PAGES + tl.arange(0, PAGES)
        exists = page < selectable
        page_ptr = digests_ptr + (num_sink_pages + page).to(tl.int64)[None, :] * digests_stride_page
        score = tl.zeros([HEADS, PAGES], tl.float32)
        square = tl.zeros([HEADS], tl.float32)
        for start in tl.static_range(0, HEAD_DIM, CHANNELS):
            if CHANNELS < HEAD_DIM:  # else it stays in registers
                query = _load_query(query_ptr, start, HEAD_DIM, GROUP, HEADS, CHANNELS)
            channel = start + tl.arange(0, CHANNELS)
            mask = (channel < HEAD_DIM)[:, None] & exists[None, :]
            center = tl.load(page_ptr + channel[:, None], mask=mask, other=0.0)
            score = dot(query, center, score)
            if SHAPE == "cuboid":
                radius = tl.load(page_ptr + HEAD_DIM + channel[:, None], mask=mask, other=0.0)
                score = dot(_magnitude(query), radius, score)
            if SHAPE == "sphere":
                square += tl.sum(widen(query) * widen(query), axis=1)
        if SHAPE == "sphere":
            radius = tl.load(page_ptr + HEAD_DIM, mask=exists[None, :], other=0.0)
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
            block,
            num_blocks,
            GROUP,
            HEADS,
            MASKED,
            HIDDEN,
        )
