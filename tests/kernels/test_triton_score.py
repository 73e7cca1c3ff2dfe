"""Rating pages on the device against the reference, and against plain torch in the same dtype."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from arkcache.config import INDEXES
from arkcache.errors import InputError
from arkcache.kernels import reference_paged, triton_score
from arkcache.kernels.arguments import Scores
from arkcache.kernels.reference import volume_score
from arkcache.kernels.torch_digest import BoundingVolumes
from arkcache.kernels.torch_tokens import TokenIndex
from arkcache.kernels.triton_score import HIDDEN, PAGES_PER_BLOCK

device = "cuda" if torch.cuda.is_available() else "cpu"

VOLUMES = [index for index in INDEXES if index != "tokens"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps


def keys(rows: int, pages: int, page_size: int, head_dim: int) -> Tensor:
    """Keys far from the origin, as keys are."""
    offset = torch.randn(rows, 1, 1, head_dim) * 3
    return torch.randn(rows, pages, page_size, head_dim) + offset


def volumes(key: Tensor, kind: str) -> Tensor:
    """Digests [rows, pages, features] of keys [rows, pages, page_size, head_dim]."""
    return BoundingVolumes(kind).digest(key[None])[0].transpose(-1, -2).contiguous()


def tokens(key: Tensor, bits: int) -> Tensor:
    return TokenIndex(*key.shape[-2:], bits).digest(key[None])[0]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def compare(own: Scores, expected: Scores, allowed: float) -> None:
    """Same pages written, no score off by more; peaks and masses fit the kernel's own scores."""
    own = Scores(*(tensor.cpu() for tensor in own))
    written = ~expected.score.isnan()
    assert torch.equal(~own.score.isnan(), written)
    error = (own.score - expected.score).where(written, torch.zeros(())).abs()
    assert (error <= allowed).all(), f"{float(error.max())}, allowed {allowed}"
    rows, group, pages = own.score.shape
    padding = own.score.new_full((rows, group, -pages % PAGES_PER_BLOCK), float("-inf"))
    seen = own.score.masked_fill(~written | (expected.score == HIDDEN), float("-inf"))
    seen = torch.cat((seen, padding), dim=-1).unflatten(-1, (-1, PAGES_PER_BLOCK))
    assert torch.equal(own.peak, seen.amax(dim=-1))
    assert torch.equal(own.peak == float("-inf"), expected.peak == float("-inf"))
    base = own.peak.masked_fill(own.peak == float("-inf"), 0.0)
    torch.testing.assert_close(own.mass, (seen - base[..., None]).exp().sum(dim=-1))


def worst(plain: Tensor, expected: Tensor, size: Tensor) -> float:
    """Twice what plain torch errs by at most, and rounding in fp32 of sums of magnitude `size`."""
    written = ~expected.isnan() & (expected != HIDDEN)
    if not written.any():
        return 0.0
    error = float((plain.float() - expected)[written].abs().max())
    return 2 * error + 4 * EPS * float(size.max() + expected[written].abs().max())


def check_volumes(
    query: Tensor,
    digests: Tensor,
    sealed: Tensor,
    kind: str,
    num_sink_pages: int = 1,
    **options: Any,
) -> None:
    """Both on the same digests; plain torch is what a CPU runs, in the dtype of the model."""
    scale = 0.3
    expected = reference_paged.score_volumes(
        query, digests, sealed, num_sink_pages=num_sink_pages, kind=kind, scale=scale, **options
    )
    on_device = {name: tensor.to(device) for name, tensor in options.items()}
    own = triton_score.score_volumes(
        query.to(device),
        digests.to(device),
        sealed.to(device),
        num_sink_pages=num_sink_pages,
        kind=kind,
        scale=scale,
        **on_device,
    )
    rated = digests[:, num_sink_pages:]
    plain = BoundingVolumes(kind).score(query * scale, rated.transpose(-1, -2))
    size = volume_score(query.abs() * scale, rated.abs(), kind)
    compare(own, expected, worst(plain, expected.score, size))


