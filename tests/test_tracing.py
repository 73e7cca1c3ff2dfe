"""Traces: what is recorded is what steps did, recording changes nothing, files are whole."""

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save as to_bytes
from torch import Tensor

from arkcache import ArkCache, InputError, KVCacheManager
from arkcache.demo import run as demo
from arkcache.demo.models import load_model
from arkcache.tracing.file import load, save
from arkcache.tracing.recorder import Recorder
from arkcache.tracing.trace import Trace, trace_of
from tests.twins import small_config

HOST_BACKENDS = ("torch", "numba")
BACKENDS = (*HOST_BACKENDS, pytest.param("triton", marks=pytest.mark.slow))


class Run:
    """A manager on random data, alike for all of a seed: 60 tokens, then step by step."""

    def __init__(self, backend: str, *, heads: int = 2, batch: int = 2, **settings: Any) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.heads, self.batch = heads, batch
        config = small_config(backend=backend, **settings)
        self.manager = KVCacheManager(3, heads, 8, config)
        self.outputs: list[Tensor] = []
        self.rated: list[list[list[set[int]]]] = []
        self.append(60)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def append(self, tokens: int) -> None:
        for layer in range(3):
            key, value = (self.randn(self.batch, self.heads, tokens, 8) for _ in range(2))
            self.manager.append(layer, key, value)

    def steps(self, count: int, *, rated: bool = False) -> None:
        for _ in range(count):
            self.append(1)
            queries = [2 * self.randn(self.batch, 2 * self.heads, 1, 8) for _ in range(3)]
            if rated:
                self.rated.append([self.best(layer, queries[layer]) for layer in range(3)])
            self.outputs += [self.manager.attend(layer, queries[layer]) for layer in range(3)]

    def best(self, layer: int, query: Tensor) -> list[set[int]]:
        """The pages that rate highest, of each row: as many as the budget allows."""
        rating = self.manager.ratings(layer, query)
        assert rating is not None
        best = rating.flatten(0, 1).topk(min(5, rating.shape[2]), dim=1).indices + 1
        return [set(row) for row in best.tolist()]


def traced(run: Run, recorder: Recorder, count: int = 12, **how: Any) -> Trace:
    with run.manager.trace(recorder):
        run.steps(count, **how)
    return trace_of(recorder)


def rows_of(trace: Trace) -> Iterator[tuple[int, int, int, np.ndarray, np.ndarray]]:
    """Step, layer, row, its pages, and which of them were recalled."""
    starts = trace.starts
    for step, layer, row in zip(*np.nonzero(trace.counts >= 0), strict=True):
        first = starts[step, layer, row]
        own = slice(first, first + trace.counts[step, layer, row])
        yield step, layer, row, trace.pages[own], trace.recalled[own]


def assert_adds_up(trace: Trace, manager: KVCacheManager) -> None:
    """What a trace of all steps says is what the manager counted."""
    stats = manager.stats()
    assert trace.total("hits") == stats.pages_hit
    assert trace.total("recalled") == stats.pages_recalled
    assert trace.total("evicted") == stats.pages_evicted
    assert trace.total("bytes_recalled") == stats.bytes_recalled
    assert trace.layer("attended_tokens")[-1].sum() == stats.attended_tokens
    assert trace.layer("held_tokens")[-1].sum() == stats.total_tokens


# -- what is recorded -----------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_selected_pages_are_the_best_rated(backend: str, heads: int) -> None:
    run = Run(backend, heads=heads)
    trace = traced(run, Recorder(time_every=2), rated=True)
    seen = 0
    for step, layer, row, pages, _ in rows_of(trace):
        assert set(pages.tolist()) == run.rated[step][layer][row]
        assert (np.diff(pages) > 0).all()
        seen += 1
    assert seen == 12 * 3 * 2 * heads


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_are_recalled_that_were_not_at_hand(backend: str) -> None:
    run = Run(backend)
    trace = traced(run, Recorder(mass_every=2), count=4)
    assert_adds_up(trace, run.manager)
    recalled = np.zeros(trace.counts.shape[:2], np.int64)
    for step, layer, _, _, fresh in rows_of(trace):
        recalled[step, layer] += fresh.sum()
    assert np.array_equal(recalled, trace.layer("recalled"))
    selected = np.maximum(trace.counts, 0).sum(axis=2)
    assert np.array_equal(selected, trace.layer("hits") + trace.layer("recalled"))
    assert 0 < trace.recalled.sum() < len(trace.recalled)
    assert trace.total("evicted") > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_attention_over_the_traced_pages_is_the_output(backend: str) -> None:
    run, recorder = Run(backend), Recorder(mass_every=1)
    query = 2 * run.randn(2, 4, 1, 8)
    with run.manager.trace(recorder):
        run.append(1)
        output = run.manager.attend(1, query)
    trace = trace_of(recorder)
    key, value = run.manager.gather(1)
    for _, _, row, pages, _ in rows_of(trace):
        sequence, head = divmod(int(row), 2)
        tokens, _ = tokens_of(trace, pages, key.shape[2])
        heads = slice(2 * head, 2 * head + 2)
        logits = query[sequence, heads, 0] @ key[sequence, head, tokens].T * 8**-0.5
        expected = logits.softmax(dim=1) @ value[sequence, head, tokens]
        assert torch.allclose(output[sequence, heads, 0], expected, atol=1e-5)


