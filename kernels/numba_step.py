"""A decode step of one layer on a CPU: score, select and attend pages where they lie.

Nothing is copied: pages are read in the host tier, which is the same memory. Rows are (sequence, KV
head) pairs. Where every thread has rows of its own, one parallel region does it all; else the
pages of a row are shared out, in a region to score, one to select and one to attend, and what the
threads have summed is merged by log-sum-exp.

`run` is what is compiled, appending tokens included: see `numba_record` for what it is told.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from arkcache.kernels.numba_append import append_tokens
from arkcache.kernels.numba_attend import (
    add_units,
    ask_for,
    dot_units,
    unpack_keys,
    unpack_values,
    weigh,
)
from arkcache.kernels.numba_compile import kernel
from arkcache.kernels.numba_numbers import (
    F32,
    HIDDEN,
    exp_of_negative,
    floats,
    integers,
    log_of_positive,
    narrow,
    pointer,
    rotate,
    widen,
)
from arkcache.kernels.numba_record import (
    ATTEND,
    ATTEND_ROWS,
    ATTENDED,
    CUBOID,
    EVICTED,
    HIT,
    MERGE,
    NUM_COUNTERS,
    RECALLED,
    SCORE,
    SCORE_ROWS,
    SELECT,
    SPHERE,
    TOKEN_CODES,
    TOKEN_ROWS,
    WHOLE_ROWS,
    WRITE,
    bias_of,
    count_recent,
    count_sealed,
    page_address,
    states,
)
from arkcache.kernels.numba_score import (
    BLOCK,
    add_bias,
    cap,
    score_token_codes,
    score_token_rows,
    score_volumes,
)
from arkcache.kernels.numba_select import count_common, rate, select

# -- queries --------------------------------------------------------------------------------------


@kernel
def scaled_query(step: Any, row: Any, address: Any, like: Any, width: Any) -> Any:
    """A row's queries times the scale, fp32 [lanes, width], zeros behind the elements of each."""
    out = np.zeros(step.lanes * width, np.float32)
    size = step.group * step.head_dim
    own = states(address + row * size * like.itemsize, size, like)
    for g in range(step.group):
        for d in range(step.head_dim):
            out[g * width + d] = widen(own[g * step.head_dim + d]) * step.scale
    return out


@kernel
def query_features(step: Any, row: Any, like: Any) -> Any:
    """What digests are multiplied with (`torch_digest`), fp32 [lanes, features]."""
    out = scaled_query(step, row, step.index_query, like, step.features)
    dim = step.head_dim
    for g in range(step.group):
        own = out[g * step.features : (g + 1) * step.features]
        if step.index == CUBOID:
            for d in range(dim):
                own[dim + d] = abs(own[d])
        elif step.index == SPHERE:
            total = F32(0)
            for d in range(dim):
                total += own[d] * own[d]
            own[dim] = np.sqrt(total)
        elif step.index == TOKEN_ROWS:
            rotate(own, dim)
    return out


# -- score ----------------------------------------------------------------------------------------


