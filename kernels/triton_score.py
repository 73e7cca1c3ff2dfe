"""Rates all pages of a row by their digests: one launch, split over pages so that few rows suffice.

Every program rates `PAGES_PER_BLOCK` pages at a time for all query heads of a KV head and leaves,
beside the scores, the peak and the mass of each such block: what a softmax over all pages needs of
it. Which pages there are is read on the device, so that one grid serves a sequence that grows.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from arkcache.config import INDEXES
from arkcache.errors import InputError
from arkcache.kernels.arguments import Scores
from arkcache.kernels.torch_digest import num_features
from arkcache.kernels.torch_tokens import digest_bytes
from arkcache.kernels.triton_checked import check
from arkcache.kernels.triton_score_tokens import score_tokens_kernel
from arkcache.kernels.triton_score_volumes import score_volumes_kernel
from arkcache.kernels.triton_sizes import aligned, cdiv, power_of_two

PAGES_PER_BLOCK = 32
"""Pages that a program rates at a time: 16 KiB of a cuboid's digests at head_dim 128."""

FEWEST_PROGRAMS = 256
"""With fewer programs than that a large GPU's processors, some 130, would not have two each: only
beyond does a program rate several blocks, the next ones on their way meanwhile. 4096 pages of 8 KV
heads are 256 programs of four blocks."""

MAX_STEPS = 8
"""Most blocks of a program."""

AHEAD_BYTES = 32768
"""Most bytes of digests that are on their way to a program, of two blocks or more."""

BLOCKS_AHEAD, COLUMNS_AHEAD = 2, 2
"""How many times what a program rates at once is on its way, of volumes and of the token index."""

MANY_PROGRAMS = 512
"""With so many programs or more, one warp each unpacks codes with the fewest instructions; with
less, four warps each finish sooner, and where a group has so few heads that one would spill."""

