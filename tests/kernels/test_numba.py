"""The CPU's compiled kernels against `kernels/reference.py`, torch and numpy, piece by piece."""

import copy
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from arkcache import InputError, KVCacheManager
from arkcache.engines.native import NativeEngine
from arkcache.formats import PageFormat, PageLayout
from arkcache.kernels import numba_compile, reference
from arkcache.kernels.numba_attend import (
    add_units,
    dot_units,
    unpack_keys,
    unpack_values,
    weigh,
)
from arkcache.kernels.numba_launch import DecodeStep, Digests, Lists, Scratch
from arkcache.kernels.numba_numbers import HIDDEN
from arkcache.kernels.numba_record import TOKEN_ROWS
from arkcache.kernels.numba_score import (
    BLOCK,
    score_token_codes,
    score_token_rows,
    score_volumes,
)
from arkcache.kernels.numba_select import BY_MEAN, BY_SHARE, count_common, rate, select
from arkcache.kernels.torch_hadamard import rotate
from arkcache.kernels.torch_pages import PagePacker
from arkcache.kernels.torch_token_rows import TokenRows
from arkcache.kernels.torch_tokens import TokenIndex
from arkcache.pages.policy import aggregate, page_shares
from tests.oracle import stored_rows
from tests.twins import Twins, small_config

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_BIAS = np.empty(0, np.float32)
NO_CAP = np.float32(0)


