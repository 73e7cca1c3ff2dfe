"""Kernels that move and pack bytes, on the real compiler: equal to their references to the bit."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from arkcache.formats import PageFormat, PageLayout
from arkcache.kernels import reference_copy, reference_seal
from arkcache.kernels.arguments import Counts, HostPages, Places, Selection, Summaries, Window
from tests.gpu.card import Card
from tests.gpu.compare import Case, Pair, on_both, run_cases, some
from tests.gpu.draws import BF16, FP16, FP32, NAMES, int32, randn, random_bytes

# -- append -------------------------------------------------------------------------------------


def test_append(card: Card) -> None:
    """Windows of odd lengths, keys and values of odd and of different sizes, strided tokens."""
    run_cases(card, some(card, append_cases(card)))


def append_cases(card: Card) -> list[Case]:
    """The sizes of a large model first."""
    sizes = [
        (128, 128, 160, 32),
        (64, 64, 1, 1),
        (80, 40, 63, 5),
        (96, 96, 111, 32),
        (256, 8, 7, 7),
    ]
    return [
        Case(f"append {NAMES[dtype]} {size}", lambda d=dtype, s=size: _append(card, d, *s))
        for dtype, size in itertools.product((BF16, FP32, FP16), sizes)
    ]


def _append(
    card: Card, dtype: torch.dtype, head_dim: int, value_dim: int, window: int, page_size: int
) -> None:
    from arkcache.kernels import triton_append

    batch, heads = 3, 2
    rows = batch * heads
    pair = on_both(
        card,
        triton_append.append,
        reference_seal.append,
        key=randn(1, heads, batch, head_dim, dtype=dtype).transpose(0, 1),
        value=randn(2, batch, heads, value_dim, dtype=dtype),
        window=Window(
            randn(3, rows, window, head_dim, dtype=dtype),
            randn(4, rows, window, value_dim, dtype=dtype),
        ),
        counts=Counts(
            int32(0, 1, window - 1, window, 3 * window + 2, 10_000_000),
            torch.zeros(rows, dtype=torch.int32),
        ),
        recent=max(1, window - page_size),
        page_size=page_size,
    )
    pair.check_equal("window.key", "window.value", "counts.lengths", "counts.sealed")


# -- seal ---------------------------------------------------------------------------------------

SEALS = [
    # dtype, (key bits, value bits, group size), page size, head dims, index and its bits
    (BF16, (16, 16, 32), 32, (128, 128), "cuboid-mean", 2),
    (FP32, (16, 16, 32), 5, (96, 64), "cuboid-max", 2),
    (FP16, (16, 16, 32), 1, (64, 64), "cuboid-center", 2),
    (BF16, (16, 16, 32), 7, (80, 40), "sphere-mean", 2),
    (FP32, (16, 16, 32), 32, (64, 64), "sphere-max", 2),
    (FP16, (16, 16, 32), 16, (256, 256), "sphere-center", 2),
    (BF16, (16, 16, 32), 32, (96, 96), "centroid", 2),
    (BF16, (16, 16, 32), 32, (128, 128), "tokens", 2),
    (FP32, (16, 16, 32), 5, (96, 96), "tokens", 4),
    (FP16, (16, 16, 32), 1, (64, 64), "tokens", 8),
    (BF16, (8, 4, 32), 32, (128, 128), "cuboid-mean", 2),
    (BF16, (4, 2, 32), 32, (128, 128), "tokens", 2),
    (FP16, (4, 4, 8), 5, (96, 96), "cuboid-mean", 2),
    (FP32, (2, 2, 16), 32, (64, 64), "sphere-mean", 2),
    (FP32, (4, 16, 32), 1, (64, 96), "centroid", 2),
    (BF16, (16, 2, 32), 7, (80, 64), "cuboid-mean", 2),
    (BF16, (2, 8, 64), 32, (256, 256), "cuboid-mean", 2),
]


def test_seal(card: Card) -> None:
    """Pages of prompts and of the newest token, in every format, by every index and by none."""
    run_cases(card, some(card, seal_cases(card)))


def seal_cases(card: Card) -> list[Case]:
    """The sizes of a large model first."""
    cases = []
    for entry in SEALS:
        name = f"{NAMES[entry[0]]} {entry[1:]}"
        cases.append(Case(f"pages {name}", lambda e=entry: _seal_pages(card, *e)))
        cases.append(Case(f"newest {name}", lambda e=entry: _seal_newest(card, *e)))
    entry = SEALS[11]
    cases.append(Case("newest of a dense layer", lambda: _seal_newest(card, *entry, dense=True)))
    return cases


def _digests(
    rows: int, capacity: int, dtype: torch.dtype, layout: PageLayout, index: str, bits: int
) -> Tensor:
    head_dim = layout.head_dim
    if index == "tokens":
        features = 4 * head_dim + -(-head_dim * bits // 8) * layout.page_size
        return random_bytes(8, rows, capacity, features)
    features = {"cuboid": 2 * head_dim, "sphere": head_dim + 1}.get(index.split("-")[0], head_dim)
    return randn(8, rows, capacity, features, dtype=dtype)


def _check_digests(pair: Pair, dtype: torch.dtype, index: str) -> None:
    if index == "tokens":
        pair.check_equal("summaries.digests")
        return
    expected = pair.expected["summaries"].digests.float()
    # Sums in fp32 in another order, rounded once: at most to the next number of the dtype.
    bound = torch.finfo(dtype).eps * expected.abs() + 32 * torch.finfo(FP32).eps
    pair.check_close("summaries.digests", bound)


def _seal_pages(
    card: Card,
    dtype: torch.dtype,
    bits: tuple[int, int, int],
    page_size: int,
    dims: tuple[int, int],
    index: str,
    index_bits: int,
) -> None:
    from arkcache.kernels import triton_seal

    layout = PageLayout(PageFormat(*bits), page_size, *dims, dtype.itemsize)
    rows, pages, first = 2, 2, 3
    key = randn(1, rows, pages, page_size, dims[0], dtype=dtype)
    pair = on_both(
        card,
        triton_seal.seal_pages,
        reference_seal.seal_pages,
        key=key,
        value=randn(2, rows, page_size, pages, dims[1], dtype=dtype).transpose(1, 2),
        digest_key=key.roll(1, dims=3),
        packed=random_bytes(3, pages, rows, layout.nbytes).transpose(0, 1),
        summaries=Summaries(_digests(rows, first + pages + 1, dtype, layout, index, index_bits)),
        first=first,
        layout=layout,
        index=index,
        index_bits=index_bits,
    )
    pair.check_equal("packed")
    _check_digests(pair, dtype, index)


def _seal_newest(
    card: Card,
    dtype: torch.dtype,
    bits: tuple[int, int, int],
    page_size: int,
    dims: tuple[int, int],
    index: str,
    index_bits: int,
    dense: bool = False,
) -> None:
    """Rows that seal a sink, one in a place, one beyond the places, none, and the first token."""
    from arkcache.kernels import triton_seal

    layout = PageLayout(PageFormat(*bits), page_size, *dims, dtype.itemsize)
    sealed, off, num_sink_pages, num_places = [1, 3, 6, 4, 0], [0, 0, 0, 1, 1], 1, 4
    rows, recent, window = len(sealed), 2 * page_size, 3 * page_size
    lengths = [count * page_size + recent + extra for count, extra in zip(sealed, off, strict=True)]
    key = randn(1, rows, window, dims[0], dtype=dtype)
    page_of = torch.full((rows, num_places), -1, dtype=torch.int32)
    digests = None if dense else _digests(rows, 8, dtype, layout, index, index_bits)
    if page_size == 1:  # one token more completes another page
        sealed = [length - recent for length in lengths]
    pair = on_both(
        card,
        triton_seal.seal_newest,
        reference_seal.seal_newest,
        window=Window(key, randn(2, rows, window, dims[1], dtype=dtype)),
        digest_window=key.roll(1, dims=2),
        counts=Counts(int32(*lengths), int32(*sealed)),
        slots=random_bytes(3, rows, 8 if dense else num_sink_pages + num_places, layout.nbytes),
        packed=random_bytes(4, rows, layout.nbytes),
        places=None if dense else Places(page_of, int32(4, 4, 4, 2, 4)),
        summaries=Summaries(digests),
        recent=recent,
        num_sink_pages=0 if dense else num_sink_pages,
        layout=layout,
        index=index,
        index_bits=index_bits,
    )
    pair.check_equal("packed", "slots")
    if not dense:
        pair.check_equal("places.page_of")
        _check_digests(pair, dtype, index)


# -- copy ---------------------------------------------------------------------------------------


def test_copies(card: Card) -> None:
    """Pages of any size: whole words, odd bytes, larger than a program's chunk; empty rows."""
    run_cases(card, some(card, copy_cases(card)))


