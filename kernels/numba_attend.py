"""Attention of one row over runs of tokens that lie anywhere: logits, values, quantised pages.

Query heads go four at a time, so that a token is read once for four of them; a row with one head
goes by itself. `lanes` is how many heads there are, padded to whole fours with queries of zeros.
Logits of four heads lie beside each other, token by token: fp32 [chunk, capacity, heads], where
`heads` is 4 or, for one head alone, 1. All sums are fp32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from arkcache.kernels.numba_compile import kernel
from arkcache.kernels.numba_numbers import F32, HIDDEN, floats, pointer, prefetch, widen
from arkcache.kernels.numba_vectors import (
    LANES,
    add16,
    exp16,
    fma16,
    load16,
    load_codes16,
    max16,
    splat16,
    store16,
    store_sums4,
    sub16,
    sum16,
    zeros16,
)

LINE_BYTES = 64

AHEAD = 4
"""Units that are asked for before they are read: they lie anywhere, so that no processor guesses
the next one."""


@kernel
def ask_for(address: Any, nbytes: Any) -> None:
    """Ask for memory that is read soon."""
    for offset in range(0, nbytes, LINE_BYTES):
        prefetch(address + offset)


@kernel
def dot_units(
    query: Any,
    lanes: Any,
    dim: Any,
    like: Any,
    units: Any,
    size: Any,
    tokens: Any,
    logits: Any,
    capacity: Any,
    at: Any,
) -> None:
    """Logits of `tokens` tokens, from token `at` of the buffer on.

    query fp32 [lanes, dim], scaled; units int64: addresses of keys [size, dim] of the type of
    `like`, of which the last may have fewer tokens; logits fp32 [chunk, capacity, heads].
    """
    heads, width = min(lanes, 4), dim * like.itemsize
    for u in range(len(units)):
        count, first = min(size, tokens - u * size), at + u * size
        ask_for(units[min(u + AHEAD, len(units) - 1)], size * width)
        for lane in range(0, lanes, 4):
            own = query[lane * dim : (lane + heads) * dim]
            place = lane * capacity + heads * first
            to = logits.ctypes.data + 4 * place
            if heads == 1:
                _dot_tokens_once(own, dim, like, units[u], count, to)
            else:
                _dot_tokens4(own, dim, like, units[u], count, to)
            if dim % LANES:
                keys = carray(pointer(units[u]), (count * dim,), like.dtype)
                _dot_rest(own, dim, keys, count, logits[place : place + heads * count], heads)


@kernel
def _dot_tokens4(query: Any, dim: Any, like: Any, keys: Any, count: Any, to: Any) -> None:
    """Four heads, two tokens at a time: whole vectors of channels."""
    size, q = like.itemsize, query.ctypes.data
    whole, row = dim // LANES * LANES, 4 * dim
    for t in range(0, count, 2):
        x_at = keys + t * dim * size
        y_at = x_at + (dim * size if t + 1 < count else 0)
        a0, a1, a2, a3 = zeros16(), zeros16(), zeros16(), zeros16()
        b0, b1, b2, b3 = zeros16(), zeros16(), zeros16(), zeros16()
        for d in range(0, whole, LANES):
            x, y = load16(x_at + d * size, like), load16(y_at + d * size, like)
            w = load16(q + 4 * d, query)
            a0, b0 = fma16(w, x, a0), fma16(w, y, b0)
            w = load16(q + 4 * d + row, query)
            a1, b1 = fma16(w, x, a1), fma16(w, y, b1)
            w = load16(q + 4 * d + 2 * row, query)
            a2, b2 = fma16(w, x, a2), fma16(w, y, b2)
            w = load16(q + 4 * d + 3 * row, query)
            a3, b3 = fma16(w, x, a3), fma16(w, y, b3)
        store_sums4(to + 16 * t, a0, a1, a2, a3)
        if t + 1 < count:
            store_sums4(to + 16 * t + 16, b0, b1, b2, b3)


@kernel
def _dot_tokens_once(query: Any, dim: Any, like: Any, keys: Any, count: Any, to: Any) -> None:
    """One head, four tokens at a time: whole vectors of channels."""
    size, q = like.itemsize, query.ctypes.data
    whole, row, fours = dim // LANES * LANES, dim * like.itemsize, count // 4 * 4
    for t in range(0, fours, 4):
        at = keys + t * row
        a0, a1, a2, a3 = zeros16(), zeros16(), zeros16(), zeros16()
        for d in range(0, whole, LANES):
            w = load16(q + 4 * d, query)
            a0 = fma16(w, load16(at + d * size, like), a0)
            a1 = fma16(w, load16(at + row + d * size, like), a1)
            a2 = fma16(w, load16(at + 2 * row + d * size, like), a2)
            a3 = fma16(w, load16(at + 3 * row + d * size, like), a3)
        store_sums4(to + 4 * t, a0, a1, a2, a3)
    for t in range(fours, count):
        at, a0 = keys + t * row, zeros16()
        for d in range(0, whole, LANES):
            a0 = fma16(load16(q + 4 * d, query), load16(at + d * size, like), a0)
        floats(to + 4 * t, 1)[0] = sum16(a0)


@kernel
def _dot_rest(query: Any, dim: Any, keys: Any, count: Any, logits: Any, heads: Any) -> None:
    """Add the channels that are no whole vector."""
    for t in range(count):
        for h in range(heads):
            for d in range(dim // LANES * LANES, dim):
                logits[t * heads + h] += query[h * dim + d] * widen(keys[t * dim + d])


@kernel
def add_units(
    weights: Any,
    lanes: Any,
    dim: Any,
    like: Any,
    units: Any,
    size: Any,
    tokens: Any,
    capacity: Any,
    at: Any,
    sums: Any,
) -> None:
    """sums[h] += the values of `tokens` tokens, weighted by what their logits have become.

    weights as the logits of `dot_units`; units: addresses of values [size, dim]; sums fp32 [lanes,
    dim].
    """
    heads, run = min(lanes, 4), 2 * LANES
    for lane in range(0, lanes, 4):
        first = lane * capacity + heads * at
        own, out = weights[first : first + heads * tokens], sums[lane * dim : (lane + heads) * dim]
        for d in range(0, dim // run * run, run):
            ahead = AHEAD if d == 0 and lane == 0 else 0
            if heads == 1:
                _add_channels_once(own, dim, like, units, size, tokens, d, out, ahead)
            else:
                _add_channels4(own, dim, like, units, size, tokens, d, out, ahead)
        if dim % run:
            _add_rest(own, heads, dim, like, units, size, tokens, dim // run * run, out)


@kernel
def _add_channels_once(
    own: Any, dim: Any, like: Any, units: Any, size: Any, tokens: Any, d: Any, out: Any, ahead: Any
) -> None:
    """Two vectors of channels, from channel d on, of one head."""
    to, width = out.ctypes.data + 4 * d, dim * like.itemsize
    a0, b0 = load16(to, out), load16(to + 4 * LANES, out)
    for u in range(len(units)):
        if ahead:
            ask_for(units[min(u + ahead, len(units) - 1)], size * width)
        at = units[u] + d * like.itemsize
        for t in range(u * size, min((u + 1) * size, tokens)):
            w = splat16(own[t])
            a0 = fma16(w, load16(at, like), a0)
            b0 = fma16(w, load16(at + LANES * like.itemsize, like), b0)
            at += width
    store16(to, a0)
    store16(to + 4 * LANES, b0)


@kernel
def _add_channels4(
    own: Any, dim: Any, like: Any, units: Any, size: Any, tokens: Any, d: Any, out: Any, ahead: Any
) -> None:
    """Two vectors of channels, from channel d on, of four heads."""
    to, row, half, width = out.ctypes.data + 4 * d, 4 * dim, 4 * LANES, dim * like.itemsize
    a0, b0 = load16(to, out), load16(to + half, out)
    a1, b1 = load16(to + row, out), load16(to + row + half, out)
    a2, b2 = load16(to + 2 * row, out), load16(to + 2 * row + half, out)
    a3, b3 = load16(to + 3 * row, out), load16(to + 3 * row + half, out)
    for u in range(len(units)):
        if ahead:
            ask_for(units[min(u + ahead, len(units) - 1)], size * width)
        at = units[u] + d * like.itemsize
        for t in range(u * size, min((u + 1) * size, tokens)):
            x, y = load16(at, like), load16(at + LANES * like.itemsize, like)
            w = splat16(own[4 * t])
            a0, b0 = fma16(w, x, a0), fma16(w, y, b0)
            w = splat16(own[4 * t + 1])
            a1, b1 = fma16(w, x, a1), fma16(w, y, b1)
            w = splat16(own[4 * t + 2])
            a2, b2 = fma16(w, x, a2), fma16(w, y, b2)
            w = splat16(own[4 * t + 3])
            a3, b3 = fma16(w, x, a3), fma16(w, y, b3)
            at += width
    store16(to, a0)
    store16(to + half, b0)
    store16(to + row, a1)
    store16(to + row + half, b1)
    store16(to + 2 * row, a2)
    store16(to + 2 * row + half, b2)
    store16(to + 3 * row, a3)
    store16(to + 3 * row + half, b3)


@kernel
def _add_rest(
    own: Any,
    heads: Any,
    dim: Any,
    like: Any,
    units: Any,
    size: Any,
    tokens: Any,
    first: Any,
    out: Any,
) -> None:
    """The channels from `first` on."""
    for u in range(len(units)):
        count = min(size, tokens - u * size)
        values = carray(pointer(units[u]), (count * dim,), like.dtype)
        for t in range(count):
            for h in range(heads):
                weight = own[(u * size + t) * heads + h]
                for d in range(first, dim):
                    out[h * dim + d] += weight * widen(values[t * dim + d])


@kernel
def weigh(logits: Any, tokens: Any, heads: Any, peaks: Any, masses: Any) -> None:
    """Turn logits [tokens, heads] into exp(logit - peak) in place; peaks, masses fp32 [heads].

    Writes up to 15 numbers behind them. Where every logit is `HIDDEN` nothing is seen: the weights
    are 0, and so is their sum.
    """
    size, at = tokens * heads, logits.ctypes.data
    whole = (size + LANES - 1) // LANES * LANES
    for i in range(size, whole):
        logits[i] = HIDDEN
    lanes = np.empty(LANES, np.float32)
    highest = splat16(HIDDEN)
    for i in range(0, whole, LANES):
        highest = max16(load16(at + 4 * i, logits), highest)
    store16(lanes.ctypes.data, highest)
    for h in range(heads):
        peak = HIDDEN
        for i in range(h, LANES, heads):
            peak = max(peak, lanes[i])
        peaks[h] = peak
        for i in range(h, LANES, heads):
            lanes[i] = peak if peak > HIDDEN else F32(0)
    peak16s, total = load16(lanes.ctypes.data, lanes), zeros16()
    for i in range(0, whole, LANES):
        weight = exp16(sub16(load16(at + 4 * i, logits), peak16s))
        store16(at + 4 * i, weight)
        total = add16(total, weight)
    store16(lanes.ctypes.data, total)
    for h in range(heads):
        mass = F32(0)
        for i in range(h, LANES, heads):
            mass += lanes[i]
        masses[h] = mass


@kernel
def unpack_codes(codes: Any, bits: Any, plane_dim: Any, dim: Any, out: Any) -> None:
    """The codes of one token, uint8 [plane_dim], as fp32 [dim] (see `arkcache.formats`)."""
    for plane in range(8 // bits):
        first = plane * plane_dim
        stop = max(0, min(first + plane_dim, dim) - first)
        whole = stop // LANES * LANES
        for j in range(0, whole, LANES):
            code = load_codes16(codes.ctypes.data + j, plane, bits)
            store16(out.ctypes.data + 4 * (first + j), code)
        for j in range(whole, stop):
            code = (np.int32(codes[j]) >> np.int32(plane * bits)) & np.int32((1 << bits) - 1)
            out[first + j] = F32(code)


@kernel
def unpack_keys(meta: Any, codes: Any, bits: Any, dim: Any, count: Any, out: Any) -> None:
    """A page of keys: meta [2 * dim] scales and zeros by channel, codes [count, plane_dim]."""
    planes = 8 // bits
    plane_dim, whole = (dim + planes - 1) // planes, dim // LANES * LANES
    at = meta.ctypes.data
    for t in range(count):
        own = out[t * dim : (t + 1) * dim]
        unpack_codes(codes[t * plane_dim : (t + 1) * plane_dim], bits, plane_dim, dim, own)
        for d in range(0, whole, LANES):
            scale = load16(at + d * meta.itemsize, meta)
            zero = load16(at + (dim + d) * meta.itemsize, meta)
            to = own.ctypes.data + 4 * d
            store16(to, fma16(load16(to, own), scale, zero))
        for d in range(whole, dim):
            own[d] = own[d] * widen(meta[d]) + widen(meta[dim + d])


@kernel
def unpack_values(
    meta: Any, codes: Any, bits: Any, dim: Any, group_size: Any, count: Any, out: Any
) -> None:
    """A page of values: meta [2 * count * groups] by token and group of channels."""
    planes = 8 // bits
    plane_dim, groups = (dim + planes - 1) // planes, dim // group_size
    for t in range(count):
        own = out[t * dim : (t + 1) * dim]
        unpack_codes(codes[t * plane_dim : (t + 1) * plane_dim], bits, plane_dim, dim, own)
        for g in range(groups):
            scale = widen(meta[t * groups + g])
            zero = widen(meta[(count + t) * groups + g])
            first, whole = g * group_size, group_size // LANES * LANES
            for d in range(first, first + whole, LANES):
                to = own.ctypes.data + 4 * d
                store16(to, fma16(load16(to, own), splat16(scale), splat16(zero)))
            for d in range(first + whole, first + group_size):
                own[d] = own[d] * scale + zero
