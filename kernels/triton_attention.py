"""Attention of one new token over pages, packed or not, and the recent window, on a GPU.

Split-KV (Flash-Decoding): how pages and window are shared out among programs, and by whom what
they leave is merged. The grid follows from shapes alone, the runs from lengths read on the device,
so that a captured step is good for any length.
"""

from __future__ import annotations

from functools import lru_cache
from math import log

import torch
from torch import Tensor

from arkcache.errors import InputError
from arkcache.formats import PageFormat, PageLayout
from arkcache.kernels.arguments import Counts, Estimates, PageSet, Window
from arkcache.kernels.torch_pages import meta_dtype
from arkcache.kernels.triton_attention_kernel import merge_kernel, partial_kernel
from arkcache.kernels.triton_checked import Checked, check, signature
from arkcache.kernels.triton_sizes import aligned, cdiv, power_of_two

PAGE_SPLIT = 128
"""Fewest tokens of pages per program: 2048 tokens of 8 KV heads are then 128 programs."""

WINDOW_SPLIT = 256
"""Fewest tokens of a window, and fewest estimates of pages, per program."""

MAX_SPLITS = 128
"""Most programs per row for the pages, for the window and for estimates; their runs are longer
beyond."""

MAX_MERGED = 32
"""Most splits of a row that its last program merges; more are shared out among programs, one for
each head, which takes a launch."""

WIDEST_MERGED = 128
"""Channels of a value that the last program merges at most: beyond it has no register to spare."""

MERGE_BLOCK = 4096
"""Elements of totals that a program merges at a time."""

BLOCK_HEADS = 16
"""Query heads per program: the least that a matrix instruction takes."""

BLOCK_BYTES = 8192
"""Most bytes of keys, or of values, that a program holds at a time."""

PAGES_AHEAD = 3
"""Blocks of pages that are on their way while one is attended."""

WINDOW_AHEAD = 2
"""Blocks of the window likewise; it is short."""

NO_PAGES, NO_ESTIMATES = (None,) * 4, (None,) * 3

_checked = Checked()


