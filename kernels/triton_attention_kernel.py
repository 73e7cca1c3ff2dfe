"""The kernels of attention: runs of pages, of the window and of estimates, and what merges them.

Every program attends a run and leaves the peak, the mass and the weighted sum of its values. They
are combined by log-sum-exp: by the program of a row that is the last to be done, which it learns
from a ticket, or by the merge kernel. Packed pages are unpacked in registers. A page that is
estimated is one token: mean key, mean value, ln(page_size) added to its logit.
"""

# Triton reads annotations of kernels as its own: parameters of a kernel can have none.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_hip

from arkcache.kernels.triton_tiles import dot, load_keys, load_values, round_to, tanh

SIZES = [
    *("group", "num_slots", "num_sink_pages", "max_selected", "num_places", "ring", "page_splits"),
    *("stride_bias_row", "stride_bias_head", "mean_splits", "num_means"),
    *("stride_page_bias_row", "stride_page_bias_head"),
]
"""Arguments that a cache changes as it grows: no value of theirs is worth compiling anew for."""


@triton.jit
def _fold_tile(
    query, key, value, bias_ptrs, stride_bias, token, there, valid, scale, softcap,
    peak, mass, total,
    LOG_SIZE: tl.constexpr,
):  # fmt: skip
    """Fold keys and values [tokens, channels] into the running peak, mass and total.

    Each that is `valid` counts exp(LOG_SIZE) times. A bias is read where a token is `there`: what
    is valid may be on its way from memory itself.
    """
    none = tl.zeros((query.shape[0], key.shape[0]), dtype=tl.float32)
    logits = dot(query, tl.trans(key), none) * scale
    if softcap is not None:
        logits = softcap * tanh(logits / softcap)
    if LOG_SIZE != 0.0:
        logits += LOG_SIZE
    if bias_ptrs is not None:
        bias_ptrs += token.to(tl.int64)[None, :] * stride_bias
        logits += tl.load(bias_ptrs, there[None, :], other=0.0)
    logits = tl.where(valid[None, :], logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, axis=1))
    # A head that may attend nothing yet has a peak of -inf; 0 keeps its exponents finite.
    reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weight = tl.exp(logits - reference[:, None])
    decay = tl.exp(peak - reference)
    mass = mass * decay + tl.sum(weight, axis=1)
    total = dot(round_to(weight, value.dtype), value, total * decay[:, None])
    return new_peak, mass, total


