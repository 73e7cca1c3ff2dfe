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
from arkcache.kernels.triton_sizes import power_of_two


def append(
    key: Tensor,
    value: Tensor,
    window_key: Tensor,
    window_value: Tensor,
    lengths: Tensor,
    sealed: Tensor,
    *,
    recent: int,
    page_size: int,
) -> None:
    """Write a token into every row's window and count it; rows are (sequence, KV head) pairs.

    Args:
        key, value: [batch, kv_heads, head_dim] and [batch, kv_heads, value_dim], the last stride 1.
        window_key, window_value: [rows, window, head_dim] and [..., value_dim], contiguous, of the
            same dtype; written at `lengths % window`.
        lengths: int32 [rows], tokens held; one more afterwards.
        sealed: int32 [rows], becomes max(0, (lengths - recent) // page_size).
        recent: tokens that stay unsealed.
        page_size: tokens per page.

    Raises `InputError` where a shape, a dtype or a stride is another.
    """
    _check(key, value, window_key, window_value, lengths, sealed)
    if page_size < 1 or recent < 0:
        raise InputError(
            f"recent={recent}, page_size={page_size}: expected recent >= 0 and page_size >= 1"
        )
    rows, window, head_dim = window_key.shape
    if not rows:
        return
    value_dim = window_value.shape[-1]
    append_kernel[(rows,)](
        key,
        value,
        window_key,
        window_value,
        lengths,
        sealed,
        key.shape[1],
        window,
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


def _check(
    key: Tensor,
    value: Tensor,
    window_key: Tensor,
    window_value: Tensor,
    lengths: Tensor,
    sealed: Tensor,
) -> None:
    heads = key.shape[:2]
    for name, states, window in (("key", key, window_key), ("value", value, window_value)):
        if window.dim() != 3 or not window.is_contiguous() or window.shape[1] < 1:
            raise InputError(
                f"window_{name} of shape {list(window.shape)} and strides {window.stride()}: "
                "expected contiguous [rows, window, dim]"
            )
        expected = (*heads, window.shape[-1])
        if states.shape != expected or heads.numel() != window.shape[0] or states.stride(-1) != 1:
            raise InputError(
                f"{name} of shape {list(states.shape)} and strides {states.stride()}: expected "
                f"[batch, kv_heads, {window.shape[-1]}] with {window.shape[0]} rows in all and the "
                "last stride 1"
            )
        if states.dtype != window.dtype:
            raise InputError(f"{name} of {states.dtype}: expected {window.dtype} as in its window")
    if window_key.shape[:2] != window_value.shape[:2]:
        raise InputError(
            f"windows of {list(window_key.shape[:2])} and {list(window_value.shape[:2])} tokens: "
            "expected the same"
        )
    for name, counts in (("lengths", lengths), ("sealed", sealed)):
        fits = counts.dtype == torch.int32 and counts.shape == window_key.shape[:1]
        if not fits or not counts.is_contiguous():
            raise InputError(
                f"{name} of {counts.dtype} {list(counts.shape)}: expected contiguous int32 "
                f"[{window_key.shape[0]}]"
            )


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
