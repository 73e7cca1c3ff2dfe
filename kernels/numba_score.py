"""What pages are worth to the query heads of one row: boxes and the token index, on a CPU.

Digests that are one number per feature and page lie in blocks of `BLOCK` pages, feature by feature,
so that one vector load takes a feature of many pages and every page's sum stays in a lane of its
own. Query heads go four at a time, which read every digest once; their features are padded with
zeros to whole fours (`lanes`).

    volumes       bf16 [blocks, features, BLOCK]
    token rows    uint8 codes [blocks, page_size, half, BLOCK], behind them in each block the
                  scales, fp32 [page_size, BLOCK] (`torch_token_rows`, laid out anew)
    token codes   uint8 [pages, bytes], as `torch_tokens` packs them
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from arkcache.kernels.numba_attend import ask_for
from arkcache.kernels.numba_compile import kernel
from arkcache.kernels.numba_numbers import (
    F32,
    HIDDEN,
    exp_of_negative,
    floats,
    log_of_positive,
    pointer,
    widen,
)
from arkcache.kernels.numba_vectors import (
    LANES,
    add16,
    broadcast16,
    exp16,
    fma16,
    load16,
    load_codes16,
    log16,
    max16,
    mul16,
    splat16,
    store16,
    store_peaks4,
    store_sums4,
    sub16,
    zeros16,
)
from arkcache.kernels.torch_token_rows import OFFSET

BLOCK = 64
"""Pages of a block."""

RUN = 32
"""Pages or tokens that are summed up at a time."""

AHEAD_BYTES = 16384
"""How far ahead of what is read digests are asked for: by itself a processor has them come at half
the speed of its memory."""


@kernel
def dot_block(
    query: Any, lanes: Any, first: Any, dim: Any, block: Any, width: Any, sums: Any
) -> None:
    """sums[h * BLOCK + p] = sum over j of query[(first + h) * dim + j] * block[j * BLOCK + p].

    For one query head, or for four where `lanes` is more than one; for the first `width` pages, in
    runs of `RUN`: the sums of four heads are then eight registers of 512 bits.
    """
    row = BLOCK * block.itemsize
    half = LANES * block.itemsize
    q0 = query[first * dim : (first + 1) * dim]
    if lanes == 1:
        for p in range(0, width, RUN):
            at, to = block.ctypes.data + p * block.itemsize, sums.ctypes.data + 4 * p
            a0, b0 = zeros16(), zeros16()
            for j in range(dim):
                w0 = splat16(q0[j])
                a0 = fma16(w0, load16(at, block), a0)
                b0 = fma16(w0, load16(at + half, block), b0)
                at += row
            store_run(to, a0, b0)
        return
    q1 = query[(first + 1) * dim : (first + 2) * dim]
    q2 = query[(first + 2) * dim : (first + 3) * dim]
    q3 = query[(first + 3) * dim : (first + 4) * dim]
    for p in range(0, width, RUN):
        at, to = block.ctypes.data + p * block.itemsize, sums.ctypes.data + 4 * p
        a0, b0, a1, b1 = zeros16(), zeros16(), zeros16(), zeros16()
        a2, b2, a3, b3 = zeros16(), zeros16(), zeros16(), zeros16()
        for j in range(dim):
            x, y = load16(at, block), load16(at + half, block)
            w0, w1, w2, w3 = splat16(q0[j]), splat16(q1[j]), splat16(q2[j]), splat16(q3[j])
            a0, b0 = fma16(w0, x, a0), fma16(w0, y, b0)
            a1, b1 = fma16(w1, x, a1), fma16(w1, y, b1)
            a2, b2 = fma16(w2, x, a2), fma16(w2, y, b2)
            a3, b3 = fma16(w3, x, a3), fma16(w3, y, b3)
            at += row
        store_run(to, a0, b0)
        store_run(to + 4 * BLOCK, a1, b1)
        store_run(to + 8 * BLOCK, a2, b2)
        store_run(to + 12 * BLOCK, a3, b3)


@kernel
def store_run(address: Any, first: Any, second: Any) -> None:
    """Write `RUN` numbers."""
    store16(address, first)
    store16(address + 4 * LANES, second)


@kernel
def score_volumes(
    query: Any, lanes: Any, dim: Any, digests: Any, first: Any, last: Any, score: Any, stride: Any
) -> None:
    """Score pages first..last (`first` a multiple of `BLOCK`) by bounding volumes.

    query fp32 [lanes, dim]: features; digests: blocks of the row; score fp32 [lanes, stride].
    """
    sums = np.empty(4 * BLOCK, np.float32)
    step = 1 if lanes == 1 else 4
    for at in range(first, last, BLOCK):
        block = digests[at * dim : (at + BLOCK) * dim]
        ask_for(block.ctypes.data + AHEAD_BYTES, block.nbytes)
        width = _width(last - at)
        for lane in range(0, lanes, step):
            dot_block(query, lanes, lane, dim, block, width, sums)
            for h in range(step):
                row = (lane + h) * stride + at
                score[row : row + width] = sums[h * BLOCK : h * BLOCK + width]


@kernel
def _width(pages: Any) -> Any:
    """Pages of a block to compute: whole runs, so that no loop is left over."""
    return min(BLOCK, (pages + RUN - 1) // RUN * RUN)


@kernel
def score_token_rows(
    query: Any,
    lanes: Any,
    half: Any,
    page_size: Any,
    digests: Any,
    first: Any,
    last: Any,
    softcap: Any,
    bias: Any,
    score: Any,
    stride: Any,
) -> None:
    """Score pages first..last (`first` a multiple of `BLOCK`): the log of their softmax mass.

    query fp32 [lanes, 2 * half], rotated, zeros behind the channels; digests uint8, blocks of the
    row; bias fp32 [lanes, tokens] or empty, from the token of page 0 on; score fp32 [lanes,
    stride]. softcap 0 is none.
    """
    step = 1 if lanes == 1 else 4
    offsets, sums = np.zeros(max(lanes, 4), np.float32), np.empty(4 * BLOCK, np.float32)
    for lane in range(lanes):
        for d in range(2 * half):
            offsets[lane] -= F32(OFFSET) * query[lane * 2 * half + d]
    logits = np.empty(step * page_size * BLOCK, np.float32)
    codes_size = page_size * half * BLOCK
    block_bytes = codes_size + 4 * page_size * BLOCK
    tokens = 0 if len(bias) == 0 else len(bias) // lanes
    for at in range(first, last, BLOCK):
        block = digests.ctypes.data + at // BLOCK * block_bytes
        scales = carray(pointer(block + codes_size), (page_size * BLOCK,), np.float32)
        width = _width(last - at)
        for lane in range(0, lanes, step):
            own = query.ctypes.data + 8 * lane * half
            for i in range(page_size):
                codes = block + i * half * BLOCK
                ask_for(codes + AHEAD_BYTES, half * BLOCK)
                dot_nibbles(own, step, half, codes, width, offsets[lane:], sums)
                for h in range(step):
                    to = logits.ctypes.data + 4 * (h * page_size + i) * BLOCK
                    _scale(sums.ctypes.data + 4 * h * BLOCK, scales, i * BLOCK, width, to)
            for h in range(step):
                mine = logits[h * page_size * BLOCK : (h + 1) * page_size * BLOCK]
                if softcap > 0:
                    cap(mine, page_size * BLOCK, softcap)
                if tokens > 0:
                    row = bias[(lane + h) * tokens : (lane + h + 1) * tokens]
                    mask_columns(mine, page_size, row, at, min(last - at, BLOCK))
                row = (lane + h) * stride + at
                log_mass_of_columns(mine, page_size, width, score[row : row + width])


@kernel
def mask_columns(logits: Any, page_size: Any, bias: Any, first: Any, count: Any) -> None:
    """Add a mask by token number to logits [page_size, BLOCK] of `count` pages from `first` on."""
    for p in range(count):
        for i in range(page_size):
            add_bias(logits, i * BLOCK + p, bias[(first + p) * page_size + i])


@kernel
def dot_nibbles(
    query: Any, heads: Any, half: Any, codes: Any, width: Any, offsets: Any, sums: Any
) -> None:
    """sums[h * BLOCK + p] = offsets[h] + query[h] . the codes of page p, for one head or four.

    query: address of fp32 [heads, 2 * half]; codes: of bytes [half, BLOCK], channel j in the low
    bits of row j and channel j + half in the high ones; for the first `width` pages, in runs of
    `RUN`.
    """
    row = 8 * half if heads > 1 else 0  # of one head four times the same
    for p in range(0, width, RUN):
        at, low, high = codes + p, query, query + 4 * half
        a0, a1 = splat16(offsets[0]), splat16(offsets[1])
        a2, a3 = splat16(offsets[2]), splat16(offsets[3])
        b0, b1, b2, b3 = a0, a1, a2, a3
        for _ in range(half):
            x, y = load_codes16(at, 0, 4), load_codes16(at + LANES, 0, 4)
            w0, w1 = broadcast16(low), broadcast16(low + row)
            w2, w3 = broadcast16(low + 2 * row), broadcast16(low + 3 * row)
            a0, b0, a1, b1 = fma16(w0, x, a0), fma16(w0, y, b0), fma16(w1, x, a1), fma16(w1, y, b1)
            a2, b2, a3, b3 = fma16(w2, x, a2), fma16(w2, y, b2), fma16(w3, x, a3), fma16(w3, y, b3)
            x, y = load_codes16(at, 1, 4), load_codes16(at + LANES, 1, 4)
            w0, w1 = broadcast16(high), broadcast16(high + row)
            w2, w3 = broadcast16(high + 2 * row), broadcast16(high + 3 * row)
            a0, b0, a1, b1 = fma16(w0, x, a0), fma16(w0, y, b0), fma16(w1, x, a1), fma16(w1, y, b1)
            a2, b2, a3, b3 = fma16(w2, x, a2), fma16(w2, y, b2), fma16(w3, x, a3), fma16(w3, y, b3)
            at, low, high = at + BLOCK, low + 4, high + 4
        to = sums.ctypes.data + 4 * p
        store_run(to, a0, b0)
        if heads > 1:
            store_run(to + 4 * BLOCK, a1, b1)
            store_run(to + 8 * BLOCK, a2, b2)
            store_run(to + 12 * BLOCK, a3, b3)


@kernel
def _scale(sums: Any, scales: Any, first: Any, width: Any, to: Any) -> None:
    """Write sums times the scales from `first` on."""
    for p in range(0, 4 * width, 4 * LANES):
        scale = load16(scales.ctypes.data + 4 * first + p, scales)
        store16(to + p, mul16(load16(sums + p, scales), scale))


@kernel
def log_mass_of_columns(logits: Any, count: Any, width: Any, score: Any) -> None:
    """score[p] = logsumexp over i < count of logits[i * BLOCK + p]."""
    for p in range(0, width, LANES):
        at = logits.ctypes.data + 4 * p
        peak = load16(at, logits)
        for i in range(1, count):
            peak = max16(load16(at + 4 * i * BLOCK, logits), peak)
        mass = zeros16()
        for i in range(count):
            mass = add16(mass, exp16(sub16(load16(at + 4 * i * BLOCK, logits), peak)))
        store16(score.ctypes.data + 4 * p, add16(peak, log16(mass)))


@kernel
def score_token_codes(
    query: Any,
    lanes: Any,
    dim: Any,
    page_size: Any,
    bits: Any,
    digests: Any,
    first: Any,
    last: Any,
    softcap: Any,
    bias: Any,
    score: Any,
    stride: Any,
) -> None:
    """`score_token_rows` of codes of 2, 4 or 8 bits with scales per channel and page.

    digests uint8 [pages * bytes of a page], from page 0 of the row on.
    """
    step = 1 if lanes == 1 else 4
    plane_dim = (dim * bits + 7) // 8
    page_bytes = 4 * dim + plane_dim * page_size
    padded = plane_dim * 8 // bits
    scaled, offsets = np.zeros(4 * padded, np.float32), np.zeros(4, np.float32)
    logits = np.empty(4 * page_size, np.float32)
    tokens = 0 if len(bias) == 0 else len(bias) // lanes
    # Logs are taken of all pages together: sixteen at a time.
    count, peaks, masses = last - first, np.empty(4, np.float32), np.empty(4, np.float32)
    mass = np.empty(lanes * count, np.float32)
    for page in range(first, last):
        header = digests.ctypes.data + page * page_bytes
        ask_for(header + AHEAD_BYTES, page_bytes)
        for lane in range(0, lanes, step):
            fold(query.ctypes.data + 4 * lane * dim, step, dim, header, padded, scaled, offsets)
            codes = header + 4 * dim
            if page_size % RUN == 0:
                dot_codes(scaled, step, padded, bits, codes, page_size, offsets, logits)
            else:
                add_codes(scaled, step, padded, bits, codes, page_size, offsets, logits)
            if softcap > 0:
                cap(logits, step * page_size, softcap)
            for h in range(step if tokens > 0 else 0):
                for i in range(page_size):
                    at = (lane + h) * tokens + page * page_size + i
                    add_bias(logits, h * page_size + i, bias[at])
            log_masses(logits, step, page_size, peaks, masses)
            for h in range(step):
                score[(lane + h) * stride + page] = peaks[h]
                mass[(lane + h) * count + page - first] = masses[h]
    for lane in range(lanes):
        row = score[lane * stride + first : lane * stride + last]
        add_logs(row, mass[lane * count : (lane + 1) * count], count)


@kernel
def fold(
    query: Any, heads: Any, dim: Any, header: Any, padded: Any, weights: Any, offsets: Any
) -> None:
    """weights[h * padded + j] = query * scale of each channel, offsets[h] = query . zero, for one
    head or four. With key = code * scale + zero, codes are then multiplied as they are.

    query: address of fp32 [heads, dim]; header: of bf16 scales [dim], zeros [dim].
    """
    whole, row, to, out = dim // LANES * LANES, 4 * dim, weights.ctypes.data, 4 * padded
    singles, shorts = floats(query, heads * dim), carray(pointer(header), (2 * dim,), np.uint16)
    second = row if heads > 1 else 0  # of one head four times the same
    t0, t1, t2, t3 = zeros16(), zeros16(), zeros16(), zeros16()
    for j in range(0, whole, LANES):
        scale, zero = load16(header + 2 * j, shorts), load16(header + 2 * (dim + j), shorts)
        q0, q1 = load16(query + 4 * j, singles), load16(query + 4 * j + second, singles)
        q2 = load16(query + 4 * j + 2 * second, singles)
        q3 = load16(query + 4 * j + 3 * second, singles)
        t0, t1, t2, t3 = (
            fma16(q0, zero, t0),
            fma16(q1, zero, t1),
            fma16(q2, zero, t2),
            fma16(q3, zero, t3),
        )
        store16(to + 4 * j, mul16(q0, scale))
        store16(to + 4 * j + out, mul16(q1, scale))
        store16(to + 4 * j + 2 * out, mul16(q2, scale))
        store16(to + 4 * j + 3 * out, mul16(q3, scale))
    store_sums4(offsets.ctypes.data, t0, t1, t2, t3)
    for h in range(heads):
        for j in range(whole, dim):
            weights[h * padded + j] = singles[h * dim + j] * widen(shorts[j])
            offsets[h] += singles[h * dim + j] * widen(shorts[dim + j])


@kernel
def dot_codes(
    weights: Any,
    heads: Any,
    padded: Any,
    bits: Any,
    codes: Any,
    page_size: Any,
    offsets: Any,
    logits: Any,
) -> None:
    """logits[h * page_size + t] = offsets[h] + sum over channels of weights[h * padded + channel] *
    code, for one head or four and whole runs of tokens; codes: address of bytes [plane_dim,
    page_size]."""
    if bits == 2:
        dot_planes(weights, heads, padded, 2, codes, page_size, offsets, logits)
    elif bits == 4:
        dot_planes(weights, heads, padded, 4, codes, page_size, offsets, logits)
    else:
        dot_planes(weights, heads, padded, 8, codes, page_size, offsets, logits)


@kernel(inline=True)
def dot_planes(
    weights: Any,
    heads: Any,
    padded: Any,
    bits: Any,
    codes: Any,
    page_size: Any,
    offsets: Any,
    logits: Any,
) -> None:
    """`dot_codes`, compiled for each number of bits."""
    planes = 8 // bits
    plane_dim = padded // planes
    head = 4 * padded if heads > 1 else 0
    for t in range(0, page_size, RUN):
        a0, a1 = splat16(offsets[0]), splat16(offsets[1])
        a2, a3 = splat16(offsets[2]), splat16(offsets[3])
        b0, b1, b2, b3 = a0, a1, a2, a3
        at, weight = codes + t, weights.ctypes.data
        for _ in range(plane_dim):
            w = weight
            for plane in range(planes):
                x = load_codes16(at, plane, bits)
                y = load_codes16(at + LANES, plane, bits)
                u = broadcast16(w)
                a0, b0 = fma16(u, x, a0), fma16(u, y, b0)
                u = broadcast16(w + head)
                a1, b1 = fma16(u, x, a1), fma16(u, y, b1)
                u = broadcast16(w + 2 * head)
                a2, b2 = fma16(u, x, a2), fma16(u, y, b2)
                u = broadcast16(w + 3 * head)
                a3, b3 = fma16(u, x, a3), fma16(u, y, b3)
                w += 4 * plane_dim
            at += page_size
            weight += 4
        to = logits.ctypes.data + 4 * t
        store_run(to, a0, b0)
        if heads > 1:
            store_run(to + 4 * page_size, a1, b1)
            store_run(to + 8 * page_size, a2, b2)
            store_run(to + 12 * page_size, a3, b3)


@kernel
def add_codes(
    weights: Any,
    heads: Any,
    padded: Any,
    bits: Any,
    codes: Any,
    page_size: Any,
    offsets: Any,
    logits: Any,
) -> None:
    """`dot_codes` for pages of any size."""
    mask, plane_dim = np.int32((1 << bits) - 1), padded * bits // 8
    packed = carray(pointer(codes), (plane_dim * page_size,), np.uint8)
    for h in range(heads):
        own = logits[h * page_size : (h + 1) * page_size]
        own[:] = offsets[h]
        for c in range(plane_dim):
            row = packed[c * page_size : (c + 1) * page_size]
            for plane in range(8 // bits):
                weight = weights[h * padded + plane * plane_dim + c]
                shift = np.int32(plane * bits)
                for t in range(page_size):
                    own[t] += weight * F32((np.int32(row[t]) >> shift) & mask)


@kernel
def log_masses(logits: Any, heads: Any, page_size: Any, peaks: Any, masses: Any) -> None:
    """The largest logit of a page for each head, and the sum of the exponentials of the others
    relative to it; logits [heads, page_size]."""
    if heads == 4 and page_size % LANES == 0:
        at, row = logits.ctypes.data, 4 * page_size
        p0, p1 = load16(at, logits), load16(at + row, logits)
        p2, p3 = load16(at + 2 * row, logits), load16(at + 3 * row, logits)
        for i in range(at + 4 * LANES, at + row, 4 * LANES):
            p0, p1 = max16(load16(i, logits), p0), max16(load16(i + row, logits), p1)
            p2, p3 = max16(load16(i + 2 * row, logits), p2), max16(load16(i + 3 * row, logits), p3)
        store_peaks4(peaks.ctypes.data, p0, p1, p2, p3)
        p0, p1 = splat16(peaks[0]), splat16(peaks[1])
        p2, p3 = splat16(peaks[2]), splat16(peaks[3])
        m0, m1, m2, m3 = zeros16(), zeros16(), zeros16(), zeros16()
        for i in range(at, at + row, 4 * LANES):
            m0 = add16(m0, exp16(sub16(load16(i, logits), p0)))
            m1 = add16(m1, exp16(sub16(load16(i + row, logits), p1)))
            m2 = add16(m2, exp16(sub16(load16(i + 2 * row, logits), p2)))
            m3 = add16(m3, exp16(sub16(load16(i + 3 * row, logits), p3)))
        store_sums4(masses.ctypes.data, m0, m1, m2, m3)
        return
    for h in range(heads):
        own = logits[h * page_size : (h + 1) * page_size]
        peak, mass = own[0], F32(0)
        for i in range(1, page_size):
            peak = max(peak, own[i])
        for i in range(page_size):
            mass += exp_of_negative(own[i] - peak)
        peaks[h], masses[h] = peak, mass


@kernel
def add_logs(score: Any, mass: Any, count: Any) -> None:
    """score += ln(mass)."""
    whole = count // LANES * LANES
    for i in range(0, 4 * whole, 4 * LANES):
        at = score.ctypes.data + i
        store16(at, add16(load16(at, score), log16(load16(mass.ctypes.data + i, mass))))
    for i in range(whole, count):
        score[i] += log_of_positive(mass[i])


@kernel
def cap(logits: Any, count: Any, softcap: Any) -> None:
    """logits = softcap * tanh(logits / softcap), in place."""
    for t in range(count):
        logits[t] = softcap * np.tanh(logits[t] / softcap)


@kernel(fast=False)
def add_bias(logits: Any, at: Any, bias: Any) -> None:
    """Add an entry of a mask, which may be -inf, to a logit; what is hidden becomes `HIDDEN`."""
    logits[at] = max(logits[at] + bias, HIDDEN)
