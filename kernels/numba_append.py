"""Appending on a CPU: a new token into the recent window, a full page into the host tier.

Pages of 16 bits rated by `TOKEN_ROWS`, the default, are sealed here: with pages of 4 that happens at
every fourth token. All others take torch (`NativeEngine.seal`), which this does to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from arkcache.kernels.numba_compile import kernel
from arkcache.kernels.numba_numbers import F32, pointer, widen
from arkcache.kernels.numba_record import (
    count_recent,
    count_sealed,
    page_address,
    states,
)
from arkcache.kernels.numba_score import BLOCK
from arkcache.kernels.torch_token_rows import LEVELS


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
    given, kept = states(source + number * size, dim, like), states(target + token * size, dim, like)
    for d in range(dim):
        kept[d] = given[d]

@kernel
def seal_row(step: Any, row: Any, like: Any) -> None:
    """Seal the oldest page of a row's window, if it is full: its piece is there to be written."""
    size, recent = step.page_size, count_recent(step, row)
    if recent < step.num_recent_tokens + size:
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
    size, dim = step.page_size, step.head_dim
    codes_size, column = size * dim * BLOCK, page % BLOCK
    block_bytes = codes_size + 4 * size * BLOCK
    block = step.digests + row * step.digest_bytes + page // BLOCK * block_bytes
    codes = carray(pointer(block), (codes_size,), np.int8)
    scales = carray(pointer(block + codes_size), (size * BLOCK,), np.float32)
    for t in range(size):
        peak = F32(0)
        for d in range(dim):
            peak = max(peak, abs(widen(keys[t * dim + d])))
        scale = peak / F32(LEVELS)
        divisor = scale if scale > 0 else F32(1)
        for d in range(dim):
            code = np.rint(widen(keys[t * dim + d]) / divisor)
            bounded = min(max(code, F32(-LEVELS)), F32(LEVELS))
            codes[(t * dim + d) * BLOCK + column] = np.int8(bounded)
        scales[t * BLOCK + column] = scale
