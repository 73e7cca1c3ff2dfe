"""The kernel that rates pages by the token index: log-sum-exp of q.k over a page's quantised keys.

A block's pages are taken a few at a time, so that the query heads of a group fill the tile of a
matrix product that they would otherwise leave empty. What all tokens of a page have in common is
added to its score at the end; under a softcap or a mask, which are of each token, to its logits.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from arkcache.kernels.triton_pack import widen
from arkcache.kernels.triton_score_volumes import finish_block, finish_empty_block
from arkcache.kernels.triton_tiles import tanh
from arkcache.kernels.triton_token_planes import add_planes, load_planes, offsets

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _normaliser(
    query_ptr: tl.tensor,
    head: tl.tensor,
    scale: tl.tensor,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    EXACT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """What queries are multiplied by before their product, and logits (in base 2) after it.

    Normalised, q * scale overflows fp16 only where keys of a page differ by 5e7, however large q.
    """
    largest = tl.full(head.shape, 1.0, tl.float32)
    if not EXACT:
        largest = tl.zeros(head.shape, tl.float32)
        for start in tl.static_range(0, HEAD_DIM, 128):
            channel = start + tl.arange(0, 128)[None, :]
            mask = (head < GROUP)[:, None] & (channel < HEAD_DIM)
            query = widen(tl.load(query_ptr + channel, mask=mask, other=0.0))
            largest = tl.maximum(largest, tl.max(tl.abs(query), axis=1))
        largest = tl.where(largest == 0.0, 1.0, largest) * 2 ** (10 - BITS)
    return 1.0 / largest, largest * (scale * LOG2_E)


@triton.jit
def _load_scores(
    score_ptr: tl.tensor,
    row: tl.tensor,
    pages: tl.tensor,
    sealed: tl.tensor,
    num_pages: tl.tensor,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
) -> tl.tensor:
    """The scores [HEADS, pages] of a block, as they are in memory."""
    head = tl.arange(0, HEADS)[:, None]
    score_ptrs = score_ptr + (row * GROUP + head) * num_pages + pages[None, :]
    return tl.load(score_ptrs, mask=(head < GROUP) & sealed[None, :], other=0.0)


@triton.jit
def _store_common(
    query_ptr: tl.tensor,
    header_ptr: tl.tensor,
    score_ptr: tl.tensor,
    sealed: tl.tensor,
    scale: tl.tensor,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EXACT: tl.constexpr,
    PAGES: tl.constexpr,
    HEADS: tl.constexpr,
    BY_TOKEN: tl.constexpr,
) -> None:
    """Where logits are wanted one by one, store what all tokens of a page have in common, in place
    of scores [HEADS, PAGES]."""
    if BY_TOKEN:
        common = scale * offsets(
            query_ptr, header_ptr, sealed, HEAD_DIM, GROUP, BITS, ALIGNED, EXACT, PAGES, HEADS
        )
        mask = (tl.arange(0, HEADS) < GROUP)[:, None] & sealed[None, :]
        tl.store(score_ptr, common, mask=mask)
        tl.debug_barrier()  # other threads read it than wrote it


@triton.jit
def _load_common(score_ptr: tl.tensor, rated: tl.tensor, BY_TOKEN: tl.constexpr) -> tl.tensor:
    """What was stored for the logits of all tokens of a page."""
    if BY_TOKEN:
        return tl.load(score_ptr, mask=rated, other=0.0)
    else:
        return tl.zeros(rated.shape, tl.float32)


@triton.jit
def _final_logits(
    logit: tl.tensor,
    common: tl.tensor,
    bias_ptr: tl.tensor,
    offset: tl.tensor,
    there: tl.tensor,
    softcap: tl.tensor,
    BY_TOKEN: tl.constexpr,
) -> tl.tensor:
    """Logits of tokens in base 2, of what is to be added to those of a page [queries] and of what
    comes after that: a softcap, and the bias that lies `offset` [queries, tokens] from `bias_ptr`,
    which is None without one."""
    if BY_TOKEN:
        logit = logit * LN2 + common[:, None]
        if softcap is not None:
            logit = softcap * tanh(logit / softcap)
        if bias_ptr is not None:
            logit += tl.load(bias_ptr + offset, mask=there, other=0.0)
            # Some models hide with the most negative number rather than with -inf.
            logit = tl.where(logit < -1.7e38, -float("inf"), logit)
        logit = logit * LOG2_E
    return logit


@triton.jit
def _fold(
    logit: tl.tensor, peak: tl.tensor, mass: tl.tensor, HIDES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Peak and mass [queries] in base 2 with more logits [queries, tokens]; HIDES: any may be
    -inf."""
    higher = tl.maximum(peak, tl.max(logit, axis=1))
    base = higher
    if HIDES:
        base = tl.where(higher == -float("inf"), 0.0, higher)
    mass = mass * tl.exp2(peak - base) + tl.sum(tl.exp2(logit - base[:, None]), axis=1)
    return higher, mass


