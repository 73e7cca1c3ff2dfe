"""Chooses the pages of a decode step on the device: the best of each row, and who gives way.

The host learns nothing of it: the lists are read by the kernels that recall and attend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from arkcache.config import GROUP_REDUCTIONS
from arkcache.errors import InputError
from arkcache.kernels.triton_score import HIDDEN, Scores
from arkcache.kernels.triton_select_kernel import select_kernel
from arkcache.kernels.triton_sizes import aligned, cdiv, power_of_two

CHUNK_WARPS = {256: 1, 1024: 4, 4096: 8}
"""Pages or places that a program looks at together, and its warps; few sizes, as each is compiled
for itself. The smallest that holds all is used, else the largest over and over."""

NUM_COUNTERS = 5
"""Of a row: hits, recalled, evicted, speculative hits, speculated."""


class Selection(NamedTuple):
    """What to recall and what to attend, per row; lists are int32 [rows, most], counts [rows].

    The first `num_missing` entries of `pages` (ascending) go into those of `places` (ascending).
    The first `num_chosen` entries of `chosen` are the places that hold the selection then.
    """

    pages: Tensor
    places: Tensor
    num_missing: Tensor
    chosen: Tensor
    num_chosen: Tensor


def select(
    scores: Scores,
    sealed: Tensor,
    page_of: Tensor,
    num_selected: Tensor,
    num_places: Tensor,
    speculated: Tensor,
    counters: Tensor,
    *,
    num_sinks: int,
    most: int,
    reduction: str,
    speculative: bool = False,
) -> Selection:
    """Choose each row's best pages and give the missing ones a place.

    Row r chooses min(num_selected[r], sealed[r] - num_sinks) pages, the best by the mean over its
    query heads, of equals the lowest, hidden ones last. Those that are resident stay where they
    are; the others get the empty places first, then those of the residents that were not chosen,
    worst first, of equals the lowest.

    Args:
        scores: of all pages from `num_sinks` on.
        sealed: int32 [rows], sealed pages.
        page_of: int32 [rows, places], the page in each place, -1 for none; updated. No page may be
            there twice.
        num_selected, num_places: int32 [rows]; a row uses its first `num_places[r]` places only,
            and chooses no more pages than that.
        speculated: int8 [rows, places], whether a page was recalled by guess and not attended
            since; updated.
        counters: int64 [rows, 5]; hits, recalled, evicted and speculative hits are added, or
            evicted and speculated pages if `speculative`.
        most: the most pages that a row chooses, the width of the lists.
        reduction: "softmax-mean" or "raw-mean" (see `GROUP_REDUCTIONS`).
        speculative: the choice is a guess: pages that get a place are flagged in `speculated`.

    All contiguous. Raises `InputError` where a shape, a dtype or a stride is another.
    """
    rows, group, num_pages = scores.score.shape
    if reduction not in GROUP_REDUCTIONS or most < 0 or num_sinks < 0:
        raise InputError(
            f"reduction={reduction!r}, most={most}, num_sinks={num_sinks}: expected one of "
            f"{', '.join(GROUP_REDUCTIONS)} and sizes from 0 on"
        )
    if page_of.ndim != 2:
        raise InputError(f"page_of {tuple(page_of.shape)}: expected [{rows}, places]")
    max_places, num_blocks = page_of.shape[1], scores.peak.shape[-1]
    _check("score", scores.score, (rows, group, num_pages), torch.float32)
    for name, block in (("peak", scores.peak), ("mass", scores.mass)):
        _check(name, block, (rows, group, num_blocks), torch.float32)
    limits = {"sealed": sealed, "num_selected": num_selected, "num_places": num_places}
    for name, limit in limits.items():
        _check(name, limit, (rows,), torch.int32)
    _check("page_of", page_of, (rows, max_places), torch.int32)
    _check("speculated", speculated, (rows, max_places), torch.int8)
    _check("counters", counters, (rows, NUM_COUNTERS), torch.int64)
    lists = aligned(rows * most)
    made = torch.empty(3 * lists + 2 * aligned(rows), dtype=torch.int32, device=page_of.device)
    selection = _carve(made, rows, most)
    if not rows:
        return selection
    # Apart from the lists, which speculation keeps.
    scratch = torch.empty(
        rows * (aligned(num_pages) + aligned(max_places) + aligned(cdiv(num_pages, 4))),
        dtype=torch.int32,
        device=page_of.device,
    )
    pages, places = _chunk(num_pages), _chunk(max_places)
    num_warps = CHUNK_WARPS[max(pages, places)]
    select_kernel[(rows,)](
        *scores,
        sealed,
        page_of,
        num_selected,
        num_places,
        speculated,
        counters,
        scratch,
        made,
        num_pages,
        num_blocks,
        max_places,
        num_sinks,
        most,
        GROUP=group,
        HEADS=power_of_two(group),
        SHARES=reduction == "softmax-mean" and group > 1,
        SPECULATIVE=speculative,
        HIDDEN=HIDDEN,
        # A lane each, so that what the heads of a block sum up to needs no other lane.
        BLOCKS=32 * num_warps,
        PAGES=pages,
        PLACES=places,
        ALL_PAGES=num_pages <= pages,
        ALL_PLACES=max_places <= places,
        num_warps=num_warps,
    )
    return selection


def _carve(made: Tensor, rows: int, most: int) -> Selection:
    """The lists and the counts as `select_kernel` lays them out."""
    apart, start = aligned(rows * most), 3 * aligned(rows * most)
    pages, places, chosen = made.as_strided((3, rows, most), (apart, most, 1)).unbind()
    missing, num_chosen = made.as_strided((2, rows), (aligned(rows), 1), start).unbind()
    return Selection(pages, places, missing, chosen, num_chosen)


def _chunk(size: int) -> int:
    """The smallest chunk that holds `size`, else the largest."""
    return next((chunk for chunk in CHUNK_WARPS if size <= chunk), max(CHUNK_WARPS))


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise InputError(
            f"{name} {tuple(tensor.shape)} of {tensor.dtype}: expected contiguous {dtype} "
            f"{list(shape)}"
        )
