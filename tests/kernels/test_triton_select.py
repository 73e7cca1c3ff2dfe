"""Selecting on the device against the plain loop: pages, places, flags and counters."""

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arkcache.config import GROUP_REDUCTIONS
from arkcache.errors import InputError
from arkcache.kernels import reference_paged, triton_select
from arkcache.kernels.arguments import Places, Scores, Selection
from arkcache.kernels.triton_score import HIDDEN, PAGES_PER_BLOCK, score_volumes
from arkcache.kernels.triton_select import select
from arkcache.kernels.triton_sizes import aligned, cdiv, power_of_two

device = "cuda" if torch.cuda.is_available() else "cpu"


class Metadata(NamedTuple):
    """What a selection changes."""

    page_of: Tensor
    speculated: Tensor
    counters: Tensor

    def clone(self, where: str) -> "Metadata":
        return Metadata(*(tensor.to(where, copy=True) for tensor in self))


def empty_metadata(rows: int, places: int) -> Metadata:
    return Metadata(
        torch.full((rows, places), -1, dtype=torch.int32),
        torch.zeros(rows, places, dtype=torch.int8),
        torch.zeros(rows, 5, dtype=torch.int64),
    )


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_scores(score: Tensor, selectable: list[int]) -> Scores:
    """Scores as a kernel leaves them: nothing behind the last page, and each block's softmax."""
    score = score.clone()
    for row, count in enumerate(selectable):
        score[row, :, max(0, count) :] = float("nan")
    rows, group, pages = score.shape
    blocks = -(-pages // PAGES_PER_BLOCK)
    seen = score.masked_fill(score.isnan() | (score == HIDDEN), float("-inf"))
    padding = seen.new_full((rows, group, blocks * PAGES_PER_BLOCK - pages), float("-inf"))
    seen = torch.cat((seen, padding), dim=-1).unflatten(-1, (blocks, PAGES_PER_BLOCK))
    peak = seen.amax(dim=-1)
    base = peak.masked_fill(peak == float("-inf"), 0.0)
    return Scores(score, peak, (seen - base[..., None]).exp().sum(dim=-1))


def check(
    scores: Scores,
    metadata: Metadata,
    sealed: Tensor,
    num_selected: Tensor,
    num_places: Tensor,
    **options: Any,
) -> tuple[Metadata, Selection]:
    """Select with both and compare everything; returns new metadata and the reference's lists."""
    mine, theirs = metadata.clone(device), metadata.clone("cpu")
    options.setdefault("reduction", "raw-mean")
    options.setdefault("max_selected", max(num_selected.tolist(), default=0))
    own = select(
        Scores(*(tensor.to(device) for tensor in scores)),
        sealed.to(device),
        Places(mine.page_of, num_places.to(device)),
        num_selected.to(device),
        mine.speculated,
        mine.counters,
        **options,
    )
    expected = reference_paged.select(
        scores,
        sealed,
        Places(theirs.page_of, num_places),
        num_selected,
        theirs.speculated,
        theirs.counters,
        **options,
    )
    assert torch.equal(own.num_missing.cpu(), expected.num_missing)
    assert torch.equal(own.num_chosen.cpu(), expected.num_chosen)
    for row in range(len(sealed)):
        missing, chosen = int(expected.num_missing[row]), int(expected.num_chosen[row])
        for name, count in (("pages", missing), ("places", missing), ("chosen", chosen)):
            entries = getattr(own, name)[row, :count].cpu()
            assert torch.equal(entries, getattr(expected, name)[row, :count]), name
        count = max(0, int(sealed[row]) - options["num_sink_pages"])
        if expected.estimated is not None:
            assert own.estimated is not None
            assert torch.equal(own.estimated[row, :count].cpu(), expected.estimated[row, :count])
    for name, tensor in mine._asdict().items():
        assert torch.equal(tensor.cpu(), getattr(theirs, name)), name
    for held in theirs.page_of.tolist():
        pages = [page for page in held if page >= 0]
        assert len(set(pages)) == len(pages)
    return theirs, expected


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_what_is_made_lies_apart_and_aligned(rows: int) -> None:
    """Lists of odd lengths and scores of odd sizes share memory; all start where vectors may."""
    query = torch.randn(rows, 3, 16, device=device)
    digests = torch.randn(rows, 36, 32, device=device)
    sealed, limit = (torch.tensor([[33], [5]], dtype=torch.int32).repeat(1, rows)).to(device)
    scores = score_volumes(query, digests, sealed, num_sink_pages=1, kind="cuboid-max", scale=1.0)
    metadata, max_selected = empty_metadata(rows, 7).clone(device), 5
    how: dict[str, Any] = {
        "num_sink_pages": 1,
        "max_selected": max_selected,
        "reduction": "raw-mean",
    }
    how |= {"num_estimated": None}
    places = Places(metadata.page_of, limit)
    selection = select(scores, sealed, places, limit, *metadata[1:], **how)
    shapes = [(rows, 3, 35), (rows, 3, 2), (rows, 3, 2), *[(rows, max_selected)] * 2, (rows,)]
    shapes += [(rows, max_selected), (rows,), (rows, 35)]
    for tensor, shape in zip((*scores, *selection), shapes, strict=True):
        assert tensor.shape == shape
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
    for parts in (scores, selection):
        ends = sorted((part.data_ptr(), part.data_ptr() + part.nbytes) for part in parts)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(ends))


