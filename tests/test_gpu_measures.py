"""What the GPU check makes of what it measures, and how it finds what can be set."""

import functools
import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

from arkcache import CacheConfig
from benchmarks.gpu import profiling
from benchmarks.gpu.generating import Clock
from benchmarks.gpu.knobs import Knob, constants, options, turned
from benchmarks.gpu.models import tier_bytes
from benchmarks.gpu.profiling import Span, shares_of
from benchmarks.gpu.sweeps import in_turn, sweep
from tests.gpu.card import Card
from tests.gpu.outcome import Skipped
from tests.gpu.replays import refusal_is_an_error


def test_a_profile_counts_overlapping_streams_once() -> None:
    spans = [
        Span("attend", 10.0, 20.0),
        Span("gather", 15.0, 30.0),  # beside it, on another stream
        Span("attend", 34.0, 40.0),
        Span("select", 36.0, 37.0),
        Span("select", 50.0, 52.0),
    ]
    found = shares_of(spans[::-1], num_steps=2)
    assert (found["step_us"], found["busy_us"], found["gaps_us"]) == (21.0, 14.0, 7.0)
    assert (found["gaps"], found["longest_gap_us"]) == (1.0, 10.0)
    assert found["launches_per_step"] == 2
    assert list(found["kernels"]) == ["attend", "gather", "select"]
    assert found["kernels"]["attend"] == {"us": 8.0, "launches": 1.0}


def test_a_profile_keeps_the_longest_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "MAX_NAMES", 1)
    found = shares_of([Span("short", 0.0, 1.0), Span("long", 1.0, 5.0)], num_steps=1)
    assert list(found["kernels"]) == ["long"]
    assert found["others_us"] == 1.0


def test_the_first_tokens_do_not_count_for_the_rate() -> None:
    clock = Clock()
    clock.times = [0.0, 100.0, 200.0, 201.0, 202.0, 203.0]  # the prompt, two slow ones, three
    assert clock.rate(2) == pytest.approx(1.0)


