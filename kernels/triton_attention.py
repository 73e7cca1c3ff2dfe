"""Attention of one new token over pages, packed or not, and the recent window, on a GPU.

Split-KV (Flash-Decoding): the partial kernel gives every program a run of the pages or of the
window and writes the peak, the mass and the weighted sum of its values; the merge kernel combines
them by log-sum-exp. Packed pages are unpacked in registers. The grid follows from shapes alone,
the runs from lengths read on the device, so that a captured step is good for any length.
"""

# Triton reads annotations of kernels as its own: parameters of a kernel can have none.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_hip

from arkcache.errors import InputError
from arkcache.formats import PageFormat, PageLayout
from arkcache.kernels.torch_pages import meta_dtype
from arkcache.kernels.triton_checked import Checked, signature
from arkcache.kernels.triton_tiles import dot, load_keys, load_values, round_to, tanh

PAGE_SPLIT = 128
"""Fewest tokens of pages per program: 2048 tokens of 8 KV heads are then 128 programs."""

WINDOW_SPLIT = 256
"""Fewest tokens of a window per program."""

MAX_SPLITS = 128
"""Most programs per row for the pages, and for the window; their runs are longer beyond."""

BLOCK_HEADS = 16
"""Query heads per program: the least that a matrix instruction takes."""

BLOCK_BYTES = 8192
"""Most bytes of keys, or of values, that a program holds at a time."""

PAGES_AHEAD = 3
"""Blocks of pages that are on their way while one is attended."""

WINDOW_AHEAD = 2
"""Blocks of the window likewise; it is short."""

SIZES = [
    *("group", "num_slots", "num_sinks", "most", "num_places", "ring", "page_splits"),
    *("stride_bias_row", "stride_bias_head"),
]
"""Arguments that a cache changes as it grows: no value of theirs is worth compiling anew for."""

_checked = Checked()


@triton.jit
def _fold_tile(
    query, key, value, bias_ptrs, stride_bias, token, valid, scale, softcap, peak, mass, total
):
    """Fold keys and values [tokens, channels] into the running peak, mass and total."""
    none = tl.zeros((query.shape[0], key.shape[0]), dtype=tl.float32)
    logits = dot(query, tl.trans(key), none) * scale
    if softcap is not None:
        logits = softcap * tanh(logits / softcap)
    if bias_ptrs is not None:
        bias_ptrs += token.to(tl.int64)[None, :] * stride_bias
        logits += tl.load(bias_ptrs, valid[None, :], other=0.0)
    logits = tl.where(valid[None, :], logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, axis=1))
    # A head that may attend nothing yet has a peak of -inf; 0 keeps its exponents finite.
    reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weight = tl.exp(logits - reference[:, None])
    decay = tl.exp(peak - reference)
    mass = mass * decay + tl.sum(weight, axis=1)
    total = dot(round_to(weight, value.dtype), value, total * decay[:, None])
    return new_peak, mass, total


