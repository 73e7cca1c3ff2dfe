"""What a decode step on a CPU is told, and where things are that it reads.

Sizes, settings and addresses are one record, `STEP`. `numba_launch` fills it in and checks it;
nothing that reads it looks at a size again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from arkcache.kernels.numba_compile import kernel
from arkcache.kernels.numba_numbers import floats, integers, pointer

WHOLE_ROWS, SCORE, SELECT, ATTEND, MERGE, SCORE_ROWS, ATTEND_ROWS, WRITE, SEAL = range(9)
"""What is to be done: by a parallel region everything for rows of its own, or one part for shares
of all; by one thread merging what they have summed; the parts of `WHOLE_ROWS` one by one (with
`SELECT`), to be timed; by one thread writing a new token into the window, or sealing pages that are
full."""

CUBOID, SPHERE, CENTROID, TOKEN_ROWS, TOKEN_CODES = range(5)
"""What digests are."""

ATTENDED, HIT, RECALLED, EVICTED, NUM_COUNTERS = range(5)
"""Of every row: tokens attended by the latest step; pages so far that it read like the step before
it, that it read anew, that it read no more."""

PER_STEP = ("phase", "output", "query", "index_query", "pieces", "scale", "softcap")
"""What changes from step to step, in front of everything else: see `STEP`."""

SIZES = (
    *("batch", "kv_heads", "group", "lanes", "head_dim", "value_dim", "page_size"),
    *(
        "num_sink_pages",
        "num_recent_tokens",
        "window_tokens",
        "max_pages",
        "page_capacity",
        "token_capacity",
        "shares",
    ),
    *("key_bits", "value_bits", "group_size", "value_offset", "page_bytes", "piece_bytes"),
    *("index", "index_bits", "features", "digest_bytes", "reduction", "needs_fixed"),
    *("handle_stride", "bias_tokens", "hidden_stride"),
)
ADDRESSES = (
    *("handles", "positions", "lengths", "sealed", "budgets"),
    *("window_key", "window_value", "digests", "new_key", "new_value"),
    *("sink_logits", "bias", "hidden"),
    *("score", "rating", "order", "chosen", "logits", "parts", "pages", "num_pages", "counters"),
)
STEP = np.dtype(
    [(name, np.int64) for name in PER_STEP[:-2]]
    + [(name, np.float32) for name in PER_STEP[-2:]]
    + [(name, np.int64) for name in (*SIZES, *ADDRESSES)],
    align=True,
)
"""What a step is told: sizes in elements unless they say bytes, then addresses, 0 for none.

max_pages is the length of a row's list, page_capacity and token_capacity that of its scores and of
its logits. `needs_fixed` says that what is attended anyhow takes part in the rating.
"""


# -- where things are -----------------------------------------------------------------------------


@kernel
def states(address: Any, size: Any, like: Any) -> Any:
    """Elements of the type of `like` at an address."""
    return carray(pointer(address), (size,), like.dtype)


@kernel
def page_address(step: Any, row: Any, page: Any) -> Any:
    """Where a page of a row lies in the host tier."""
    sequence, head = row // step.kv_heads, row % step.kv_heads
    handles = integers(step.handles, step.batch * step.handle_stride)
    handle = handles[sequence * step.handle_stride + page]
    position = integers(step.positions, handle + 1)[handle]
    return step.pieces + position * step.piece_bytes + head * step.page_bytes


@kernel
def count_sealed(step: Any, row: Any) -> Any:
    """Sealed pages of a row."""
    return integers(step.sealed, step.batch)[row // step.kv_heads]


@kernel
def count_recent(step: Any, row: Any) -> Any:
    """Tokens of a row's recent window."""
    length = integers(step.lengths, step.batch)[row // step.kv_heads]
    return length - count_sealed(step, row) * step.page_size


@kernel
def bias_of(step: Any, row: Any) -> Any:
    """The mask of a row, fp32 [lanes * tokens] by token number; empty for none."""
    if step.bias == 0:
        return np.empty(0, np.float32)
    size = step.lanes * step.bias_tokens
    return floats(step.bias + row * size * 4, size)