HIDDEN = torch.finfo(torch.float32).min
"""The score of a page that a mask hides."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def score_volumes(
    query: Tensor,
    digests: Tensor,
    sealed: Tensor,
    *,
    num_sink_pages: int,
    kind: str,
    scale: float,
    hidden: Tensor | None = None,
) -> Scores:
    """Rate pages by bounding volumes (ArkVale, section 5.2), accumulating in fp32.

    Args:
        query: [rows, group, head_dim] in the model's dtype, the last stride 1; scaled in here.
        digests: [rows, capacity, features] of the same dtype, the last stride 1: [center, radius]
            with 2 * head_dim features (cuboid) or head_dim + 1 (sphere), or head_dim (centroid).
        sealed: int32 [rows], sealed pages; those from `num_sink_pages` on are rated.
        num_sink_pages: pages that are attended anyway.
        kind: the index's name, such as "cuboid-mean".
        scale: of the attention.
        hidden: bool or uint8 [rows, capacity - num_sink_pages], contiguous: pages that are rated
            `HIDDEN`; None is none.

    Raises `InputError` where a shape, a dtype, a stride or a name is another.
    """
    rows, group, head_dim = _check(query, sealed)
    shape, features = _volume(kind, head_dim)
    _check_pages(digests, (rows, None, features), query.dtype, num_sink_pages, hidden)
    scores = _empty(query, digests, num_sink_pages)
    if not scores.peak.numel():
        return scores
    pages, blocks = scores.score.shape[-1], scores.peak.shape[-1]
    block_bytes = features * digests.element_size() * PAGES_PER_BLOCK
    num_steps = max(1, min(MAX_STEPS, rows * blocks // FEWEST_PROGRAMS))
    score_volumes_kernel[(rows, cdiv(blocks, num_steps))](
        query,
        digests,
        sealed,
        sealed if hidden is None else hidden.view(torch.uint8),
        *scores,
        *query.stride()[:2],
        *digests.stride()[:2],
        pages,
        blocks,
        num_steps,
        num_sink_pages,
        scale,
        HEAD_DIM=head_dim,
        GROUP=group,
        SHAPE=shape,
        MASKED=hidden is not None,
        HIDDEN=HIDDEN,
        PAGES=PAGES_PER_BLOCK,
        HEADS=max(16, power_of_two(group)),
        CHANNELS=max(16, min(128, power_of_two(head_dim))),
        BLOCKS_AHEAD=max(1, min(BLOCKS_AHEAD, AHEAD_BYTES // block_bytes)),
        num_warps=4,
    )
    return scores


def score_tokens(
    query: Tensor,
    digests: Tensor,
    sealed: Tensor,
    *,
    num_sink_pages: int,
    page_size: int,
    bits: int,
    scale: float,
    hidden: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Scores:
    """Rate pages by the token index: the log of each page's softmax mass, in fp32.

    Args:
        query, sealed, num_sink_pages, scale, hidden: as for `score_volumes`.
        digests: uint8 [rows, capacity, bytes] as `TokenIndex` makes them, the last stride 1.
        page_size: tokens per page.
        bits: bits per code, 2, 4 or 8.
        softcap: where given, logits become softcap * tanh(logits / softcap).
        bias: fp32 [rows, group, tokens] in any strides, by token number, added after the softcap;
            of all tokens of the pages that are rated. Where it hides a page the score is -inf.

    With 16-bit queries, q * (scale of a channel) is rounded to fp16 once; everything else is exact
    or in fp32. Raises `InputError` where a shape, a dtype or a stride is another.
    """
    if bits not in (2, 4, 8) or page_size < 1:
        raise InputError(
            f"bits={bits}, page_size={page_size}: expected 2, 4 or 8 bits and page_size >= 1"
        )
    rows, group, head_dim = _check(query, sealed)
    plane_dim = -(-head_dim * bits // 8)
    nbytes = digest_bytes(head_dim, page_size, bits)
    _check_pages(digests, (rows, None, nbytes), torch.uint8, num_sink_pages, hidden)
    if bias is not None:
        check("bias", bias, (rows, group, None), torch.float32, strides="any strides")
    scores = _empty(query, digests, num_sink_pages)
    if not scores.peak.numel():
        return scores
    blocks, exact = scores.peak.shape[-1], query.dtype == torch.float32
    heads = power_of_two(group)
    columns = max(1, min(4, 16 // heads))
    widest = (32 if exact else 128) // columns
    tokens = max(16 // columns, min(widest, power_of_two(page_size)))
    channels = max(16, min(64, power_of_two(plane_dim)))
    small = channels * columns * tokens <= 4096 and page_size <= tokens and not exact
    alone = small and columns * heads >= 16 and rows * blocks >= MANY_PROGRAMS
    alone = alone and softcap is None and bias is None  # they take registers
    score_tokens_kernel[(rows, blocks)](
        query,
        digests,
        sealed,
        sealed if hidden is None else hidden.view(torch.uint8),
        bias,
        *scores,
        *query.stride()[:2],
        *digests.stride()[:2],
        *((0, 0, 0) if bias is None else bias.stride()),
        scores.score.shape[-1],
        num_sink_pages,
        scale,
        softcap,
        HEAD_DIM=head_dim,
        GROUP=group,
        PAGE_SIZE=page_size,
        BITS=bits,
        MASKED=hidden is not None,
        HIDDEN=HIDDEN,
        ALIGNED=not any(n % 2 for n in (digests.data_ptr(), *digests.stride()[:2])),
        EXACT=exact,
        PAGES=PAGES_PER_BLOCK,
        HEADS=heads,
        BLOCK_HEADS=max(16, heads),
        COLUMNS=columns,
        TOKENS=tokens,
        CHANNELS=channels,
        num_warps=1 if alone else 4,
        COLUMNS_AHEAD=COLUMNS_AHEAD,
    )
    return scores


def _check(query: Tensor, sealed: Tensor) -> torch.Size:
    """Rows, query heads per row and head_dim, or `InputError`."""
    sizes = check("query", query, (None, None, None), *DTYPES, strides="last stride 1")
    check("sealed", sealed, sizes[:1], torch.int32)
    return sizes


def _check_pages(
    digests: Tensor,
    shape: tuple[int, None, int],
    dtype: torch.dtype,
    num_sink_pages: int,
    hidden: Tensor | None,
) -> None:
    """Raise `InputError` for what is not of as many pages as there is room for."""
    rows, capacity, _ = check("digests", digests, shape, dtype, strides="last stride 1")
    if not 0 <= num_sink_pages <= capacity:
        raise InputError(f"num_sink_pages={num_sink_pages}: expected 0 to {capacity}, the capacity")
    if hidden is not None:
        check("hidden", hidden, (rows, capacity - num_sink_pages), torch.bool, torch.uint8)


@lru_cache
def _volume(kind: str, head_dim: int) -> tuple[str, int]:
    """The shape of a volume and the features of its digest, or `InputError`."""
    if kind not in INDEXES or kind == "tokens":
        volumes = ", ".join(name for name in INDEXES if name != "tokens")
        raise InputError(f"kind={kind!r}: expected one of {volumes}")
    shape = kind.partition("-")[0]
    return shape, num_features(kind, head_dim)


def _empty(query: Tensor, digests: Tensor, num_sink_pages: int) -> Scores:
    """Room for the scores of all pages beyond the sinks: one allocation, each part aligned."""
    rows, group, _ = query.shape
    pages = digests.shape[1] - num_sink_pages
    blocks = cdiv(pages, PAGES_PER_BLOCK)
    start, apart = aligned(rows * group * pages), aligned(rows * group * blocks)
    room = torch.empty(start + 2 * apart, dtype=torch.float32, device=query.device)
    score = room.as_strided((rows, group, pages), (group * pages, pages, 1))
    shape, strides = (rows, group, blocks), (group * blocks, blocks, 1)
    peak = room.as_strided(shape, strides, start)
    return Scores(score, peak, room.as_strided(shape, strides, start + apart))