@kernel
def score_row(step: Any, row: Any, slot: Any, share: Any, shares: Any, like: Any) -> None:
    """Score one share of a row's pages, sinks included; none where all are selected anyhow."""
    sealed = count_sealed(step, row)
    if sealed - step.num_sink_pages <= integers(step.budgets, row + 1)[row]:
        return
    blocks = (sealed + BLOCK - 1) // BLOCK
    first = blocks * share // shares * BLOCK
    last = min(blocks * (share + 1) // shares * BLOCK, sealed)
    if first >= last:
        return
    query, lanes, dim = query_features(step, row, like), step.lanes, step.features
    size, capacity = step.page_size, step.page_capacity
    score = floats(step.score + slot * lanes * capacity * 4, lanes * capacity)
    digests = step.digests + row * step.digest_bytes
    bias = bias_of(step, row)
    if step.index == TOKEN_ROWS:
        rows = carray(pointer(digests), (step.digest_bytes,), np.uint8)
        half, softcap = dim // 2, step.softcap
        score_token_rows(
            query, lanes, half, size, rows, first, last, softcap, bias, score, capacity
        )
    elif step.index == TOKEN_CODES:
        packed = carray(pointer(digests), (step.digest_bytes,), np.uint8)
        bits, softcap = step.index_bits, step.softcap
        score_token_codes(
            query, lanes, dim, size, bits, packed, first, last, softcap, bias, score, capacity
        )
    else:
        volumes = carray(pointer(digests), (step.digest_bytes // 2,), np.uint16)
        score_volumes(query, lanes, dim, volumes, first, last, score, capacity)


# -- select ---------------------------------------------------------------------------------------


@kernel
def fixed_mass(step: Any, row: Any, slot: Any, like: Any, meta: Any) -> Any:
    """The log mass of a row's sinks and window, sink logits included, fp32 [lanes]."""
    query = scaled_query(step, row, step.query, like, step.head_dim)
    logits = logits_of(step, slot)
    pages = integers(step.pages + row * step.max_pages * 8, step.max_pages)
    num_pages = min(step.num_sink_pages, count_sealed(step, row))
    units = count_units(step, row, num_pages)
    first = np.int64(0)
    keys, _ = unit_addresses(step, row, first, units, pages, num_pages, like)
    unit_logits(step, row, first, units, first, keys, pages, num_pages, query, logits, like, meta)
    tokens = count_tokens(step, row, first, units, num_pages)
    mass, total = np.empty(step.lanes, np.float32), np.empty(step.lanes, np.float32)
    weigh_row(step, logits, first, tokens, mass, total)
    for g in range(step.group):
        mass[g] = mass[g] + log_of_positive(total[g]) if total[g] > 0 else HIDDEN
        if step.sink_logits != 0:
            extra = sink_logit(step, row, g)
            high = max(mass[g], extra)
            low = min(mass[g], extra)
            mass[g] = high + log_of_positive(F32(1) + exp_of_negative(low - high))
    return mass


@kernel
def logits_of(step: Any, slot: Any) -> Any:
    """Room for the logits of a row, see `numba_attend`."""
    size = step.lanes * step.token_capacity
    return floats(step.logits + slot * size * 4, size)


@kernel
def weigh_row(step: Any, logits: Any, first: Any, tokens: Any, peaks: Any, masses: Any) -> None:
    """`weigh` the logits of all heads: `tokens` tokens from token `first` of the buffer on."""
    heads = min(step.lanes, 4)
    for lane in range(0, step.lanes, heads):
        at = lane * step.token_capacity + heads * first
        stop = (lane + heads) * step.token_capacity
        weigh(logits[at:stop], tokens, heads, peaks[lane:], masses[lane:])


@kernel
def sink_logit(step: Any, row: Any, g: Any) -> Any:
    """The extra logit of a query head."""
    heads = step.kv_heads * step.group
    return floats(step.sink_logits, heads)[row % step.kv_heads * step.group + g]


@kernel
def select_row(step: Any, row: Any, slot: Any, like: Any, meta: Any) -> None:
    """List the pages that a row attends, ascending: sinks, then what is selected."""
    sealed, sinks = count_sealed(step, row), step.num_sink_pages
    pages = integers(step.pages + row * step.max_pages * 8, step.max_pages)
    count = sealed - sinks
    wanted = integers(step.budgets, row + 1)[row]
    for p in range(min(sealed, sinks)):
        pages[p] = p
    chosen = integers(step.chosen + slot * step.max_pages * 8, step.max_pages)
    if count <= wanted:
        taken = max(count, 0)
        for p in range(taken):
            chosen[p] = p
    else:
        taken = choose(step, row, slot, count, wanted, chosen, like, meta)
    num_pages = integers(step.num_pages, row + 1)
    before = max(num_pages[row] - sinks, 0)
    selected = pages[sinks:] if sealed >= sinks else pages[:0]
    for p in range(taken):
        chosen[p] += sinks
    note(step, row, count_common(selected, before, chosen, taken), before, taken)
    for p in range(taken):
        selected[p] = chosen[p]
    num_pages[row] = min(sealed, sinks) + taken


@kernel
def choose(
    step: Any, row: Any, slot: Any, count: Any, wanted: Any, chosen: Any, like: Any, meta: Any
) -> Any:
    """Write the numbers of the best pages, counted from the first behind the sinks. Where fewer
    than none are wanted, all are rated and none is chosen."""
    stride, sinks, size = step.page_capacity, step.num_sink_pages, step.lanes * step.page_capacity
    if wanted == 0:
        return 0
    score = floats(step.score + slot * size * 4, size)
    if step.hidden != 0:
        hidden = carray(pointer(step.hidden + row * step.hidden_stride), (count,), np.uint8)
        for g in range(step.group):
            for p in range(count):
                if hidden[p]:
                    score[g * stride + sinks + p] = HIDDEN
    rating = floats(step.rating + slot * stride * 4, stride)
    order = carray(pointer(step.order + slot * stride * 4), (stride,), np.int32)
    fixed = np.full(step.lanes, HIDDEN, np.float32)
    if step.needs_fixed:
        fixed = fixed_mass(step, row, slot, like, meta)
    rate(score[sinks:], stride, step.group, count, step.reduction, fixed, rating)
    if wanted < 0:
        return 0
    return select(rating, count, wanted, order, chosen)


@kernel
def note(step: Any, row: Any, common: Any, before: Any, taken: Any) -> None:
    """Count what a row reads, see `ATTENDED`."""
    all_counters = integers(step.counters, step.batch * step.kv_heads * NUM_COUNTERS)
    counters = all_counters[row * NUM_COUNTERS : (row + 1) * NUM_COUNTERS]
    sinks = min(step.num_sink_pages, count_sealed(step, row))
    counters[ATTENDED] = (sinks + taken) * step.page_size + count_recent(step, row)
    counters[HIT] += common
    counters[RECALLED] += taken - common
    counters[EVICTED] += before - common


# -- attend ---------------------------------------------------------------------------------------


@kernel
def count_units(step: Any, row: Any, num_pages: Any) -> Any:
    """Units of work of a row: its pages, then its window in parts of the size of a page."""
    return num_pages + (count_recent(step, row) + step.page_size - 1) // step.page_size


@kernel
def unit_tokens(step: Any, row: Any, unit: Any, num_pages: Any) -> Any:
    """Tokens of a unit."""
    if unit < num_pages:
        return step.page_size
    return min(step.page_size, count_recent(step, row) - (unit - num_pages) * step.page_size)


@kernel
def count_tokens(step: Any, row: Any, first: Any, last: Any, num_pages: Any) -> Any:
    """Tokens of units first..last, of which one at least."""
    return (last - first - 1) * step.page_size + unit_tokens(step, row, last - 1, num_pages)


@kernel
def unit_addresses(
    step: Any, row: Any, first: Any, last: Any, pages: Any, num_pages: Any, like: Any
) -> Any:
    """Where the keys and the values of units first..last lie, int64 each."""
    keys, values = np.empty(last - first, np.int64), np.empty(last - first, np.int64)
    key_bytes = step.head_dim * like.itemsize
    value_bytes = step.value_dim * like.itemsize
    tokens = row * step.window_tokens
    for unit in range(first, min(last, num_pages)):
        keys[unit - first] = page_address(step, row, pages[unit])
        values[unit - first] = keys[unit - first] + step.value_offset
    for unit in range(max(first, num_pages), last):
        token = tokens + (unit - num_pages) * step.page_size
        keys[unit - first] = step.window_key + token * key_bytes
        values[unit - first] = step.window_value + token * value_bytes
    return keys, values


@kernel
def unit_logits(
    step: Any,
    row: Any,
    first: Any,
    last: Any,
    start: Any,
    keys: Any,
    pages: Any,
    num_pages: Any,
    query: Any,
    logits: Any,
    like: Any,
    meta: Any,
) -> None:
    """Logits of units first..last, from token `start` of the buffer on."""
    dim, lanes, capacity = step.head_dim, step.lanes, step.token_capacity
    size = step.page_size
    tokens = count_tokens(step, row, first, last, num_pages)
    packed = max(min(last, num_pages) - first, 0) if step.key_bits < 16 else 0
    unpacked = np.empty(size * dim if packed else 1, np.float32)
    here = np.full(1, np.int64(unpacked.ctypes.data))
    for u in range(packed):
        ask_for(keys[min(u + 2, packed - 1)], step.value_offset)
        numbers = states(keys[u], 2 * dim, meta)
        codes = carray(pointer(keys[u] + 4 * dim), (step.value_offset - 4 * dim,), np.uint8)
        unpack_keys(numbers, codes, step.key_bits, dim, size, unpacked)
        at = start + u * size
        dot_units(query, lanes, dim, unpacked, here, size, size, logits, capacity, at)
    rest, at = tokens - packed * size, start + packed * size
    dot_units(query, lanes, dim, like, keys[packed:], size, rest, logits, capacity, at)
    if step.softcap > 0 or step.bias != 0:
        mask_logits(step, row, first, last, start, pages, num_pages, logits)


@kernel
def mask_logits(
    step: Any, row: Any, first: Any, last: Any, start: Any, pages: Any, num_pages: Any, logits: Any
) -> None:
    """Apply softcap and mask to the logits of units first..last."""
    bias, page_size, heads = bias_of(step, row), step.page_size, min(step.lanes, 4)
    sealed = count_sealed(step, row)
    for unit in range(first, last):
        number = pages[unit] if unit < num_pages else sealed + unit - num_pages
        for t in range(unit_tokens(step, row, unit, num_pages)):
            for g in range(step.group):
                at = start + (unit - first) * page_size + t
                place = g // 4 * 4 * step.token_capacity + at * heads + g % 4
                if step.softcap > 0:
                    cap(logits[place : place + 1], 1, step.softcap)
                if step.bias != 0:
                    token = number * page_size + t
                    add_bias(logits, place, bias[g * step.bias_tokens + token])


@kernel
def unit_values(
    step: Any,
    row: Any,
    first: Any,
    last: Any,
    start: Any,
    values: Any,
    num_pages: Any,
    weights: Any,
    sums: Any,
    like: Any,
    meta: Any,
) -> None:
    """Add the values of units first..last, as they are weighted from token `start` of the buffer
    on, to sums fp32 [lanes, value_dim]."""
    dim, capacity, lanes, size = step.value_dim, step.token_capacity, step.lanes, step.page_size
    tokens = count_tokens(step, row, first, last, num_pages)
    packed = max(min(last, num_pages) - first, 0) if step.value_bits < 16 else 0
    unpacked = np.empty(size * dim if packed else 1, np.float32)
    here = np.full(1, np.int64(unpacked.ctypes.data))
    nbytes, num_meta = step.page_bytes - step.value_offset, 2 * size * (dim // step.group_size)
    for u in range(packed):
        ask_for(values[min(u + 2, packed - 1)], nbytes)
        numbers = states(values[u], num_meta, meta)
        codes = carray(pointer(values[u] + 2 * num_meta), (nbytes - 2 * num_meta,), np.uint8)
        unpack_values(numbers, codes, step.value_bits, dim, step.group_size, size, unpacked)
        at = start + u * size
        add_units(weights, lanes, dim, unpacked, here, size, size, capacity, at, sums)
    rest, at = tokens - packed * size, start + packed * size
    add_units(weights, lanes, dim, like, values[packed:], size, rest, capacity, at, sums)


@kernel
def attend_row(
    step: Any,
    row: Any,
    slot: Any,
    first: Any,
    last: Any,
    share: Any,
    part: Any,
    like: Any,
    meta: Any,
) -> None:
    """Attend units first..last of a row into `part`: sums, peaks and masses, unmerged.

    Threads that share a row write their logits to parts of the buffer that do not touch, `share`
    times 16 tokens apart: `weigh` writes a little behind them.
    """
    lanes, value_dim = step.lanes, step.value_dim
    sums = part[: lanes * value_dim]
    peaks, masses = part[lanes * value_dim :], part[lanes * (value_dim + 1) :]
    sums[:] = F32(0)
    peaks[:lanes] = HIDDEN
    masses[:lanes] = F32(0)
    pages = integers(step.pages + row * step.max_pages * 8, step.max_pages)
    num_pages = integers(step.num_pages, row + 1)[row]
    last = min(last, count_units(step, row, num_pages))
    if first >= last:
        return
    logits, start = logits_of(step, slot), first * step.page_size + share * 16
    query = scaled_query(step, row, step.query, like, step.head_dim)
    keys, values = unit_addresses(step, row, first, last, pages, num_pages, like)
    unit_logits(step, row, first, last, start, keys, pages, num_pages, query, logits, like, meta)
    weigh_row(step, logits, start, count_tokens(step, row, first, last, num_pages), peaks, masses)
    unit_values(step, row, first, last, start, values, num_pages, logits, sums, like, meta)


@kernel
def merge_row(step: Any, row: Any, parts: Any, count: Any, like: Any) -> None:
    """Merge the parts of a row by log-sum-exp, and write its output.

    parts fp32 [count, lanes * (value_dim + 2)].
    """
    lanes, dim = step.lanes, step.value_dim
    size, row_size = lanes * (dim + 2), step.group * dim
    output = states(step.output + row * row_size * like.itemsize, row_size, like)
    for g in range(step.group):
        peak = HIDDEN
        for i in range(count):
            peak = max(peak, parts[i * size + lanes * dim + g])
        total = F32(0)
        if step.sink_logits != 0:
            extra = sink_logit(step, row, g)
            peak = max(peak, extra)
            total = exp_of_negative(extra - peak)
        sums = parts[g * dim : (g + 1) * dim]
        for i in range(count):
            weight = exp_of_negative(parts[i * size + lanes * dim + g] - peak)
            total += weight * parts[i * size + lanes * (dim + 1) + g]
            own = parts[i * size + g * dim : i * size + (g + 1) * dim]
            for d in range(dim):
                sums[d] = own[d] * weight + (sums[d] if i > 0 else F32(0))
        share = F32(1) / total if total > 0 else F32(0)  # a row that may attend nothing gets zeros
        for d in range(dim):
            output[g * dim + d] = narrow(sums[d] * share, output[0])


# -- the step -------------------------------------------------------------------------------------


@kernel
def run(step: Any, begin: Any, end: Any, like: Any, meta: Any) -> None:
    """Shares begin..end of the phase under way.

    like, meta: arrays of the type of keys and values, and of the scales of quantised pages.
    """
    if step.phase >= WRITE:
        append_tokens(step, like)
        return
    part_size = step.lanes * (step.value_dim + 2)
    parts = floats(step.parts, max(step.batch * step.kv_heads, 1) * step.shares * part_size)
    for share in range(begin, end):
        run_share(step, share, parts, part_size, like, meta)


@kernel
def run_share(step: Any, share: Any, parts: Any, part_size: Any, like: Any, meta: Any) -> None:
    """One share of the phase under way; parts: room for what each share of each row sums."""
    rows, shares = step.batch * step.kv_heads, step.shares
    if step.phase == SCORE:
        for row in range(rows):
            score_row(step, row, row, share, shares, like)
    elif step.phase == ATTEND:
        attend_share(step, share, parts, part_size, like, meta)
    elif step.phase == MERGE:
        for row in range(rows):
            size = shares * part_size
            merge_row(step, row, parts[row * size : (row + 1) * size], shares, like)
    else:
        own = parts[share * part_size : (share + 1) * part_size]
        for row in range(share, rows, shares):
            run_row(step, row, share, own, like, meta)


@kernel
def run_row(step: Any, row: Any, share: Any, part: Any, like: Any, meta: Any) -> None:
    """All that is done of a whole row, or the part of it that is under way."""
    # Not literals, for each of which numba would compile what they are given to anew.
    none, one, all_units = np.int64(0), np.int64(1), np.int64(1 << 40)
    is_whole = step.phase == WHOLE_ROWS
    slot = share if is_whole else row  # what is scored now is selected from later
    if is_whole or step.phase == SCORE_ROWS:
        score_row(step, row, slot, none, one, like)
    if is_whole or step.phase == SELECT:
        select_row(step, row, slot, like, meta)
    if is_whole or step.phase == ATTEND_ROWS:
        attend_row(step, row, slot, none, all_units, none, part, like, meta)
        merge_row(step, row, part, one, like)


@kernel
def attend_share(step: Any, share: Any, parts: Any, part_size: Any, like: Any, meta: Any) -> None:
    """Attend one share of the units of all rows."""
    rows, shares = step.batch * step.kv_heads, step.shares
    num_pages = integers(step.num_pages, rows)
    total = 0
    for row in range(rows):
        total += count_units(step, row, num_pages[row])
    first, last, start = total * share // shares, total * (share + 1) // shares, 0
    for row in range(rows):
        units = count_units(step, row, num_pages[row])
        at = (row * shares + share) * part_size
        low, high = max(first - start, 0), min(last - start, units)
        attend_row(step, row, row, low, high, share, parts[at : at + part_size], like, meta)
        start += units
