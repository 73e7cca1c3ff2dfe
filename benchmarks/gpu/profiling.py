"""Where the time of a replayed step goes: kernel by kernel, between them, and what is left at best.

The floor under a step has two parts: the model with attention that reads nothing, and what the
device takes to start as many kernels that do nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.baseline import attending, captured
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.check import Outcome
from benchmarks.gpu.models import cache_config, check_room, filled_cache, make_model
from benchmarks.gpu.steps import TINY_SIZES, warm_steps
from tests.gpu.outcome import Skipped

NUM_STEPS = 5
MAX_NAMES = 24
"""Kernels that are kept by name, those that take longest."""


class Span(NamedTuple):
    """A kernel or a copy on the device, in microseconds."""

    name: str
    start: float
    end: float


def profiled_step(bench: Bench, shape: str, context: int) -> Outcome:
    """Five replayed steps, default settings, whatever they recall; the figure is busy time."""
    check_room(bench, shape, context, 1, "K16V16")
    name = f"launches {shape}"
    context, batch = bench.pick((context, 1), TINY_SIZES)
    model = make_model(bench, shape)
    with (
        filled_cache(bench, model, cache_config(bench), batch, context) as cache,
        warm_steps(bench, model, cache, batch, context) as steps,
    ):
        for number in range(NUM_STEPS):  # on the way to the next page that seals
            steps(number)
        found = shares_of(spans_of(bench, steps))
        steps.replays.check(2 * NUM_STEPS)
    bench.kept[name] = found["launches_per_step"]
    share = None if bench.rehearsing else found["busy_us"] / found["step_us"]
    return Outcome(share, details=found)


def spans_of(bench: Bench, run: Callable[[int], Any]) -> list[Span]:
    """What the device did in five calls of `run`; in a rehearsal, what the CPU did."""
    from torch.profiler import ProfilerActivity, profile

    kind = bench.pick(ProfilerActivity.CUDA, ProfilerActivity.CPU)
    device = bench.pick(torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU)
    bench.synchronize()
    with profile(activities=[kind]) as profiler:
        for number in range(bench.pick(NUM_STEPS, 1)):
            run(number)
        bench.synchronize()
    spans = [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == device
    ]
    if not spans:
        raise Skipped("the profiler saw no kernel: it needs CUPTI, and access to its counters")
    return spans


def shares_of(spans: Sequence[Span], num_steps: int = NUM_STEPS) -> dict[str, Any]:
    """Microseconds of a step by kernel, and those in which none ran.

    Args:
        spans: of so many steps, in any order; they may overlap, as streams do.
    """
    spans = sorted(spans, key=lambda span: span.start)
    totals: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    gaps, until = [], spans[0].start
    for span in spans:
        totals[span.name] += span.end - span.start
        counts[span.name] += 1
        if span.start > until:
            gaps.append(span.start - until)
        until = max(until, span.end)
    step = (until - spans[0].start) / num_steps
    idle = sum(gaps) / num_steps
    longest = sorted(totals, key=lambda name: -totals[name])
    kernels = {
        name[:80]: {
            "us": round(totals[name] / num_steps, 2),
            "launches": round(counts[name] / num_steps, 2),
        }
        for name in longest[:MAX_NAMES]
    }
    rest = sum(totals[name] for name in longest[MAX_NAMES:])
    return {
        "step_us": round(step, 1),
        "busy_us": round(step - idle, 1),
        "gaps_us": round(idle, 1),
        "gaps": round(len(gaps) / num_steps, 1),
        "longest_gap_us": round(max(gaps, default=0.0), 1),
        "launches_per_step": round(len(spans) / num_steps),
        "kernels": kernels,
        "others_us": round(rest / num_steps, 2),
    }


def floor(bench: Bench, shape: str) -> Outcome:
    """A step whose attention reads nothing, and a graph of as many empty kernels as a step has.

    The figure is microseconds of the first: no cache can make a step faster.
    """
    model = make_model(bench, shape)
    ids = torch.ones((1, 1), dtype=torch.int64, device=bench.device)

    def nothing(query: Tensor, _key: Tensor, _value: Tensor, _scale: float) -> Tensor:
        return query

    with attending(model, nothing), torch.inference_mode():
        step = captured(bench, lambda _: model(input_ids=ids, use_cache=False).logits)
    timing = bench.time_calls(step, repeats=bench.pick(20, 1))
    bench.note(without_attention=timing.asdict())
    launches = bench.kept.get(f"launches {shape}")
    if launches is None:
        bench.note(empty_kernels="no step was profiled in this process, so nobody counted them")
        return Outcome(timing.median_us)
    launch = bench.pick(lambda _: torch.cuda._sleep(0), lambda _: None)
    empty = bench.time_calls(bench.record(launch, 1, calls=launches)[0], repeats=20, calls=launches)
    bench.note(empty_kernels=launches, empty_kernel_us=round(empty.median_us, 3))
    return Outcome(
        timing.median_us, details={"empty_kernels_us": round(empty.median_us * launches, 1)}
    )
