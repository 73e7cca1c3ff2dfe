"""Appending on a CPU: a new token into the recent window, a full page into the host tier.

Pages of 16 bits rated by `TOKEN_ROWS`, the default, are sealed here: with pages of 4 that happens
at every fourth token. All others take torch (`NativeEngine.seal`), which this does to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from arkcache.kernels.numba_compile import kernel
from arkcache.kernels.numba_numbers import F32, floats, integers, pointer, rotate, widen
from arkcache.kernels.numba_record import (
    WRITE,
    count_recent,
    count_sealed,
    page_address,
    states,
)
from arkcache.kernels.numba_score import BLOCK
from arkcache.kernels.torch_token_rows import LEVELS, OFFSET


@kernel
def append_tokens(step: Any, like: Any) -> None:
    """Write the new tokens of all rows and count them (`WRITE`), or seal what has become full and
    count that (`SEAL`)."""
    for row in range(step.batch * step.kv_heads):
        if step.phase == WRITE:
            write_row(step, row, like)
        else:
            seal_row(step, row, like)
    lengths, sealed = integers(step.lengths, step.batch), integers(step.sealed, step.batch)
    for sequence in range(step.batch):
        if step.phase == WRITE:
            lengths[sequence] += 1
        elif is_full(step, sequence * step.kv_heads):
            sealed[sequence] += 1


@kernel
def write_row(step: Any, row: Any, like: Any) -> None:
    """Write a row's new token behind those of its window."""
    token = row * step.window_tokens + count_recent(step, row)
    copy_states(step.new_key, row, step.window_key, token, step.head_dim, like)
    copy_states(step.new_value, row, step.window_value, token, step.value_dim, like)


@kernel
def copy_states(source: Any, number: Any, target: Any, token: Any, dim: Any, like: Any) -> None:
    """Copy vector `number` at one address to be vector `token` at another."""
    size = dim * like.itemsize
    given, kept = (
        states(source + number * size, dim, like),
        states(target + token * size, dim, like),
    )
    for d in range(dim):
        kept[d] = given[d]


@kernel
def is_full(step: Any, row: Any) -> Any:
    """Whether the oldest tokens of a row's window are a page."""
    return count_recent(step, row) >= step.num_recent_tokens + step.page_size


@kernel
def seal_row(step: Any, row: Any, like: Any) -> None:
    """Seal the oldest page of a row's window, if it is full: its piece is there to be written."""
    size, recent = step.page_size, count_recent(step, row)
    if not is_full(step, row):
        return
    page, first = count_sealed(step, row), row * step.window_tokens
    address = page_address(step, row, page)
    for window, kept, dim in (
        (step.window_key, address, step.head_dim),
        (step.window_value, address + step.value_offset, step.value_dim),
    ):
        tokens = states(window + first * dim * like.itemsize, recent * dim, like)
        piece = states(kept, size * dim, like)
        for i in range(size * dim):
            piece[i] = tokens[i]
        if window == step.window_key:
            digest_tokens(step, row, page, piece)
        for i in range((recent - size) * dim):
            tokens[i] = tokens[i + size * dim]


@kernel(fast=False)
def digest_tokens(step: Any, row: Any, page: Any, keys: Any) -> None:
    """Write a page's keys [page_size, head_dim] as `TOKEN_ROWS` (`torch_token_rows`)."""
    size, dim, half = step.page_size, step.head_dim, step.features // 2
    codes_size, column = size * half * BLOCK, page % BLOCK
    block = step.digests + row * step.digest_bytes + page // BLOCK * (codes_size + 4 * size * BLOCK)
    codes = carray(pointer(block), (codes_size,), np.uint8)
    scales = floats(block + codes_size, size * BLOCK)
    key = np.zeros(2 * half, np.float32)
    for t in range(size):
        for d in range(dim):
            key[d] = widen(keys[t * dim + d])
        rotate(key, dim)
        peak = F32(0)
        for d in range(dim):
            peak = max(peak, abs(key[d]))
        scale = peak / F32(LEVELS)
        for j in range(half):
            low, high = code_of(key[j], scale), code_of(key[half + j], scale)
            codes[(t * half + j) * BLOCK + column] = np.uint8(low | (high << 4))
        scales[t * BLOCK + column] = scale


@kernel(fast=False)
def code_of(number: Any, scale: Any) -> Any:
    """The code of an element, which is not to be rounded another way than torch does it."""
    code = np.rint(number / (scale if scale > 0 else F32(1)))
    return np.int64(min(max(code, F32(-LEVELS)), F32(LEVELS))) + OFFSET
