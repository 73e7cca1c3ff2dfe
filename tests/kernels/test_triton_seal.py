"""Appending and sealing on the device against plain torch on a CPU, bit for bit, and the reference.

Digests of volumes are rounded once: they err by at most twice what plain torch does in that dtype.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arkcache.config import INDEXES
from arkcache.errors import InputError
from arkcache.formats import BITS, PageFormat, PageLayout
from arkcache.kernels import reference, reference_seal
from arkcache.kernels.arguments import Counts, Places, Summaries, Window
from arkcache.kernels.torch_digest import BoundingVolumes
from arkcache.kernels.torch_pages import PagePacker
from arkcache.kernels.torch_tokens import TokenIndex
from arkcache.kernels.triton_append import append
from arkcache.kernels.triton_seal import seal_newest, seal_pages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUANTISED = [8, 4, 2]
VOLUMES = [index for index in INDEXES if index != "tokens"]
SHAPES = [(1, 1, 1), (33, 22, 11), (45, 45, 15), (64, 32, 32), (80, 40, 20), (96, 160, 32)]
LARGE = [(128, 128, 64), (256, 96, 32), (256, 256, 32), (64, 512, 512)]
"""Elements of a key, of a value, and of a group."""


def layout_of(
    key_bits: int, value_bits: int, dtype: torch.dtype, shape: tuple[int, int, int], page_size: int
) -> PageLayout:
    page_format = PageFormat(key_bits, value_bits, shape[2])
    return PageLayout(page_format, page_size, shape[0], shape[1], dtype.itemsize)


def random_pages(layout: PageLayout, dtype: torch.dtype, *lead: int) -> tuple[Tensor, Tensor]:
    """Keys with channels far from the origin, values with tokens of many sizes."""
    key = torch.randn(*lead, layout.page_size, layout.head_dim) + 3 * torch.randn(layout.head_dim)
    value = torch.randn(*lead, layout.page_size, layout.value_dim)
    value *= torch.randn(layout.page_size, 1).exp()
    return key.to(DEVICE, dtype), value.to(DEVICE, dtype)


def empty_bytes(*shape: int) -> Tensor:
    """Bytes that nobody has written."""
    return torch.full(shape, 255, dtype=torch.uint8, device=DEVICE)


def packed_by_kernel(key: Tensor, value: Tensor, layout: PageLayout) -> Tensor:
    packed = empty_bytes(*key.shape[:2], layout.nbytes)
    seal_pages(key, value, key, packed, first=0, layout=layout, index="centroid")
    return packed.cpu()


def assert_same_bytes(key: Tensor, value: Tensor, layout: PageLayout) -> None:
    """As plain torch packs on a CPU; on a GPU that divides by multiplying, and may differ."""
    expected = PagePacker(layout, key.dtype).pack(key.cpu(), value.cpu())
    assert torch.equal(packed_by_kernel(key, value, layout), expected)


@pytest.mark.parametrize(("key_bits", "value_bits"), list(itertools.product(BITS, BITS)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_formats(dtype: torch.dtype, key_bits: int, value_bits: int) -> None:
    layout = layout_of(key_bits, value_bits, dtype, (13, 18, 6), page_size=5)
    assert_same_bytes(*random_pages(layout, dtype, 1, 2), layout)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_dims(bits: int, shape: tuple[int, int, int]) -> None:
    layout = layout_of(bits, bits, torch.bfloat16, shape, page_size=5)
    assert_same_bytes(*random_pages(layout, torch.bfloat16, 1, 1), layout)


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [1, 32, 33, 128])
@pytest.mark.parametrize("shape", SHAPES + LARGE)
@pytest.mark.parametrize(("key_bits", "value_bits"), [(16, 16), (8, 2), (4, 4), (2, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dims_of_all(
    dtype: torch.dtype, key_bits: int, value_bits: int, shape: tuple[int, int, int], page_size: int
) -> None:
    layout = layout_of(key_bits, value_bits, dtype, shape, page_size)
    assert_same_bytes(*random_pages(layout, dtype, 1, 1), layout)


@pytest.mark.parametrize(("dims", "page_size"), [(20, 1), (20, 32), (20, 33), (256, 32), (64, 100)])
@pytest.mark.parametrize(("key_bits", "value_bits"), [(8, 4), (4, 2), (2, 8)])
def test_page_sizes(key_bits: int, value_bits: int, dims: int, page_size: int) -> None:
    """The last ones in several tiles."""
    shape = (dims, dims, dims // 4)
    layout = layout_of(key_bits, value_bits, torch.float16, shape, page_size)
    assert_same_bytes(*random_pages(layout, torch.float16, 1, 1), layout)


@given(
    key_bits=st.sampled_from(BITS),
    value_bits=st.sampled_from(BITS),
    dtype=st.sampled_from(DTYPES),
    page_size=st.integers(1, 9),
    shape=st.tuples(st.integers(1, 24), st.integers(1, 3), st.integers(1, 9)),
    exponent=st.integers(-24, 16),
    offset=st.sampled_from([0.0, 1.0, -30.0]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=25)
def test_any_page(
    key_bits: int,
    value_bits: int,
    dtype: torch.dtype,
    page_size: int,
    shape: tuple[int, int, int],
    exponent: int,
    offset: float,
    seed: int,
) -> None:
    """Of any size: from where scales vanish in fp16 to where numbers leave its range."""
    generator = torch.Generator().manual_seed(seed)
    shape = (shape[0], shape[1] * shape[2], shape[2])
    layout = layout_of(key_bits, value_bits, dtype, shape, page_size)
    bound = torch.finfo(dtype).max
    key, value = (
        ((torch.randn(1, 1, page_size, dim, generator=generator) + offset) * 2.0**exponent)
        .clamp(-bound, bound)
        .to(DEVICE, dtype)
        for dim in shape[:2]
    )
    assert_same_bytes(key, value, layout)


def pairs_page(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """A page of two tokens in which every pair [pairs, 2] is a channel of keys and a group."""
    key = pairs.T.contiguous()[None, None].to(DEVICE)
    value = pairs.flatten().expand(2, -1)[None, None].to(DEVICE)
    return key, value


@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # to inf, as on a GPU
def test_extremes(dtype: torch.dtype, bits: int) -> None:
    """Infinities are clipped; scales whose largest code would overflow are rounded down."""
    limits = torch.finfo(dtype)
    most = [limits.max, limits.max * 0.75, limits.max / 2, limits.max / 3, 65504.0, math.inf]
    numbers = [0.0, 1.0, limits.tiny, *most, *(-number for number in most)]
    pairs = torch.tensor(list(itertools.product(numbers, numbers)), dtype=dtype)
    layout = layout_of(bits, bits, dtype, (len(pairs), 2 * len(pairs), 2), page_size=2)
    assert_same_bytes(*pairs_page(pairs), layout)


@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_groups(dtype: torch.dtype, bits: int) -> None:
    """Numbers of every size; most of fp32 are none of fp16, so that zeros are rounded down."""
    numbers = torch.arange(-(2**15), 2**15, 37).to(torch.int16)
    numbers = numbers.view(torch.float16 if dtype == torch.float32 else dtype)
    numbers = numbers[numbers.isfinite()].to(dtype)
    if dtype == torch.float32:
        numbers = torch.cat((numbers * 1.0003, numbers * 100))
    layout = layout_of(bits, bits, dtype, (len(numbers), 2 * len(numbers), 2), page_size=2)
    assert_same_bytes(*pairs_page(numbers[:, None].expand(-1, 2)), layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_parts_keep_every_bit(dtype: torch.dtype) -> None:
    """NaN with its payload and infinities too: random bits, each pattern of them likely."""
    layout = layout_of(16, 16, dtype, (64, 64, 32), page_size=32)
    bits = torch.randint(0, 256, (2, 1, 1, 32, 64 * dtype.itemsize), dtype=torch.uint8)
    key, value = bits.to(DEVICE).view(dtype)
    assert key.isnan().any()
    assert torch.equal(packed_by_kernel(key, value, layout), bits.view(1, 1, -1))


@pytest.mark.parametrize(("key_bits", "value_bits"), [(16, 16), (4, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_borders(dtype: torch.dtype, key_bits: int, value_bits: int) -> None:
    """Slices of larger tensors are read and written, and nothing beside them."""
    layout = layout_of(key_bits, value_bits, dtype, (20, 16, 4), page_size=5)
    key, value = random_pages(layout, dtype, 2, 3)
    spare_key = torch.full((3, 7, 2, 24), math.nan, dtype=dtype, device=DEVICE)
    spare_key[:, 1:6, :, 2:22] = key.permute(1, 2, 0, 3)
    strided_key = spare_key[:, 1:6, :, 2:22].permute(2, 0, 1, 3)
    strided_value = value.repeat_interleave(2, dim=2)[:, :, ::2]
    buffer = empty_bytes(2, 4, layout.nbytes + 32)
    digests = torch.full((2, 9, 42), 7.0, dtype=dtype, device=DEVICE)
    seal_pages(
        strided_key,
        strided_value,
        strided_key,
        buffer[:, 1:, 16 : 16 + layout.nbytes],
        Summaries(digests[:, :, 1:41]),
        first=4,
        layout=layout,
        index="cuboid-max",
    )
    expected = empty_bytes(2, 4, layout.nbytes + 32).cpu()
    expected[:, 1:, 16 : 16 + layout.nbytes] = PagePacker(layout, dtype).pack(
        key.cpu(), value.cpu()
    )
    assert torch.equal(buffer.cpu(), expected)
    expected = torch.full((2, 9, 42), 7.0, dtype=dtype)
    expected[:, 4:7, 1:41] = reference.bounding_volume(key.cpu(), "cuboid-max").to(dtype)
    assert torch.equal(digests.cpu(), expected)


@pytest.mark.parametrize("rows", [0, 2])
def test_no_page(rows: int) -> None:
    layout = layout_of(4, 4, torch.float32, (8, 8, 8), page_size=4)
    key, value = random_pages(layout, torch.float32, rows, 0)
    assert packed_by_kernel(key, value, layout).shape == (rows, 0, layout.nbytes)


def assert_volumes(kind: str, dtype: torch.dtype, page_size: int, head_dim: int) -> None:
    """The error against fp64 is at most twice that of plain torch, which rounds every step."""
    layout = layout_of(16, 16, dtype, (head_dim, 1, 1), page_size)
    key, value = random_pages(layout, dtype, 2, 1)
    digest_key = (key + 1).to(dtype)
    truth = BoundingVolumes(kind).digest(digest_key[:, None].cpu().double())
    digests = torch.full((2, 4, truth.shape[-2]), math.nan, dtype=dtype, device=DEVICE)
    packed = empty_bytes(2, 1, layout.nbytes)
    summaries = Summaries(digests)
    seal_pages(key, value, digest_key, packed, summaries, first=2, layout=layout, index=kind)
    assert digests[:, [0, 1, 3]].isnan().all()
    plain = BoundingVolumes(kind).digest(digest_key[:, None].cpu())
    allowed = 2 * (plain.double() - truth).abs().max()
    floor = torch.finfo(torch.float32).eps * truth.abs().max()
    digest = digests[:, None, 2:3].transpose(-1, -2).cpu()
    assert (digest.double() - truth).abs().max() <= allowed + floor


@pytest.mark.parametrize(("page_size", "head_dim"), [(1, 20), (5, 33), (32, 80)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", VOLUMES)
def test_volumes(kind: str, dtype: torch.dtype, page_size: int, head_dim: int) -> None:
    assert_volumes(kind, dtype, page_size, head_dim)


@pytest.mark.parametrize("kind", ["cuboid-mean", "sphere-mean", "centroid"])
def test_volumes_of_several_tiles(kind: str) -> None:
    assert_volumes(kind, torch.bfloat16, page_size=128, head_dim=256)


@pytest.mark.parametrize(("page_size", "head_dim"), [(1, 20), (5, 33), (32, 64), (64, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", QUANTISED)
def test_token_digests(bits: int, dtype: torch.dtype, page_size: int, head_dim: int) -> None:
    """Bit for bit, and byte for byte where pages of odd sizes follow each other."""
    layout = layout_of(16, 16, dtype, (head_dim, 1, 1), page_size)
    key, value = random_pages(layout, dtype, 1, 2)
    key[:, :, :, 0], key[:, :, :, 1] = 0.0, 1000.0
    expected = TokenIndex(page_size, head_dim, bits).digest(key[:, None].cpu())[:, 0]
    digests = empty_bytes(1, 4, expected.shape[-1])
    seal_pages(
        key,
        value,
        key,
        empty_bytes(1, 2, layout.nbytes),
        Summaries(digests),
        first=1,
        layout=layout,
        index="tokens",
        index_bits=bits,
    )
    assert torch.equal(digests[:, 1:3].cpu(), expected)
    assert (digests[:, [0, 3]] == 255).all()


@pytest.mark.parametrize(
    ("page_size", "shape"), [(1, (20, 7, 7)), (5, (33, 64, 8)), (32, (80, 16, 16))]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_means(dtype: torch.dtype, page_size: int, shape: tuple[int, int, int]) -> None:
    """Of what is packed, not of what is digested; rounded once, lines of other pages untouched."""
    layout = layout_of(4, 2, dtype, shape, page_size)
    key, value = random_pages(layout, dtype, 2, 3)
    means = torch.full((2, 6, shape[0] + shape[1] + 3), math.nan, dtype=dtype, device=DEVICE)
    own, packed = means[:, :, 1:-2], empty_bytes(2, 3, layout.nbytes)
    how = {"first": 2, "layout": layout, "index": "centroid"}
    seal_pages(key, value, key + 1, packed, Summaries(None, own), **how)
    truth = torch.cat((key.double().mean(dim=2), value.double().mean(dim=2)), dim=-1)
    eps = torch.finfo(dtype).eps
    bound = truth.abs() * eps + torch.finfo(torch.float32).eps * float(truth.abs().max())
    assert ((own[:, 2:5].double() - truth).abs() <= bound).all()
    assert own[:, [0, 1, 5]].isnan().all()
    assert means[:, :, [0, -2, -1]].isnan().all()


@dataclass
class State:
    """What `seal_newest` reads and writes."""

    window: Window
    digest_window: Tensor
    counts: Counts
    slots: Tensor
    packed: Tensor
    places: Places | None
    summaries: Summaries

    def clone(self) -> "State":
        return State(*map(cloned, vars(self).values()))

    def assert_equal(self, other: "State") -> None:
        for name, held in vars(self).items():
            pairs = zip(tensors_of(held), tensors_of(vars(other)[name]), strict=True)
            for number, (own, expected) in enumerate(pairs):
                # As bytes: NaN marks what nobody has written.
                same = torch.equal(own.view(torch.uint8), expected.view(torch.uint8))
                assert same, (name, number)


def cloned(value: Any) -> Any:
    """A tensor, a tuple of such, or None."""
    if isinstance(value, tuple):
        return type(value)(*map(cloned, value))
    return None if value is None else value.clone()


def tensors_of(value: Any) -> list[Tensor]:
    """Those of a tensor, of a tuple of such, or of None."""
    fields = value if isinstance(value, tuple) else (value,)
    return [field for field in fields if field is not None]


def compare_means(state: State, expected: State) -> None:
    """To rounding: the order of a sum is its own affair. What was not written is NaN in both."""
    own, truth = state.summaries.means, expected.summaries.means
    assert own is not None
    eps = 4 * torch.finfo(own.dtype).eps
    torch.testing.assert_close(own, truth, rtol=eps, atol=eps, equal_nan=True)
    for each in (state, expected):
        each.summaries = Summaries(each.summaries.digests)


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


RECENT, SINKS, PLACES, CAPACITY = 6, 1, 3, 12


def state_of(layout: PageLayout, dtype: torch.dtype, index: str, lengths: Tensor) -> State:
    """Rows with a window of four pages; the last row has fewer places than the others."""
    rows, window = len(lengths), 4 * layout.page_size
    sealed = ((lengths - RECENT).clamp(min=0) // layout.page_size).int()
    key = torch.randn(rows, window, layout.head_dim).to(DEVICE, dtype)
    features = 2 * layout.head_dim
    if index == "tokens":
        features = 4 * layout.head_dim + -(-layout.head_dim // 4) * layout.page_size
        digests = empty_bytes(rows, CAPACITY, features)
    else:
        digests = torch.full((rows, CAPACITY, features), math.nan, dtype=dtype, device=DEVICE)
    dims = layout.head_dim + layout.value_dim
    means = torch.full((rows, CAPACITY, dims), math.nan, dtype=dtype, device=DEVICE)
    page_of = torch.full((rows, PLACES), -1, dtype=torch.int32, device=DEVICE)
    return State(
        Window(key, torch.randn(rows, window, layout.value_dim).to(DEVICE, dtype)),
        key * 2,
        Counts(lengths, sealed),
        empty_bytes(rows, SINKS + PLACES, layout.nbytes),
        empty_bytes(rows, layout.nbytes),
        Places(page_of, ints(*[PLACES] * (rows - 1), 1)),
        Summaries(digests, means),
    )


@pytest.mark.parametrize("index", ["cuboid-max", "tokens"])
@pytest.mark.parametrize(
    ("bits", "shape", "dtype"),
    [
        ((16, 16), (20, 12, 4), torch.bfloat16),
        ((16, 16), (5, 7, 7), torch.float16),
        ((4, 2), (20, 12, 4), torch.bfloat16),
        ((16, 8), (5, 7, 7), torch.float32),
    ],
)
def test_seal_newest(
    bits: tuple[int, int], shape: tuple[int, int, int], dtype: torch.dtype, index: str
) -> None:
    """A sink, a place, past the places, the ring's second round; and rows that seal nothing."""
    layout = layout_of(*bits, dtype, shape, page_size=5)
    pages = (1, 2, 4, 5, 9, 0, 3, 3)
    lengths = [RECENT + 5 * page for page in pages]
    lengths[-2] += 1
    state = state_of(layout, dtype, index, ints(*lengths, 4, 0))
    expected = state.clone()
    arguments = {"recent": RECENT, "num_sink_pages": SINKS, "layout": layout, "index": index}
    seal_newest(*vars(state).values(), **arguments)
    reference_seal.seal_newest(*vars(expected).values(), **arguments)
    compare_means(state, expected)
    state.assert_equal(expected)
    assert (state.packed[[5, 6, 8, 9]] == 255).all()
    assert (state.packed[[0, 1, 2, 3, 4, 7]] != 255).any(dim=-1).all()


