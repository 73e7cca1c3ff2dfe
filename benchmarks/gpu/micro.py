"""Kernels of one layer by themselves: 8 KV heads, 4 query heads each, head_dim 128, pages of 32.

Every launch of a graph works on another set of buffers, as the layers of a model do, so that
nothing is read from the L2 cache that would not be there in a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arkcache.formats import PRESETS, PageLayout
from arkcache.kernels.arguments import Counts, PageSet, Places, Summaries, Window
from arkcache.kernels.torch_tokens import TokenIndex
from benchmarks.gpu.baseline import fastest_attention
from benchmarks.gpu.bench import Bench, Timing
from benchmarks.gpu.check import Outcome

ROWS, GROUP, HEAD_DIM, PAGE_SIZE = 8, 4, 128, 32
NUM_SINK_PAGES, NUM_SELECTED, RECENT, WINDOW = 1, 58, 128, 160
"""What the default settings (2048 tokens) make of this."""

SCALE = HEAD_DIM**-0.5
DTYPE = torch.bfloat16


class Rows(NamedTuple):
    """What a layer holds beside keys and values."""

    counts: Counts
    places: Places


def make_rows(bench: Bench, tokens: int, count: int = ROWS) -> Rows:
    """So many rows of so many tokens, random pages in their places."""
    sealed = (tokens - RECENT) // PAGE_SIZE
    numbers = [tokens, sealed, NUM_SELECTED]
    lengths, sealed_pages, num_places = (
        torch.full((count,), number, dtype=torch.int32, device=bench.device) for number in numbers
    )
    pages = [
        torch.randperm(sealed - NUM_SINK_PAGES)[:NUM_SELECTED] + NUM_SINK_PAGES
        for _ in range(count)
    ]
    page_of = torch.full((count, NUM_SELECTED), -1, dtype=torch.int32)
    for row, own in enumerate(pages):
        page_of[row, : len(own)] = own
    places = Places(page_of.to(bench.device), num_places)
    return Rows(Counts(lengths, sealed_pages), places)


def of_device_peak(bench: Bench, nbytes: int, timing: Timing) -> float:
    """The share of the memory's bandwidth that reading so much in this time is."""
    return nbytes / timing.median_us * 1e6 / bench.peak("device")


# -- the index ----------------------------------------------------------------------------------


class Load(NamedTuple):
    """A kernel with all it needs.

    Attributes:
        run: launches it on one of `sets` sets of buffers.
        nbytes: read by a launch.
    """

    run: Callable[[int], Any]
    sets: int
    nbytes: int


def scan_volumes(bench: Bench, context: int) -> Outcome:
    """Rate all pages by their cuboids."""
    load = volumes_load(bench, context)
    timing = bench.time(load.run, load.sets)
    share = of_device_peak(bench, load.nbytes, timing)
    return Outcome(timing.median_us, share, timing.asdict())


def volumes_load(bench: Bench, context: int) -> Load:
    """The digest scan of a layer."""
    from arkcache.kernels.triton_score import score_volumes

    context = bench.pick(context, 512)
    rows, pages = make_rows(bench, context), context // PAGE_SIZE
    sets = bench.num_sets(ROWS * pages * 2 * HEAD_DIM * DTYPE.itemsize)
    digests = [bench.randn(ROWS, pages, 2 * HEAD_DIM) for _ in range(sets)]
    query = bench.randn(ROWS, GROUP, HEAD_DIM)
    how: dict[str, Any] = {"num_sink_pages": NUM_SINK_PAGES, "kind": "cuboid-mean", "scale": SCALE}
    return Load(
        lambda number: score_volumes(query, digests[number], rows.counts.sealed, **how),
        sets,
        digests[0].nbytes,
    )


def scan_tokens(bench: Bench, context: int) -> Outcome:
    """Rate all pages by two bits of every key element."""
    load = tokens_load(bench, context)
    timing = bench.time(load.run, load.sets)
    share = of_device_peak(bench, load.nbytes, timing)
    return Outcome(timing.median_us, share, timing.asdict())