def lanes_of(group: int) -> int:
    return 1 if group == 1 else -(-group // 4) * 4


def in_lanes(query: Tensor) -> np.ndarray:
    """Queries [group, dim] as kernels read them: zeros up to whole fours of heads."""
    padded = torch.zeros(lanes_of(len(query)), query.shape[1])
    padded[: len(query)] = query
    return padded.flatten().numpy()


def as_bits(states: Tensor) -> np.ndarray:
    """Elements as kernels see them: bf16 as uint16, fp16 as int16."""
    kinds = {torch.bfloat16: np.uint16, torch.float16: np.int16, torch.float32: np.float32}
    if states.dtype == torch.float32:
        return states.contiguous().flatten().numpy()
    return states.contiguous().view(torch.int16).flatten().numpy().view(kinds[states.dtype])


def blocks_of(columns: Tensor) -> Tensor:
    """[..., pages] in blocks [blocks, ..., BLOCK]."""
    pages = columns.shape[-1]
    padded = torch.nn.functional.pad(columns, (0, -pages % BLOCK))
    return padded.unflatten(-1, (-1, BLOCK)).movedim(-2, 0).contiguous()


# -- score ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize("pages", [1, 63, 64, 200])
@pytest.mark.parametrize("kind", ["cuboid-mean", "sphere-max", "centroid"])
def test_volumes(kind: str, pages: int, group: int) -> None:
    query, keys = torch.randn(group, 12), torch.randn(1, pages, 5, 12)
    digest = reference.bounding_volume(keys, kind).bfloat16()
    expected = reference.volume_score(query[None], digest.float(), kind)[0]
    features = reference_features(query, kind)
    stride = -(-pages // BLOCK) * BLOCK
    score = np.full(lanes_of(group) * stride, np.nan, np.float32)
    blocks = as_bits(blocks_of(digest[0].T))
    size = features.shape[1]
    score_volumes(in_lanes(features), lanes_of(group), size, blocks, 0, pages, score, stride)
    actual = torch.from_numpy(score).view(-1, stride)[:group, :pages]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def reference_features(query: Tensor, kind: str) -> Tensor:
    shape = kind.partition("-")[0]
    more = {"cuboid": query.abs(), "sphere": query.norm(dim=1, keepdim=True)}
    return torch.cat((query, more[shape]), dim=1) if shape in more else query


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("page_size", [1, 4, 32])
@pytest.mark.parametrize("dim", [7, 16, 64])
def test_token_rows(dim: int, page_size: int, group: int) -> None:
    pages = 130
    query, keys = torch.randn(group, dim), torch.randn(pages, page_size, dim)
    index = TokenRows(page_size, dim)
    expected = torch.einsum("gd,ptd->gpt", query, stored_rows(keys)[0]).logsumexp(dim=2)
    rows = index.digest(keys[None, None])[0, 0]
    columns = blocks_of(rows[..., : index.half].permute(1, 2, 0))  # [blocks, tokens, half, BLOCK]
    scales = blocks_of(rows.view(torch.float32)[..., -1].T)
    whole = torch.cat((columns.flatten(1), scales.flatten(1).view(torch.uint8)), dim=1)
    stride = 3 * BLOCK
    score = np.full(lanes_of(group) * stride, np.nan, np.float32)
    rotated = torch.nn.functional.pad(rotate(query), (0, 2 * index.half - dim))
    given = (in_lanes(rotated), lanes_of(group), index.half, page_size, whole.flatten().numpy())
    score_token_rows(*given, 0, pages, NO_CAP, NO_BIAS, score, stride)
    actual = torch.from_numpy(score).view(-1, stride)[:group, :pages]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("page_size", [1, 8, 16, 32, 64])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dim", [7, 64])
def test_token_codes(dim: int, bits: int, page_size: int, group: int) -> None:
    """From a page on that is not the first, with a softcap and a mask beside it."""
    pages, first = 40, 3
    query, keys = torch.randn(group, dim), torch.randn(1, 1, pages, page_size, dim)
    index = TokenIndex(page_size, dim, bits)
    digest = index.digest(keys)[0]
    bias = torch.randn(group, pages * page_size)
    bias[:, ::7] = -math.inf
    paged = bias.view(1, group, pages, page_size)
    packed, stride = digest.flatten().numpy(), pages + 5
    in_bias = in_lanes(bias)
    for softcap, extra, mask in ((0.0, NO_BIAS, None), (2.5, in_bias, paged)):
        expected = index.log_mass(query[None], digest, softcap or None, mask)[0]
        score = np.full(lanes_of(group) * stride, np.nan, np.float32)
        given = (in_lanes(query), lanes_of(group), dim, page_size, bits, packed, first, pages)
        score_token_codes(*given, np.float32(softcap), extra, score, stride)
        actual = torch.from_numpy(score).view(-1, stride)[:group, first:pages]
        seen = expected[:, first:].clamp(min=float(HIDDEN))
        torch.testing.assert_close(actual, seen, rtol=1e-5, atol=2e-5)
        assert np.isnan(score[:first]).all()


# -- select ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [2, 5])
def test_ratings(group: int) -> None:
    score, fixed = torch.randn(1, group, 77) * 20, torch.randn(1, group) * 20
    for reduction, expected, mass in (
        (BY_MEAN, aggregate(score, "raw-mean"), torch.full((group,), float(HIDDEN))),
        (BY_SHARE, aggregate(score, "softmax-mean"), torch.full((group,), float(HIDDEN))),
        (BY_SHARE, page_shares(score, fixed), fixed[0]),
    ):
        rating = np.empty(77, np.float32)
        rate(score.flatten().numpy().copy(), 77, group, 77, reduction, mass.numpy(), rating)
        torch.testing.assert_close(torch.from_numpy(rating), expected[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("count", [1, 15, 1000])
def test_the_best_are_selected(count: int) -> None:
    """Negative, equal and infinite ones among them: of equal ones the first, in order."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        rating = generator.normal(size=count).astype(np.float32).round(1)
        rating[generator.random(count) < 0.1] = -np.inf
        rating[generator.random(count) < 0.02] = np.inf
        wanted = int(generator.integers(1, count + 1))
        chosen = np.full(wanted, -1)
        assert select(rating, count, wanted, np.empty(count, np.int32), chosen) == wanted
        best = sorted(range(count), key=lambda page: (-rating[page], page))[:wanted]
        assert chosen.tolist() == sorted(best)


def test_ratings_that_are_no_numbers_stay_in_bounds() -> None:
    rating = np.full(50, np.nan, np.float32)
    chosen = np.full(12, -1)
    assert select(rating, 50, 10, np.empty(50, np.int32), chosen) <= 10
    assert (chosen[10:] == -1).all()
    assert chosen.max() < 50


def test_what_two_lists_have_in_common() -> None:
    one, other = np.array([1, 3, 4, 9]), np.array([0, 3, 9, 11, 12])
    assert count_common(one, 4, other, 5) == 2
    assert count_common(one, 4, other, 0) == 0


# -- attend ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 3, 4, 9])
@pytest.mark.parametrize("dim", [5, 16, 32, 80, 128])
def test_units(dim: int, group: int, dtype: torch.dtype) -> None:
    """Scattered runs of tokens, the last of them short, against attention in fp64."""
    size, tokens = 6, 27
    lanes, heads = lanes_of(group), 1 if group == 1 else 4
    query = torch.randn(group, dim) * dim**-0.5
    keys, values = torch.randn(2, 5, size, dim).to(dtype)
    key_bits, value_bits = as_bits(keys), as_bits(values)
    step = size * dim * key_bits.itemsize
    order = np.array([3, 0, 4, 1, 2])
    units = [bits.ctypes.data + order * step for bits in (key_bits, value_bits)]
    capacity, at = tokens + 40, 2
    logits = np.full(lanes * capacity, np.nan, np.float32)
    dot_units(in_lanes(query), lanes, dim, key_bits, units[0], size, tokens, logits, capacity, at)
    peaks, masses = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    for lane in range(0, lanes, heads):
        run = logits[lane * capacity + heads * at : (lane + heads) * capacity]
        weigh(run, tokens, heads, peaks[lane:], masses[lane:])
    sums = np.zeros(lanes * dim, np.float32)
    add_units(logits, lanes, dim, value_bits, units[1], size, tokens, capacity, at, sums)
    result = torch.from_numpy(sums.reshape(lanes, dim) / masses[:, None])[:group]
    key, value = (plane[order].flatten(0, 1)[:tokens].double() for plane in (keys, values))
    expected = (query.double() @ key.T).softmax(dim=1) @ value
    assert float((result - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
    assert peaks[:group] == pytest.approx((query.double() @ key.T).amax(dim=1).numpy(), rel=1e-5)


def test_nothing_seen_weighs_nothing() -> None:
    logits = np.full(32, HIDDEN, np.float32)
    peaks, masses = np.empty(4, np.float32), np.empty(4, np.float32)
    weigh(logits, 5, 4, peaks, masses)
    assert masses.tolist() == [0.0] * 4
    assert (logits == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [24, 64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unpacking(bits: int, dim: int, dtype: torch.dtype) -> None:
    layout = PageLayout(PageFormat(bits, bits, 8 if dim == 24 else 32), 6, dim, dim, dtype.itemsize)
    packer = PagePacker(layout, dtype)
    packed = packer.pack(*torch.randn(2, 6, dim).to(dtype))
    expected = packer.unpack(packed)
    raw, cut = packed.numpy(), layout.key.nbytes
    kind = np.uint16 if dtype == torch.bfloat16 else np.int16
    out = np.empty(6 * dim, np.float32)
    unpack_keys(raw[: 4 * dim].view(kind), raw[4 * dim : cut].copy(), bits, dim, 6, out)
    check_unpacked(out, expected[0])
    meta = 2 * layout.value.meta_bytes
    numbers, codes = raw[cut : cut + meta].view(kind), raw[cut + meta :].copy()
    unpack_values(numbers, codes, bits, dim, layout.format.group_size, 6, out)
    check_unpacked(out, expected[1])


def check_unpacked(out: np.ndarray, expected: Tensor) -> None:
    """As torch unpacks it, but for the rounding to the model's dtype."""
    eps = torch.finfo(expected.dtype).eps
    actual = torch.from_numpy(out).view(expected.shape)
    assert float((actual - expected.float()).abs().max()) <= 4 * eps * max(
        1.0, float(expected.abs().max())
    )


# -- the whole step -------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("settings", [{}, {"key_bits": 4, "value_bits": 2, "group_size": 8}])
def test_threads_share_the_work(
    settings: dict[str, Any], heads: int, num_threads: int, threads: None
) -> None:
    """Whole rows each, or parts of rows that are merged: the same result, with all extras."""
    torch.set_num_threads(num_threads)
    twins = Twins(small_config(backend="numba", **settings), num_kv_heads=heads, batch=1, group=3)
    twins.append(150)
    for _ in range(6):
        twins.append(1)
        twins.attend()
    columns = twins.manager.num_columns
    mask = torch.rand(1, 3 * heads, 1, columns) > 0.3
    mask[..., -1] = True
    twins.attend(mask=mask, softcap=4.0, sinks=torch.randn(3 * heads))
    twins.check()


@pytest.mark.parametrize("page_size", [1, 4, 32])
@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
def test_models(head_dim: int, group: int, page_size: int) -> None:
    sizes = {"page_size": page_size, "budget_tokens": 160, "stream_block_tokens": 64}
    twins = Twins(small_config(backend="numba", **sizes), head_dim=head_dim, group=group, batch=1)
    twins.append(400)
    for _ in range(3):
        twins.append(1)
        twins.attend()


def test_hits_are_pages_that_were_read_the_step_before() -> None:
    twins = Twins(small_config(backend="numba"), num_layers=2)
    twins.append(100)
    twins.attend()
    stats = twins.manager.stats()
    assert (stats.pages_hit, stats.pages_recalled, stats.pages_evicted) == (0, 2 * 2 * 2 * 5, 0)
    assert stats.bytes_recalled == stats.pages_recalled * twins.page_bytes()
    assert stats.attended_tokens == 2 * 2 * (4 + 5 * 4 + 4)
    query = twins.query()
    for layer in range(2):
        twins.attend_layer(layer, query)
    before = twins.manager.stats()
    for layer in range(2):
        twins.attend_layer(layer, query)
    after = twins.manager.stats()
    assert after.pages_recalled == before.pages_recalled
    assert after.pages_hit == before.pages_hit + 2 * 2 * 2 * 5
    twins.keep_sequences([1, 1, 0])
    assert twins.manager.stats().pages_hit == after.pages_hit
    twins.check()


# -- what cannot reach compiled code --------------------------------------------------------------


def make_step() -> tuple[DecodeStep, dict[str, Any]]:
    sizes = dict.fromkeys(("batch", "kv_heads", "group", "lanes", "page_size"), 1)
    sizes |= {"head_dim": 8, "value_dim": 8}
    window = (torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8))
    lists = Lists(np.zeros((1, 4), np.int64), np.zeros(1, np.int64), np.zeros((1, 4), np.int64))
    bound = {
        "window": window,
        "digests": Digests(torch.zeros(1, 1, 1, 64), 1),
        "handles": np.zeros((1, 4), np.int64),
        "lists": lists,
    }
    return DecodeStep(torch.float32, Scratch(), **sizes), bound


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("window", (torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 7)), r"window value .*4, 8\]"),
        ("window", (torch.zeros(1, 1, 4, 8).half(),) * 2, "window key is torch.float16"),
        ("digests", Digests(torch.zeros(1, 1, 64, 2).transpose(2, 3), 1), "digests .* contiguous"),
        ("handles", np.zeros((2, 4), np.int64), r"handles is int64 \[2, 4\]: expected"),
        ("handles", np.zeros((1, 4), np.int32), "handles is int32"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, wrong: Any, message: str) -> None:
    step, bound = make_step()
    step.bind(**bound)
    with pytest.raises(InputError, match=message):
        step.bind(**(bound | {name: wrong}))


def test_a_folder_that_cannot_be_written_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process compiles for itself then."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/proc/no-such-folder")
    assert numba_compile.cache_folder.__wrapped__() is None


SUMS = """
import sys
import numpy as np
from arkcache.kernels.numba_compile import kernel
{functions}
kinds = [np.dtype(kind) for kind in sys.argv[1].split(",")]
for function in ({names}):
    for kind in kinds:
        assert function(np.arange(5, dtype=kind)).dtype == kind, (function, kind)
    if len(kinds) > 1:
        assert sum(function.stats.cache_hits.values()) == len(kinds), function.stats
"""


@pytest.mark.slow
def test_processes_may_compile_at_once(tmp_path: Path) -> None:
    """Each finds what it compiled, and what the other did, under the right signature."""
    names = [f"double{number}" for number in range(6)]
    functions = "".join(f"@kernel\ndef {name}(x):\n    return x + x\n" for name in names)
    script = tmp_path / "sums.py"
    script.write_text(SUMS.format(functions=functions, names=", ".join(names)))
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(script)]
    kinds = ("float32", "float64", "int64")
    running = [subprocess.Popen([*command, kind], env=environment) for kind in kinds]
    assert [process.wait(timeout=120) for process in running] == [0, 0, 0]
    subprocess.run([*command, ",".join(kinds)], env=environment, check=True, timeout=120)