def copy_cases(card: Card) -> list[Case]:
    """The pages of a large model first."""
    cases = []
    for nbytes in (16384, 1, 13, 64, 1000, 8192, 24576, 40008):
        cases.append(Case(f"gather {nbytes}", lambda n=nbytes: _gather(card, n, num_sink_pages=1)))
        cases.append(Case(f"scatter {nbytes}", lambda n=nbytes: _scatter(card, n)))
        cases.append(Case(f"gather_lines {nbytes}", lambda n=nbytes: _gather_lines(card, n)))
    cases.append(Case("gather without sinks", lambda: _gather(card, 512, num_sink_pages=0)))
    return cases


def _lines(rows: int, capacity: int, seed: int) -> Tensor:
    order = torch.randperm(rows * capacity, generator=torch.Generator().manual_seed(seed))
    return order.view(rows, capacity)


def _gather(card: Card, nbytes: int, num_sink_pages: int) -> None:
    from arkcache.kernels import triton_copy

    rows, capacity, max_selected = 4, 12, 7
    order = torch.stack([torch.randperm(max_selected) for _ in range(rows)]).int()
    pages = _lines(rows, capacity, 3).argsort(dim=1)[:, :max_selected].int().contiguous()
    counts = int32(0, 1, 4, max_selected)
    pair = on_both(
        card,
        triton_copy.gather,
        reference_copy.gather,
        ("host.pieces",),
        host=HostPages(random_bytes(1, rows * capacity, nbytes), _lines(rows, capacity, 2)),
        selection=Selection(pages, order, counts, order, counts),
        slots=random_bytes(5, rows, num_sink_pages + max_selected, nbytes),
        num_sink_pages=num_sink_pages,
    )
    pair.check_equal("slots")


def _scatter(card: Card, nbytes: int) -> None:
    from arkcache.kernels import triton_copy

    pair = on_both(
        card,
        triton_copy.scatter,
        reference_copy.scatter,
        ("host.pieces",),
        packed=random_bytes(1, 5, nbytes),
        lines=torch.tensor([7, -1, 0, 11, -1]),
        host=HostPages(random_bytes(2, 12, nbytes), torch.full((5, 6), -1, dtype=torch.int64)),
        sealed=int32(1, 2, 3, 6, 4),
    )
    pair.check_equal("host.pieces", "host.located")


def _gather_lines(card: Card, nbytes: int) -> None:
    from arkcache.kernels import triton_copy

    pair = on_both(
        card,
        triton_copy.gather_lines,
        reference_copy.gather_lines,
        ("pieces",),
        pieces=random_bytes(1, 40, nbytes),
        lines=torch.tensor([0, 39, 7, 8, 9, 7]),
        target=random_bytes(2, 6, nbytes),
    )
    pair.check_equal("target")