def test_sizes_are_those_of_triton() -> None:
    for number in (1, 2, 3, 4, 5, 31, 32, 33, 1000, 2**20 + 1):
        assert power_of_two(number) == triton.next_power_of_2(number)
        for divisor in (1, 3, 32):
            assert cdiv(number, divisor) == triton.cdiv(number, divisor)
    assert [aligned(number) for number in (0, 1, 16, 17)] == [0, 16, 16, 32]


@pytest.mark.parametrize("num_estimated", [None, 1, 7])
@pytest.mark.parametrize("chunk", [4096, 16])
def test_estimated_pages(
    chunk: int, num_estimated: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of those not chosen, of equals the lowest; all, some or none are left out."""
    monkeypatch.setattr(triton_select, "CHUNK_WARPS", {chunk: 1})
    score = torch.randint(-4, 4, (4, 2, 60)).float()
    score[:, :, 10:20] = HIDDEN
    scores, counts = make_scores(score, [60, 33, 5, -1]), ints(20, 3, 9, 4)
    metadata, sealed = empty_metadata(4, 20), ints(62, 35, 7, 1)
    how: dict[str, Any] = {"num_sink_pages": 2, "num_estimated": num_estimated}
    for reduction in GROUP_REDUCTIONS:
        _, selection = check(scores, metadata, sealed, counts, counts, reduction=reduction, **how)
        assert selection.estimated is not None
        limit = 60 if num_estimated is None else num_estimated
        expected = [min(limit, 40), min(limit, 30), 0]
        flags = selection.estimated[:3] == 1
        assert [int(flags[row, : int(sealed[row]) - 2].sum()) for row in range(3)] == expected


def aim(
    score: Tensor, fixed: Tensor, target: float, counts: list[int], num_sink_pages: int = 1
) -> tuple[Tensor, Selection]:
    """Aim with both, compare everything; what was missed, and the reference's lists."""
    rows, _, pages = score.shape
    missed = [torch.zeros(rows, 5, dtype=torch.float64, device=where) for where in (device, "cpu")]
    limits, places = ints(*counts), max(counts)
    how: dict[str, Any] = {
        "num_sink_pages": num_sink_pages,
        "max_selected": max(counts),
        "reduction": "raw-mean",
    }
    how |= {"target": target, "num_estimated": 2}
    scores, sealed = make_scores(score, [pages] * rows), ints(*[pages + num_sink_pages] * rows)
    metadata = empty_metadata(rows, places)
    selections = []
    for kernel, log, where in (
        (select, missed[0], device),
        (reference_paged.select, missed[1], "cpu"),
    ):
        page_of, *rest = metadata.clone(where)
        given, limit = Scores(*(tensor.to(where) for tensor in scores)), limits.to(where)
        on_device = (sealed.to(where), Places(page_of, limit), limit)
        chosen = kernel(given, *on_device, *rest, fixed=fixed.to(where), missed=log, **how)
        assert torch.equal(chosen.num_missing, chosen.num_chosen)
        selections.append(chosen)
    own, expected = selections
    assert torch.equal(own.num_chosen.cpu(), expected.num_chosen)
    for row, count in enumerate(expected.num_chosen.tolist()):
        assert torch.equal(own.chosen[row, :count].cpu(), expected.chosen[row, :count])
    assert own.estimated is not None
    assert expected.estimated is not None
    assert torch.equal(own.estimated.cpu(), expected.estimated)
    torch.testing.assert_close(missed[0].cpu(), missed[1], rtol=1e-4, atol=1e-7)
    return missed[0].cpu(), expected


@pytest.mark.parametrize(
    ("target", "group", "chunk"), [(1e-4, 1, 4096), (0.05, 3, 4096), (0.3, 3, 16), (0.9, 1, 16)]
)
def test_a_target(target: float, group: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewest pages that meet it, or all that there are places for; one row has few of these."""
    monkeypatch.setattr(triton_select, "CHUNK_WARPS", {chunk: 1})
    score = 3 * torch.randn(4, group, 35)
    score[:, :, 7] = -float("inf")
    score[1, :, 10:20] = score[1, :, 10:11]  # equal ones
    fixed = torch.tensor([1.0, -2.0, 4.0, -float("inf")])[:, None].expand(4, group).contiguous()
    missed, selection = aim(score, fixed, target, [35, 35, 4, 20])
    log = missed.tolist()
    for (steps, total, worst, capped, spared), count, max_selected in zip(
        log, selection.num_chosen.tolist(), (35, 35, 4, 20), strict=True
    ):
        assert steps == 1
        assert total == worst
        assert capped == (worst > target)
        assert spared == max_selected - count
        assert worst <= target or count == max_selected


def test_a_target_by_hand() -> None:
    """Shares .5 .3 .1 .06 .04, all of them to be selected: .85 takes three, of equals the first."""
    share = torch.tensor([0.06, 0.5, 0.1, 0.04, 0.3])
    nothing = torch.full((1, 1), -float("inf"))
    for target, count in {0.15: 3, 0.35: 2, 0.07: 4, 0.99: 1, 0.03: 5}.items():
        missed, selection = aim(share.log()[None, None], nothing, target, [5], num_sink_pages=0)
        assert selection.num_chosen.tolist() == [count]
        rest = float(share.sort(descending=True).values[count:].sum())
        assert missed[0, 2] == pytest.approx(rest, abs=1e-6)
    _, selection = aim(torch.zeros(1, 1, 8), nothing, 0.3, [8], num_sink_pages=0)
    assert selection.chosen[0, :6].tolist() == [0, 1, 2, 3, 4, 5]
    for fixed, scores in ((torch.zeros(1, 1), -20.0), (nothing, -float("inf"))):
        missed, selection = aim(torch.full((1, 1, 6), scores), fixed, 0.1, [5])
        assert selection.num_chosen.tolist() == [0]
        assert missed[0, 3:].tolist() == [0, 5]


def test_by_hand() -> None:
    """Two residents stay, an empty place is filled first, then the worst resident gives way."""
    scores = make_scores(torch.tensor([[[5.0, 1.0, 4.0, 3.0, 0.0, 9.0]]]), [6])
    metadata = empty_metadata(1, 5)
    metadata.page_of[0] = ints(3, 6, 7, -1, 2)
    metadata.speculated[0] = torch.tensor([1, 1, 0, 0, 1], dtype=torch.int8)
    metadata, selection = check(scores, metadata, ints(8), ints(4), ints(5), num_sink_pages=2)
    # Pages 2 to 7 are worth 5 1 4 3 0 9: of the best, 7, 2, 4 and 5, places 2 and 4 hold two.
    assert metadata.page_of.tolist() == [[3, 4, 7, 5, 2]]
    assert selection.pages[0, :2].tolist() == [4, 5]
    assert selection.places[0, :2].tolist() == [1, 3]
    assert selection.chosen[0].tolist() == [1, 2, 3, 4]
    assert metadata.counters.tolist() == [[2, 2, 1, 1, 0]]
    assert metadata.speculated.tolist() == [[1, 0, 0, 0, 0]]


def test_a_guess_flags_what_it_recalls() -> None:
    scores = make_scores(torch.tensor([[[5.0, 1.0, 4.0, 3.0]]]), [4])
    metadata = empty_metadata(1, 3)
    metadata.page_of[0] = ints(1, 0, -1)
    metadata, _ = check(scores, metadata, ints(4), ints(1), ints(3), num_sink_pages=0)
    assert metadata.counters.tolist() == [[1, 0, 0, 0, 0]]
    metadata, _ = check(
        scores, metadata, ints(4), ints(3), ints(3), num_sink_pages=0, speculative=True
    )
    assert metadata.page_of.tolist() == [[2, 0, 3]]
    assert metadata.speculated.tolist() == [[1, 0, 1]]
    assert metadata.counters.tolist() == [[1, 0, 1, 0, 2]]
    metadata, _ = check(scores, metadata, ints(4), ints(2), ints(3), num_sink_pages=0)
    assert metadata.speculated.tolist() == [[0, 0, 1]]
    assert metadata.counters.tolist() == [[3, 0, 1, 1, 2]]


def test_ties_go_to_the_lowest_page_and_place() -> None:
    scores = make_scores(torch.zeros(1, 3, 70), [70])
    metadata = empty_metadata(1, 6)
    metadata.page_of[0] = ints(60, 61, 62, 63, 64, 65)
    metadata, _ = check(scores, metadata, ints(71), ints(4), ints(6), num_sink_pages=1)
    assert metadata.page_of.tolist() == [[1, 2, 3, 4, 64, 65]]


def test_minus_zero_is_zero() -> None:
    scores = make_scores(torch.tensor([[[-1.0, -0.0, 0.0, -0.0]]]), [4])
    metadata, _ = check(scores, empty_metadata(1, 2), ints(4), ints(2), ints(2), num_sink_pages=0)
    assert metadata.page_of.tolist() == [[1, 2]]


@pytest.mark.parametrize("reduction", GROUP_REDUCTIONS)
@pytest.mark.parametrize("group", [1, 3])
def test_hidden_pages_come_last(group: int, reduction: str) -> None:
    """After those whose share underflows to nothing, too."""
    score = torch.full((2, group, 40), -500.0)
    score[:, :, 39] = 500.0
    score[:, :, :38] = HIDDEN
    score[1] = HIDDEN
    metadata, _ = check(
        make_scores(score, [40, 40]),
        empty_metadata(2, 3),
        ints(40, 40),
        ints(3, 3),
        ints(3, 3),
        num_sink_pages=0,
        reduction=reduction,
    )
    assert metadata.page_of.tolist() == [[0, 38, 39], [0, 1, 2]]


def test_nothing_to_select() -> None:
    """Fewer pages than sinks, no budget, no place, a page that is the only one."""
    scores = make_scores(torch.randn(5, 2, 10), [0, -2, 10, 10, 1])
    num_selected, num_places = ints(3, 3, 0, 3, 3), ints(3, 3, 3, 0, 3)
    metadata, _ = check(
        scores,
        empty_metadata(5, 3),
        ints(2, 0, 12, 12, 3),
        num_selected,
        num_places,
        num_sink_pages=2,
    )
    assert metadata.page_of.tolist() == [[-1] * 3] * 4 + [[2, -1, -1]]
    assert metadata.counters.sum(0).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(("rows", "pages", "places"), [(0, 5, 3), (2, 0, 3), (2, 5, 0), (2, 0, 0)])
def test_empty_shapes(rows: int, pages: int, places: int) -> None:
    scores, full = make_scores(torch.randn(rows, 2, pages), [pages] * rows), [3] * rows
    limits = ints(*[pages] * rows), ints(*full), ints(*full)
    check(scores, empty_metadata(rows, places), *limits, num_sink_pages=0, max_selected=3)


def test_places_beyond_the_limit_are_left_alone() -> None:
    scores = make_scores(torch.arange(8.0).reshape(1, 1, 8), [8])
    metadata = empty_metadata(1, 6)
    metadata.page_of[0] = ints(0, 1, -1, -1, 2, -1)
    metadata, _ = check(scores, metadata, ints(8), ints(5), ints(3), num_sink_pages=0)
    assert sorted(metadata.page_of[0, :3].tolist()) == [5, 6, 7]
    assert metadata.page_of[0, 3:].tolist() == [-1, 2, -1]


@pytest.mark.parametrize(("pages", "places"), [(4096, 200), (9000, 100), (300, 4500)])
def test_many_pages_and_places(pages: int, places: int) -> None:
    selectable = [pages, pages - 5]
    metadata = empty_metadata(2, places)
    sealed, limit = ints(*selectable), ints(places, places - 7)
    for _ in range(2):
        scores = make_scores(torch.randn(2, 2, pages), selectable)
        metadata, _ = check(
            scores, metadata, sealed, limit // 2, limit, num_sink_pages=0, reduction="softmax-mean"
        )


def test_equal_pages_of_many_heads() -> None:
    """A share of 1/29 each, which 16 heads add up to what depends on the order: the lowest win."""
    score = torch.full((1, 16, 174), -400.0)
    score[:, :, ::6] = 600.0
    limit = ints(5)
    how: dict[str, Any] = {"num_sink_pages": 0, "reduction": "softmax-mean"}
    scores = make_scores(score, [174])
    _, selection = check(scores, empty_metadata(1, 5), ints(174), limit, limit, **how)
    assert selection.pages[0].tolist() == [0, 6, 12, 18, 24]


@st.composite
def score_tensors(draw: st.DrawFn, rows: int, group: int, pages: int) -> tuple[Tensor, str]:
    """Scores with ties, all different, or so far apart that shares underflow; some pages hidden."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    kind = draw(st.sampled_from(["ties", "different", "far"]))
    if kind == "different":
        score = torch.randn(rows, group, pages, generator=generator) * 3
        reduction = draw(st.sampled_from(GROUP_REDUCTIONS))
    else:
        score = torch.randint(-3, 4, (rows, group, pages), generator=generator).float()
        # Sums of integers are exact, and where all heads agree there is nothing to round.
        reduction = "raw-mean"
        if kind == "far":
            score, reduction = score[:, :1].repeat(1, group, 1) * 200, "softmax-mean"
    if draw(st.booleans()):
        hidden = torch.rand(rows, 1, pages, generator=generator) < draw(st.sampled_from([0.3, 1.0]))
        score = score.masked_fill(hidden, HIDDEN)
    return score, reduction


def check_sequence(data: st.DataObject) -> None:
    """Whatever is selected one after another while pages are sealed, both agree on all of it."""
    draw = data.draw
    rows, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 5, 7, 16]))
    capacity, num_sink_pages = draw(st.sampled_from([3, 40, 300])), draw(st.integers(0, 2))
    limits = st.lists(st.integers(0, draw(st.sampled_from([2, 8, 140]))), min_size=rows)
    selected = ints(*draw(limits)[:rows])
    factor = draw(st.sampled_from([1, 2]))
    metadata = empty_metadata(rows, max(1, int(selected.max()) * factor))
    sealed = [draw(st.integers(0, capacity + num_sink_pages)) for _ in range(rows)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_select, "CHUNK_WARPS", {draw(st.sampled_from([32, 128, 1024])): 4})
        for _ in range(draw(st.integers(1, 6))):
            score, reduction = draw(score_tensors(rows, group, capacity))
            scores = make_scores(score, [count - num_sink_pages for count in sealed])
            options = {"num_sink_pages": num_sink_pages, "reduction": reduction}
            state = ints(*sealed), selected, selected * factor
            metadata, _ = check(scores, metadata, *state, **options)
            if factor > 1 and draw(st.booleans()):
                state = ints(*sealed), selected * factor, selected * factor
                metadata, _ = check(scores, metadata, *state, **options, speculative=True)
            max_sealed = capacity + num_sink_pages
            sealed = [min(max_sealed, count + draw(st.sampled_from([0, 1, 9]))) for count in sealed]