def check_tokens(
    query: Tensor,
    digests: Tensor,
    sealed: Tensor,
    page_size: int,
    bits: int,
    num_sink_pages: int = 1,
    **options: Any,
) -> None:
    """Both on the same digests; plain torch multiplies dequantised keys in the model's dtype."""
    dtype, scale = query.dtype, 0.9 * query.shape[-1] ** -0.5
    sizes = {"num_sink_pages": num_sink_pages, "page_size": page_size, "bits": bits, "scale": scale}
    expected = reference_paged.score_tokens(query, digests, sealed, **sizes, **options)
    on_device = {name: tensor.to(device) for name, tensor in options.items()}
    own = triton_score.score_tokens(
        query.to(device), digests.to(device), sealed.to(device), **sizes, **on_device
    )
    codes, step, zero = reference_paged.unpack_tokens(
        digests[:, num_sink_pages:].contiguous(), query.shape[-1], bits
    )
    key = (codes * step + zero).flatten(1, 2)
    logit = (query * scale).to(dtype) @ key.to(dtype).transpose(-1, -2)
    plain = logit.float().unflatten(-1, (-1, page_size)).logsumexp(dim=-1)
    size = query.float().abs() * scale @ (codes * step + zero.abs()).flatten(1, 2).mT
    compare(own, expected, worst(plain, expected.score, size))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", VOLUMES)
def test_volumes(kind: str, dtype: torch.dtype) -> None:
    key, query = keys(3, 37, 16, 80).to(dtype), torch.randn(3, 5, 80).to(dtype)
    check_volumes(query, volumes(key, kind), ints(37, 20, 34), kind)


