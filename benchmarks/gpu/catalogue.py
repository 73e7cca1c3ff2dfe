"""Every GPU check in its order: name, what it shows, where it is, its goal, how long it takes.

First what everything rests on, then the figures that tell most, then correctness in depth, then
what is long: whatever a run is cut off at, it has told the most by then. The seconds are guesses
until a run on a GPU corrects them; together they stay within the time of a run.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.check import Check, Goal, least, most

CONTEXT = 128 << 10


def _smoke(kernel: str, shows: str) -> Check:
    settings = {"kernel": kernel}
    place = "tests.gpu.smoke:smoke"
    return Check(f"smoke-{kernel}", place, shows, 1, settings=settings, is_quick=True)


def _test(name: str, test: str, shows: str, seconds: int, is_quick: bool = False) -> Check:
    return Check(name, f"tests.gpu.{test}", shows, seconds, is_quick=is_quick)


def _timed(
    name: str, place: str, shows: str, seconds: int, goal: Goal | None = None, **settings: Any
) -> Check:
    """A kernel by itself."""
    unit = "us" if goal is None else goal.unit
    is_quick = place != "attend_budget"
    return Check(
        name, f"benchmarks.gpu.micro:{place}", shows, seconds, goal, unit, settings, is_quick
    )


def _step(shape: str, context: int, batch: int, seconds: int, goal: Goal | None = None) -> Check:
    kind = {"8b": "an 8B Llama", "7b": "a 7B multi-head Llama"}[shape]
    return Check(
        f"step-{shape}-{context >> 10}k-b{batch}",
        "benchmarks.gpu.steps:whole_step",
        f"StaticCache over a decode step of {kind} at {context} tokens, batch {batch}, a tenth "
        "of the pages recalled",
        seconds, goal, "x", {"shape": shape, "context": context, "batch": batch},
    )  # fmt: skip


def _recalled(context: int) -> Check:
    return Check(
        f"recall-cost-{context >> 10}k",
        "benchmarks.gpu.steps:recalled_share",
        "that step over one in which nothing is recalled",
        0, most(1.2, 1.1, "x"), settings={"shape": "8b", "context": context, "batch": 1},
    )  # fmt: skip


def _profile(context: int, seconds: int) -> Check:
    return Check(
        f"profile-{context >> 10}k",
        "benchmarks.gpu.profiling:profiled_step",
        "five replayed steps kernel by kernel: the share of the time in which any runs, the gaps",
        seconds, unit="busy", settings={"shape": "8b", "context": context},
    )  # fmt: skip


def _throughput(preset: str, seconds: int) -> Check:
    settings = {"shape": "7b", "context": 30720, "preset": preset, "cap_gb": 40}
    return Check(
        f"throughput-7b-30k-{preset}",
        "benchmarks.gpu.steps:throughput",
        f"7B multi-head at 30k, {preset}, largest batches under 40 GB of GPU KV: tokens per second "
        "over StaticCache's",
        seconds, least(3, 6, "x"), settings=settings,
    )  # fmt: skip


def _sweep(name: str, seconds: int, **settings: Any) -> Check:
    return Check(
        f"sweep-{name}",
        f"benchmarks.gpu.sweeps:sweep_{name}",
        f"{name} as its launcher launches it over the best of other settings",
        seconds, unit="x", settings={"seconds": seconds - 4} | settings,
    )  # fmt: skip


FIRST = [
    Check("environment", "benchmarks.gpu.environment:environment",
          "GPU, driver, versions, memory", 2, is_quick=True),
    Check("peaks", "benchmarks.gpu.transfers:peaks",
          "copies of 256 MiB from and to pinned memory, and on the device", 4,
          unit="GB/s", is_quick=True),
    Check("compile", "tests.gpu.smoke:compile_kernels",
          "what most checks launch, compiled in parallel", 20, most_seconds=90),
    _smoke("append", "one case, equal to the bit"),
    _smoke("seal", "one page of a prompt and one of a step"),
    _smoke("copy", "gather, scatter, gather_lines: one case each"),
    _smoke("score", "boxes and tokens: one case each"),
    _smoke("select", "one case"),
    _smoke("attention", "16 bits and packed: one case each"),
]  # fmt: skip

KERNELS = [
    Check("gather-8k", "benchmarks.gpu.transfers:gather",
          "recall of pieces of 8 KiB over the bus's peak", 3,
          least(0.6, 0.8), settings={"nbytes": 8 << 10}, is_quick=True),
    Check("gather-16k", "benchmarks.gpu.transfers:gather",
          "recall of pieces of 16 KiB over the bus's peak", 3,
          least(0.6, 0.8), settings={"nbytes": 16 << 10}, is_quick=True),
    Check("backup", "benchmarks.gpu.transfers:backup", "BackupEngine over the bus's peak", 3,
          least(0.6, 0.8), is_quick=True),
    Check("register", "benchmarks.gpu.transfers:register",
          "host memory registered with the driver in chunks of 256 MiB, 1 and 2 GiB", 4,
          unit="GB/s", is_quick=True),
    _timed("scan", "scan_volumes", "digest scan of a layer of 128k tokens", 3,
           most(20, 12, "us"), context=CONTEXT),
    _timed("scan-tokens", "scan_tokens", "2-bit token index of a layer of 128k tokens", 4,
           most(35, 20, "us"), context=CONTEXT),
    _timed("select-time", "select_pages", "select in a layer of 128k tokens", 3,
           most(28, 10, "us"), context=CONTEXT),
    _timed("append-time", "append_token", "append in a layer", 2),
    _timed("seal-time", "seal_page", "seal_newest in a layer, 16 bits", 3, preset="K16V16"),
    _timed("seal-time-K4V2", "seal_page", "seal_newest in a layer, K4V2", 4, preset="K4V2"),
    _timed("attend-32k", "attend_budget", "2048 tokens in pages against torch over 32k", 4,
           least(4, 7, "x"), context=32 << 10, preset="K16V16"),
    _timed("attend-32k-K4V2", "attend_budget", "the same, pages packed as K4V2", 6,
           least(4, 7, "x"), context=32 << 10, preset="K4V2"),
    _timed("attend-128k", "attend_budget", "2048 tokens in pages against torch over 128k", 4,
           least(7, 14, "x"), context=CONTEXT, preset="K16V16"),
]  # fmt: skip

STEPS = [
    _step("8b", 32 << 10, 1, 30, least(1.0, 1.15, "x")),
    _recalled(32 << 10),
    _profile(32 << 10, 10),
    Check("floor", "benchmarks.gpu.profiling:floor",
          "a step whose attention reads nothing; as many empty kernels as a step launches", 3,
          unit="us", settings={"shape": "8b"}),
    _step("8b", CONTEXT, 1, 32, least(1.4, 1.5, "x")),
    _recalled(CONTEXT),
    _profile(CONTEXT, 14),
    Check("tokens-per-second", "benchmarks.gpu.generating:tokens_per_second",
          "generate() of an 8B Llama at 32k, replayed and eager: over StaticCache's graph", 20,
          least(0.9, 1.1, "x"), settings={"shape": "8b", "context": 32 << 10}),
    Check("prefill-32k", "benchmarks.gpu.prefill:prefill",
          "a prompt of 32k tokens read in chunks of 2048 over the same with DynamicCache", 18,
          most(1.5, 1.15, "x"), settings={"shape": "8b", "context": 32 << 10}),
    Check("hit-rate", "benchmarks.gpu.generating:hit_rates",
          "selected pages that were resident, by pool factor: the shipped model, 16k tokens", 16),
    _sweep("attention", 20, preset="K16V16"),
    _sweep("score", 8),
    _sweep("tokens", 7),
    _sweep("select", 8),
]  # fmt: skip

CORRECTNESS = [
    _test("append", "test_bytes:test_append", "equal to its reference to the bit", 3, True),
    _test("seal", "test_bytes:test_seal",
          "seal_pages and seal_newest, every format and index: equal to the bit", 14),
    _test("copy", "test_bytes:test_copies", "gather, scatter, gather_lines: equal to the bit", 4,
          True),
    _test("score", "test_numeric:test_score",
          "score_volumes and score_tokens: error at most twice that of plain torch", 14),
    _test("select", "test_numeric:test_select",
          "equal to its reference, selection and victims", 14),
    _test("attention", "test_attention:test_attention",
          "paged_attention, every format: error at most twice that of plain torch", 24),
    _test("no-waiting", "test_streams:test_no_waiting",
          "append and attend, plain and sealing, wait for nothing, nor does the driver", 9),
    _test("no-waiting-graphed", "test_generate:test_no_waiting_graphed",
          "nor do replayed steps", 6),
    _test("exactness", "test_generate:test_exactness",
          "greedy tokens with everything attended equal DynamicCache's, eager and graphed", 12),
    _test("manager", "test_manager:test_oracle",
          "12 scenarios, every step against the dense oracle", 22),
    _test("estimates", "test_manager:test_estimates",
          "pages that are not attended estimated, every step against the dense oracle", 8),
    _test("target", "test_manager:test_target",
          "the fewest pages for a target of missed mass, likewise", 8),
    _test("races", "test_streams:test_races",
          "hundreds of steps with streams held up: outputs and bytes of a cache that waits", 12),
    _test("two-managers", "test_memory:test_two_managers",
          "two caches in turn against their oracles; reset frees pinned memory", 9),
    _test("two-models", "test_generate:test_two_models",
          "two models in turn: the tokens of each", 5),
    _test("memory", "test_memory:test_memory",
          "torch has allocated no more than 1.1 times what stats() says", 5, True),
]  # fmt: skip

LONG = [
    Check("gather-16gib", "benchmarks.gpu.transfers:gather_large",
          "recall from 16 GiB, alone over the bus's peak, and beside a kernel that saturates the "
          "device's memory", 16,
          least(0.6, 0.8), settings={"nbytes": 16 << 10}, most_seconds=60, is_quick=True),
    _step("7b", 30720, 4, 30, least(3, 4, "x")),
    _throughput("K16V16", 40),
    _step("8b", 32 << 10, 4, 20, least(1.4, 1.6, "x")),
    Check("checkpoint", "benchmarks.gpu.generating:checkpoint",
          "a real model (--model FOLDER): tokens per second, hit rates, tokens equal", 20,
          unit="tok/s", most_seconds=120),
    Check("sanitizer", "benchmarks.gpu.sanitizer:sanitizer",
          "compute-sanitizer's memcheck, and racecheck if quick, over a tiny run", 20,
          most_seconds=200),
]  # fmt: skip

CHECKS = [*FIRST, *KERNELS, *STEPS, *CORRECTNESS, *LONG]