@settings(max_examples=10)
@given(st.data())
def test_sequences_of_selections(data: st.DataObject) -> None:
    check_sequence(data)


@pytest.mark.slow
@settings(max_examples=200)
@given(st.data())
def test_many_sequences_of_selections(data: st.DataObject) -> None:
    check_sequence(data)


def test_inputs_that_do_not_fit() -> None:
    scores, metadata = make_scores(torch.randn(2, 1, 5), [5, 5]), empty_metadata(2, 3)
    limit = ints(3, 3)

    def attempt(scores: Scores, page_of: Tensor, sealed: Tensor, **options: Any) -> None:
        options = {"num_sink_pages": 0, "max_selected": 3, "reduction": "raw-mean"} | options
        places = Places(page_of, limit)
        select(scores, sealed, places, limit, metadata.speculated, metadata.counters, **options)

    for change, message in (
        ({"reduction": "max"}, "reduction='max'"),
        ({"max_selected": -1}, "max_selected=-1"),
        ({"page_of": metadata.page_of.long()}, "page_of"),
        ({"page_of": metadata.page_of[:, :2]}, "page_of"),
        ({"page_of": metadata.page_of[0]}, "page_of"),
        ({"sealed": limit[:1]}, "sealed"),
        ({"scores": scores._replace(peak=scores.peak.half())}, "peak"),
        ({"scores": scores._replace(score=scores.score.transpose(0, 1))}, "score|peak"),
    ):
        whole: dict[str, Any] = {"scores": scores, "page_of": metadata.page_of, "sealed": limit}
        with pytest.raises(InputError, match=message):
            attempt(**(whole | change))
