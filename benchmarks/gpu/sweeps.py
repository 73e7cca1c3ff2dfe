"""A kernel under other settings than its launcher's: which would have been faster on this GPU."""

from __future__ import annotations

import time
from itertools import zip_longest
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.check import Outcome
from benchmarks.gpu.knobs import Knob, constants, options, others, turned
from benchmarks.gpu.micro import Load, attention_load, select_load, tokens_load, volumes_load
from tests.gpu.outcome import Skipped

OF_ATTENTION = r"_SPLIT$|_AHEAD$|_BYTES$|MERGE"
OF_VOLUMES = r"_PER_|^FEWEST|_STEPS$|^BLOCKS_AHEAD|_BYTES$"
OF_TOKENS = r"_PER_|^MANY|^COLUMNS_AHEAD"
OF_SELECT = r"CHUNK|FEW|VARIANT|RADIX|BUCKETS|BITS$"
"""Names of the constants that a sweep turns, of a module of kernels."""

CONTEXT = 128 << 10
"""Tokens of the layer whose pages are rated and selected: 4096 pages."""


def sweep_attention(bench: Bench, preset: str, seconds: float) -> Outcome:
    """Splits, blocks, what is fetched ahead, who merges, warps; 2048 of 32k tokens."""
    load = attention_load(bench, 32 << 10, preset)
    return sweep(bench, load, "triton_attention", OF_ATTENTION, seconds)


def sweep_score(bench: Bench, seconds: float) -> Outcome:
    """Pages and programs, what is fetched ahead, warps of the digest scan."""
    load = volumes_load(bench, CONTEXT)
    return sweep(bench, load, "triton_score", OF_VOLUMES, seconds)


def sweep_tokens(bench: Bench, seconds: float) -> Outcome:
    """Pages, what is fetched ahead, warps of the token index's scan."""
    return sweep(bench, tokens_load(bench, CONTEXT), "triton_score", OF_TOKENS, seconds)


def sweep_select(bench: Bench, seconds: float) -> Outcome:
    """Chunks, warps and whatever else the module names as a variant."""
    load, _counters = select_load(bench, CONTEXT)
    return sweep(bench, load, "triton_select", OF_SELECT, seconds)


def sweep(bench: Bench, load: Load, module: str, pattern: str, seconds: float) -> Outcome:
    """Turn one knob at a time; the figure is the time as it is over the best found.

    Args:
        module: whose constants are turned, and with them stages and warps of what is launched.
        pattern: of the constants' names.
        seconds: after which nothing more is tried: nearly every value is compiled anew.
    """
    start, wanted = time.monotonic(), _result(load)
    knobs = knobs_of(load, module, pattern)
    bench.note(knobs=[knob.where for knob in knobs], left_alone=others(module, pattern))
    if not knobs:
        raise Skipped("the launcher leaves nothing open that can be set")
    present = bench.time(load.run, load.sets).median_us
    best, found, untried = (present, "as it is"), {}, []
    bench.note(as_it_is_us=round(present, 3))
    for knob, value in in_turn(knobs, most=bench.pick(None, 1)):
        name = f"{knob.where} {value} for {knob.current}"
        if time.monotonic() - start > seconds:
            untried.append(name)
            continue
        found[name] = _timed(bench, load, knob, value, wanted)
        bench.note(tried=found)
        if isinstance(found[name], float) and found[name] < best[0]:
            best = (found[name], name)
    bench.note(best=best[1], untried=untried)
    return Outcome(present / best[0])


def knobs_of(load: Load, module: str, pattern: str) -> list[Knob]:
    """Constants of a module and options of what is launched; what is both is turned as an option,
    of which more values are known to be worth a try."""
    open_options = options(lambda: load.run(0))
    names = {knob.where.rstrip(")").partition("(")[2] for knob in open_options}
    fixed = constants(module, pattern)
    return [knob for knob in fixed if knob.where.partition(".")[2] not in names] + open_options


def in_turn(knobs: list[Knob], most: int | None) -> list[tuple[Knob, int]]:
    """The first value of every knob, then the second, and so on, to at most so many of each."""
    values = zip_longest(*([(knob, value) for value in knob.values[:most]] for knob in knobs))
    return [turn for turns in values for turn in turns if turn is not None]


def _timed(bench: Bench, load: Load, knob: Knob, value: int, wanted: torch.Tensor | None) -> Any:
    """Microseconds with the knob at a value; why not, where that cannot be compiled or is wrong."""
    try:
        with turned(knob, value):
            result = _result(load)
            if wanted is not None and result is not None:
                close = {"rtol": 0.05, "atol": 0.05}  # other splits round otherwise
                torch.testing.assert_close(result, wanted, **close)
            return round(bench.time(load.run, load.sets).median_us, 3)
    except Exception as error:  # too much shared memory, a block that is no power of two, and so on
        return f"{type(error).__name__}: {str(error)[:120]}"


def _result(load: Load) -> torch.Tensor | None:
    """What a launch gives, where that is one tensor."""
    result = load.run(0)
    return result.float().clone() if isinstance(result, torch.Tensor) else None