@pytest.mark.parametrize(
    ("head_dim", "group", "pages"),
    [(64, 1, 33), (96, 3, 1), (128, 4, 32), (256, 7, 65), (1, 2, 5), (300, 16, 9), (16, 20, 3)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["cuboid-mean", "sphere-max", "centroid"])
def test_shapes_of_volumes(
    kind: str, dtype: torch.dtype, head_dim: int, group: int, pages: int
) -> None:
    key, query = keys(2, pages, 5, head_dim).to(dtype), torch.randn(2, group, head_dim).to(dtype)
    check_volumes(query, volumes(key, kind), ints(pages, pages // 2), kind, num_sink_pages=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_tokens(bits: int, dtype: torch.dtype) -> None:
    key, query = keys(2, 36, 32, 80), torch.randn(2, 4, 80).to(dtype)
    check_tokens(query, tokens(key.to(dtype), bits), ints(36, 12), 32, bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("head_dim", "group", "page_size", "bits"),
    [
        (128, 4, 32, 2),
        (96, 3, 5, 4),
        (33, 5, 5, 8),  # headers at odd addresses
        (64, 1, 1, 2),
        (1, 2, 3, 4),
        (256, 7, 33, 2),
        (80, 16, 48, 8),
        (300, 2, 4, 4),
        (16, 20, 2, 2),
    ],
)
def test_shapes_of_tokens(
    head_dim: int, group: int, page_size: int, bits: int, dtype: torch.dtype
) -> None:
    key = keys(2, 7, page_size, head_dim).to(dtype)
    query = torch.randn(2, group, head_dim).to(dtype)
    check_tokens(query, tokens(key, bits), ints(7, 4), page_size, bits, num_sink_pages=0)


@pytest.mark.parametrize("pages", [1, 64, 140])
def test_several_blocks_per_program(pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program has less of them, and rows end inside a program and before it."""
    key, query = keys(3, pages, 8, 32), torch.randn(3, 4, 32)
    digests, sealed = volumes(key, "cuboid-mean"), ints(pages, pages // 3, 1)
    score = partial(triton_score.score_volumes, num_sink_pages=1, kind="cuboid-mean", scale=1.0)
    inputs = [tensor.to(device) for tensor in (query, digests, sealed)]
    one = score(*inputs)
    monkeypatch.setattr(triton_score, "FEWEST_PROGRAMS", 1)
    monkeypatch.setattr(triton_score, "MAX_STEPS", 3)
    check_volumes(query, digests, sealed, "cuboid-mean")
    more = score(*inputs)
    assert torch.equal(one.peak, more.peak)
    assert torch.equal(one.mass, more.mass)


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_warps_and_many(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_score, "MANY_PROGRAMS", 1)
    key, query = keys(2, 36, 32, 128), torch.randn(2, 4, 128).to(dtype)
    check_tokens(query, tokens(key.to(dtype), 2), ints(36, 12), 32, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_sizes_of_queries_and_keys(size: float, dtype: torch.dtype) -> None:
    """A query as large as fp16 holds, or as small; keys that fill the range of fp16."""
    key, query = keys(1, 5, 8, 64), torch.randn(1, 4, 64) * size
    check_tokens(query.to(dtype), tokens(key.to(dtype), 2), ints(5), 8, 2)
    wide = ((key - key.amin()) / (key.amax() - key.amin()) * 2 - 1) * 65000
    check_tokens((query / 1e5).to(dtype), tokens(wide.to(dtype), 2), ints(5), 8, 2)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_constant_pages_and_queries_of_nothing(bits: int) -> None:
    key, query = keys(1, 5, 8, 32), torch.randn(1, 4, 32)
    key[:, 2], query[:, 1] = 0.5, 0.0
    for dtype in DTYPES:
        check_tokens(query.to(dtype), tokens(key.to(dtype), bits), ints(5), 8, bits)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "page_size", "bits"),
    [
        (torch.float32, 33, 5, 5, 8),
        (torch.bfloat16, 128, 4, 32, 2),
        (torch.float16, 96, 1, 33, 4),
        (torch.float16, 16, 20, 2, 2),
    ],
)
@pytest.mark.parametrize("extra", ["softcap", "bias", "both"])
def test_tokens_under_a_softcap_and_a_mask(
    dtype: torch.dtype, head_dim: int, group: int, page_size: int, bits: int, extra: str
) -> None:
    """Of each token: pages of which all, some or no tokens are hidden; NaN where nobody reads."""
    pages, sealed = 37, ints(38, 20, 1)
    key = keys(3, pages + 1, page_size, head_dim).to(dtype)
    query, digests = torch.randn(3, group, head_dim).to(dtype), tokens(key, bits)
    bias = torch.randn(group, 3, (pages + 2) * page_size).transpose(0, 1)
    bias = bias.masked_fill(torch.rand(bias.shape) < 0.3, -float("inf"))
    bias[:, :, 5 * page_size : 7 * page_size] = -float("inf")
    for row, count in enumerate(sealed.tolist()):
        bias[row, :, count * page_size :] = float("nan")
    options: dict[str, Any] = {
        "num_sink_pages": 1,
        "page_size": page_size,
        "bits": bits,
        "scale": 0.2,
    }
    options |= {} if extra == "bias" else {"softcap": 1.5}
    options |= {} if extra == "softcap" else {"bias": bias}
    expected = reference_paged.score_tokens(query, digests, sealed, **options)
    on_device = [tensor.to(device) for tensor in (query, digests, sealed)]
    if extra != "softcap":
        options["bias"] = bias.to(device)
    own = triton_score.score_tokens(*on_device, **options)
    for row, count in enumerate(sealed.tolist()):
        mine, truth = (scores.score[row, :, : count - 1].cpu() for scores in (own, expected))
        # What the fp16 of a query's products with scales rounds, as without softcap and mask.
        torch.testing.assert_close(
            mine, truth, rtol=1e-3, atol=1e-5 if dtype.itemsize > 2 else 0.02
        )
    total = [scores.peak + scores.mass.log() for scores in (own, expected)]
    torch.testing.assert_close(total[0].cpu(), total[1], rtol=1e-3, atol=0.02)


def test_a_bias_of_another_shape_is_refused() -> None:
    key, query = keys(2, 3, 4, 16), torch.randn(2, 3, 16)
    how: dict[str, Any] = {"num_sink_pages": 0, "page_size": 4, "bits": 2, "scale": 1.0}
    for bias in (torch.zeros(2, 1, 12), torch.zeros(2, 3, 12).half()):
        with pytest.raises(InputError, match="bias"):
            triton_score.score_tokens(query, tokens(key, 2), ints(3, 3), bias=bias, **how)


def test_hidden_pages() -> None:
    """Alone, whole blocks, everything; beyond the last page they are not looked at."""
    key, query = keys(3, 70, 4, 32), torch.randn(3, 3, 32)
    sealed, hidden = ints(70, 50, 69), torch.rand(3, 69) < 0.3
    hidden[1, :32], hidden[2] = True, True
    check_volumes(query, volumes(key, "cuboid-mean"), sealed, "cuboid-mean", hidden=hidden)
    check_tokens(query, tokens(key, 2), sealed, 4, 2, hidden=hidden.to(torch.uint8))


@pytest.mark.parametrize("num_sink_pages", [0, 3, 40])
def test_rows_without_pages(num_sink_pages: int) -> None:
    key, query = keys(4, 40, 4, 32), torch.randn(4, 2, 32)
    sealed = ints(0, 2, 3, 4)
    check_volumes(query, volumes(key, "sphere-mean"), sealed, "sphere-mean", num_sink_pages)
    check_tokens(query, tokens(key, 4), sealed, 4, 4, num_sink_pages)


def test_no_rows() -> None:
    query, sealed = torch.empty(0, 2, 32), ints()
    check_volumes(query, torch.empty(0, 5, 64), sealed, "cuboid-max")
    digests = torch.empty(0, 5, 4 * 32 + 8 * 4, dtype=torch.uint8)
    check_tokens(query, digests, sealed, 4, 2)


def test_strides() -> None:
    """Queries as a model makes them, digests cut from more; the last stride is 1."""
    key = keys(2, 9, 4, 32)
    query, sealed = torch.randn(3, 4, 40)[:2, ::2, 3:35], ints(9, 8)
    digests = volumes(key, "cuboid-mean")
    whole = torch.randn(4, 12, 70)
    whole[::2, 2:11, :64] = digests
    check_volumes(query, whole[::2, 2:11, :64], sealed, "cuboid-mean")
    digests = tokens(key, 4)
    for shift in (0, 1):
        room = torch.zeros(4, 12, digests.shape[-1] + 3, dtype=torch.uint8)
        part = room[::2, 2:11, shift : shift + digests.shape[-1]]
        part.copy_(digests)
        check_tokens(query, part, sealed, 4, 4)


def test_inputs_that_do_not_fit() -> None:
    query, sealed = torch.randn(2, 3, 32), ints(5, 5)
    digests = torch.randn(2, 6, 64)
    packed = torch.zeros(2, 6, 4 * 32 + 8 * 4, dtype=torch.uint8)
    same: dict[str, Any] = {"query": query, "sealed": sealed, "num_sink_pages": 1, "scale": 1.0}
    box = same | {"digests": digests, "kind": "cuboid-mean"}
    index = same | {"digests": packed, "page_size": 4, "bits": 2}
    for change, message in (
        ({"kind": "tokens"}, "kind='tokens'"),
        ({"kind": "cube"}, "kind='cube'"),
        ({"kind": "sphere-max"}, r"digests is .*expected torch.float32 \[2, any, 33\]"),
        ({"digests": digests.half()}, "digests is torch.float16"),
        ({"digests": digests[:1]}, "digests"),
        ({"digests": digests.mT}, "digests"),
        ({"query": query[0]}, "query"),
        ({"query": query.long()}, "query"),
        ({"query": query.mT}, "query"),
        ({"sealed": sealed.long()}, "sealed"),
        ({"num_sink_pages": 7}, "num_sink_pages=7"),
        ({"num_sink_pages": -1}, "num_sink_pages=-1"),
        ({"hidden": torch.zeros(2, 6, dtype=torch.bool)}, "hidden"),
        ({"hidden": torch.zeros(2, 5)}, "hidden"),
    ):
        with pytest.raises(InputError, match=message):
            triton_score.score_volumes(**(box | change))
    for change, message in (
        ({"bits": 3}, "bits=3"),
        ({"page_size": 0}, "page_size=0"),
        ({"page_size": 5}, r"expected torch.uint8 \[2, any, 168\]"),
        ({"digests": packed.to(torch.int8)}, "digests is torch.int8"),
    ):
        with pytest.raises(InputError, match=message):
            triton_score.score_tokens(**(index | change))