def tokens_of(trace: Trace, pages: np.ndarray, length: int) -> tuple[list[int], list[int]]:
    """The tokens that a row attends in the first step of a layer: those of its sink, of the window,
    and of its pages; and how many are in each of these."""
    sealed = int(trace.layer("sealed_pages")[0].max()) // trace.counts.shape[2]
    window = range(4 * sealed, length)
    listed = [*range(4), *window, *(4 * page + t for page in pages.tolist() for t in range(4))]
    return listed, [4, len(window), *[4] * len(pages)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_tracing_changes_nothing(backend: str, heads: int, threads: int) -> None:
    """To the bit, whether threads have whole rows or share them, in every kind of sample."""
    with demo.threads(threads):
        plain, told = Run(backend, heads=heads, batch=1), Run(backend, heads=heads, batch=1)
        plain.steps(12)
        traced(told, Recorder(time_every=2, mass_every=3))
        plain.steps(4)
        told.steps(4)
    assert all(map(torch.equal, plain.outputs, told.outputs))
    assert plain.manager.stats() == told.manager.stats()


@pytest.mark.parametrize("settings", [{}, {"key_bits": 4, "value_bits": 4, "group_size": 8}])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("backend", HOST_BACKENDS)
def test_mass_is_the_softmax_over_what_is_attended(
    backend: str, softcap: float | None, settings: dict[str, int]
) -> None:
    run, recorder = Run(backend, **settings), Recorder(mass_every=1)
    query = 2 * run.randn(2, 4, 1, 8)
    with run.manager.trace(recorder):
        run.append(1)
        run.manager.attend(0, query, softcap=softcap)
    trace, at = trace_of(recorder), 0
    key, _ = run.manager.gather(0)
    for _, _, row, pages, _ in rows_of(trace):
        sequence, head = divmod(int(row), 2)
        tokens, sizes = tokens_of(trace, pages, key.shape[2])
        logits = query[sequence, 2 * head : 2 * head + 2, 0] @ key[sequence, head, tokens].T
        logits *= 8**-0.5
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        share = logits.softmax(dim=1).mean(dim=0)
        mass = trace.mass[at : (at := at + len(sizes))]
        assert np.allclose(mass, [float(one.sum()) for one in share.split(sizes)], atol=1e-5)
    assert at == len(trace.mass) > 0


def test_phases_are_timed_in_one_step_of_so_many() -> None:
    trace = traced(Run("numba"), Recorder(time_every=4, mass_every=None))
    timed = [0, 4, 8]
    for phase in ("score", "select", "recall", "attend"):
        known = np.nonzero((trace.layer(f"{phase}_ns") >= 0).all(axis=1))[0]
        assert known.tolist() == timed
    parts = sum(trace.layer(f"{phase}_ns")[timed] for phase in ("score", "select", "attend"))
    assert (parts <= trace.layer("total_ns")[timed]).all()
    assert (parts > 0).all()
    assert len(trace.mass_of) == 0
    latency = trace.step("latency_ns")
    assert (latency[:-1] >= trace.layer("total_ns").sum(axis=1)[:-1]).all()
    assert latency[-1] == -1  # none followed


@pytest.mark.parametrize("backend", BACKENDS)
def test_crops_sequences_and_prompts_between(backend: str) -> None:
    """What is at hand before a step changes; sums stay right, and no time spans a prompt."""
    run, recorder = Run(backend), Recorder(mass_every=2)
    with run.manager.trace(recorder):
        run.steps(3)
        run.manager.crop(48)
        run.steps(3)
        run.manager.keep_sequences(torch.tensor([1, 1, 0]))
        run.batch = 3
        run.steps(3)
        run.append(9)
        run.manager.attend(0, run.randn(3, 4, 9, 8))
        run.steps(3)
        run.manager.reset()
        run.append(60)
        before = trace_of(recorder)
        run.steps(2)
    trace = trace_of(recorder)
    assert (trace.counts >= 0).sum(axis=2)[:, 0].tolist() == [4] * 6 + [6] * 8
    stats = run.manager.stats()  # since the reset
    assert trace.total("recalled") - before.total("recalled") == stats.pages_recalled
    assert trace.total("hits") - before.total("hits") == stats.pages_hit
    assert trace.recalled.sum() == trace.layer("recalled").sum()
    assert trace.step("latency_ns")[8] == -1


@pytest.mark.parametrize("bound", [{"max_steps": 5}, {"max_bytes": 20_000}])
def test_a_trace_is_bounded(bound: dict[str, int]) -> None:
    run = Run("numba")
    recorder = Recorder(mass_every=3, **bound)
    trace = traced(run, recorder, count=40)
    assert 2 <= len(trace.steps) < 15
    assert trace.about["num_forgotten"] == 40 - len(trace.steps)
    assert trace.step("number")[-1] == 39
    assert_adds_up(trace, run.manager)
    assert trace.recalled.sum() == trace.layer("recalled").sum()
    assert sum(step.nbytes for step in recorder.steps) <= bound.get("max_bytes", 1 << 30)


def test_copies_are_not_traced() -> None:
    run, recorder = Run("numba"), Recorder()
    with run.manager.trace(recorder):
        run.steps(2)
        for other in (copy.deepcopy(run.manager), pickle.loads(pickle.dumps(run.manager))):
            other.append(0, run.randn(2, 2, 1, 8), run.randn(2, 2, 1, 8))
            other.attend(0, run.randn(2, 4, 1, 8))
        run.steps(1)
        with pytest.raises(InputError, match="traced already"), run.manager.trace(Recorder()):
            pass
        run.steps(1)
    run.steps(1)
    assert recorder.num_steps == 4


@pytest.mark.parametrize("wrong", [{"max_steps": 0}, {"time_every": 0}, {"mass_every": -1}])
def test_impossible_recorders(wrong: dict[str, int]) -> None:
    (name,) = wrong
    with pytest.raises(InputError, match=name):
        Recorder(**wrong)


def test_a_model_says_the_same() -> None:
    """Tokens and counters of `generate`, and layers numbered as in the model."""
    with demo.threads(1):
        model, tokenizer = load_model(None, torch.device("cpu"), "auto")
        text = "The value of amber is 4821. The value of birch is 1200. " * 12
        ids = tokenizer(text, return_tensors="pt").input_ids
        plain, told = (ArkCache(model, budget_tokens=128, num_dense_layers=2) for _ in range(2))
        recorder = Recorder(time_every=2, mass_every=4)
        how: dict[str, Any] = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
        expected = model.generate(ids, past_key_values=plain, **how)
        with told.trace(recorder):
            assert told.is_traced
            with pytest.raises(InputError, match="traced already"), told.trace(Recorder()):
                pass
            assert torch.equal(model.generate(ids, past_key_values=told, **how), expected)
    assert not told.is_traced
    assert plain.stats() == told.stats()
    trace = trace_of(recorder)
    assert trace.about["layers"] == list(range(2, len(told.layers)))
    assert trace.total("recalled") == told.stats().pages_recalled
    # The first token is the prompt's, the second one's step may be, the last one needs none.
    assert len(trace.steps) == 8


# -- files ----------------------------------------------------------------------------------------


def assert_same(trace: Trace, other: Trace) -> None:
    assert trace.about == other.about
    for name in ("steps", "layers", "counts", "pages", "recalled", "mass_of", "mass"):
        mine, its = getattr(trace, name), getattr(other, name)
        assert (mine.dtype, mine.shape) == (its.dtype, its.shape)
        assert np.array_equal(mine, its)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return traced(Run("numba", heads=3), Recorder(mass_every=2))


def test_a_file_holds_everything(trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "one.trace"
    save(trace, path)
    assert_same(trace, load(path))
    save(trace, path)  # over the one before
    assert [one.name for one in tmp_path.iterdir()] == ["one.trace"]
    nothing = trace_of(Recorder())
    save(nothing, path)
    assert_same(nothing, load(path))


def test_a_file_that_was_cut_off_is_refused(trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "one.trace"
    save(trace, path)
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"no trace, or was cut off"):
            load(path)


def test_what_is_no_trace_is_refused(trace: Trace, tmp_path: Path) -> None:
    path = tmp_path / "one.trace"
    path.write_bytes(b"<html>" * 1000)
    with pytest.raises(InputError, match="no trace"):
        load(path)
    path.write_bytes(to_bytes({"weight": np.zeros(3)}))
    with pytest.raises(InputError, match="no trace"):
        load(path)
    with pytest.raises(InputError, match="cannot read"):
        load(tmp_path / "none")
    with pytest.raises(InputError, match="cannot write"):
        save(trace, tmp_path / "none" / "one.trace")


def rewritten(path: Path, header: dict[str, str], **tensors: np.ndarray) -> None:
    """The file at `path` with other parts."""
    with safe_open(path, framework="numpy") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        path.write_bytes(to_bytes(held | tensors, file.metadata() | header))


DAMAGE: dict[str, dict[str, Any]] = {
    "another version": {"header": {"version": "2"}},
    "no layers": {"header": {"about": json.dumps({"num_sink_pages": 1})}},
    "fewer pages": {"counts": np.zeros((12, 3, 6), np.int32)},
    "no steps": {"steps": np.zeros((2, 4), np.int64)},
    "another dtype": {"layers": np.zeros((12, 3, 14), np.int32)},
    "a bomb": {"pages": np.zeros(9, np.uint8)},
    "a step that is not there": {"mass_of": np.full((1, 2), 99, np.int32)},
    "less mass": {"mass": np.zeros(1, np.float32)},
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_trace_is_refused(trace: Trace, tmp_path: Path, name: str) -> None:
    path, damage = tmp_path / "one.trace", dict(DAMAGE[name])
    save(trace, path)
    rewritten(path, damage.pop("header", {}), **damage)
    with pytest.raises(InputError, match=r"damaged trace|version 2"):
        load(path)