# -- append ---------------------------------------------------------------------------------------


def fed(monkeypatch: pytest.MonkeyPatch, *, short: bool, **settings: Any) -> KVCacheManager:
    """A manager after a ragged prompt and 90 tokens, each attended, appended in the short way or
    in the long one."""
    with monkeypatch.context() as patch:
        if not short:
            for name in ("write_next", "seal_next"):
                patch.setattr(NativeEngine, name, lambda *_: False)
        config = small_config(backend="numba", **settings)
        manager = KVCacheManager(2, 3, 20, config, value_dim=12)
        generator = torch.Generator().manual_seed(0)
        for number in range(91):
            new = 43 if number == 0 else 1
            mask = None
            if number == 0:
                mask = torch.ones(2, 43, dtype=torch.bool)
                mask[1, :5] = False
            for layer in range(2):
                key, value, query = (
                    torch.randn(2, heads, new, dim, generator=generator)
                    for heads, dim in ((3, 20), (3, 12), (6, 20))
                )
                manager.append(layer, key, value, mask)
                manager.attend(layer, query)
        manager.check_integrity()
    return manager


PACKED = {"key_bits": 4, "rotation": "both", "group_size": 4}


@pytest.mark.parametrize("settings", [{}, {"page_size": 8}, {"index": "cuboid-mean"}, PACKED])
def test_short_way_to_append(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels write and seal is what torch does: pages and windows to the bit, digests but for
    codes that lie between two."""
    short, long = (fed(monkeypatch, short=short, **settings) for short in (True, False))
    for layer in range(2):
        for one, other in zip(short.gather(layer), long.gather(layer), strict=True):
            assert torch.equal(one, other)
        engines = [manager._layers[layer].engine for manager in (short, long)]
        one, other = (engine._digests.data for engine in engines)
        if engines[0]._digests.kind == TOKEN_ROWS:
            codes = engines[0]._digests._codes
            scales = [data[..., codes:].view(torch.float32) for data in (one, other)]
            torch.testing.assert_close(*scales, rtol=1e-6, atol=0)
            one, other = one[..., :codes], other[..., :codes]
        assert (one != other).float().mean() < 1e-4
        sealed = [manager._layers[layer].tokens.sealed for manager in (short, long)]
        assert (sealed[0] == sealed[1]).all()
        assert sealed[0].min() > 10
    assert short.stats().bytes_backed_up == long.stats().bytes_backed_up


def test_short_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """By every token but the first one of each layer, which no step came before."""
    taken: list[str] = []
    for name in ("write_next", "seal_next"):
        plain = getattr(NativeEngine, name)

        def counted(engine: NativeEngine, *states: Tensor, name: str, plain: Any) -> bool:
            done = bool(plain(engine, *states))
            taken.extend([name] * done)
            return done

        monkeypatch.setattr(NativeEngine, name, partialmethod(counted, name=name, plain=plain))
    fed(monkeypatch, short=True)
    assert len(taken) == 2 * 89
    # Sequences that differ by five tokens fill pages of four one after the other.
    assert taken.count("seal_next") in range(80, 100)


@pytest.mark.parametrize("change", ["copy", "reorder", "repeat"])
def test_short_way_after_a_change(change: str) -> None:
    """Several tokens before the first step: nothing is written where a layer was before."""
    twins = Twins(small_config(backend="numba"), batch=2)
    twins.append(60)
    for _ in range(3):
        twins.append(1)
        twins.attend()
    if change == "copy":
        twins.manager = copy.deepcopy(twins.manager)
    else:
        index = [1, 0] if change == "reorder" else [0, 0, 1]
        twins.keep_sequences(index)
    for _ in range(9):
        twins.append(1)
    twins.attend()
    twins.check()


def test_short_way_between_columns_of_padding() -> None:
    """Such columns count as more than they are towards the next full page."""
    twins = Twins(small_config(backend="numba"), batch=3)
    twins.append(60)
    for number in range(40):
        mask = torch.ones(3, 1, dtype=torch.bool)
        if number % 3 == 1:
            mask[number % 2] = False
        twins.append(1, mask)
        twins.attend()
    twins.check()