@triton.jit(do_not_specialize=SIZES)
def partial_kernel(
    query_ptr, elements_ptr, meta_ptr, codes_ptr,  # the last three: slots, in three dtypes
    chosen_ptr, num_chosen_ptr, page_of_ptr, window_key_ptr, window_value_ptr,
    lengths_ptr, sealed_ptr, bias_ptr, peak_ptr, mass_ptr, total_ptr,
    scale, softcap, group, num_slots, num_sinks, most, num_places, ring, page_splits,
    stride_query_row, stride_query_head, stride_bias_row, stride_bias_head, stride_bias_token,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_BITS: tl.constexpr, KEY_PLANE: tl.constexpr, KEY_BYTES: tl.constexpr,
    VALUE_BITS: tl.constexpr, VALUE_PLANE: tl.constexpr, PAGE_BYTES: tl.constexpr,
    ELEMENT_BYTES: tl.constexpr, GROUP_SIZE: tl.constexpr, NUM_SCALES: tl.constexpr,
    PAGES_PER_SPLIT: tl.constexpr, TOKENS_PER_SPLIT: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_KEY: tl.constexpr, BLOCK_SCALES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_PAGE: tl.constexpr, BLOCK_WINDOW: tl.constexpr,
    PAGES_AHEAD: tl.constexpr, WINDOW_AHEAD: tl.constexpr,
):  # fmt: skip
    """Program (row, split, block of heads) attends a run of pages, or of the window's tokens."""
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

    # Both loops are empty where a program has nothing to do in them.
    if codes_ptr is not None:
        num_first, num_pages = sealed, sealed
        if chosen_ptr is not None:
            num_first = tl.minimum(sealed, num_sinks)
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
                place = tl.load(chosen_ptr + row * most + at, at >= 0, other=0)
                held = tl.load(page_of_ptr + row * num_places + place, at >= 0, other=0)
                page = tl.where(at >= 0, held, slot)
                slot = tl.where(at >= 0, num_sinks + place, slot)
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
                scale, softcap, peak, mass, total,
            )  # fmt: skip

    first = sealed * PAGE_SIZE
    count = tl.load(lengths_ptr + row) - first
    share = tl.cdiv(count, tl.num_programs(1) - page_splits)
    share = tl.maximum(tl.cdiv(share, BLOCK_WINDOW) * BLOCK_WINDOW, TOKENS_PER_SPLIT)
    start = (split - page_splits) * share
    stop = tl.where(split < page_splits, start, tl.minimum(start + share, count))
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
            query, key, value, bias_ptrs, stride_bias_token, first + index, valid,
            scale, softcap, peak, mass, total,
        )  # fmt: skip

    line = (row * group + head) * tl.num_programs(1) + split
    tl.store(peak_ptr + line, peak, in_group)
    tl.store(mass_ptr + line, mass, in_group)
    # Where nothing was added nothing is read either.
    mask = (in_group & (peak > float("-inf")))[:, None] & in_value[None, :]
    tl.store(total_ptr + line[:, None] * VALUE_DIM + value_channel[None, :], total, mask)


