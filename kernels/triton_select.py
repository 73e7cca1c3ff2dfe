"""Chooses the pages of a decode step on the device: the best of each row, and who gives way.

One program per row, in chunks, so that any number of pages will do. Ratings become integers of the
same order, of which the k-th largest is found bit by bit; what is chosen is compared with what is
resident, and the missing pages get the empty places and those of the worst rated residents. The
host learns nothing of it: the lists are read by the kernels that recall and attend.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from arkcache.config import GROUP_REDUCTIONS
from arkcache.errors import InputError
from arkcache.kernels.triton_rank import (
    HIGHEST_KEY,
    LOWEST_KEY,
    add_counts,
    is_top,
    kth_largest,
    write_keys,
)
from arkcache.kernels.triton_score import HIDDEN, Scores

CHUNK = 4096
"""Pages or places that a program looks at together: 16 keys in each of its 256 threads."""

FEW = 1024
"""A smaller chunk for caches with no more: two sizes, as each is compiled for itself."""

SIZES = ["num_pages", "num_blocks", "max_places", "num_sinks", "most"]
"""Arguments that a cache changes as it grows: no value of theirs is worth compiling anew for."""

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


@triton.jit(do_not_specialize=SIZES)
def select_kernel(
    score_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    mass_ptr: tl.tensor,
    sealed_ptr: tl.tensor,
    page_of_ptr: tl.tensor,
    num_selected_ptr: tl.tensor,
    num_places_ptr: tl.tensor,
    speculated_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    wanted_ptr: tl.tensor,
    victims_ptr: tl.tensor,
    pages_ptr: tl.tensor,
    places_ptr: tl.tensor,
    num_missing_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    num_chosen_ptr: tl.tensor,
    num_pages: tl.tensor,
    num_blocks: tl.tensor,
    max_places: tl.tensor,
    num_sinks: tl.tensor,
    most: tl.tensor,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,  # GROUP padded
    SHARES: tl.constexpr,
    SPECULATIVE: tl.constexpr,
    HIDDEN: tl.constexpr,
    PAGES: tl.constexpr,  # pages per chunk
    PLACES: tl.constexpr,  # places per chunk
) -> None:
    """One row. Scratch: keys and wanted flags of its pages, keys of its places as victims."""
    row = tl.program_id(0).to(tl.int64)
    keys_ptr += row * num_pages
    wanted_ptr += row * num_pages
    victims_ptr += row * max_places
    page_of_ptr += row * max_places
    speculated_ptr += row * max_places
    pages_ptr += row * most
    places_ptr += row * most
    chosen_ptr += row * most
    selectable = tl.minimum(tl.maximum(tl.load(sealed_ptr + row) - num_sinks, 0), num_pages)
    limit = tl.minimum(tl.load(num_places_ptr + row), max_places)
    count = tl.minimum(tl.load(num_selected_ptr + row), tl.minimum(selectable, limit))
    count = tl.maximum(tl.minimum(count, most), 0)

    write_keys(
        keys_ptr,
        score_ptr,
        peak_ptr,
        mass_ptr,
        row,
        selectable,
        num_pages,
        num_blocks,
        GROUP,
        HEADS,
        SHARES,
        HIDDEN,
        16 if PAGES // HEADS < 16 else PAGES // HEADS,
    )
    tl.debug_barrier()  # as all others: what follows reads what other threads wrote
    kth, num_ties = kth_largest(keys_ptr, selectable, count, PAGES)
    ties = tl.full([], 0, tl.int32)
    start = tl.full([], 0, tl.int32)
    while start < selectable:
        page = start + tl.arange(0, PAGES)
        key = tl.load(keys_ptr + page, mask=page < selectable, other=LOWEST_KEY)
        wanted, ties = is_top(key, kth, num_ties, ties)
        tl.store(wanted_ptr + page, wanted.to(tl.int8), mask=page < selectable)
        start += PAGES
    tl.debug_barrier()

    num_hits = tl.full([], 0, tl.int32)
    num_foreseen = tl.full([], 0, tl.int32)
    start = tl.full([], 0, tl.int32)
    while start < limit:
        place = start + tl.arange(0, PLACES)
        inside = place < limit
        held = tl.load(page_of_ptr + place, mask=inside, other=-1)
        page = held - num_sinks
        rated = inside & (page >= 0) & (page < selectable)
        hit = rated & (tl.load(wanted_ptr + page, mask=rated, other=0) != 0)
        foreseen = hit & (tl.load(speculated_ptr + place, mask=hit, other=0) != 0)
        num_hits += tl.sum(hit.to(tl.int32))
        num_foreseen += tl.sum(foreseen.to(tl.int32))
        # What is found is no longer missing.
        tl.store(wanted_ptr + page, tl.zeros([PLACES], tl.int8), mask=hit)
        if not SPECULATIVE:
            tl.store(speculated_ptr + place, tl.zeros([PLACES], tl.int8), mask=hit)
        # The worst rated have the largest keys, but for the empty places.
        worth = tl.load(keys_ptr + page, mask=rated, other=LOWEST_KEY + 1)
        victim = tl.where(held < 0, HIGHEST_KEY, ~worth)
        tl.store(victims_ptr + place, tl.where(hit, LOWEST_KEY, victim), mask=inside)
        start += PLACES
    num_missing = count - num_hits
    tl.debug_barrier()

    listed = tl.full([], 0, tl.int32)
    start = tl.full([], 0, tl.int32)
    while start < selectable:
        page = start + tl.arange(0, PAGES)
        missing = tl.load(wanted_ptr + page, mask=page < selectable, other=0).to(tl.int32)
        entry = listed + tl.cumsum(missing, 0) - 1
        tl.store(pages_ptr + entry, page + num_sinks, mask=missing != 0)
        listed += tl.sum(missing)
        start += PAGES
    kth, num_ties = kth_largest(victims_ptr, limit, num_missing, PLACES)
    tl.debug_barrier()

    ties = tl.full([], 0, tl.int32)
    num_listed = tl.full([], 0, tl.int32)
    num_chosen = tl.full([], 0, tl.int32)
    num_evicted = tl.full([], 0, tl.int32)
    start = tl.full([], 0, tl.int32)
    while start < limit:
        place = start + tl.arange(0, PLACES)
        inside = place < limit
        key = tl.load(victims_ptr + place, mask=inside, other=LOWEST_KEY)
        taken, ties = is_top(key, kth, num_ties, ties)
        entry = num_listed + tl.cumsum(taken.to(tl.int32), 0) - 1
        page = tl.load(pages_ptr + entry, mask=taken, other=-1)
        tl.store(page_of_ptr + place, page, mask=taken)
        tl.store(places_ptr + entry, place, mask=taken)
        tl.store(speculated_ptr + place, tl.full([PLACES], SPECULATIVE, tl.int8), mask=taken)
        num_listed += tl.sum(taken.to(tl.int32))
        num_evicted += tl.sum((taken & (key != HIGHEST_KEY)).to(tl.int32))
        chosen = (taken | (inside & (key == LOWEST_KEY))).to(tl.int32)
        entry = num_chosen + tl.cumsum(chosen, 0) - 1
        tl.store(chosen_ptr + entry, place, mask=chosen != 0)
        num_chosen += tl.sum(chosen)
        start += PLACES
    tl.store(num_missing_ptr + row, num_missing)
    tl.store(num_chosen_ptr + row, num_chosen)
    add_counts(counters_ptr, row, num_hits, num_missing, num_evicted, num_foreseen, SPECULATIVE)


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

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=page_of.device)

    lists, counts = [empty(rows, most) for _ in range(3)], [empty(rows) for _ in range(2)]
    selection = Selection(lists[0], lists[1], counts[0], lists[2], counts[1])
    if not rows:
        return selection
    select_kernel[(rows,)](
        *scores,
        sealed,
        page_of,
        num_selected,
        num_places,
        speculated,
        counters,
        empty(rows, num_pages),
        empty(rows, num_pages, dtype=torch.int8),
        empty(rows, max_places),
        *selection,
        num_pages,
        num_blocks,
        max_places,
        num_sinks,
        most,
        GROUP=group,
        HEADS=triton.next_power_of_2(group),
        SHARES=reduction == "softmax-mean" and group > 1,
        SPECULATIVE=speculative,
        HIDDEN=HIDDEN,
        PAGES=_chunk(num_pages),
        PLACES=_chunk(max_places),
        num_warps=8,
    )
    return selection


def _chunk(size: int) -> int:
    return FEW if size <= FEW else CHUNK


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise InputError(
            f"{name} {tuple(tensor.shape)} of {tensor.dtype}: expected contiguous {dtype} "
            f"{list(shape)}"
        )
