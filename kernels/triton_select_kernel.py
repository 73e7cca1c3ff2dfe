"""The kernel that chooses pages: one program per row.

All pages are in registers, or in chunks, so that any number will do. Ratings become integers of the
same order, whose range is halved until as many as wanted are above its middle; what is chosen is
compared with what is resident, and the missing pages get the empty places and those of the worst
rated residents.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from arkcache.kernels.triton_rank import (
    HIGHEST_KEY,
    LOWEST_KEY,
    add_counts,
    fewest,
    is_top,
    keys_at,
    kth_largest,
    note_missed,
    rate,
    sum_of_masses,
)

SIZES = ["num_pages", "num_blocks", "max_places", "num_sink_pages", "max_selected", "num_estimated"]
"""Arguments that a cache changes as it grows: no value of theirs is worth compiling anew for."""


@triton.jit
def _aligned(number: tl.tensor) -> tl.tensor:
    """As `triton_sizes.aligned`, and the compiler knows it."""
    return tl.cdiv(number, 16) * 16


@triton.jit
def _choose(
    missed_ptr: tl.tensor,
    row: tl.tensor,
    keys_ptr: tl.tensor,
    keys: tl.tensor,
    selectable: tl.tensor,
    max_selected: tl.tensor,
    target: tl.tensor,
    GROUP: tl.constexpr,
    PAGES: tl.constexpr,
    ALL_PAGES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """How many pages a row chooses (`max_selected`, or fewer where a target says so) and the least
    of them: see `kth_largest`."""
    count = max_selected
    if missed_ptr is not None:
        needed = fewest(keys_ptr, keys, selectable, target * GROUP, PAGES, ALL_PAGES)
        count = tl.minimum(needed, max_selected)
    kth, last = kth_largest(keys_ptr, keys, selectable, selectable, count, PAGES, ALL_PAGES)
    if missed_ptr is not None:
        note_missed(
            missed_ptr, row, keys_ptr, keys, selectable, kth, last, needed > max_selected,
            max_selected - count, GROUP, PAGES, ALL_PAGES,
        )  # fmt: skip
    return count, kth, last


@triton.jit
def _flag_estimated(
    estimated_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    keys: tl.tensor,
    selectable: tl.tensor,
    count: tl.tensor,
    num_estimated: tl.tensor,
    kth: tl.tensor,
    last: tl.tensor,
    PAGES: tl.constexpr,
    ALL_PAGES: tl.constexpr,
) -> None:
    """Flag the `num_estimated` best of the pages that are not among the `count` best."""
    k = tl.minimum(count + num_estimated, selectable)
    least, end = kth_largest(keys_ptr, keys, selectable, selectable, k, PAGES, ALL_PAGES)
    for start in range(0, PAGES if ALL_PAGES else selectable, PAGES):
        page = start + tl.arange(0, PAGES)
        key = keys_at(keys_ptr, keys, start, selectable, PAGES, ALL_PAGES)
        flag = is_top(key, page, least, end) & (is_top(key, page, kth, last) == 0)
        tl.store(estimated_ptr + page, flag.to(tl.int32), mask=page < selectable)


@triton.jit
def _list_missing(
    pages_ptr: tl.tensor,
    resident_ptr: tl.tensor,
    resident: tl.tensor,
    keys_ptr: tl.tensor,
    keys: tl.tensor,
    selectable: tl.tensor,
    kth: tl.tensor,
    last: tl.tensor,
    num_sink_pages: tl.tensor,
    PAGES: tl.constexpr,
    ALL_PAGES: tl.constexpr,
) -> None:
    """List the pages that are wanted and not resident, ascending."""
    listed = tl.full([], 0, tl.int32)
    for start in range(0, PAGES if ALL_PAGES else selectable, PAGES):
        page = start + tl.arange(0, PAGES)
        if not ALL_PAGES:
            resident = tl.load(resident_ptr + page, mask=page < selectable, other=1)
        key = keys_at(keys_ptr, keys, start, selectable, PAGES, ALL_PAGES)
        missing = ((resident == 0) & is_top(key, page, kth, last)).to(tl.int32)
        entry = listed + tl.cumsum(missing, 0) - 1
        tl.store(pages_ptr + entry, page + num_sink_pages, mask=missing != 0)
        listed += tl.sum(missing)


@triton.jit
def _place_missing(
    page_of_ptr: tl.tensor,
    speculated_ptr: tl.tensor,
    pages_ptr: tl.tensor,
    places_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    victims_ptr: tl.tensor,
    victims: tl.tensor,
    limit: tl.tensor,
    kth: tl.tensor,
    last: tl.tensor,
    SPECULATIVE: tl.constexpr,
    PLACES: tl.constexpr,
    ALL_PLACES: tl.constexpr,
) -> tl.tensor:
    """Give the listed pages the places that give way, ascending; how many pages were evicted."""
    num_listed = tl.full([], 0, tl.int32)
    num_chosen = tl.full([], 0, tl.int32)
    num_evicted = tl.full([], 0, tl.int32)
    for start in range(0, PLACES if ALL_PLACES else limit, PLACES):
        place = start + tl.arange(0, PLACES)
        key = keys_at(victims_ptr, victims, start, limit, PLACES, ALL_PLACES)
        taken = is_top(key, place, kth, last)
        chosen = taken | ((key == LOWEST_KEY) & (place < limit))
        entries = tl.cumsum(taken.to(tl.int32) + chosen.to(tl.int32) * 65536, 0)
        entry = num_listed + (entries & 65535) - 1
        page = tl.load(pages_ptr + entry, mask=taken, other=-1)
        tl.store(chosen_ptr + num_chosen + (entries >> 16) - 1, place, mask=chosen)
        tl.store(places_ptr + entry, place, mask=taken)
        tl.store(page_of_ptr + place, page, mask=taken)
        tl.store(speculated_ptr + place, tl.full([PLACES], SPECULATIVE, tl.int8), mask=taken)
        num_listed += tl.sum(taken.to(tl.int32))
        num_chosen += tl.sum(chosen.to(tl.int32))
        num_evicted += tl.sum((taken & (key != HIGHEST_KEY)).to(tl.int32))
    return num_evicted


@triton.jit(do_not_specialize=SIZES)
def select_kernel(
    score_ptr: tl.tensor,
    peak_ptr: tl.tensor,
    mass_ptr: tl.tensor,
    fixed_ptr: tl.tensor,  # [rows, GROUP], None where pages are rated beside each other alone
    sealed_ptr: tl.tensor,
    page_of_ptr: tl.tensor,
    num_selected_ptr: tl.tensor,
    num_places_ptr: tl.tensor,
    speculated_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    estimated_ptr: tl.tensor,  # [rows, num_pages]; None where nothing is estimated
    missed_ptr: tl.tensor,  # [rows, 5]; None where the number of pages does not depend on a target
    target: tl.tensor,
    scratch_ptr: tl.tensor,
    made_ptr: tl.tensor,
    num_pages: tl.tensor,
    num_blocks: tl.tensor,
    max_places: tl.tensor,
    num_sink_pages: tl.tensor,
    max_selected: tl.tensor,
    num_estimated: tl.tensor,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,  # GROUP padded
    SHARES: tl.constexpr,
    SPECULATIVE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCKS: tl.constexpr,  # of pages, whose masses are read together
    PAGES: tl.constexpr,  # per chunk
    PLACES: tl.constexpr,  # per chunk
    ALL_PAGES: tl.constexpr,  # in one chunk
    ALL_PLACES: tl.constexpr,  # in one chunk
) -> None:
    """One row.

    Made are three lists of all rows (pages, places, chosen) and two counts (missing, chosen).
    Scratch, of each row: keys of its pages, keys of its places as victims, residence of its pages.
    """
    row = tl.program_id(0).to(tl.int64)
    score_ptr += row * GROUP * num_pages
    page_of_ptr += row * max_places
    speculated_ptr += row * max_places
    room, victims_room = _aligned(num_pages), _aligned(max_places)
    keys_ptr = scratch_ptr + row * (room + victims_room + _aligned(tl.cdiv(num_pages, 4)))
    victims_ptr = keys_ptr + room
    resident_ptr = (victims_ptr + victims_room).to(tl.pointer_type(tl.int8), bitcast=True)
    apart = _aligned(tl.num_programs(0) * max_selected)
    pages_ptr = made_ptr + row * max_selected
    places_ptr, chosen_ptr = pages_ptr + apart, pages_ptr + 2 * apart
    num_missing_ptr = made_ptr + 3 * apart
    num_chosen_ptr = num_missing_ptr + _aligned(tl.num_programs(0))
    selectable = tl.minimum(tl.maximum(tl.load(sealed_ptr + row) - num_sink_pages, 0), num_pages)
    limit = tl.minimum(tl.load(num_places_ptr + row), max_places)
    count = tl.minimum(tl.load(num_selected_ptr + row), tl.minimum(selectable, limit))
    count = tl.maximum(tl.minimum(count, max_selected), 0)

    peak, mass = 0.0, 1.0
    if SHARES:
        peak, mass = sum_of_masses(
            peak_ptr, mass_ptr, fixed_ptr, row, num_blocks, GROUP, HEADS, BLOCKS
        )
    keys = tl.full([PAGES], LOWEST_KEY, tl.int32)
    for start in range(0, PAGES if ALL_PAGES else selectable, PAGES):
        page = start + tl.arange(0, PAGES)
        exists = page < selectable
        keys = rate(
            score_ptr, peak, mass, page, selectable, num_pages, GROUP, HEADS, SHARES, HIDDEN
        )
        tl.store(keys_ptr + page, keys, mask=exists)
        tl.store(resident_ptr + page, tl.zeros([PAGES], tl.int8), mask=exists)
    tl.debug_barrier()  # as all others: what follows reads what other threads wrote

    # What does not depend on the search is read before it.
    held = tl.full([PLACES], -1, tl.int32)
    worth = tl.full([PLACES], LOWEST_KEY + 1, tl.int32)
    guessed = tl.zeros([PLACES], tl.int8)
    for start in range(0, PLACES if ALL_PLACES else limit, PLACES):
        place = start + tl.arange(0, PLACES)
        held = tl.load(page_of_ptr + place, mask=place < limit, other=-1)
        guessed = tl.load(speculated_ptr + place, mask=place < limit, other=0)
        page = held - num_sink_pages
        rated = (page >= 0) & (page < selectable)
        worth = tl.load(keys_ptr + page, mask=rated, other=LOWEST_KEY + 1)
        tl.store(resident_ptr + page, tl.full([PLACES], 1, tl.int8), mask=rated)
    tl.debug_barrier()
    resident = tl.zeros([PAGES], tl.int8)
    if ALL_PAGES:
        every = tl.arange(0, PAGES)
        resident = tl.load(resident_ptr + every, mask=every < selectable, other=1)
    count, kth, last = _choose(
        missed_ptr, row, keys_ptr, keys, selectable, count, target, GROUP, PAGES, ALL_PAGES
    )
    if estimated_ptr is not None:
        _flag_estimated(
            estimated_ptr + row * num_pages, keys_ptr, keys, selectable, count, num_estimated,
            kth, last, PAGES, ALL_PAGES,
        )  # fmt: skip

    hits = tl.full([], 0, tl.int32)  # and, 2**16 times as much, those that were foreseen
    num_hits = tl.full([], 0, tl.int32)
    num_foreseen = tl.full([], 0, tl.int32)
    victims = tl.full([PLACES], LOWEST_KEY, tl.int32)
    for start in range(0, PLACES if ALL_PLACES else limit, PLACES):
        place = start + tl.arange(0, PLACES)
        if not ALL_PLACES:
            held = tl.load(page_of_ptr + place, mask=place < limit, other=-1)
            guessed = tl.load(speculated_ptr + place, mask=place < limit, other=0)
        page = held - num_sink_pages
        rated = (page >= 0) & (page < selectable)
        if not ALL_PLACES:
            worth = tl.load(keys_ptr + page, mask=rated, other=LOWEST_KEY + 1)
        hit = rated & is_top(worth, page, kth, last)
        hits = tl.sum(hit.to(tl.int32) + (hit & (guessed != 0)).to(tl.int32) * 65536)
        num_hits += hits & 65535
        num_foreseen += hits >> 16
        if not SPECULATIVE:
            tl.store(speculated_ptr + place, tl.zeros([PLACES], tl.int8), mask=hit)
        # The worst rated have the largest keys, but for the empty places.
        victims = tl.where(hit, LOWEST_KEY, tl.where(held < 0, HIGHEST_KEY, ~worth))
        victims = tl.where(place < limit, victims, LOWEST_KEY)
        tl.store(victims_ptr + place, victims, mask=place < limit)
    num_missing = count - num_hits

    _list_missing(
        pages_ptr, resident_ptr, resident, keys_ptr, keys, selectable, kth, last, num_sink_pages,
        PAGES, ALL_PAGES,
    )  # fmt: skip
    tl.debug_barrier()
    num_free = tl.maximum(limit, 0) - num_hits
    kth, last = kth_largest(victims_ptr, victims, limit, num_free, num_missing, PLACES, ALL_PLACES)

    num_evicted = _place_missing(
        page_of_ptr, speculated_ptr, pages_ptr, places_ptr, chosen_ptr, victims_ptr, victims, limit,
        kth, last, SPECULATIVE, PLACES, ALL_PLACES,
    )  # fmt: skip
    tl.store(num_missing_ptr + row, num_missing)
    tl.store(num_chosen_ptr + row, count)
    add_counts(counters_ptr, row, num_hits, num_missing, num_evicted, num_foreseen, SPECULATIVE)