def tokens_load(bench: Bench, context: int) -> Load:
    """The scan of a layer's token index."""
    from arkcache.kernels.triton_score import score_tokens

    context = bench.pick(context, 512)
    rows, pages = make_rows(bench, context), context // PAGE_SIZE
    index = TokenIndex(PAGE_SIZE, HEAD_DIM, 2)
    one = index.digest(bench.randn(1, 1, pages, PAGE_SIZE, HEAD_DIM))[0]
    sets = bench.num_sets(ROWS * one.nbytes)
    digests = [one.repeat(ROWS, 1, 1) for _ in range(sets)]
    query = bench.randn(ROWS, GROUP, HEAD_DIM)
    how: dict[str, Any] = {"page_size": PAGE_SIZE, "bits": 2, "scale": SCALE}
    return Load(
        lambda number: score_tokens(
            query, digests[number], rows.counts.sealed, num_sink_pages=NUM_SINK_PAGES, **how
        ),
        sets,
        digests[0].nbytes,
    )


def select_pages(bench: Bench, context: int) -> Outcome:
    """Choose 58 pages per row, nearly all of them missing."""
    load, counters = select_load(bench, context)
    timing = bench.time(load.run, load.sets)
    hits, recalled = counters.sum(dim=0)[:2].tolist()
    missing = recalled / (hits + recalled)
    return Outcome(timing.median_us, None, timing.asdict() | {"missing": missing})


def select_load(bench: Bench, context: int) -> tuple[Load, Tensor]:
    """The choice of a layer's pages, and the counters that it adds to."""
    from arkcache.kernels.triton_score import score_volumes
    from arkcache.kernels.triton_select import select

    context = bench.pick(context, 2560)
    rows, pages = make_rows(bench, context), context // PAGE_SIZE
    digests = bench.randn(ROWS, pages, 2 * HEAD_DIM)
    sets = bench.pick(8, 1)
    how: dict[str, Any] = {"num_sink_pages": NUM_SINK_PAGES, "kind": "cuboid-mean", "scale": SCALE}
    scores = [
        score_volumes(bench.randn(ROWS, GROUP, HEAD_DIM), digests, rows.counts.sealed, **how)
        for _ in range(sets)
    ]
    speculated = torch.zeros((ROWS, NUM_SELECTED), dtype=torch.int8, device=bench.device)
    counters = torch.zeros((ROWS, 5), dtype=torch.int64, device=bench.device)

    def choose(number: int) -> None:
        select(
            scores[number],
            rows.counts.sealed,
            rows.places,
            rows.places.num_places,
            speculated,
            counters,
            num_sink_pages=NUM_SINK_PAGES,
            max_selected=NUM_SELECTED,
            reduction="softmax-mean",
        )

    return Load(choose, sets, scores[0].score.nbytes), counters


# -- append and seal ----------------------------------------------------------------------------


def append_token(bench: Bench) -> Outcome:
    """Store a token in the windows of 8 rows."""
    from arkcache.kernels.triton_append import append

    rows = make_rows(bench, 4096)
    key, value = (bench.randn(1, ROWS, HEAD_DIM) for _ in range(2))
    window = Window(*(bench.randn(ROWS, WINDOW, HEAD_DIM) for _ in range(2)))
    sizes = {"recent": RECENT, "page_size": PAGE_SIZE}
    timing = bench.time(lambda _: append(key, value, window, rows.counts, **sizes), sets=1)
    return Outcome(timing.median_us, None, timing.asdict())


