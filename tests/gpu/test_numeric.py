"""Kernels that compute, on the real compiler: no worse than plain torch in the same dtype.

Attention is in `test_attention.py`.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from arkcache.kernels import reference, reference_paged
from arkcache.kernels.arguments import Places
from arkcache.kernels.torch_tokens import TokenIndex
from tests.gpu.card import Card
from tests.gpu.compare import Case, bound_of, error_share, on_both, run_cases, some
from tests.gpu.draws import BF16, FP16, FP32, NAMES, int32, randn
from tests.oracle import stored_codes

# -- score --------------------------------------------------------------------------------------

SEALED = (0, 1, 2, 35, 70)
"""Of five rows: none, the sink alone, one page, a block and a bit, all."""

VOLUMES = [
    (BF16, 128, 4, "cuboid-mean"),
    (FP32, 64, 1, "cuboid-max"),
    (FP16, 96, 3, "sphere-mean"),
    (BF16, 80, 7, "sphere-max"),
    (FP32, 256, 5, "centroid"),
    (FP16, 128, 16, "cuboid-center"),
    (BF16, 96, 1, "centroid"),
    (BF16, 256, 2, "cuboid-mean"),
]

TOKENS = [
    (BF16, 128, 4, 32, 2),
    (FP32, 64, 1, 5, 4),
    (FP16, 96, 3, 1, 8),
    (BF16, 96, 7, 32, 4),
    (FP32, 128, 16, 32, 2),
    (FP16, 256, 5, 7, 2),
    (BF16, 64, 2, 64, 8),
]


def test_score(card: Card) -> None:
    """Volumes and low-bit tokens, with and without hidden pages, rows without pages among them."""
    run_cases(card, some(card, score_cases(card)))


def score_cases(card: Card) -> list[Case]:
    """The sizes of a large model first."""
    cases = []
    for hides in (False, True):
        cases += [
            Case(
                f"volumes {NAMES[v[0]]} {v[1:]} {hides=}",
                lambda v=v, h=hides: _volumes(card, *v, h),
            )
            for v in VOLUMES
        ]
        cases += [
            Case(
                f"tokens {NAMES[t[0]]} {t[1:]} {hides=}", lambda t=t, h=hides: _tokens(card, *t, h)
            )
            for t in TOKENS
        ]
    return cases


def _volumes(
    card: Card, dtype: torch.dtype, head_dim: int, group: int, kind: str, hides: bool
) -> float:
    from arkcache.kernels import triton_score

    rows, pages = len(SEALED), max(SEALED)
    key = randn(1, rows, pages, 8, head_dim)
    digests = reference.bounding_volume(key, kind).to(dtype)
    query, scale = randn(2, group, rows, head_dim, dtype=dtype).transpose(0, 1), head_dim**-0.5
    return _check_scores(
        card,
        (triton_score.score_volumes, reference_paged.score_volumes),
        _plain_volumes(query, digests, kind) * scale,
        hides,
        query=query,
        digests=digests,
        kind=kind,
        scale=scale,
    )


def _plain_volumes(query: Tensor, digests: Tensor, kind: str) -> Tensor:
    """In the dtype of the query [rows, group, pages]."""
    center, radius = digests.split([query.shape[-1], digests.shape[-1] - query.shape[-1]], dim=-1)
    result = query @ center.mT
    if kind.startswith("cuboid"):
        result = result + query.abs() @ radius.mT
    if kind.startswith("sphere"):
        result = result + query.norm(dim=-1, keepdim=True) @ radius.mT
    return result


def _tokens(
    card: Card,
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    page_size: int,
    bits: int,
    hides: bool,
) -> float:
    from arkcache.kernels import triton_score

    rows, pages = len(SEALED), max(SEALED)
    key = randn(1, 1, rows, pages, page_size, head_dim)
    digests = TokenIndex(page_size, head_dim, bits).digest(key)[0]
    codes, step, zero = stored_codes(key[0], bits)
    unpacked = codes * step + zero  # [rows, pages, page_size, head_dim]
    query, scale = randn(2, group, rows, head_dim, dtype=dtype).transpose(0, 1), head_dim**-0.5
    logits = (
        query @ unpacked.flatten(1, 2).transpose(1, 2).to(dtype)
    ) * scale  # [rows, group, pages * page_size]
    return _check_scores(
        card,
        (triton_score.score_tokens, reference_paged.score_tokens),
        logits.unflatten(2, (pages, page_size)).logsumexp(dim=-1),
        hides,
        query=query,
        digests=digests,
        page_size=page_size,
        bits=bits,
        scale=scale,
    )


def _check_scores(
    card: Card, functions: tuple[Any, Any], plain: Tensor, hides: bool, **arguments: Any
) -> float:
    """Scores, and what peaks and masses of all blocks make of them together."""
    num_sink_pages, rows = 1, len(SEALED)
    hidden = randn(3, rows, max(SEALED) - num_sink_pages) > 1 if hides else None
    pair = on_both(
        card,
        *functions,
        sealed=int32(*SEALED),
        num_sink_pages=num_sink_pages,
        hidden=hidden,
        **arguments,
    )
    mine, exact = pair.actual["returned"], pair.expected["returned"]
    worst = 0.0
    for row, sealed in enumerate(SEALED):
        pages = slice(0, max(0, sealed - num_sink_pages))
        seen = torch.ones(pages.stop, dtype=torch.bool)
        if hidden is not None:
            seen = ~hidden[row, pages]
            assert bool((mine.score[row, :, pages][:, ~seen] < -1e38).all()), (
                "hidden pages rate low"
            )
        scores, wanted = (one.score[row, :, pages][:, seen] for one in (mine, exact))
        if wanted.numel():
            bound = bound_of(plain[row, :, num_sink_pages:][:, pages][:, seen], wanted)
            worst = max(worst, error_share("score", scores, wanted, bound))
        total = (mine.peak[row] + mine.mass[row].log()).logsumexp(dim=-1)
        # Sums of shares: their error is relative, that of a logarithm is not.
        worst = max(worst, error_share("mass", total, scores.logsumexp(dim=-1), 1e-5))
    return worst


# -- select -------------------------------------------------------------------------------------


def test_select(card: Card) -> None:
    """Fewer pages than places, none, many; unequal budgets, hidden pages, guesses."""
    run_cases(card, some(card, select_cases(card)))


def select_cases(card: Card) -> list[Case]:
    """Many pages first."""
    shapes = itertools.product((700, 3, 70), (4, 1, 3, 16), ("softmax-mean", "raw-mean"))
    return [
        Case(f"select {shape} {guesses=}", lambda s=shape, g=guesses: _select(card, *s, guesses=g))
        for shape in shapes
        for guesses in (False, True)
    ]


def _select(card: Card, pages: int, group: int, reduction: str, guesses: bool) -> None:
    from arkcache.kernels import triton_select

    num_sink_pages, places, head_dim = 1, 12, 64
    limits = [(4, 6), (8, 12), (1, 1), (8, 8), (0, 4)]
    sealed = int32(pages, max(0, pages - 20), pages, 1, pages)
    rows = len(limits)
    digests = randn(1, rows, pages, head_dim)
    hidden = randn(3, rows, pages - num_sink_pages) > 1.5
    held = _held_pages(sealed, limits, num_sink_pages, places)
    arguments: dict[str, Any] = {"num_sink_pages": num_sink_pages, "kind": "centroid", "scale": 0.3}
    scores = reference_paged.score_volumes(
        randn(2, rows, group, head_dim), digests, sealed, hidden=hidden, **arguments
    )
    selected = int32(*(limit[guesses] for limit in limits))
    pair = on_both(
        card,
        triton_select.select,
        reference_paged.select,
        scores=scores,
        sealed=sealed,
        places=Places(held, int32(*(limit[1] for limit in limits))),
        num_selected=selected,
        speculated=(randn(5, rows, places) > 0).to(torch.int8) * (held >= 0),
        counters=torch.arange(rows * 5).view(rows, 5),
        num_sink_pages=num_sink_pages,
        max_selected=int(selected.max()),
        reduction=reduction,
        speculative=guesses,
    )
    pair.check_equal("places.page_of", "speculated", "counters")
    mine, other = pair.actual["returned"], pair.expected["returned"]
    assert torch.equal(mine.num_missing, other.num_missing)
    assert torch.equal(mine.num_chosen, other.num_chosen)
    for row, (missing, chosen) in enumerate(
        zip(other.num_missing.tolist(), other.num_chosen.tolist(), strict=True)
    ):
        moves = [
            set(
                zip(
                    one.pages[row, :missing].tolist(),
                    one.places[row, :missing].tolist(),
                    strict=True,
                )
            )
            for one in (mine, other)
        ]
        assert moves[0] == moves[1], f"row {row} recalls {moves[0]}, expected {moves[1]}"
        kept = [set(one.chosen[row, :chosen].tolist()) for one in (mine, other)]
        assert kept[0] == kept[1], f"row {row} attends {kept[0]}, expected {kept[1]}"


def _held_pages(
    sealed: Tensor, limits: list[tuple[int, int]], num_sink_pages: int, places: int
) -> Tensor:
    """What is in the places of each row: some empty, the others random pages."""
    held = torch.full((len(limits), places), -1, dtype=torch.int32)
    for row, (_, max_selected) in enumerate(limits):
        order = torch.randperm(
            max(0, int(sealed[row]) - num_sink_pages), generator=torch.Generator().manual_seed(row)
        )
        count = min(len(order), max(0, max_selected - 2))
        held[row, 1 : 1 + count] = (order[:count] + num_sink_pages).int()
    return held
