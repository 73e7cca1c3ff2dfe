"""Paged decode attention against the reference; what may not be read is NaN or out of range."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime import interpreter

from arkcache.errors import InputError
from arkcache.formats import BITS, PageFormat, PageLayout
from arkcache.kernels import reference, reference_attention, triton_attention
from arkcache.kernels.arguments import Counts, Estimates, PageSet, Window
from arkcache.kernels.torch_pages import PagePacker

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NOWHERE = 2**31 - 1
NAMES = (
    *("query", "slots", "chosen", "num_chosen", "page_of"),
    *("window_key", "window_value", "lengths", "sealed"),
)

Inputs = dict[str, Any]
"""What `paged_attention` is called with, tensor by tensor."""


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def inputs(
    dtype: torch.dtype = torch.float32,
    bits: tuple[int, int] = (16, 16),
    dims: tuple[int, int, int] = (24, 16, 16),
    group: int = 3,
    page_size: int = 5,
    num_sink_pages: int = 1,
    sealed: Sequence[int] = (9, 3, 0),
    num_chosen: Sequence[int] | None = (4, 1, 0),
    newest: Sequence[int] = (37, 1, 5),
    ring: int = 40,
) -> Inputs:
    """A state of one layer; dims are elements of a key, of a value and of a group of a value.

    num_chosen None attends all sealed pages. Room for two more chosen pages is left.
    """
    rows = len(sealed)
    page_format = PageFormat(*bits, dims[2])
    layout = PageLayout(page_format, page_size, dims[0], dims[1], dtype.itemsize)
    max_selected = max(sealed) if num_chosen is None else max(num_chosen) + 2
    num_slots = max_selected + (0 if num_chosen is None else num_sink_pages)
    slots = torch.full((rows, num_slots, layout.nbytes), 255, dtype=torch.uint8)
    chosen = torch.full((rows, max_selected), NOWHERE, dtype=torch.int32)
    page_of = torch.full((rows, max_selected), NOWHERE, dtype=torch.int32)
    packer = PagePacker(layout, dtype)
    window_key = torch.full((rows, ring, dims[0]), math.nan, dtype=dtype)
    window_value = torch.full((rows, ring, dims[1]), math.nan, dtype=dtype)
    for row, (pages, tokens) in enumerate(zip(sealed, newest, strict=True)):
        attended = torch.arange(pages)
        if num_chosen is not None:
            count, first = num_chosen[row], min(num_sink_pages, pages)
            places = torch.randperm(max_selected)[:count]
            chosen[row, :count] = places.int()
            held = torch.randperm(pages - first)[:count] + first
            page_of[row, places] = held.int()
            attended = torch.cat((attended[:first], num_sink_pages + places))
        states = [torch.randn(len(attended), page_size, dim).to(dtype) for dim in dims[:2]]
        slots[row, attended] = packer.pack(*states)
        line = (pages * page_size + torch.arange(tokens)) % ring
        window_key[row, line] = torch.randn(tokens, dims[0]).to(dtype)
        window_value[row, line] = torch.randn(tokens, dims[1]).to(dtype)
    given: Inputs = {
        "query": torch.randn(rows, group, dims[0]).to(dtype),
        "slots": slots,
        "chosen": None if num_chosen is None else chosen,
        "num_chosen": None if num_chosen is None else ints(*num_chosen),
        "page_of": None if num_chosen is None else page_of,
        "window_key": window_key,
        "window_value": window_value,
        "lengths": ints(*sealed) * page_size + ints(*newest),
        "sealed": ints(*sealed),
    }
    return given | {"layout": layout, "num_sink_pages": num_sink_pages, "scale": dims[0] ** -0.5}


def estimates_of(given: Inputs, spare: int = 3, bias: bool = False) -> Inputs:
    """Means of all pages, and what is not chosen to be estimated; NaN and ones beyond what counts.

    spare: pages that there is room for beyond the sealed ones.
    """
    rows, group, head_dim = given["query"].shape
    num_sink_pages, layout = given["num_sink_pages"], given["layout"]
    capacity = max(num_sink_pages, int(given["sealed"].max())) + spare
    dims = head_dim + layout.value_dim
    means = torch.full((rows, capacity, dims), math.nan, dtype=given["query"].dtype)
    estimated = torch.ones(rows, capacity - num_sink_pages, dtype=torch.int32)
    numbers = torch.full((rows, group, capacity), math.nan)
    for row, sealed in enumerate(given["sealed"].tolist()):
        means[row, :sealed] = torch.randn(sealed, dims).to(means)
        places = given["chosen"][row, : int(given["num_chosen"][row])].long()
        estimated[row, given["page_of"][row, places].long() - num_sink_pages] = 0
        numbers[row, :, :sealed] = torch.randn(group, sealed)
    numbers = numbers.masked_fill(torch.rand(numbers.shape) < 0.3, -math.inf)
    estimates: Inputs = {"means": means, "estimated": estimated}
    return given | estimates | ({"page_bias": numbers} if bias else {})


def run(given: Inputs) -> Tensor:
    """The kernels, on the device."""
    moved = {
        name: value.to(DEVICE) if isinstance(value, Tensor) else value
        for name, value in given.items()
    }
    output = triton_attention.paged_attention(**arguments_of(moved))
    assert output.dtype == given["query"].dtype
    assert output.is_contiguous()
    return output.cpu()


def expected_of(given: Inputs) -> Tensor:
    how = {name: value for name, value in given.items() if name not in ("tickets", "log_mass")}
    return reference_attention.paged_attention(**arguments_of(how))


def arguments_of(given: Inputs) -> Inputs:
    """The tensors as launchers take them, those that belong together in one tuple."""
    rest = dict(given)
    query, *pages = (rest.pop(name) for name in NAMES[:5])
    key, value, *counts = (rest.pop(name) for name in NAMES[5:])
    means, *estimates = (rest.pop(name, None) for name in ("means", "estimated", "page_bias"))
    return rest | {
        "query": query,
        "pages": None if pages[0] is None else PageSet(*pages),
        "window": Window(key, value),
        "counts": Counts(*counts),
        "estimates": None if means is None else Estimates(means, *estimates),
    }


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """What anybody would write, in the dtype of the inputs: `reference.attention` without fp32."""
    logits = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits + mask.to(query.dtype)
    if sink_logits is not None:
        logits = torch.cat((logits, sink_logits.to(query.dtype)[None, :, None, None]), dim=-1)
    return (logits.softmax(dim=-1)[..., : key.shape[2]] @ value).float()


def assert_as_good(given: Inputs) -> None:
    """As the reference in fp32; below, at most twice the error of plain PyTorch in the dtype."""
    output, truth = run(given), expected_of(given)
    if output.dtype == torch.float32:
        torch.testing.assert_close(output, truth, rtol=1e-5, atol=1e-5)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "attention", plain)
        usual = expected_of(given)
    bound = 2 * (usual - truth).abs().max() + torch.finfo(torch.float32).eps
    assert (output.float() - truth).abs().max() <= bound


def extras_of(given: Inputs, bias: str = "head") -> Inputs:
    """Softcap, sink logits and a bias that is NaN where nothing may be read."""
    rows, group, _ = given["query"].shape
    tokens = int(given["lengths"].max()) + 3
    shapes = {"head": (rows, group), "row": (rows, 1), "all": (1, 1)}
    numbers = torch.randn(*shapes[bias], tokens)
    if bias != "all":
        for row, length in enumerate(given["lengths"].tolist()):
            numbers[row, :, length:] = math.nan
    numbers = numbers.masked_fill(torch.rand(numbers.shape) < 0.3, -math.inf)
    return given | {
        "softcap": 2.0,
        "sink_logits": torch.randn(group, rows).T,
        "bias": numbers.expand(rows, group, tokens),
    }


@pytest.mark.parametrize(
    ("dtype", "dims"),
    [
        (torch.bfloat16, (64, 64, 32)),
        (torch.float16, (80, 40, 20)),
        (torch.float32, (96, 160, 32)),
        (torch.bfloat16, (128, 128, 32)),
        (torch.bfloat16, (256, 256, 32)),
    ],
)
def test_dims(dtype: torch.dtype, dims: tuple[int, int, int]) -> None:
    assert_as_good(inputs(dtype, dims=dims))
    assert_as_good(inputs(dtype, (8, 4), dims, sealed=(3, 1, 0), num_chosen=(2, 0, 0)))


@pytest.mark.parametrize(
    "dims", [(1, 1, 1), (33, 22, 11), (45, 45, 15), (20, 18, 6), (576, 512, 64)]
)
@pytest.mark.parametrize("bits", [(16, 16), (4, 2)])
def test_awkward_dims(bits: tuple[int, int], dims: tuple[int, int, int]) -> None:
    few = {"sealed": (2, 0), "num_chosen": (1, 0), "newest": (4, 1)}
    assert_as_good(inputs(torch.bfloat16, bits, dims, **few))


@pytest.mark.parametrize("key_bits", BITS)
@pytest.mark.parametrize("value_bits", BITS)
def test_formats(key_bits: int, value_bits: int) -> None:
    for dtype in DTYPES:
        few = {"sealed": (3,), "num_chosen": (2,), "newest": (1,)}
        assert_as_good(inputs(dtype, (key_bits, value_bits), **few))


@pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 16, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups(dtype: torch.dtype, group: int) -> None:
    few = {"sealed": (5,), "num_chosen": (3,), "newest": (9,)}
    assert_as_good(extras_of(inputs(dtype, group=group, **few)))


@pytest.mark.parametrize("page_size", [1, 5, 16, 32, 33, 100])
@pytest.mark.parametrize("bits", [(16, 16), (8, 4), (2, 2)])
def test_page_sizes(bits: tuple[int, int], page_size: int) -> None:
    few = {"sealed": (4, 1), "num_chosen": (2, 0), "newest": (page_size, 1)}
    given = inputs(torch.float16, bits, (8, 8, 4), page_size=page_size, ring=page_size, **few)
    assert_as_good(extras_of(given))


@pytest.mark.parametrize("ring", [1, 63, 111, 160, 600])
@pytest.mark.parametrize("dtype", DTYPES)
def test_windows(dtype: torch.dtype, ring: int) -> None:
    """Full and not, around the end of the ring and not; 600 tokens are three splits."""
    newest = (ring, max(1, ring // 2), 1, 0)
    given = inputs(dtype, sealed=(7, 2, 0, 0), num_chosen=(2, 0, 0, 0), newest=newest, ring=ring)
    assert_as_good(given)


@pytest.mark.parametrize("bias", ["head", "row", "all"])
def test_strides_of_biases(bias: str) -> None:
    assert_as_good(extras_of(inputs(bits=(4, 4)), bias))


@pytest.mark.parametrize("absent", ["softcap", "sink_logits", "bias"])
def test_extras(absent: str) -> None:
    assert_as_good(extras_of(inputs()) | {absent: None})


@pytest.mark.parametrize("num_sink_pages", [0, 1, 3])
def test_sinks_are_attended_as_far_as_they_are_sealed(num_sink_pages: int) -> None:
    sealed = (8, 3, 2, 1, 0)
    num_chosen = tuple(min(2, max(0, pages - num_sink_pages)) for pages in sealed)
    given = inputs(
        num_sink_pages=num_sink_pages, sealed=sealed, num_chosen=num_chosen, newest=(3,) * 5
    )
    assert_as_good(extras_of(given))


@pytest.mark.parametrize("bits", [(16, 16), (8, 4)])
def test_everything_sealed_is_attended(bits: tuple[int, int]) -> None:
    given = inputs(bits=bits, num_chosen=None)
    assert_as_good(given)
    assert_as_good(extras_of(given))


def test_only_a_window() -> None:
    """The whole context in the ring, without pages; with and without a layout."""
    given = inputs(sealed=(0, 0, 0), num_chosen=(0, 0, 0), newest=(700, 257, 1), ring=700)
    given |= dict.fromkeys(("slots", "chosen", "num_chosen", "page_of"))
    assert_as_good(extras_of(given))
    assert torch.equal(run(given | {"layout": None}), run(given))
    assert torch.equal(expected_of(given | {"layout": None}), expected_of(given))


def test_no_places() -> None:
    """Budgets of nothing but sinks and window, and of not even sinks."""
    for num_sink_pages in (1, 0):
        given = inputs(num_sink_pages=num_sink_pages, num_chosen=(0, 0, 0))
        given["slots"] = given["slots"][:, :num_sink_pages].contiguous()
        given |= {name: torch.empty(3, 0, dtype=torch.int32) for name in ("chosen", "page_of")}
        assert_as_good(extras_of(given))


@pytest.mark.parametrize("most_splits", [128, 3, 1])
def test_many_splits(monkeypatch: pytest.MonkeyPatch, most_splits: int) -> None:
    """23 of them, more than the merge takes at a time, or fewer and longer ones."""
    monkeypatch.setattr(triton_attention, "MAX_SPLITS", most_splits)
    counts: Inputs = {"sealed": (22, 9), "num_chosen": (18, 3), "newest": (600, 20)}
    given = inputs(torch.float16, page_size=128, dims=(16, 16, 16), ring=640, **counts)
    assert_as_good(extras_of(given))


def test_long_contexts_have_more_splits_than_short_ones_fill() -> None:
    """All sealed pages of a row among many slots that nobody has written."""
    given = inputs(sealed=(60, 2), num_chosen=None, newest=(3, 4), page_size=16)
    given["slots"] = torch.cat((given["slots"], torch.full_like(given["slots"], 255)), dim=1)
    assert_as_good(given)


@pytest.mark.parametrize("extras", [False, True])
def test_nothing_to_attend_gives_zeros(extras: bool) -> None:
    given = inputs(sealed=(0, 2, 2), num_chosen=(0, 1, 1), newest=(0, 5, 5))
    if extras:
        given["sink_logits"] = torch.randn(3, 3)
    given["bias"] = torch.zeros(3, 3, 15)
    given["bias"][1] = -math.inf
    output = run(given)
    assert not output[:2].any()
    assert output[2].abs().min() > 0
    torch.testing.assert_close(output, expected_of(given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 50.0, 0.1])
def test_large_logits(softcap: float | None) -> None:
    """One token takes all; the products do not fit fp16."""
    given = inputs(torch.float16, dims=(64, 16, 16)) | {"softcap": softcap, "scale": 1.0}
    given["query"] *= 1e4
    truth = expected_of(given)
    assert truth.isfinite().all()
    torch.testing.assert_close(run(given).float(), truth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("softcap", [0.01, 1.0, 30.0, 1e4])
def test_softcap_is_that_of_torch(softcap: float) -> None:
    """From where it caps everything to where it changes nothing."""
    assert_as_good(inputs() | {"softcap": softcap})


def test_strides_of_queries() -> None:
    given = inputs()
    expected = run(given)
    rows, group, dim = given["query"].shape
    plane = torch.full((group, rows, dim + 7), math.nan)
    view = plane.transpose(0, 1)[..., 3 : 3 + dim]
    assert torch.equal(run(given | {"query": view.copy_(given["query"])}), expected)


def test_no_rows() -> None:
    given = inputs()
    for name in NAMES:
        given[name] = given[name][:0]
    assert run(given).shape == (0, 3, 16)


def test_what_is_held_and_where_changes_nothing_but_rounding() -> None:
    """The same pages in other places, listed in another order."""
    given = inputs(num_sink_pages=1, sealed=(9,), num_chosen=(6,), newest=(7,))
    order = torch.randperm(8)
    moved = dict(given)
    moved["slots"] = given["slots"].clone()
    moved["slots"][:, 1:] = given["slots"][:, 1 + order]
    moved["page_of"] = given["page_of"][:, order].contiguous()
    places = order.argsort()[given["chosen"][0, :6].long()]
    moved["chosen"] = given["chosen"].clone()
    moved["chosen"][0, :6] = places[torch.randperm(6)].int()
    given, moved = (extras_of(each) for each in (given, moved))
    moved |= {name: given[name] for name in ("softcap", "sink_logits", "bias")}
    torch.testing.assert_close(run(moved), run(given), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reversed_order", [False, True])
@pytest.mark.parametrize(
    ("group", "dims", "bits"),
    [(1, (16, 16, 16), (16, 16)), (3, (24, 40, 20), (4, 2)), (16, (16, 16, 16), (8, 4))],
)
def test_the_last_program_merges(
    monkeypatch: pytest.MonkeyPatch,
    group: int,
    dims: tuple[int, int, int],
    bits: tuple[int, int],
    reversed_order: bool,
) -> None:
    """Whichever it is, to the bit what a launch of its own makes of it; and again after that."""
    counts: Inputs = {"sealed": (12, 3, 0), "num_chosen": (9, 1, 0), "newest": (520, 20, 1)}
    given = inputs(torch.bfloat16, bits, dims, group, page_size=32, ring=520, **counts)
    given |= {"tickets": ints(0, 0, 0).to(DEVICE)}
    for each in (given, extras_of(given)):
        expected = run(each | {"tickets": None})
        with monkeypatch.context() as patch:
            patch.setattr(triton_attention, "merge_kernel", None)
            if reversed_order:
                last_program_first(patch)
            for _ in range(2):
                assert torch.equal(run(each), expected)
                assert not given["tickets"].any()


def last_program_first(patch: pytest.MonkeyPatch) -> None:
    """Have the interpreter run the programs of a row in the opposite order."""
    if DEVICE != "cpu":
        pytest.skip("a GPU has an order of its own")
    builder = interpreter.interpreter_builder
    place = builder.set_grid_idx

    def opposite(x: int, y: int, z: int) -> None:
        place(x, builder.grid_dim[1] - 1 - y, z)

    patch.setattr(builder, "set_grid_idx", opposite)


@pytest.mark.parametrize("why", ["group", "splits", "wide"])
def test_what_one_program_is_not_to_merge(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """Many heads, many splits, wide values: a launch of its own does, and no ticket is drawn."""
    group, value_dim = (17 if why == "group" else 2), (136 if why == "wide" else 8)
    monkeypatch.setattr(triton_attention, "MAX_MERGED", 2 if why == "splits" else 32)
    few: Inputs = {"sealed": (5,), "num_chosen": (3,), "newest": (520,), "ring": 520}
    given = inputs(group=group, dims=(16, value_dim, 8), **few)
    given |= {"tickets": ints(7).to(DEVICE)}
    assert_as_good(given)
    assert given["tickets"].tolist() == [7]


@pytest.mark.parametrize(
    ("dtype", "dims", "bits"),
    [
        (torch.float32, (24, 16, 16), (16, 16)),
        (torch.bfloat16, (33, 22, 11), (4, 2)),
        (torch.float16, (64, 96, 32), (16, 8)),
    ],
)
@pytest.mark.parametrize("group", [1, 5])
def test_estimates(
    group: int, dtype: torch.dtype, dims: tuple[int, int, int], bits: tuple[int, int]
) -> None:
    """Of rows that leave out most pages, some, and none; with all else that attention may have."""
    counts: Inputs = {"sealed": (9, 3, 0), "num_chosen": (2, 2, 0), "newest": (12, 1, 5)}
    given = inputs(dtype, bits, dims, group, **counts)
    assert_as_good(estimates_of(given))
    assert_as_good(estimates_of(extras_of(given), bias=True))
    assert not torch.equal(run(estimates_of(given))[0], run(given)[0])


@pytest.mark.parametrize(("num_sink_pages", "page_size"), [(0, 1), (3, 5), (1, 33)])
def test_estimates_and_sinks(num_sink_pages: int, page_size: int) -> None:
    """Fewer pages than sinks, as many, and one more."""
    sealed = (8, 4, 3, 1, 0)
    num_chosen = tuple(min(2, max(0, pages - num_sink_pages)) for pages in sealed)
    given = inputs(
        num_sink_pages=num_sink_pages,
        sealed=sealed,
        num_chosen=num_chosen,
        newest=(3,) * 5,
        page_size=page_size,
    )
    assert_as_good(estimates_of(given))


@pytest.mark.parametrize("most_splits", [128, 2])
def test_many_estimates(monkeypatch: pytest.MonkeyPatch, most_splits: int) -> None:
    """600 pages are three splits, or two longer ones; another row has one, and room for all."""
    monkeypatch.setattr(triton_attention, "MAX_SPLITS", most_splits)
    counts: Inputs = {"sealed": (600, 4), "num_chosen": (3, 1), "newest": (2, 2)}
    given = estimates_of(inputs(page_size=1, dims=(16, 16, 16), **counts), bias=True)
    assert_as_good(given)
    assert_as_good(given | {"tickets": ints(0, 0).to(DEVICE)})


@pytest.mark.parametrize("with_tickets", [False, True])
def test_nothing_left_out_is_bit_equal_to_no_estimates(with_tickets: bool) -> None:
    """However many programs find nothing to estimate."""
    counts: Inputs = {"sealed": (9, 3, 1), "num_chosen": (8, 2, 0), "newest": (12, 1, 5)}
    given = inputs(torch.bfloat16, (8, 4), **counts)
    if with_tickets:
        given |= {"tickets": ints(0, 0, 0).to(DEVICE)}
    for each in (given, extras_of(given)):
        expected = run(each)
        for spare in (3, 4000):
            assert torch.equal(run(estimates_of(each, spare)), expected)


@pytest.mark.parametrize("with_tickets", [False, True])
def test_log_mass(with_tickets: bool) -> None:
    """Of all that is attended, sink logits included; -inf where that is nothing."""
    given = extras_of(inputs(sealed=(9, 3, 0), num_chosen=(4, 1, 0), newest=(37, 1, 0)))
    tickets = {"tickets": ints(0, 0, 0).to(DEVICE)} if with_tickets else {}
    for each in (given, given | {"sink_logits": None, "bias": None}, estimates_of(given)):
        own, expected = (torch.full((3, 3), math.nan) for _ in range(2))
        output = run(each | tickets)
        held = own.to(DEVICE)
        assert torch.equal(run(each | tickets | {"log_mass": held}), output)
        reference_attention.paged_attention(**arguments_of(each), log_mass=expected)
        torch.testing.assert_close(held.cpu(), expected, rtol=1e-5, atol=1e-5)
        nothing = (
            torch.full((3,), -math.inf) if each["sink_logits"] is None else each["sink_logits"][2]
        )
        assert torch.equal(held[2].cpu(), nothing)


REFUSED: dict[str, Inputs] = {
    "query": {"query": torch.zeros(3, 3, 25)},
    "stride": {"query": torch.zeros(3, 24, 3).transpose(1, 2)},
    "slots": {"slots": torch.zeros(3, 7, 11, dtype=torch.uint8)},
    "signed slots": {"slots": torch.zeros(3, 7, 800, dtype=torch.int8)},
    "chosen": {"chosen": torch.zeros(3, 6, dtype=torch.int64)},
    "half chosen": {"num_chosen": None},
    "half a list": {"chosen": None},
    "page_of": {"page_of": torch.zeros(2, 6, dtype=torch.int32)},
    "keys": {"window_key": torch.zeros(3, 24, 40).transpose(1, 2)},
    "values": {"window_value": torch.zeros(3, 40, 16, dtype=torch.float16)},
    "no window": {"window_key": torch.zeros(3, 0, 24), "window_value": torch.zeros(3, 0, 16)},
    "lengths": {"lengths": torch.zeros(3)},
    "sealed": {"sealed": torch.zeros(4, dtype=torch.int32)},
    "sink_logits": {"sink_logits": torch.zeros(3)},
    "bias": {"bias": torch.zeros(3, 1, 100)},
    "tickets": {"tickets": torch.zeros(3, 3, dtype=torch.int32)},
    "layout": {"layout": PageLayout(PageFormat(), 5, 24, 16, 2)},
    "slots without a layout": {"layout": None},
    "means": {
        "means": torch.zeros(3, 9, 24),
        "estimated": torch.zeros(3, 8, dtype=torch.int32),
    },
    "estimated": {
        "means": torch.zeros(3, 9, 40),
        "estimated": torch.zeros(3, 9, dtype=torch.int32),
    },
    "page_bias": {
        "means": torch.zeros(3, 9, 40),
        "estimated": torch.zeros(3, 8, dtype=torch.int32),
        "page_bias": torch.zeros(3, 1, 9),
    },
    "log_mass": {"log_mass": torch.zeros(3)},
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_does_not_fit_is_refused(wrong: str) -> None:
    with pytest.raises(InputError, match="expected"):
        run(inputs() | REFUSED[wrong])


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(64, 64, 32), (96, 96, 32), (128, 128, 32), (256, 256, 64)])
@pytest.mark.parametrize("bits", [(16, 16), (8, 4), (4, 4), (4, 2), (2, 2), (16, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_models(dtype: torch.dtype, bits: tuple[int, int], dims: tuple[int, int, int]) -> None:
    """Pages of 32 tokens, groups of 4 and 7, windows of 160."""
    counts: Inputs = {"sealed": (15, 3), "num_chosen": (11, 2), "newest": (160, 129)}
    for group in (4, 7):
        given = inputs(dtype, bits, dims, group, page_size=32, ring=160, **counts)
        assert_as_good(given)
        assert_as_good(extras_of(given))