@triton.jit
def _log_mass(peak: tl.tensor, mass: tl.tensor, HIDES: tl.constexpr) -> tl.tensor:
    """The logarithm of what `_fold` made."""
    if HIDES:
        mass = tl.where(peak == -float("inf"), 1.0, mass)
    return (peak + tl.log2(mass)) * LN2


# They grow: no value is worth compiling anew for.
@triton.jit(do_not_specialize=["num_pages", "bias_stride_row", "bias_stride_head"])
def score_tokens_kernel(
    query_ptr: tl.tensor,
    digests_ptr: tl.tensor,
    sealed_ptr: tl.tensor,
    hidden_ptr: tl.tensor,
    bias_ptr: tl.tensor,  # by token number; None without a mask
    score_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    mass_ptr: tl.tensor,
    query_stride_row: tl.tensor,
    query_stride_head: tl.tensor,
    digests_stride_row: tl.tensor,
    digests_stride_page: tl.tensor,
    bias_stride_row: tl.tensor,
    bias_stride_head: tl.tensor,
    bias_stride_token: tl.tensor,
    num_pages: tl.tensor,
    num_sink_pages: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BITS: tl.constexpr,
    MASKED: tl.constexpr,
    HIDDEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    EXACT: tl.constexpr,
    PAGES: tl.constexpr,
    HEADS: tl.constexpr,  # GROUP padded to a power of two
    BLOCK_HEADS: tl.constexpr,  # and to what a matrix product takes
    COLUMNS: tl.constexpr,  # pages rated at a time
    TOKENS: tl.constexpr,  # of each page at a time
    CHANNELS: tl.constexpr,  # of each plane at a time
    COLUMNS_AHEAD: tl.constexpr,  # times as many pages whose codes are on their way
) -> None:
    """Scores of one block of pages.

    A matrix product takes the queries of COLUMNS pages, each multiplied by its page's scales, and
    the codes of the same pages; what a query of one page makes of another page's is dropped.
    """
    ROWS: tl.constexpr = 16 if COLUMNS * HEADS < 16 else COLUMNS * HEADS
    PLANE_DIM: tl.constexpr = (HEAD_DIM * BITS + 7) // 8
    WHOLE: tl.constexpr = CHANNELS >= PLANE_DIM
    BY_TOKEN: tl.constexpr = (softcap is not None) | (bias_ptr is not None)
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * PAGES
    selectable = tl.load(sealed_ptr + row) - num_sink_pages
    if first >= selectable:
        finish_empty_block(peak_ptr, mass_ptr, row, GROUP, BLOCK_HEADS)
        return
    query_ptr += row * query_stride_row
    digests_ptr += row * digests_stride_row
    column, head = tl.arange(0, ROWS) // HEADS, tl.arange(0, ROWS) % HEADS
    token = tl.arange(0, COLUMNS * TOKENS)
    head_ptr = query_ptr + head[:, None] * query_stride_head
    inverse, unit = _normaliser(head_ptr, head, scale, HEAD_DIM, GROUP, BITS, EXACT)

    if WHOLE:  # the queries stay in registers
        byte = tl.arange(0, CHANNELS)
        query0, query1, query2, query3 = load_planes(
            head_ptr, inverse, byte, head, HEAD_DIM, GROUP, BITS
        )

    heads = tl.arange(0, BLOCK_HEADS)
    pages = first + tl.arange(0, PAGES)
    sealed = pages < selectable
    _store_common(
        query_ptr + heads[:, None] * query_stride_head,
        digests_ptr + (num_sink_pages + pages).to(tl.int64)[None, :] * digests_stride_page,
        score_ptr + (row * GROUP + heads)[:, None] * num_pages + pages[None, :],
        sealed,
        scale,
        HEAD_DIM,
        GROUP,
        BITS,
        ALIGNED,
        EXACT,
        PAGES,
        BLOCK_HEADS,
        BY_TOKEN,
    )

    for step in tl.range(0, PAGES, COLUMNS, num_stages=COLUMNS_AHEAD + 1):
        start_page = first + step
        page = start_page + column
        exists = (column < COLUMNS) & (page < selectable)
        header_ptr = (
            digests_ptr + (num_sink_pages + page).to(tl.int64)[:, None] * digests_stride_page
        )
        token_page = start_page + token // TOKENS
        codes_ptr = digests_ptr + 4 * HEAD_DIM
        codes_ptr += (num_sink_pages + token_page).to(tl.int64)[None, :] * digests_stride_page
        peak = tl.full([ROWS], -float("inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        entry = (row * GROUP + head) * num_pages + page
        rated = exists & (head < GROUP)
        common = _load_common(score_ptr + entry, rated, BY_TOKEN)
        for start_token in range(0, PAGE_SIZE, TOKENS):
            position = start_token + token % TOKENS
            logit = tl.zeros([ROWS, COLUMNS * TOKENS], tl.float32)
            for start in range(0, PLANE_DIM, CHANNELS):
                byte = start + tl.arange(0, CHANNELS)
                mask = (byte < PLANE_DIM)[:, None] & (token_page < selectable)[None, :]
                if PAGE_SIZE % TOKENS:
                    mask = mask & (position < PAGE_SIZE)[None, :]
                packed_ptr = codes_ptr + byte[:, None] * PAGE_SIZE + position[None, :]
                packed = tl.load(packed_ptr, mask=mask, other=0)
                if not WHOLE:
                    query0, query1, query2, query3 = load_planes(
                        head_ptr, inverse, byte, head, HEAD_DIM, GROUP, BITS
                    )
                logit = add_planes(
                    logit,
                    query0,
                    query1,
                    query2,
                    query3,
                    header_ptr,
                    byte,
                    exists,
                    packed,
                    HEAD_DIM,
                    BITS,
                    ALIGNED,
                    EXACT,
                )
            logit = tl.reshape(logit, (ROWS, COLUMNS, TOKENS))
            own = column[:, None] == tl.arange(0, COLUMNS)[None, :]
            logit = tl.sum(tl.where(own[:, :, None], logit, 0.0), axis=1) * unit[:, None]
            number = (num_sink_pages + page)[:, None] * PAGE_SIZE + start_token
            number = (number + tl.arange(0, TOKENS)[None, :]).to(tl.int64)
            bias = row * bias_stride_row + head[:, None] * bias_stride_head
            bias += number * bias_stride_token
            there = rated[:, None] & (start_token + tl.arange(0, TOKENS) < PAGE_SIZE)[None, :]
            logit = _final_logits(logit, common, bias_ptr, bias, there, softcap, BY_TOKEN)
            if PAGE_SIZE % TOKENS:
                inside = start_token + tl.arange(0, TOKENS) < PAGE_SIZE
                logit = tl.where(inside[None, :], logit, -float("inf"))
            peak, mass = _fold(logit, peak, mass, bias_ptr is not None)
        log_mass = _log_mass(peak, mass, bias_ptr is not None)
        tl.store(score_ptr + entry, log_mass, mask=rated)

    tl.debug_barrier()  # other threads read these scores than wrote them
    score = _load_scores(score_ptr, row, pages, sealed, num_pages, GROUP, BLOCK_HEADS)
    if not BY_TOKEN:
        score += scale * offsets(
            query_ptr + heads[:, None] * query_stride_head,
            digests_ptr + (num_sink_pages + pages).to(tl.int64)[None, :] * digests_stride_page,
            sealed,
            HEAD_DIM,
            GROUP,
            BITS,
            ALIGNED,
            EXACT,
            PAGES,
            BLOCK_HEADS,
        )
    tl.debug_barrier()
    finish_block(
        score_ptr,
        peak_ptr,
        mass_ptr,
        hidden_ptr,
        score,
        row,
        pages,
        sealed,
        num_pages,
        tl.program_id(1),
        tl.num_programs(1),
        GROUP,
        BLOCK_HEADS,
        MASKED,
        HIDDEN,
    )
