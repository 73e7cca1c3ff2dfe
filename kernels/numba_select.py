"""Which pages a row attends: the scores of its query heads into one rating, the best of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from arkcache.kernels.numba_compile import kernel
from arkcache.kernels.numba_numbers import F32, UNSEEN, bits_of_float, exp_of_negative
from arkcache.kernels.numba_vectors import (
    LANES,
    add16,
    exp16,
    load16,
    max16,
    peak16,
    splat16,
    store16,
    sub16,
    sum16,
    zeros16,
)

BY_MEAN, BY_SHARE = 0, 1
"""How scores become ratings: their mean, or the mean share of the mass that they are the log of."""


@kernel
def rate(
    score: Any, stride: Any, group: Any, count: Any, reduction: Any, fixed: Any, rating: Any
) -> None:
    """Reduce scores [lanes, stride] of `count` pages over the query heads, to rating [count].

    fixed fp32 [group]: log mass of what is attended anyhow, which has its part of each head's
    attention; below `UNSEEN` it has none. `score` is used up.
    """
    weight = F32(1) / F32(group)
    for g in range(group):
        own = score[g * stride : g * stride + count]
        if reduction == BY_SHARE:
            peak, total = exponents(own, count, fixed[g])
            # Where nothing has any mass, nothing is a share of it.
            share = F32(0) if peak < UNSEEN else weight / total
        else:
            share = weight
        if g == 0:
            for p in range(count):
                rating[p] = own[p] * share
        else:
            for p in range(count):
                rating[p] += own[p] * share


@kernel
def exponents(score: Any, count: Any, fixed: Any) -> Any:
    """Turn scores into exp(score - peak) in place, the peak being over them and `fixed`; returns
    it, and what they and that of `fixed` add up to."""
    whole, at = count // LANES * LANES, score.ctypes.data
    highest, totals = splat16(fixed), zeros16()
    for i in range(at, at + 4 * whole, 4 * LANES):
        highest = max16(load16(i, score), highest)
    peak = peak16(highest)
    for p in range(whole, count):
        peak = max(peak, score[p])
    peaks = splat16(peak)
    for i in range(at, at + 4 * whole, 4 * LANES):
        weight = exp16(sub16(load16(i, score), peaks))
        store16(i, weight)
        totals = add16(totals, weight)
    total = sum16(totals) + (exp_of_negative(fixed - peak) if fixed > UNSEEN else F32(0))
    for p in range(whole, count):
        score[p] = exp_of_negative(score[p] - peak)
        total += score[p]
    return peak, total


@kernel
def select(rating: Any, count: Any, wanted: Any, order: Any, chosen: Any) -> Any:
    """The numbers of the `wanted` largest of `count` ratings, ascending; of equal ones the first.

    order int32 [count]: for keys that are ordered as the ratings are. Returns how many there are,
    `wanted` unless ratings are NaN.
    """
    for p in range(count):
        bits = bits_of_float(rating[p])
        order[p] = bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))
    low, high = np.int64(-0x80000000), np.int64(0x7F800001)  # above infinity
    while high - low > 1:
        middle = np.int32((low + high) >> 1)
        reached = np.int32(0)
        for p in range(count):
            reached += np.int32(order[p] >= middle)
        if reached >= wanted:
            low = np.int64(middle)
            if reached == wanted:
                break
        else:
            high = np.int64(middle)
    least, above = np.int32(low), np.int32(0)
    for p in range(count):
        above += np.int32(order[p] > least)
    ties, taken = wanted - above, 0
    for p in range(count):
        key = order[p]
        if taken < wanted and (key > least or (key == least and ties > 0)):
            ties -= np.int32(key == least)
            chosen[taken] = p
            taken += 1
    return taken


@kernel
def count_common(one: Any, num_one: Any, other: Any, num_other: Any) -> Any:
    """How many numbers two ascending lists have in common."""
    common, i, j = 0, 0, 0
    while i < num_one and j < num_other:
        if one[i] == other[j]:
            common += 1
            i += 1
            j += 1
        elif one[i] < other[j]:
            i += 1
        else:
            j += 1
    return common