def paged_attention(
    query: Tensor,
    pages: PageSet | None,
    window: Window,
    counts: Counts,
    *,
    layout: PageLayout | None,
    num_sink_pages: int,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    bias: Tensor | None = None,
    estimates: Estimates | None = None,
    log_mass: Tensor | None = None,
    tickets: Tensor | None = None,
) -> Tensor:
    """`reference_attention.paged_attention` in the query's dtype: [R, G, value_dim], contiguous.

    query in any strides but the last, sink_logits and biases in any, all else contiguous. Nothing
    waits for the device: a CUDA graph may hold the call. Raises `InputError` for a shape, a dtype,
    a device or strides that the kernels do not read.

    Args:
        tickets: int32 [R], zeros, and zeros again when the call is done: with them one launch does
            all where splits are few. Two calls that share them must not run at the same time, so
            they belong to a layer and not to a stream: a graph runs on other streams than it was
            recorded on. None, and on AMD: a launch of its own merges the splits.
    """
    if layout is None:
        layout = _window_layout(query.shape[-1], window.value.shape[-1], query.dtype)
    slots, chosen, num_chosen, page_of = pages or NO_PAGES
    means, estimated, page_bias = estimates or NO_ESTIMATES
    tensors = (
        query, slots, chosen, num_chosen, page_of, *window, *counts,
        sink_logits, bias, means, estimated, page_bias, log_mass, tickets,
    )  # fmt: skip
    key = (signature(*tensors), layout, num_sink_pages)
    if key not in _checked:
        _check_states(query, pages, window, counts, layout)
        _check_logits(query, sink_logits, bias, log_mass)
        if estimates is not None:
            _check_estimates(query, estimates, layout, num_sink_pages)
        if tickets is not None:
            check("tickets", tickets, query.shape[:1], torch.int32, device=query.device)
        _checked.add(key)
    (rows, group, _), ring, value_dim = query.shape, window.key.shape[1], layout.value_dim
    output = torch.empty((rows, group, value_dim), dtype=query.dtype, device=query.device)
    if output.numel() == 0:
        return output
    sizes = _sizes(layout, query.dtype, group)
    num_slots, max_selected, num_places = (
        0 if x is None else x.shape[1] for x in (slots, chosen, page_of)
    )
    num_pages = num_slots if chosen is None else min(num_slots, num_sink_pages + max_selected)
    page_splits = min(MAX_SPLITS, cdiv(num_pages, sizes["PAGES_PER_SPLIT"]))
    num_means = 0 if means is None else means.shape[1]
    mean_splits = min(MAX_SPLITS, cdiv(num_means, WINDOW_SPLIT))
    num_splits = page_splits + min(MAX_SPLITS, cdiv(ring, WINDOW_SPLIT)) + mean_splits
    views: tuple[Tensor | None, ...] = (None, None, None)
    if slots is not None and num_pages > 0:
        views = (slots.view(query.dtype), slots.view(meta_dtype(query.dtype)), slots)
    num_lines = rows * group * num_splits
    nelements = 2 * aligned(num_lines) + num_lines * value_dim  # as `_parts_of` divides them
    parts = torch.empty(nelements, dtype=torch.float32, device=query.device)
    sink_logits_strides = (0, 0) if sink_logits is None else sink_logits.stride()
    merged: tuple[Tensor | None, ...] = (None, None, None, None)
    is_small = num_splits <= MAX_MERGED and value_dim <= WIDEST_MERGED and group <= BLOCK_HEADS
    # On AMD a barrier does not wait for stores: one thread could not vouch for those of others.
    if tickets is not None and is_small and torch.version.hip is None:
        merged = (tickets, sink_logits, output, log_mass)
    with torch.cuda.device_of(query):
        partial_kernel[(rows, num_splits, cdiv(group, BLOCK_HEADS))](
            query, *views, chosen, num_chosen, page_of, *window, *counts,
            bias, means if mean_splits else None, estimated, page_bias, parts, *merged,
            scale, softcap, group, num_slots, num_sink_pages, max_selected, num_places, ring,
            page_splits, mean_splits, num_means,
            *query.stride()[:2], *((0, 0, 0) if bias is None else bias.stride()),
            *((0, 0, 0) if page_bias is None else page_bias.stride()), *sink_logits_strides,
            LOG_SIZE=log(layout.page_size), **sizes,
        )  # fmt: skip
        if merged[0] is None:
            merge_kernel[(rows, group)](
                parts, sink_logits, output, log_mass, num_splits, *sink_logits_strides, value_dim,
                BLOCK_TILE=16, BLOCK_VALUE=sizes["MERGE_VALUE"],
            )  # fmt: skip
    return output


