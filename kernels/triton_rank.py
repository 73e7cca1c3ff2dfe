"""Ratings as integers of the same order, and the largest k of any number of them.

Device functions of `kernels/triton_select.py`: what a program does with the pages of its row, in
chunks. Keys stay in registers where one chunk holds them all (`WHOLE`), and lie in scratch memory
where it does not.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

# Keys of pages lie strictly between the two, and so do those of residents that may give way. The
# lowest is the key of what cannot be chosen, the highest that of an empty place.
LOWEST_KEY: tl.constexpr = tl.constexpr(-(2**31))
HIGHEST_KEY: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def sum_of_masses(
    peak_ptr: tl.tensor,
    mass_ptr: tl.tensor,
    fixed_ptr: tl.tensor,  # None, or the log mass [rows, GROUP] of what there is beside the pages
    row: tl.tensor,
    num_blocks: tl.tensor,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,  # read together
) -> tuple[tl.tensor, tl.tensor]:
    """Peak and mass [HEADS] over all pages, from those of the blocks, and what is fixed."""
    head = tl.arange(0, HEADS)
    peak = tl.full([HEADS], -float("inf"), tl.float32)
    mass = tl.zeros([HEADS], tl.float32)
    if fixed_ptr is not None:
        peak = tl.load(fixed_ptr + row * GROUP + head, mask=head < GROUP, other=-float("inf"))
        mass = tl.where(peak == -float("inf"), 0.0, 1.0)
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
def rate(
    score_ptr: tl.tensor,
    peak: tl.tensor,
    mass: tl.tensor,
    page: tl.tensor,
    selectable: tl.tensor,
    num_pages: tl.tensor,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    SHARES: tl.constexpr,
    HIDDEN: tl.constexpr,
) -> tl.tensor:
    """Ratings of pages as integers of the same order; hidden ones get the lowest but one.

    One query head at a time, so that many pages fit in registers, the scores of the next one on
    their way meanwhile.
    """
    exists = page < selectable
    heads = tl.arange(0, HEADS)
    rating = tl.zeros(page.shape, tl.float32)
    hidden = page < 0
    score = tl.load(score_ptr + page, mask=exists, other=HIDDEN)
    for head in range(GROUP):
        score_ptr += num_pages
        ahead = tl.load(score_ptr + page, mask=exists & (head + 1 < GROUP), other=HIDDEN)
        hidden = hidden | (score == HIDDEN)
        if SHARES:
            own = heads == head
            share = tl.exp(score - tl.sum(tl.where(own, peak, 0.0)))
            rating += share * (1.0 / tl.sum(tl.where(own, mass, 0.0)))
        else:
            rating += tl.where(hidden, 0.0, score)
        score = ahead
    rating = tl.where(rating == 0.0, 0.0, rating)  # -0.0 is no less
    bits = rating.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(hidden, LOWEST_KEY + 1, tl.minimum(key, HIGHEST_KEY - 1))
    return tl.where(exists, key, LOWEST_KEY)


@triton.jit
def keys_at(
    keys_ptr: tl.tensor,
    keys: tl.tensor,
    start: tl.tensor,
    num_keys: tl.tensor,
    CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    """The chunk of keys from `start` on: `keys`, or from memory where these are not all."""
    if WHOLE:
        return keys
    entry = start + tl.arange(0, CHUNK)
    return tl.load(keys_ptr + entry, mask=entry < num_keys, other=LOWEST_KEY)


@triton.jit
def kth_largest(
    keys_ptr: tl.tensor,
    keys: tl.tensor,
    num_keys: tl.tensor,
    num_eligible: tl.tensor,
    k: tl.tensor,
    CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """A key that exactly k others reach, or the k-th largest key and the last entry to take of it.

    Whatever is above the key belongs to the k largest, and what equals it up to that entry. Of the
    keys `num_eligible` are above `LOWEST_KEY`; where all of them or none are wanted nothing is
    searched. Otherwise the range between the lowest and the highest is halved until k keys reach
    its middle: 10 times as a rule, 32 times at most.
    """
    low = tl.full([], LOWEST_KEY + 1, tl.int32)
    high = tl.full([], HIGHEST_KEY, tl.int32)
    if (k > 0) & (k < num_eligible):
        low = tl.full([], HIGHEST_KEY, tl.int32)
        high = tl.full([], LOWEST_KEY, tl.int32)
        for start in range(0, CHUNK if WHOLE else num_keys, CHUNK):
            key = keys_at(keys_ptr, keys, start, num_keys, CHUNK, WHOLE)
            low = tl.minimum(low, tl.min(tl.where(key == LOWEST_KEY, HIGHEST_KEY, key)))
            high = tl.maximum(high, tl.max(key))
    reached = num_eligible
    above = tl.full([], 0, tl.int32)
    while (k > 0) & (reached != k) & (low < high):
        half = (high.to(tl.uint32, bitcast=True) - low.to(tl.uint32, bitcast=True)) >> 1
        middle = high - half.to(tl.int32, bitcast=True)
        reached = tl.full([], 0, tl.int32)
        for start in range(0, CHUNK if WHOLE else num_keys, CHUNK):
            key = keys_at(keys_ptr, keys, start, num_keys, CHUNK, WHOLE)
            reached += tl.sum((key >= middle).to(tl.int32))
        low = tl.where(reached >= k, middle, low)
        high = tl.where(reached >= k, high, middle - 1)
        above = tl.where(reached >= k, above, reached)
    last = tl.where(k > 0, HIGHEST_KEY, -1)
    if (k > 0) & (reached != k):
        last = tl.full([], -1, tl.int32)
        ties = tl.full([], 0, tl.int32)
        for start in range(0, CHUNK if WHOLE else num_keys, CHUNK):
            key = keys_at(keys_ptr, keys, start, num_keys, CHUNK, WHOLE)
            tied = (key == low).to(tl.int32)
            taken = (tied != 0) & (ties + tl.cumsum(tied, 0) <= k - above)
            last = tl.maximum(last, tl.max(tl.where(taken, start + tl.arange(0, CHUNK), -1)))
            ties += tl.sum(tied)
    return tl.where(k > 0, low, HIGHEST_KEY), last


@triton.jit
def share_of(key: tl.tensor) -> tl.tensor:
    """What `rate` rated, for shares: never negative, nothing where a page is hidden or is none."""
    return tl.where(key > 0, key, 0).to(tl.float32, bitcast=True)


@triton.jit
def fewest(
    keys_ptr: tl.tensor,
    keys: tl.tensor,
    num_keys: tl.tensor,
    bound: tl.tensor,
    CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    """How many of the largest keys to take at least so that the shares of all others add up to no
    more than `bound`; all keys stand for shares and are eligible.

    The range of keys is halved, always so that what is below its lowest key fits, and what is below
    or in it does not, until one key is left in it, or equal ones.
    """
    low = tl.full([], HIGHEST_KEY, tl.int32)
    high = tl.full([], LOWEST_KEY, tl.int32)
    everything = tl.full([], 0.0, tl.float32)
    for start in range(0, CHUNK if WHOLE else num_keys, CHUNK):
        key = keys_at(keys_ptr, keys, start, num_keys, CHUNK, WHOLE)
        low = tl.minimum(low, tl.min(tl.where(key == LOWEST_KEY, HIGHEST_KEY, key)))
        high = tl.maximum(high, tl.max(key))
        everything += tl.sum(share_of(key))
    rest = tl.full([], 0.0, tl.float32)  # of keys below the range
    reached = num_keys  # keys in the range and above
    above = tl.full([], 0, tl.int32)
    while (everything > bound) & (low < high) & (reached - above > 1):
        half = (high.to(tl.uint32, bitcast=True) - low.to(tl.uint32, bitcast=True)) >> 1
        middle = high - half.to(tl.int32, bitcast=True)
        below = tl.full([], 0.0, tl.float32)
        number = tl.full([], 0, tl.int32)
        for start in range(0, CHUNK if WHOLE else num_keys, CHUNK):
            key = keys_at(keys_ptr, keys, start, num_keys, CHUNK, WHOLE)
            below += tl.sum(tl.where(key < middle, share_of(key), 0.0))
            number += tl.sum((key >= middle).to(tl.int32))
        fits = below <= bound
        rest = tl.where(fits, below, rest)
        reached = tl.where(fits, number, reached)
        above = tl.where(fits, above, number)
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle - 1)
    ties = reached - above
    left = tl.minimum((bound - rest) / tl.maximum(share_of(low), 1e-38), ties.to(tl.float32))
    taken = tl.minimum(tl.maximum(ties - tl.maximum(left, 0.0).to(tl.int32), 1), ties)
    return tl.where(everything > bound, above + taken, 0)


@triton.jit
def is_top(key: tl.tensor, entry: tl.tensor, kth: tl.tensor, last: tl.tensor) -> tl.tensor:
    """Whether keys are among the k largest, as `kth_largest` says it."""
    return (key > kth) | ((key == kth) & (entry <= last))


@triton.jit
def note_missed(
    missed_ptr: tl.tensor,
    row: tl.tensor,
    keys_ptr: tl.tensor,
    keys: tl.tensor,
    num_keys: tl.tensor,
    kth: tl.tensor,
    last: tl.tensor,
    is_capped: tl.tensor,
    num_spared: tl.tensor,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Add a step to a row's log: steps, missed in all, worst, capped; and pages spared by this one.

    Missed is what pages hold that are not among the largest, the mean over the query heads.
    """
    missed = tl.full([], 0.0, tl.float32)
    for start in range(0, CHUNK if WHOLE else num_keys, CHUNK):
        key = keys_at(keys_ptr, keys, start, num_keys, CHUNK, WHOLE)
        taken = is_top(key, start + tl.arange(0, CHUNK), kth, last)
        missed += tl.sum(tl.where(taken, 0.0, share_of(key)))
    missed = (missed / GROUP).to(tl.float64)
    which = tl.arange(0, 8)
    missed_ptr += row * 5 + which
    before = tl.load(missed_ptr, mask=which < 5, other=0.0)
    after = tl.where(which == 0, before + 1, before + missed)
    after = tl.where(which == 2, tl.maximum(before, missed), after)
    after = tl.where(which == 3, before + is_capped.to(tl.float64), after)
    after = tl.where(which == 4, num_spared.to(tl.float64), after)
    tl.store(missed_ptr, after, mask=which < 5)


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