@pytest.mark.parametrize("bits", [(16, 16), (4, 2)])
def test_seal_newest_of_what_attends_everything(bits: tuple[int, int]) -> None:
    layout = layout_of(*bits, torch.bfloat16, (20, 12, 4), page_size=5)
    state = state_of(layout, torch.bfloat16, "cuboid-max", ints(6, 11, 16, 51, 52))
    state.slots = empty_bytes(5, CAPACITY, layout.nbytes)
    state.places, state.summaries = None, Summaries(None)
    expected = state.clone()
    arguments = {"recent": RECENT, "num_sink_pages": 0, "layout": layout, "index": "cuboid-max"}
    seal_newest(*vars(state).values(), **arguments)
    reference_seal.seal_newest(*vars(expected).values(), **arguments)
    state.assert_equal(expected)
    assert (state.slots[3, 8] != 255).any()


@pytest.mark.parametrize("index", ["cuboid-mean", "tokens"])
def test_token_by_token_is_the_prompt(index: str) -> None:
    """Appended and sealed one by one, pages and digests are those of `seal_pages`, bit for bit."""
    layout = layout_of(4, 2, torch.bfloat16, (20, 12, 4), page_size=5)
    state = state_of(layout, torch.bfloat16, index, ints(0, 0))
    state.places = state.places._replace(num_places=ints(PLACES, PLACES))
    key, value = random_pages(layout, torch.bfloat16, 2, 5)
    state.digest_window = state.window.key
    for token in range(25):
        append(
            key.flatten(1, 2)[None, :, token],
            value.flatten(1, 2)[None, :, token],
            state.window,
            state.counts,
            recent=RECENT,
            page_size=5,
        )
        arguments = {"recent": RECENT, "num_sink_pages": SINKS, "layout": layout, "index": index}
        seal_newest(*vars(state).values(), **arguments)
    assert state.counts.lengths.tolist() == [25, 25]
    assert state.counts.sealed.tolist() == [3, 3]
    packed = empty_bytes(2, 5, layout.nbytes)
    summaries = Summaries(*map(torch.empty_like, state.summaries))
    seal_pages(key, value, key, packed, summaries, first=0, layout=layout, index=index)
    assert torch.equal(state.slots[:, :3], packed[:, :3])
    assert torch.equal(state.packed, packed[:, 2])
    for own, expected in zip(state.summaries, summaries, strict=True):
        assert torch.equal(own[:, :3], expected[:, :3])
    assert state.places.page_of.tolist() == [[1, 2, -1]] * 2


