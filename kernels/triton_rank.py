"""Ratings as integers of the same order, and the largest k of any number of them.

Device functions of `kernels/triton_select.py`: what a program does with the pages of its row, in
chunks. Keys lie in scratch memory in between.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

BLOCKS: tl.constexpr = tl.constexpr(128)  # whose peaks and masses are read together

# Keys of pages lie strictly between the two, and so do those of residents that may give way.
LOWEST_KEY: tl.constexpr = tl.constexpr(-(2**31))
HIGHEST_KEY: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def _sum_of_masses(
    peak_ptr: tl.tensor,
    mass_ptr: tl.tensor,
    row: tl.tensor,
    num_blocks: tl.tensor,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Peak and mass [HEADS] over all pages, from those of the blocks."""
    head = tl.arange(0, HEADS)
    peak = tl.full([HEADS], -float("inf"), tl.float32)
    mass = tl.zeros([HEADS], tl.float32)
    start = tl.full([], 0, tl.int32)
    while start < num_blocks:
        block = start + tl.arange(0, BLOCKS)
        entry = (row * GROUP + head)[:, None] * num_blocks + block[None, :]
        mask = (head < GROUP)[:, None] & (block < num_blocks)[None, :]
        peaks = tl.load(peak_ptr + entry, mask=mask, other=-float("inf"))
        masses = tl.load(mass_ptr + entry, mask=mask, other=0.0)
        higher = tl.maximum(peak, tl.max(peaks, axis=1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        mass *= tl.exp(peak - base)
        mass += tl.sum(masses * tl.exp(peaks - base[:, None]), axis=1)
        peak = higher
        start += BLOCKS
    # Where all is hidden there is nothing to divide by, and where no head is neither.
    empty = mass == 0.0
    return tl.where(empty, 0.0, peak), tl.where(empty, 1.0, mass)


@triton.jit
def write_keys(
    keys_ptr: tl.tensor,
    score_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    mass_ptr: tl.tensor,
    row: tl.tensor,
    selectable: tl.tensor,
    num_pages: tl.tensor,
    num_blocks: tl.tensor,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    SHARES: tl.constexpr,
    HIDDEN: tl.constexpr,
    PAGES: tl.constexpr,
) -> None:
    """Rate pages, as integers of the same order; hidden pages get the lowest."""
    if SHARES:
        peak, mass = _sum_of_masses(peak_ptr, mass_ptr, row, num_blocks, GROUP, HEADS)
    head = tl.arange(0, HEADS)
    start = tl.full([], 0, tl.int32)
    while start < selectable:
        page = start + tl.arange(0, PAGES)
        entry = (row * GROUP + head)[:, None] * num_pages + page[None, :]
        mask = (head < GROUP)[:, None] & (page < selectable)[None, :]
        score = tl.load(score_ptr + entry, mask=mask, other=0.0)
        hidden = tl.min(score, axis=0) == HIDDEN
        seen = mask & (hidden == 0)[None, :]
        if SHARES:
            score = tl.where(seen, score, -float("inf"))
            score = tl.exp(score - peak[:, None]) / mass[:, None]
        else:
            score = tl.where(seen, score, 0.0)
        rating = tl.sum(score, axis=0)
        rating = tl.where(rating == 0.0, 0.0, rating)  # -0.0 is no less
        bits = rating.to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        key = tl.where(hidden, LOWEST_KEY + 1, tl.minimum(key, HIGHEST_KEY - 1))
        tl.store(keys_ptr + page, key, mask=page < selectable)
        start += PAGES


@triton.jit
def kth_largest(
    keys_ptr: tl.tensor, count: tl.tensor, k: tl.tensor, CHUNK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The k-th largest of `count` keys, and how many of its equals are among the first k.

    Bit by bit: the largest number that at least k keys reach. For k = 0 no key reaches it.
    """
    kth = tl.full([], LOWEST_KEY, tl.int32)
    above = tl.full([], 0, tl.int32)
    for bit in range(32):
        step = tl.full([], 1, tl.int32) << (31 - tl.maximum(bit, 1))
        candidate = tl.where(bit == 0, 0, kth + step)
        reached = tl.full([], 0, tl.int32)
        start = tl.full([], 0, tl.int32)
        while start < count:
            entry = start + tl.arange(0, CHUNK)
            key = tl.load(keys_ptr + entry, mask=entry < count, other=LOWEST_KEY)
            reached += tl.sum((key >= candidate).to(tl.int32))
            start += CHUNK
        above = tl.where(reached >= k, above, reached)
        kth = tl.where(reached >= k, candidate, kth)
    return kth, k - above


@triton.jit
def is_top(
    key: tl.tensor, kth: tl.tensor, num_ties: tl.tensor, ties_before: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Which of a chunk of keys are among the first k, and the ties up to the chunk's end."""
    tied = (key == kth).to(tl.int32)
    top = (key > kth) | ((key == kth) & (ties_before + tl.cumsum(tied, 0) <= num_ties))
    return top, ties_before + tl.sum(tied)


@triton.jit
def add_counts(
    counters_ptr: tl.tensor,
    row: tl.tensor,
    num_hits: tl.tensor,
    num_missing: tl.tensor,
    num_evicted: tl.tensor,
    num_foreseen: tl.tensor,
    SPECULATIVE: tl.constexpr,
) -> None:
    """Add to a row's counters: hits, recalled, evicted, speculative hits, speculated."""
    which = tl.arange(0, 8)
    counted = tl.where(which == 2, num_evicted, 0)
    if SPECULATIVE:
        counted = tl.where(which == 4, num_missing, counted)
    else:
        counted = tl.where(which == 0, num_hits, counted)
        counted = tl.where(which == 1, num_missing, counted)
        counted = tl.where(which == 3, num_foreseen, counted)
    counters_ptr += row * 5 + which
    before = tl.load(counters_ptr, mask=which < 5, other=0)
    tl.store(counters_ptr, before + counted, mask=which < 5)
