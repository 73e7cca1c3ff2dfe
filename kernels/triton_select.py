"""Chooses the pages of a decode step on the device: the best of each row, and who gives way.

The host learns nothing of it: the lists are read by the kernels that recall and attend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arkcache.config import GROUP_REDUCTIONS
from arkcache.errors import InputError
from arkcache.kernels.arguments import Places, Scores, Selection
from arkcache.kernels.triton_checked import check
from arkcache.kernels.triton_score import HIDDEN
from arkcache.kernels.triton_select_kernel import select_kernel
from arkcache.kernels.triton_sizes import aligned, cdiv, power_of_two

CHUNK_WARPS = {256: 1, 1024: 4, 4096: 8}
"""Pages or places that a program looks at together, and its warps; few sizes, as each is compiled
for itself. The smallest that holds all is used, else the largest over and over."""

EVERYTHING = 1 << 30
"""As pages to estimate: more than any row has."""

NUM_COUNTERS = 5
"""Of a row: hits, recalled, evicted, speculative hits, speculated."""

NUM_MISSED = 5
"""Of a row that has a target: steps, what they missed in all, the worst of them, how many ended for
want of places; and how many pages the last one did without that it had places for."""


def select(
    scores: Scores,
    sealed: Tensor,
    places: Places,
    num_selected: Tensor,
    speculated: Tensor,
    counters: Tensor,
    *,
    num_sink_pages: int,
    max_selected: int,
    reduction: str,
    speculative: bool = False,
    num_estimated: int | None = 0,
    fixed: Tensor | None = None,
    target: float | None = None,
    missed: Tensor | None = None,
) -> Selection:
    """Choose each row's best pages and give the missing ones a place.

    Row r chooses min(num_selected[r], sealed[r] - num_sink_pages) pages, the best by the mean over
    its query heads, of equals the lowest, hidden ones last. Those that are resident stay where they
    are; the others get the empty places first, then those of the residents that were not chosen,
    worst first, of equals the lowest.

    Args:
        scores: of all pages from `num_sink_pages` on.
        sealed: int32 [rows], sealed pages.
        places: `page_of` is updated.
        num_selected: int32 [rows]; a row chooses no more pages than it has places for, either.
        speculated: int8 [rows, places], whether a page was recalled by guess and not attended
            since; updated.
        counters: int64 [rows, 5]; hits, recalled, evicted and speculative hits are added, or
            evicted and speculated pages if `speculative`.
        max_selected: the most pages that a row chooses, the width of the lists.
        reduction: "softmax-mean" or "raw-mean" (see `GROUP_REDUCTIONS`).
        speculative: the choice is a guess: pages that get a place are flagged in `speculated`.
        num_estimated: how many of the pages that a row does not choose are to be estimated, the
            best; None is all.
        fixed: fp32 [rows, group], the log mass of what is attended beside these pages. With it they
            are rated by the share of all attention that they hold, the mean over the query heads;
            `reduction` plays no part. The scores must be log masses then.
        target: with `fixed`, the share that a row may miss: it chooses no more pages than it takes
            for that (see `policy.fewest_pages`), and `num_selected[r]` at most.
        missed: float64 [rows, 5], with `target`: what was missed is added, see `NUM_MISSED`.

    All contiguous. Raises `InputError` where a shape, a dtype or a stride is another.
    """
    rows, group, num_pages = check("scores.score", scores.score, (None, None, None), torch.float32)
    if num_estimated is None:
        num_estimated = EVERYTHING
    if reduction not in GROUP_REDUCTIONS or min(max_selected, num_sink_pages, num_estimated) < 0:
        raise InputError(
            f"reduction={reduction!r}, max_selected={max_selected}, "
            f"num_sink_pages={num_sink_pages}, num_estimated={num_estimated}: expected one of "
            f"{', '.join(GROUP_REDUCTIONS)} and sizes from 0 on"
        )
    num_blocks = check("scores.peak", scores.peak, (rows, group, None), torch.float32)[2]
    check("scores.mass", scores.mass, (rows, group, num_blocks), torch.float32)
    max_places = _check(rows, sealed, places, num_selected, speculated, counters)
    _check_target(target, fixed, missed, (rows, group))
    lists = aligned(rows * max_selected)
    made = torch.empty(3 * lists + 2 * aligned(rows), dtype=torch.int32, device=sealed.device)
    estimated = None
    if num_estimated:
        estimated = torch.empty((rows, num_pages), dtype=torch.int32, device=sealed.device)
    selection = _carve(made, rows, max_selected)._replace(estimated=estimated)
    if not rows:
        return selection
    # Apart from the lists, which speculation keeps.
    scratch = torch.empty(
        rows * (aligned(num_pages) + aligned(max_places) + aligned(cdiv(num_pages, 4))),
        dtype=torch.int32,
        device=sealed.device,
    )
    page_chunk, place_chunk = _chunk(num_pages), _chunk(max_places)
    num_warps = CHUNK_WARPS[max(page_chunk, place_chunk)]
    select_kernel[(rows,)](
        *scores,
        fixed,
        sealed,
        places.page_of,
        num_selected,
        places.num_places,
        speculated,
        counters,
        estimated,
        missed,
        0.0 if target is None else target,
        scratch,
        made,
        num_pages,
        num_blocks,
        max_places,
        num_sink_pages,
        max_selected,
        min(num_estimated, EVERYTHING),
        GROUP=group,
        HEADS=power_of_two(group),
        SHARES=fixed is not None or (reduction == "softmax-mean" and group > 1),
        SPECULATIVE=speculative,
        HIDDEN=HIDDEN,
        # A lane each, so that what the heads of a block sum up to needs no other lane.
        BLOCKS=32 * num_warps,
        PAGES=page_chunk,
        PLACES=place_chunk,
        ALL_PAGES=num_pages <= page_chunk,
        ALL_PLACES=max_places <= place_chunk,
        num_warps=num_warps,
    )
    return selection


def _check(
    rows: int,
    sealed: Tensor,
    places: Places,
    num_selected: Tensor,
    speculated: Tensor,
    counters: Tensor,
) -> int:
    """Places of a row, or `InputError`."""
    check("sealed", sealed, (rows,), torch.int32)
    check("num_selected", num_selected, (rows,), torch.int32)
    check("places.num_places", places.num_places, (rows,), torch.int32)
    max_places = check("places.page_of", places.page_of, (rows, None), torch.int32)[1]
    check("speculated", speculated, (rows, max_places), torch.int8)
    check("counters", counters, (rows, NUM_COUNTERS), torch.int64)
    return max_places


def _check_target(
    target: float | None, fixed: Tensor | None, missed: Tensor | None, shape: tuple[int, int]
) -> None:
    if (target is None) != (missed is None) or (target is not None and fixed is None):
        raise InputError(
            f"target={target}: expected fixed and missed beside it, and else no missed"
        )
    if fixed is not None:
        check("fixed", fixed, shape, torch.float32)
    if missed is not None:
        check("missed", missed, (shape[0], NUM_MISSED), torch.float64)


def _carve(made: Tensor, rows: int, max_selected: int) -> Selection:
    """The lists and the counts as `select_kernel` lays them out."""
    apart, start = aligned(rows * max_selected), 3 * aligned(rows * max_selected)
    pages, places, chosen = made.as_strided(
        (3, rows, max_selected), (apart, max_selected, 1)
    ).unbind()
    missing, num_chosen = made.as_strided((2, rows), (aligned(rows), 1), start).unbind()
    return Selection(pages, places, missing, chosen, num_chosen)


def _chunk(size: int) -> int:
    """The smallest chunk that holds `size`, else the largest."""
    return next((chunk for chunk in CHUNK_WARPS if size <= chunk), max(CHUNK_WARPS))