@triton.jit(do_not_specialize=["num_splits"])
def merge_kernel(
    peak_ptr, mass_ptr, total_ptr, sinks_ptr, output_ptr,
    num_splits, stride_sinks_row, stride_sinks_head,
    VALUE_DIM: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_TILE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """Program (row, head) merges the splits and the sink."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    line = row * tl.num_programs(1) + head
    split = tl.arange(0, BLOCK_SPLITS)
    peaks = tl.load(peak_ptr + line * num_splits + split, split < num_splits, other=float("-inf"))
    masses = tl.load(mass_ptr + line * num_splits + split, split < num_splits, other=0.0)
    peak = tl.max(peaks, axis=0)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + row * stride_sinks_row + head * stride_sinks_head)
        peak = tl.maximum(peak, sink)
    reference = tl.where(peak == float("-inf"), 0.0, peak)
    mass = tl.sum(masses * tl.exp(peaks - reference), axis=0)
    if sinks_ptr is not None:
        mass += tl.exp(sink - reference)
    channel = tl.arange(0, BLOCK_VALUE)
    in_value = channel < VALUE_DIM
    total = tl.zeros((BLOCK_VALUE,), dtype=tl.float32)
    for start in range(0, num_splits, BLOCK_TILE):
        part = start + tl.arange(0, BLOCK_TILE)
        lines = line * num_splits + part
        own = tl.load(peak_ptr + lines, part < num_splits, other=float("-inf"))
        mask = (own > float("-inf"))[:, None] & in_value[None, :]
        total_ptrs = total_ptr + lines[:, None] * VALUE_DIM + channel[None, :]
        totals = tl.load(total_ptrs, mask, other=0.0)
        total += tl.sum(totals * tl.exp(own - reference)[:, None], axis=0)
    output = round_to(total / tl.where(mass == 0, 1.0, mass), output_ptr.dtype.element_ty)
    tl.store(output_ptr + line * VALUE_DIM + channel, output, in_value)


def paged_attention(
    query: Tensor,
    slots: Tensor | None,
    chosen: Tensor | None,
    num_chosen: Tensor | None,
    page_of: Tensor | None,
    window_key: Tensor,
    window_value: Tensor,
    lengths: Tensor,
    sealed: Tensor,
    *,
    layout: PageLayout | None,
    num_sinks: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`reference_attention.paged_attention` in the query's dtype: [R, G, value_dim], contiguous.

    query in any strides but the last, sinks and bias in any, all else contiguous. Nothing waits
    for the device: a CUDA graph may hold the call. Raises `InputError` for a shape, a dtype, a
    device or strides that the kernels do not read.
    """
    if layout is None:
        layout = _window_layout(query.shape[-1], window_value.shape[-1], query.dtype)
    tensors = (
        query, slots, chosen, num_chosen, page_of, window_key, window_value, lengths, sealed, sinks,
        bias,
    )  # fmt: skip
    key = (signature(*tensors), layout)
    if key not in _checked:
        _check_all(*tensors, layout)
        _checked.add(key)
    (rows, group, _), ring = query.shape, window_key.shape[1]
    output = torch.empty((rows, group, layout.value_dim), dtype=query.dtype, device=query.device)
    if output.numel() == 0:
        return output
    sizes = _sizes(layout, query.dtype)
    num_slots, most, num_places = (0 if x is None else x.shape[1] for x in (slots, chosen, page_of))
    num_pages = num_slots if chosen is None else min(num_slots, num_sinks + most)
    page_splits = min(MAX_SPLITS, triton.cdiv(num_pages, sizes["PAGES_PER_SPLIT"]))
    num_splits = page_splits + min(MAX_SPLITS, triton.cdiv(ring, WINDOW_SPLIT))
    views: tuple[Tensor | None, ...] = (None, None, None)
    if slots is not None and num_pages > 0:
        views = (slots.view(query.dtype), slots.view(meta_dtype(query.dtype)), slots)
    device, shape = query.device, (rows, group, num_splits)
    peak, mass = torch.empty((2, *shape), dtype=torch.float32, device=device)
    total = torch.empty((*shape, layout.value_dim), dtype=torch.float32, device=device)
    with torch.cuda.device_of(query):
        partial_kernel[(rows, num_splits, triton.cdiv(group, BLOCK_HEADS))](
            query, *views, chosen, num_chosen, page_of, window_key, window_value,
            lengths, sealed, bias, peak, mass, total,
            scale, softcap, group, num_slots, num_sinks, most, num_places, ring, page_splits,
            *query.stride()[:2], *((0, 0, 0) if bias is None else bias.stride()), **sizes,
        )  # fmt: skip
        merge_kernel[(rows, group)](
            peak, mass, total, sinks, output,
            num_splits, *((0, 0) if sinks is None else sinks.stride()), layout.value_dim,
            BLOCK_SPLITS=triton.next_power_of_2(num_splits), BLOCK_TILE=16,
            BLOCK_VALUE=triton.next_power_of_2(layout.value_dim),
        )  # fmt: skip
    return output


@lru_cache
def _sizes(layout: PageLayout, dtype: torch.dtype) -> dict[str, int]:
    """What the partial kernel is compiled for, so that nothing spills on any target."""
    key, value = layout.key, layout.value
    group_size = layout.value_dim if value.bits == 16 else layout.format.group_size
    num_scales, block_size = layout.value_dim // group_size, triton.next_power_of_2(group_size)
    block_scales = max(triton.next_power_of_2(num_scales), 16 // block_size)
    block_key = max(16, triton.next_power_of_2(layout.head_dim))
    widest = max(block_key, block_scales * block_size) * dtype.itemsize
    most_tokens = max(16, min(64, BLOCK_BYTES // widest))
    is_wide = most_tokens * widest > BLOCK_BYTES
    return {
        "PAGE_SIZE": layout.page_size,
        "HEAD_DIM": layout.head_dim,
        "VALUE_DIM": layout.value_dim,
        "KEY_BITS": key.bits,
        "KEY_PLANE": key.plane_dim if key.bits < 16 else key.dim,
        "KEY_BYTES": key.nbytes,
        "VALUE_BITS": value.bits,
        "VALUE_PLANE": value.plane_dim if value.bits < 16 else value.dim,
        "PAGE_BYTES": layout.nbytes,
        "ELEMENT_BYTES": layout.element_bytes,
        "GROUP_SIZE": group_size,
        "NUM_SCALES": num_scales,
        "PAGES_PER_SPLIT": triton.cdiv(PAGE_SPLIT, layout.page_size),
        "TOKENS_PER_SPLIT": WINDOW_SPLIT,
        "BLOCK_HEADS": BLOCK_HEADS,
        "BLOCK_KEY": block_key,
        "BLOCK_SCALES": block_scales,
        "BLOCK_SIZE": block_size,
        "BLOCK_PAGE": min(most_tokens, max(16, triton.next_power_of_2(layout.page_size))),
        "BLOCK_WINDOW": most_tokens,
        "num_warps": 8 if is_wide or dtype == torch.float32 else 4,
        "PAGES_AHEAD": 1 if is_wide else PAGES_AHEAD,
        "WINDOW_AHEAD": 1 if is_wide else WINDOW_AHEAD,
    }


@lru_cache
def _window_layout(head_dim: int, value_dim: int, dtype: torch.dtype) -> PageLayout:
    """Of pages that are never read: what is attended is the window alone."""
    return PageLayout(PageFormat(), 1, head_dim, value_dim, dtype.itemsize)


def _check_all(
    query: Tensor,
    slots: Tensor | None,
    chosen: Tensor | None,
    num_chosen: Tensor | None,
    page_of: Tensor | None,
    window_key: Tensor,
    window_value: Tensor,
    lengths: Tensor,
    sealed: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    layout: PageLayout,
) -> None:
    """Raise `InputError` for what the kernels do not read."""
    (rows, group, _), ring = query.shape, window_key.shape[1]
    _check("query", query, query.dtype, (rows, group, layout.head_dim), query, whole=False)
    _check("slots", slots, torch.uint8, (rows, -1, layout.nbytes), query)
    _check("chosen", chosen, torch.int32, (rows, -1), query)
    _check("num_chosen", num_chosen, torch.int32, (rows,), query)
    _check("page_of", page_of, torch.int32, (rows, -1), query)
    _check("window_key", window_key, query.dtype, (rows, ring, layout.head_dim), query)
    _check("window_value", window_value, query.dtype, (rows, ring, layout.value_dim), query)
    _check("lengths", lengths, torch.int32, (rows,), query)
    _check("sealed", sealed, torch.int32, (rows,), query)
    _check("sinks", sinks, torch.float32, (rows, group), query, whole=False)
    _check("bias", bias, torch.float32, (rows, group, -1), query, whole=False)
    if chosen is not None and (slots is None or num_chosen is None or page_of is None):
        raise InputError("chosen is given: expected slots, num_chosen and page_of as well")
    if ring == 0 or query.dtype.itemsize != layout.element_bytes or query.stride(2) != 1:
        raise InputError(
            f"window of {ring} tokens, {query.dtype} with strides {query.stride()}: expected one "
            f"token or more, elements of {layout.element_bytes} bytes and a last stride of 1"
        )


def _check(
    name: str,
    tensor: Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    query: Tensor,
    whole: bool = True,
) -> None:
    """-1 stands for any size; `whole` tensors are contiguous."""
    if tensor is None:
        return
    fits = tensor.dim() == len(shape) and tensor.dtype == dtype and tensor.device == query.device
    fits = fits and all(want in (-1, size) for want, size in zip(shape, tensor.shape, strict=True))
    if not fits or (whole and not tensor.is_contiguous()):
        raise InputError(
            f"{name} is {tensor.dtype} {[*tensor.shape]} on {tensor.device} with strides "
            f"{tensor.stride()}: expected {dtype} {[*shape]} on {query.device}"
            f"{', contiguous' if whole else ''}"
        )