@triton.jit
def _fold_means(
    query, means_ptr, estimated_ptr, page_bias_ptr, row, head, channel, in_key,
    value_channel, in_value, split, num_splits, sealed, num_sink_pages, num_means,
    stride_bias_row, stride_bias_head, stride_bias_page,
    scale, softcap, peak, mass, total,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, LOG_SIZE: tl.constexpr,
    PAGES_PER_SPLIT: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Fold a run of estimates into the running peak, mass and total.

    None where `split` is negative, and where there are no means.
    """
    if means_ptr is not None:
        bias_ptrs = None
        if page_bias_ptr is not None:
            bias_ptrs = page_bias_ptr + row * stride_bias_row + head[:, None] * stride_bias_head
        # A bias takes registers: 16 is the least that a matrix instruction takes.
        BLOCK_MEANS: tl.constexpr = BLOCK if page_bias_ptr is None else 16
        # The row's part once and not in every line: the loop has no register to spare.
        means_ptr += row * num_means * (HEAD_DIM + VALUE_DIM)
        share = tl.cdiv(sealed - num_sink_pages, num_splits)
        share = tl.maximum(tl.cdiv(share, BLOCK_MEANS) * BLOCK_MEANS, PAGES_PER_SPLIT)
        start = num_sink_pages + split * share
        stop = tl.where(split < 0, start, tl.minimum(start + share, sealed))
        for begin in tl.range(start, stop, BLOCK_MEANS, num_stages=AHEAD + 1):
            page = begin + tl.arange(0, BLOCK_MEANS)
            there = page < stop
            flag = row * (num_means - num_sink_pages) + page - num_sink_pages
            estimated = tl.load(estimated_ptr + flag, there, other=0)
            line = page.to(tl.int64)[:, None] * (HEAD_DIM + VALUE_DIM)
            key_ptrs = means_ptr + line + channel[None, :]
            key = tl.load(key_ptrs, there[:, None] & in_key[None, :], other=0.0)
            value_ptrs = means_ptr + line + HEAD_DIM + value_channel[None, :]
            value = tl.load(value_ptrs, there[:, None] & in_value[None, :], other=0.0)
            peak, mass, total = _fold_tile(
                query, key, value, bias_ptrs, stride_bias_page, page, there, estimated != 0,
                scale, softcap, peak, mass, total, LOG_SIZE,
            )  # fmt: skip
    return peak, mass, total


@triton.jit
def _parts_of(parts_ptr, num_lines):
    """Where the peaks, the masses and the totals of all splits begin, each aligned for vectors."""
    room = tl.cdiv(num_lines, 16) * 16
    return parts_ptr, parts_ptr + room, parts_ptr + 2 * room


@triton.jit
def _merge(
    parts_ptr, sink_logits_ptr, output_ptr, log_mass_ptr, row, first_head, group, num_splits,
    stride_sink_logits_row, stride_sink_logits_head,
    VALUE_DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK_TILE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """Merge the splits of HEADS heads of a row, and their sink logits; note the mass of all."""
    num_lines = tl.num_programs(0) * group * num_splits
    peak_ptr, mass_ptr, total_ptr = _parts_of(parts_ptr, num_lines)
    first = row * group * num_splits
    peak_ptr, mass_ptr = peak_ptr + first, mass_ptr + first
    total_ptr += first * VALUE_DIM
    head = first_head + tl.arange(0, HEADS)
    in_group = head < group
    head = tl.minimum(head, group - 1)
    channel = tl.arange(0, BLOCK_VALUE)
    in_value = channel < VALUE_DIM
    peak = tl.full((HEADS,), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((HEADS,), dtype=tl.float32)
    total = tl.zeros((HEADS, BLOCK_VALUE), dtype=tl.float32)
    if sink_logits_ptr is not None:
        peak = tl.load(
            sink_logits_ptr + row * stride_sink_logits_row + head * stride_sink_logits_head
        )
        mass += 1.0
    for start in range(0, num_splits, BLOCK_TILE):
        part = start + tl.arange(0, BLOCK_TILE)[None, :]
        at = head[:, None] * num_splits + part
        # From L2: no line that a multiprocessor still has of an earlier launch is what it was.
        peaks = tl.load(peak_ptr + at, part < num_splits, float("-inf"), cache_modifier=".cg")
        masses = tl.load(mass_ptr + at, part < num_splits, 0.0, cache_modifier=".cg")
        mask = (part < num_splits)[:, :, None] & in_value[None, None, :]
        total_ptrs = total_ptr + at[:, :, None] * VALUE_DIM + channel[None, None, :]
        totals = tl.load(total_ptrs, mask, 0.0, cache_modifier=".cg")
        higher = tl.maximum(peak, tl.max(peaks, axis=1))
        # A head that attends nothing has a peak of -inf; 0 keeps its exponents finite.
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        weight, decay = tl.exp(peaks - reference[:, None]), tl.exp(peak - reference)
        mass = mass * decay + tl.sum(masses * weight, axis=1)
        # Where nothing was added nobody has written a total.
        totals = tl.where((peaks > float("-inf"))[:, :, None], totals, 0.0)
        total = total * decay[:, None] + tl.sum(totals * weight[:, :, None], axis=1)
        peak = higher
    output = total / tl.where(mass == 0, 1.0, mass)[:, None]
    output_ptr += row * group * VALUE_DIM
    output_ptrs = output_ptr + head[:, None] * VALUE_DIM + channel[None, :]
    mask = in_group[:, None] & in_value[None, :]
    tl.store(output_ptrs, round_to(output, output_ptr.dtype.element_ty), mask)
    if log_mass_ptr is not None:
        log_mass = peak + tl.log(tl.where(mass == 0, 1.0, mass))
        tl.store(log_mass_ptr + row * group + head, log_mass, in_group)


@triton.jit(do_not_specialize=SIZES)
def partial_kernel(
    query_ptr, elements_ptr, meta_ptr, codes_ptr,  # the last three: slots, in three dtypes
    chosen_ptr, num_chosen_ptr, page_of_ptr, window_key_ptr, window_value_ptr,
    lengths_ptr, sealed_ptr, bias_ptr, means_ptr, estimated_ptr, page_bias_ptr,
    parts_ptr, tickets_ptr, sink_logits_ptr, output_ptr, log_mass_ptr,
    scale, softcap, group, num_slots, num_sink_pages, max_selected, num_places, ring, page_splits,
    mean_splits, num_means,
    stride_query_row, stride_query_head, stride_bias_row, stride_bias_head, stride_bias_token,
    stride_page_bias_row, stride_page_bias_head, stride_page_bias_page,
    stride_sink_logits_row, stride_sink_logits_head,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_BITS: tl.constexpr, KEY_PLANE: tl.constexpr, KEY_BYTES: tl.constexpr,
    VALUE_BITS: tl.constexpr, VALUE_PLANE: tl.constexpr, PAGE_BYTES: tl.constexpr,
    ELEMENT_BYTES: tl.constexpr, GROUP_SIZE: tl.constexpr, NUM_SCALES: tl.constexpr,
    PAGES_PER_SPLIT: tl.constexpr, TOKENS_PER_SPLIT: tl.constexpr, LOG_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_SCALES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_PAGE: tl.constexpr, BLOCK_WINDOW: tl.constexpr,
    PAGES_AHEAD: tl.constexpr, WINDOW_AHEAD: tl.constexpr,
    MERGE_HEADS: tl.constexpr, MERGE_TILE: tl.constexpr, MERGE_VALUE: tl.constexpr,
):  # fmt: skip
    """Program (row, split, block of heads) attends a run of pages, of the window's tokens or of
    estimates.

    With tickets, the last program of a row merges what all left; there is one block of heads then.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = tl.program_id(2) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    in_group = head < group
    head = tl.minimum(head, group - 1).to(tl.int64)  # rows of padding repeat the last head
    channel = tl.arange(0, BLOCK_KEY)
    in_key = channel < HEAD_DIM
    # Groups of a value lie beside each other, each padded to a power of two.
    lane = tl.arange(0, BLOCK_SCALES * BLOCK_SIZE)
    value_channel = lane // BLOCK_SIZE * GROUP_SIZE + lane % BLOCK_SIZE
    in_value = (lane % BLOCK_SIZE < GROUP_SIZE) & (value_channel < VALUE_DIM)
    query_ptrs = query_ptr + row * stride_query_row + head[:, None] * stride_query_head
    query = tl.load(query_ptrs + channel[None, :], in_key[None, :], other=0.0)
    bias_ptrs = None
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + row * stride_bias_row + head[:, None] * stride_bias_head
    sealed = tl.load(sealed_ptr + row)
    peak = tl.full((BLOCK_HEADS,), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((BLOCK_HEADS,), dtype=tl.float32)
    total = tl.zeros((BLOCK_HEADS, BLOCK_SCALES * BLOCK_SIZE), dtype=tl.float32)

    # Each loop is empty where a program has nothing to do in it.
    if codes_ptr is not None:
        num_first, num_pages = sealed, sealed
        if chosen_ptr is not None:
            num_first = tl.minimum(sealed, num_sink_pages)
            num_pages = num_first + tl.load(num_chosen_ptr + row)
        share = tl.maximum(PAGES_PER_SPLIT, tl.cdiv(num_pages, page_splits))
        start = split * share
        stop = tl.where(split < page_splits, tl.minimum(start + share, num_pages), start)
        # Where pages are found through a list the compiler shares the stages out: to read the list,
        # to read the pages.
        LISTED: tl.constexpr = chosen_ptr is not None and not is_hip()
        STAGES: tl.constexpr = (PAGES_AHEAD + 1) * (2 if LISTED else 1)
        TILES: tl.constexpr = (PAGE_SIZE + BLOCK_PAGE - 1) // BLOCK_PAGE
        for tile in tl.range(start * TILES, stop * TILES, num_stages=STAGES):
            slot = tile // TILES
            page = slot
            if chosen_ptr is not None:
                at = slot - num_first
                place = tl.load(chosen_ptr + row * max_selected + at, at >= 0, other=0)
                held = tl.load(page_of_ptr + row * num_places + place, at >= 0, other=0)
                page = tl.where(at >= 0, held, slot)
                slot = tl.where(at >= 0, num_sink_pages + place, slot)
            first = tile % TILES * BLOCK_PAGE
            index = first + tl.arange(0, BLOCK_PAGE)
            valid = index < PAGE_SIZE
            begin = (row * num_slots + slot) * PAGE_BYTES
            key = load_keys(
                elements_ptr, meta_ptr, codes_ptr, begin, index, channel,
                HEAD_DIM, KEY_BITS, KEY_PLANE, ELEMENT_BYTES, PAGE_SIZE,
            )  # fmt: skip
            value = load_values(
                elements_ptr, meta_ptr, codes_ptr, begin + KEY_BYTES, first, value_channel,
                in_value, VALUE_DIM, VALUE_BITS, VALUE_PLANE, ELEMENT_BYTES,
                PAGE_SIZE, NUM_SCALES, BLOCK_PAGE, BLOCK_SCALES, BLOCK_SIZE,
            )  # fmt: skip
            peak, mass, total = _fold_tile(
                query, key, value, bias_ptrs, stride_bias_token, page * PAGE_SIZE + index, valid,
                valid, scale, softcap, peak, mass, total, 0.0,
            )  # fmt: skip

    window_splits = tl.num_programs(1) - page_splits
    if means_ptr is not None:
        window_splits -= mean_splits
    # Before the window: its loop would have to keep all that estimates are found by.
    peak, mass, total = _fold_means(
        query, means_ptr, estimated_ptr, page_bias_ptr, row, head, channel, in_key,
        value_channel, in_value, split - page_splits - window_splits, mean_splits,
        sealed, num_sink_pages, num_means,
        stride_page_bias_row, stride_page_bias_head, stride_page_bias_page,
        scale, softcap, peak, mass, total,
        HEAD_DIM, VALUE_DIM, LOG_SIZE, TOKENS_PER_SPLIT, BLOCK_WINDOW, WINDOW_AHEAD,
    )  # fmt: skip

    first = sealed * PAGE_SIZE
    count = tl.load(lengths_ptr + row) - first
    share = tl.cdiv(count, window_splits)
    share = tl.maximum(tl.cdiv(share, BLOCK_WINDOW) * BLOCK_WINDOW, TOKENS_PER_SPLIT)
    start = (split - page_splits) * share
    # By its start, not by its split: what was compared for pages would be kept until here.
    stop = tl.where(start < 0, start, tl.minimum(start + share, count))
    for begin in tl.range(start, stop, BLOCK_WINDOW, num_stages=WINDOW_AHEAD + 1):
        index = begin + tl.arange(0, BLOCK_WINDOW)
        valid = index < stop
        line = first % ring + index
        line = row * ring + tl.where(line < ring, line, line - ring)
        key_ptrs = window_key_ptr + line[:, None] * HEAD_DIM + channel[None, :]
        key = tl.load(key_ptrs, valid[:, None] & in_key[None, :], other=0.0)
        value_ptrs = window_value_ptr + line[:, None] * VALUE_DIM + value_channel[None, :]
        value = tl.load(value_ptrs, valid[:, None] & in_value[None, :], other=0.0)
        peak, mass, total = _fold_tile(
            query, key, value, bias_ptrs, stride_bias_token, first + index, valid, valid,
            scale, softcap, peak, mass, total, 0.0,
        )  # fmt: skip

    num_splits = tl.num_programs(1)
    num_lines = tl.num_programs(0) * group * num_splits
    peak_ptr, mass_ptr, total_ptr = _parts_of(parts_ptr, num_lines)
    line = (row * group + head) * num_splits + split
    tl.store(peak_ptr + line, peak, in_group)
    tl.store(mass_ptr + line, mass, in_group)
    # Where nothing was added nothing is read either.
    mask = (in_group & (peak > float("-inf")))[:, None] & in_value[None, :]
    tl.store(total_ptr + line[:, None] * VALUE_DIM + value_channel[None, :], total, mask)

    if tickets_ptr is not None:
        tl.debug_barrier()  # one thread draws for all: it vouches for what the others stored
        ticket = tl.atomic_add(tickets_ptr + row, 1, sem="acq_rel", scope="gpu")
        if ticket == num_splits - 1:
            tl.store(tickets_ptr + row, 0)  # for the next launch
            _merge(
                parts_ptr, sink_logits_ptr, output_ptr, log_mass_ptr, row, 0, group, num_splits,
                stride_sink_logits_row, stride_sink_logits_head,
                VALUE_DIM, MERGE_HEADS, MERGE_TILE, MERGE_VALUE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_splits"])
def merge_kernel(
    parts_ptr, sink_logits_ptr, output_ptr, log_mass_ptr, num_splits,
    stride_sink_logits_row, stride_sink_logits_head,
    VALUE_DIM: tl.constexpr, BLOCK_TILE: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """Program (row, head) merges the splits and the sink logit."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _merge(
        parts_ptr, sink_logits_ptr, output_ptr, log_mass_ptr, row, head, tl.num_programs(1),
        num_splits, stride_sink_logits_row, stride_sink_logits_head,
        VALUE_DIM, 1, BLOCK_TILE, BLOCK_VALUE,
    )  # fmt: skip
