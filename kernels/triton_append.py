"""Appends one token per sequence to the recent window, on the device alone.

The window is a ring: token t lies at position t % window. Lengths and numbers of sealed pages are
counted here too, so that a decode step needs nothing from the host and can be captured in a graph.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arkcache.errors import InputError
from arkcache.kernels.arguments import Counts, Window
from arkcache.kernels.triton_checked import check
from arkcache.kernels.triton_sizes import power_of_two


def append(
    key: Tensor,
    value: Tensor,
    window: Window,
    counts: Counts,
    *,
    recent: int,
    page_size: int,
) -> None:
    """Write a token into every row's window and count it; rows are (sequence, KV head) pairs.

    Args:
        key, value: [batch, kv_heads, head_dim] and [batch, kv_heads, value_dim] in the dtypes of
            the window, the last stride 1.
        window: contiguous; written at `lengths % tokens`.
        counts: contiguous; `lengths` is one more afterwards, `sealed` becomes
            max(0, (lengths - recent) // page_size).
        recent: tokens that stay unsealed.
        page_size: tokens per page.

    Raises `InputError` where a shape, a dtype or a stride is another.
    """
    rows, tokens, head_dim, value_dim = _check(key, value, window, counts)
    if page_size < 1 or recent < 0:
        raise InputError(
            f"recent={recent}, page_size={page_size}: expected recent >= 0 and page_size >= 1"
        )
    if not rows:
        return
    append_kernel[(rows,)](
        key,
        value,
        *window,
        *counts,
        key.shape[1],
        tokens,
        recent,
        page_size,
        *key.stride()[:2],
        *value.stride()[:2],
        head_dim,
        value_dim,
        power_of_two(head_dim),
        power_of_two(value_dim),
        num_warps=1,
    )


def _check(key: Tensor, value: Tensor, window: Window, counts: Counts) -> tuple[int, ...]:
    """Rows, tokens of their windows, head_dim and value_dim, or `InputError`."""
    like_key, like_value = window.key.dtype, window.value.dtype
    batch, heads, head_dim = check(
        "key", key, (None, None, None), like_key, strides="last stride 1"
    )
    rows, tokens, _ = check("window.key", window.key, (batch * heads, None, head_dim), like_key)
    if not tokens:
        raise InputError("a window of 0 tokens: expected one or more")
    states = (batch, heads, None)
    value_dim = check("value", value, states, like_value, strides="last stride 1")[2]
    check("window.value", window.value, (rows, tokens, value_dim), like_value)
    check("counts.lengths", counts.lengths, (rows,), torch.int32)
    check("counts.sealed", counts.sealed, (rows,), torch.int32)
    return rows, tokens, head_dim, value_dim


@triton.jit
def append_kernel(
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    window_key_ptr: tl.tensor,
    window_value_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    sealed_ptr: tl.tensor,
    num_heads: tl.tensor,
    window: tl.tensor,
    recent: tl.tensor,
    page_size: tl.tensor,
    key_stride_batch: tl.tensor,
    key_stride_head: tl.tensor,
    value_stride_batch: tl.tensor,
    value_stride_head: tl.tensor,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
) -> None:
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // num_heads, row % num_heads
    length = tl.load(lengths_ptr + row)
    tl.debug_barrier()  # nobody counts before everybody has read
    position = row * window + length % window
    channel = tl.arange(0, BLOCK_KEY)
    key_ptr += batch * key_stride_batch + head * key_stride_head
    key = tl.load(key_ptr + channel, mask=channel < HEAD_DIM)
    tl.store(window_key_ptr + position * HEAD_DIM + channel, key, mask=channel < HEAD_DIM)
    channel = tl.arange(0, BLOCK_VALUE)
    value_ptr += batch * value_stride_batch + head * value_stride_head
    value = tl.load(value_ptr + channel, mask=channel < VALUE_DIM)
    tl.store(window_value_ptr + position * VALUE_DIM + channel, value, mask=channel < VALUE_DIM)
    tl.store(lengths_ptr + row, length + 1)
    tl.store(sealed_ptr + row, tl.maximum(length + 1 - recent, 0) // page_size)