class Kernel:
    """What a launcher launches, without Triton."""

    def __init__(self) -> None:
        self.launches: list[dict[str, int]] = []

    def __getitem__(self, grid: object) -> "functools.partial[None]":
        return functools.partial(self._launch, grid)

    def _launch(self, _grid: object, *_args: object, **kwargs: int) -> None:
        self.launches.append(kwargs)


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of kernels with a launcher whose sizes are remembered."""
    module = ModuleType("arkcache.kernels.triton_made_up")
    source = (
        "from functools import lru_cache\n"
        "PAGE_SPLIT = 128\n"
        "NUM_COUNTERS = 5\n"
        "CHUNKS = (256, 1024)\n"
        "FEW_WARPS = {256: 1, 1024: 4}\n"
        "@lru_cache\n"
        "def sizes():\n"
        "    return {'SPLIT': PAGE_SPLIT}\n"
        "def run(_number=0):\n"
        "    warps = FEW_WARPS[1024]\n"
        "    few = {'PAGES_AHEAD': 3, 'W': warps}\n"
        "    made_up_kernel[(1,)](7, **sizes(), num_stages=4, num_warps=8, **few)\n"
    )
    exec(source, vars(module))
    vars(module)["made_up_kernel"] = Kernel()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_knobs_are_found_turned_and_turned_back(launcher: ModuleType) -> None:
    kernel = launcher.made_up_kernel
    (split,) = constants("triton_made_up", "_SPLIT$")
    assert split == Knob("triton_made_up.PAGE_SPLIT", 128, (64, 256, 32, 512))
    ahead, stages, warps = options(launcher.run)
    assert (stages.where, stages.current) == ("made_up_kernel(num_stages)", 4)
    assert ahead.where == "made_up_kernel(PAGES_AHEAD)"
    assert warps.where == "made_up_kernel(num_warps)"
    assert stages.values == (3, 6, 2, 8, 1)
    with turned(split, 64):
        launcher.run()
    with turned(stages, 2):
        launcher.run()
    launcher.run()
    seen = [(one["SPLIT"], one["num_stages"]) for one in kernel.launches[1:]]
    assert seen == [(64, 4), (128, 2), (128, 4)]
    assert launcher.made_up_kernel is kernel


def test_entries_of_tables_are_turned_one_by_one(launcher: ModuleType) -> None:
    one, four = constants("triton_made_up", "FEW")
    assert one == Knob("triton_made_up.FEW_WARPS[256]", 1, (2, 4))
    assert four == Knob("triton_made_up.FEW_WARPS[1024]", 4, (2, 8, 1, 16))
    with turned(four, 8):
        assert launcher.FEW_WARPS == {256: 1, 1024: 8}
        launcher.run()
    launcher.run()
    assert [launch["W"] for launch in launcher.made_up_kernel.launches] == [8, 4]
    assert launcher.FEW_WARPS == {256: 1, 1024: 4}


SWEPT = {
    "attention": (
        *("PAGE_SPLIT", "WINDOW_SPLIT", "BLOCK_BYTES", "MAX_MERGED", "MERGE_BLOCK"),
        *("PAGES_AHEAD", "WINDOW_AHEAD", "num_warps"),
    ),
    "volumes": (
        *("PAGES_PER_BLOCK", "FEWEST_PROGRAMS", "MAX_STEPS", "AHEAD_BYTES"),
        *("BLOCKS_AHEAD", "num_warps"),
    ),
    "tokens": ("PAGES_PER_BLOCK", "MANY_PROGRAMS", "COLUMNS_AHEAD", "num_warps"),
    "select": (
        *("CHUNK_WARPS[256]", "CHUNK_WARPS[1024]", "CHUNK_WARPS[4096]"),
        "num_warps",
    ),
}
"""What each sweep turns, by the names that the modules of kernels have for it."""


@pytest.mark.parametrize("sweep_of", SWEPT)
def test_sweeps_turn_what_the_launchers_leave_open(sweep_of: str) -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu import micro, sweeps
    from benchmarks.gpu.bench import Bench

    bench = Bench(torch.device("cpu"), seconds=50)
    loads = {
        "attention": lambda: micro.attention_load(bench, 2560, "K16V16"),
        "volumes": lambda: micro.volumes_load(bench, 512),
        "tokens": lambda: micro.tokens_load(bench, 512),
        "select": lambda: micro.select_load(bench, 2560)[0],
    }
    module = {"volumes": "score", "tokens": "score"}.get(sweep_of, sweep_of)
    pattern = getattr(sweeps, f"OF_{sweep_of.upper()}")
    knobs = sweeps.knobs_of(loads[sweep_of](), f"triton_{module}", pattern)
    found = [re.split(r"\.|\(", knob.where)[1].rstrip(")") for knob in knobs]
    assert {*SWEPT[sweep_of]} <= {*found}
    assert all(found.count(name) == 1 for name in SWEPT[sweep_of])


def test_every_knob_has_its_turn_before_any_has_two() -> None:
    knobs = [Knob("a", 1, (2, 3)), Knob("b", 1, (4,))]
    assert [value for _, value in in_turn(knobs, None)] == [2, 4, 3]
    assert [value for _, value in in_turn(knobs, 1)] == [2, 4]


def test_a_launcher_without_knobs_is_skipped_with_a_reason(launcher: ModuleType) -> None:
    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.micro import Load

    bench = Bench(torch.device("cpu"), seconds=50)
    with pytest.raises(Skipped, match="leaves nothing open"):
        sweep(bench, Load(lambda _number: None, 1, 1), "triton_made_up", "CHUNK", 10.0)
    assert bench.notes["left_alone"] == ["triton_made_up.CHUNKS is (256, 1024)"]


def test_what_is_noted_is_told_at_once() -> None:
    told = []
    card = Card(torch.device("cpu"))
    card.tell = told.append
    card.note(first=1)
    card.note(second=2)
    assert told == [{"first": 1}, {"second": 2}]
    assert card.notes == {"first": 1, "second": 2}


def test_steps_that_were_not_replayed_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    replayed = []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replayed.append)
    with refusal_is_an_error(Card(torch.device("cuda", 0))) as replays:
        for number in range(3):
            torch.cuda.CUDAGraph.replay(number)  # type: ignore[arg-type]
        replays.check(3)
        with pytest.raises(AssertionError, match="3 graphs were replayed in 4 decode steps"):
            replays.check(4)
    assert replayed == [0, 1, 2]
    assert torch.cuda.CUDAGraph.replay == replayed.append


@pytest.mark.parametrize("preset", ["K16V16", "K4V4"])
def test_room_is_worked_out_with_the_page_size_of_the_device(preset: str) -> None:
    """Settings that leave the page size open know it on the device alone."""
    bench = cast(Any, SimpleNamespace(device=torch.device("cpu")))
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 64}
    config = CacheConfig.preset(preset, budget_tokens=512)
    found = tier_bytes(bench, config, sizes, 1024, 3)
    assert found == tier_bytes(bench, config.on("cpu"), sizes, 1024, 3)
    bits = {"K16V16": 16, "K4V4": 5}[preset]
    assert found[1] == 2 * 2 * 1024 * 3 * 2 * 64 * bits // 8