@lru_cache
def _sizes(layout: PageLayout, dtype: torch.dtype, group: int) -> dict[str, int]:
    """What the partial kernel is compiled for, so that nothing spills on any target."""
    key, value = layout.key, layout.value
    group_size = layout.value_dim if value.bits == 16 else layout.format.group_size
    num_scales, block_size = layout.value_dim // group_size, power_of_two(group_size)
    block_scales = max(power_of_two(num_scales), 16 // block_size)
    block_key = max(16, power_of_two(layout.head_dim))
    widest = max(block_key, block_scales * block_size) * dtype.itemsize
    most_tokens = max(16, min(64, BLOCK_BYTES // widest))
    is_wide = most_tokens * widest > BLOCK_BYTES
    merge_heads = power_of_two(min(group, BLOCK_HEADS))
    merge_value = power_of_two(layout.value_dim)
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
        "PAGES_PER_SPLIT": cdiv(PAGE_SPLIT, layout.page_size),
        "TOKENS_PER_SPLIT": WINDOW_SPLIT,
        "BLOCK_HEADS": BLOCK_HEADS,
        "BLOCK_KEY": block_key,
        "BLOCK_SCALES": block_scales,
        "BLOCK_SIZE": block_size,
        "BLOCK_PAGE": min(most_tokens, max(16, power_of_two(layout.page_size))),
        "BLOCK_WINDOW": most_tokens,
        "num_warps": 8 if is_wide or dtype == torch.float32 else 4,
        "PAGES_AHEAD": 1 if is_wide else PAGES_AHEAD,
        "WINDOW_AHEAD": 1 if is_wide else WINDOW_AHEAD,
        "MERGE_HEADS": merge_heads,
        "MERGE_TILE": max(1, min(MAX_MERGED, MERGE_BLOCK // (merge_heads * merge_value))),
        "MERGE_VALUE": merge_value,
    }


@lru_cache
def _window_layout(head_dim: int, value_dim: int, dtype: torch.dtype) -> PageLayout:
    """Of pages that are never read: what is attended is the window alone."""
    return PageLayout(PageFormat(), 1, head_dim, value_dim, dtype.itemsize)


def _check_states(
    query: Tensor, pages: PageSet | None, window: Window, counts: Counts, layout: PageLayout
) -> None:
    """Raise `InputError` for a query, pages, a window or counts that the kernels do not read."""
    dtype, device = query.dtype, query.device
    if dtype.itemsize != layout.element_bytes:
        raise InputError(
            f"query is {dtype}: expected elements of {layout.element_bytes} bytes as in its layout"
        )
    dim = layout.head_dim
    rows = check("query", query, (None, None, dim), dtype, strides="last stride 1")[0]
    tokens = check("window.key", window.key, (rows, None, dim), dtype, device=device)[1]
    check("window.value", window.value, (rows, tokens, layout.value_dim), dtype, device=device)
    if not tokens:
        raise InputError("a window of 0 tokens: expected one or more")
    check("counts.lengths", counts.lengths, (rows,), torch.int32, device=device)
    check("counts.sealed", counts.sealed, (rows,), torch.int32, device=device)
    if pages is not None:
        _check_pages(pages, rows, layout, device)


def _check_pages(pages: PageSet, rows: int, layout: PageLayout, device: torch.device) -> None:
    check("pages.slots", pages.slots, (rows, None, layout.nbytes), torch.uint8, device=device)
    if len({field is None for field in pages[1:]}) > 1:
        raise InputError("chosen, num_chosen or page_of of pages is None: expected all or none")
    shapes = ((rows, None), (rows,), (rows, None))
    for name, numbers, shape in zip(PageSet._fields[1:], pages[1:], shapes, strict=True):
        if numbers is not None:
            check(f"pages.{name}", numbers, shape, torch.int32, device=device)


def _check_estimates(
    query: Tensor, estimates: Estimates, layout: PageLayout, num_sink_pages: int
) -> None:
    (rows, group, _), device, (means, estimated, bias) = query.shape, query.device, estimates
    dims = (rows, None, layout.head_dim + layout.value_dim)
    num_pages = check("estimates.means", means, dims, query.dtype, device=device)[1]
    selectable = (rows, num_pages - num_sink_pages)
    check("estimates.estimated", estimated, selectable, torch.int32, device=device)
    if bias is not None:
        shape = (rows, group, None)
        check("estimates.bias", bias, shape, torch.float32, strides="any strides", device=device)


def _check_logits(
    query: Tensor, sink_logits: Tensor | None, bias: Tensor | None, log_mass: Tensor | None
) -> None:
    (rows, group, _), device = query.shape, query.device
    for name, logits, shape in (
        ("sink_logits", sink_logits, (rows, group)),
        ("bias", bias, (rows, group, None)),
    ):
        if logits is not None:
            check(name, logits, shape, torch.float32, strides="any strides", device=device)
    if log_mass is not None:
        check("log_mass", log_mass, (rows, group), torch.float32, device=device)