@pytest.mark.parametrize(("dims", "window"), [((1, 1), 1), ((80, 33), 6), ((256, 64), 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_append(dtype: torch.dtype, dims: tuple[int, int], window: int) -> None:
    """Three tokens, to rows of different lengths, heads and channels of which lie apart."""
    lengths = ints(0, 1, window - 1, window, 9 * window + 3, 2_000_000_000)
    state = (
        Window(*(torch.randn(6, window, dim).to(DEVICE, dtype) for dim in dims)),
        Counts(lengths, torch.full_like(lengths, -7)),
    )
    expected = cloned(state[0]), cloned(state[1])
    for _ in range(3):
        key = torch.randn(3, 2 * dims[0] + 1, 2).to(DEVICE, dtype).transpose(1, 2)
        key = key.contiguous()[:, :, 1 : dims[0] + 1]
        value = torch.randn(2, 3, dims[1]).to(DEVICE, dtype).transpose(0, 1)
        append(key, value, *state, recent=4, page_size=3)
        reference_seal.append(key, value, *expected, recent=4, page_size=3)
        for held, truth in zip((*state[0], *state[1]), (*expected[0], *expected[1]), strict=True):
            assert torch.equal(held, truth)


def test_append_says_what_does_not_fit() -> None:
    key, value = torch.zeros(2, 3, 8), torch.zeros(2, 3, 4)
    window = Window(torch.zeros(6, 5, 8), torch.zeros(6, 5, 4))
    short = window.value[:, :4].clone()
    numbers, wide = torch.zeros(6, dtype=torch.int32), torch.zeros(6, dtype=torch.int64)
    counts, none = Counts(numbers, numbers), Window(*(plane[:, :0].clone() for plane in window))
    wrong = [
        ((key[0], value, window, counts), "key is .*expected .*any, any, any"),
        ((key[:1], value[:1], window, counts), "window.key is .*expected .*3, any, 8"),
        ((key[:1], value, window._replace(key=window.key[:3]), counts), "value is .*1, 3, any"),
        ((key, value[:, :, :3], window, counts), "window.value is .*expected .*6, 5, 3"),
        ((key.half(), value, window, counts), "key is torch.float16"),
        ((key[..., ::2], value, window, counts), "key is .*last stride 1"),
        ((key, value, window._replace(key=window.key.mT.contiguous().mT), counts), "contiguous"),
        ((key, value, window._replace(value=short), counts), "window.value is .*6, 5, 4"),
        ((key, value, none, counts), "0 tokens"),
        ((key, value, window, Counts(wide, numbers)), "counts.lengths is torch.int64"),
        ((key, value, window, Counts(numbers, numbers[:5])), "counts.sealed is .*expected .*6"),
    ]
    for arguments, message in wrong:
        with pytest.raises(InputError, match=message):
            append(*arguments, recent=4, page_size=3)
    with pytest.raises(InputError, match="page_size=0"):
        append(key, value, window, counts, recent=4, page_size=0)


def test_seal_pages_says_what_does_not_fit() -> None:
    layout = layout_of(16, 4, torch.float32, (8, 4, 2), page_size=5)
    key, value = random_pages(layout, torch.float32, 2, 3)
    packed = empty_bytes(2, 3, layout.nbytes)
    digests = torch.zeros(2, 6, 16, device=DEVICE)
    buffer, summaries = empty_bytes(2, 3, layout.nbytes + 1), Summaries(digests)
    means = [Summaries(None, each) for each in (digests, digests[..., :12], digests.half())]
    wrong = [
        ((key.double(), value, key, packed, summaries), 0, "cuboid-max", "key is torch.float64"),
        ((key.half(), value, key, packed, summaries), 0, "cuboid-max", "expected torch.float32"),
        ((key, value.half(), key, packed, summaries), 0, "cuboid-max", "value is torch.float16"),
        ((key, value[:, :2], key, packed, summaries), 0, "cuboid-max", "expected .*2, 3, 5, 4"),
        ((key, value, key[..., :4], packed, summaries), 0, "cuboid-max", "expected .*2, 3, 5, 8"),
        ((key, value, key, packed[:, :2], summaries), 0, "cuboid-max", "packed is"),
        ((key, value, key, packed.int(), summaries), 0, "cuboid-max", "expected torch.uint8"),
        ((key, value, key, buffer[:, :, 1:], summaries), 0, "cuboid-max", "multiples of the 4"),
        ((key, value, key, packed, summaries), 4, "cuboid-max", "expected room"),
        ((key, value, key, packed, summaries), -1, "cuboid-max", "expected room"),
        ((key, value, key, packed, summaries), 0, "sphere-max", "expected .*2, any, 9"),
        ((key, value, key, packed, summaries), 0, "tokens", "expected torch.uint8 .*2, any, 42"),
        ((key, value, key, packed, summaries), 0, "cubes", "one of cuboid-mean"),
        ((key, value, key, packed, means[0]), 0, "", "means is .* expected .*2, any, 12"),
        ((key, value, key, packed, means[2]), 0, "", "expected torch.float32"),
        ((key, value, key, packed, means[1]), 4, "", "means of 6 pages"),
    ]
    for arguments, first, index, message in wrong:
        with pytest.raises(InputError, match=message):
            seal_pages(*arguments, first=first, layout=layout, index=index)
    wide = layout_of(16, 16, torch.float64, (8, 4, 2), page_size=5)
    with pytest.raises(InputError, match="8 bytes per element"):
        seal_pages(
            key.double(), value.double(), key.double(), packed, first=0, layout=wide, index=""
        )
    assert (packed == 255).all()


def test_seal_newest_says_what_does_not_fit() -> None:
    layout = layout_of(4, 4, torch.float32, (8, 4, 2), page_size=5)
    state = state_of(layout, torch.float32, "cuboid-max", ints(11, 16))
    window, counts, places, summaries = state.window, state.counts, state.places, state.summaries
    short = window.key[:, :19]
    spread = empty_bytes(2, 4, layout.nbytes + 4)[:, :, : layout.nbytes]
    wrong = [
        ({"window": Window(*(ring[:, :19] for ring in window)), "digest_window": short}, "of 19"),
        ({"window": Window(window.key, window.key)}, "window.value is .*expected .*2, 20, 4"),
        ({"counts": counts._replace(lengths=counts.lengths.long())}, "lengths is torch.int64"),
        ({"places": places._replace(page_of=places.page_of[:1])}, "places.page_of is"),
        ({"places": places._replace(num_places=places.num_places[:1])}, "places.num_places is"),
        ({"packed": state.packed[:1]}, "packed is"),
        ({"slots": spread}, "contiguous slots"),
        ({"summaries": summaries._replace(digests=summaries.digests[:1])}, "digests is"),
        ({"summaries": summaries._replace(means=summaries.means[:, :, 1:])}, "means is"),
    ]
    for changed, message in wrong:
        with pytest.raises(InputError, match=message):
            seal_newest(
                **{**vars(state), **changed},
                recent=RECENT,
                num_sink_pages=SINKS,
                layout=layout,
                index="cuboid-max",
            )