def seal_page(bench: Bench, preset: str) -> Outcome:
    """Pack, digest and place the page that a token completed, in 8 rows."""
    from arkcache.kernels.triton_seal import seal_newest

    layout = PageLayout(PRESETS[preset], PAGE_SIZE, HEAD_DIM, HEAD_DIM, DTYPE.itemsize)
    sealed = 100
    rows = make_rows(bench, sealed * PAGE_SIZE + RECENT)
    key, value = (bench.randn(ROWS, WINDOW, HEAD_DIM) for _ in range(2))
    slots = torch.zeros((ROWS, NUM_SINK_PAGES + NUM_SELECTED, layout.nbytes), dtype=torch.uint8)
    packed = torch.zeros((ROWS, layout.nbytes), dtype=torch.uint8, device=bench.device)
    held, window = (slots.to(bench.device), packed), Window(key, value)
    how: dict[str, Any] = {
        "places": rows.places,
        "summaries": Summaries(bench.randn(ROWS, sealed, 2 * HEAD_DIM)),
        "layout": layout,
        "recent": RECENT,
        "num_sink_pages": NUM_SINK_PAGES,
        "index": "cuboid-mean",
    }

    timing = bench.time(lambda _: seal_newest(window, key, rows.counts, *held, **how), sets=1)
    return Outcome(timing.median_us, None, timing.asdict())


# -- attention ----------------------------------------------------------------------------------


def attend_budget(bench: Bench, context: int, preset: str) -> Outcome:
    """Attend 2048 tokens in pages, against the fastest attention of torch over all of them."""
    load = attention_load(bench, context, preset)
    timing = bench.time(load.run, load.sets)
    assert bool(load.run(0).isfinite().all())
    share = of_device_peak(bench, load.nbytes, timing)
    bench.note(paged=timing.asdict())
    del load
    context, heads = bench.pick((context, ROWS), (2560, 1))
    dense_sets = bench.num_sets(4 * heads * context * HEAD_DIM)
    dense = [bench.randn(2, 1, heads, context, HEAD_DIM) for _ in range(dense_sets)]
    query = bench.randn(1, heads * GROUP, 1, HEAD_DIM)
    name, attend_all = fastest_attention(bench, query, *dense[0])
    dense_timing = bench.time(lambda i: attend_all(query, *dense[i], SCALE), dense_sets)
    return Outcome(
        dense_timing.median_us / timing.median_us,
        share,
        {
            "dense": dense_timing.asdict(),
            "dense_is": name,
            "dense_of_peak": of_device_peak(bench, dense[0].nbytes, dense_timing),
        },
    )


def attention_load(bench: Bench, context: int, preset: str) -> Load:
    """Attention of a layer to 2048 tokens in pages and in the window."""
    from arkcache.kernels.triton_attention import paged_attention

    context, heads = bench.pick((context, ROWS), (2560, 1))
    layout = PageLayout(PRESETS[preset], PAGE_SIZE, HEAD_DIM, HEAD_DIM, DTYPE.itemsize)
    rows, num_slots = make_rows(bench, context, heads), NUM_SINK_PAGES + NUM_SELECTED
    sets = bench.num_sets(heads * num_slots * layout.nbytes)
    slots = [_random_slots(bench, layout, heads, num_slots) for _ in range(sets)]
    windows = [Window(*bench.randn(2, heads, WINDOW, HEAD_DIM)) for _ in range(sets)]
    query = bench.randn(heads, GROUP, HEAD_DIM)
    chosen = torch.arange(NUM_SELECTED, dtype=torch.int32, device=bench.device).repeat(heads, 1)
    page_of, num_chosen = rows.places
    pages = [PageSet(held, chosen, num_chosen, page_of) for held in slots]
    tickets = torch.zeros(heads, dtype=torch.int32, device=bench.device)
    how: dict[str, Any] = {"layout": layout, "num_sink_pages": NUM_SINK_PAGES, "scale": SCALE}
    how["tickets"] = tickets  # as layers do; launches of a graph follow each other

    def attend(number: int) -> Tensor:
        return paged_attention(query, pages[number], windows[number], rows.counts, **how)

    return Load(attend, sets, slots[0].nbytes + sum(plane.nbytes for plane in windows[0]))


def _random_slots(bench: Bench, layout: PageLayout, rows: int, num_slots: int) -> Tensor:
    """Packed pages of random keys and values [rows, slots, nbytes]."""
    from arkcache.kernels.torch_pages import PagePacker

    shape = (rows, num_slots, PAGE_SIZE, HEAD_DIM)
    return PagePacker(layout, DTYPE).pack(bench.randn(*shape), bench.randn(*shape))
