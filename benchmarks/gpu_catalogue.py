"""Every GPU check: its name, what it shows, where it is, its aim, about how long it takes."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_common import Bench, Outcome


@dataclass(frozen=True)
class Aim:
    """What a figure should be at most, or at least."""

    bound: float
    unit: str
    is_most: bool

    def is_met(self, figure: float) -> bool:
        """Whether a figure does."""
        return figure <= self.bound if self.is_most else figure >= self.bound

    def __str__(self) -> str:
        return f"{'<=' if self.is_most else '>='} {self.bound:g} {self.unit}".rstrip()


def most(bound: float, unit: str = "") -> Aim:
    """An aim from above."""
    return Aim(bound, unit, is_most=True)


def least(bound: float, unit: str = "") -> Aim:
    """An aim from below."""
    return Aim(bound, unit, is_most=False)


@dataclass(frozen=True)
class Check:
    """One check. Its function is called with a `Bench` and `settings`, and returns an `Outcome`.

    Attributes:
        place: module and function, "gpu_micro:scan_volumes".
        shows: one line.
        seconds: about how long it takes; it is skipped where less is left.
        unit: of the figure.
        is_quick: whether a rehearsal takes about a second.
    """

    name: str
    place: str
    shows: str
    seconds: int
    aim: Aim | None = None
    unit: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    is_quick: bool = False

    @property
    def function(self) -> Callable[..., Outcome]:
        """What does it; the import may need Triton."""
        module, _, name = self.place.partition(":")
        function: Callable[..., Outcome] = getattr(importlib.import_module(module), name)
        return function

    def run(self, bench: Bench) -> Outcome:
        """Do it."""
        return self.function(bench, **self.settings)

    def verdict(self, figure: float | None) -> str:
        """ "ok" or "missed"; "ok" as well without an aim, or where nothing was timed."""
        if self.aim is None or figure is None or math.isnan(figure) or self.aim.is_met(figure):
            return "ok"
        return "missed"


def _timed(name: str, place: str, shows: str, aim: Aim | None = None, **settings: Any) -> Check:
    """A kernel by itself."""
    unit = "us" if aim is None else aim.unit
    is_quick = place != "attend_budget"
    return Check(name, f"gpu_micro:{place}", shows, 8, aim, unit, settings, is_quick)


def _step(context: int, batch: int, seconds: int) -> Check:
    return Check(
        f"step-8b-{context // 1024}k-b{batch}",
        "gpu_decode:whole_step",
        f"a decode step of an 8B Llama at {context} tokens, batch {batch}: a tenth recalled over "
        "nothing recalled; StaticCache beside it",
        seconds,
        most(1.1, "x"),
        "x",
        {"shape": "8b", "context": context, "batch": batch},
    )


def _throughput(preset: str, seconds: int) -> Check:
    return Check(
        f"throughput-7b-30k-{preset}",
        "gpu_decode:throughput",
        f"7B multi-head at 30k, {preset}, largest batches under 40 GB of GPU KV: tokens per second "
        "over StaticCache's",
        seconds,
        least(6, "x"),
        "x",
        {"shape": "7b", "context": 30720, "preset": preset, "cap_gb": 40},
    )


CONTEXT = 128 << 10

CHECKS = [
    Check("environment", "gpu_environment:environment", "GPU, driver, versions, memory", 2,
          is_quick=True),
    Check("peaks", "gpu_transfers:peaks",
          "copies of 256 MiB from and to pinned memory, and on the device", 5,
          unit="GB/s", is_quick=True),
    # Right, on the real compiler
    Check("append", "gpu_kernels:append", "equal to its reference to the bit", 10, is_quick=True),
    Check("seal", "gpu_kernels:seal",
          "seal_pages and seal_newest, every format and index: equal to the bit", 30),
    Check("copy", "gpu_kernels:copies", "gather, scatter, gather_lines: equal to the bit", 10,
          is_quick=True),
    Check("score", "gpu_numeric:score",
          "score_volumes and score_tokens: error at most twice that of plain torch", 30),
    Check("select", "gpu_numeric:select", "equal to its reference, selection and victims", 30),
    Check("attention", "gpu_attend:attention",
          "paged_attention, every format: error at most twice that of plain torch", 40),
    Check("manager", "gpu_manager:oracle", "12 scenarios, every step against the dense oracle", 60),
    Check("exactness", "gpu_generate:exactness",
          "greedy tokens with everything attended equal DynamicCache's, eager and graphed", 20),
    Check("no-waiting", "gpu_lanes:syncs",
          "append and attend, plain and sealing, wait for nothing, nor does the driver", 15),
    Check("no-waiting-graphed", "gpu_generate:graphed_syncs", "nor do replayed steps", 10),
    Check("races", "gpu_lanes:races",
          "hundreds of steps with lanes held up: the outputs and bytes of a cache that waits", 20),
    Check("two-managers", "gpu_memory:two_managers",
          "two caches in turn against their oracles; reset frees pinned memory", 15),
    Check("two-models", "gpu_generate:two_models", "two models in turn: the tokens of each", 8),
    Check("memory", "gpu_memory:memory",
          "what torch has allocated over what stats() says, staging included", 8,
          most(1.1, "x"), "x", is_quick=True),
    # Fast, by themselves
    Check("gather-8k", "gpu_transfers:gather", "recall of pieces of 8 KiB over the bus's peak", 8,
          least(0.6), settings={"nbytes": 8 << 10}, is_quick=True),
    Check("gather-16k", "gpu_transfers:gather", "recall of pieces of 16 KiB over the bus's peak", 8,
          least(0.6), settings={"nbytes": 16 << 10}, is_quick=True),
    Check("backup", "gpu_transfers:backup", "BackupEngine over the bus's peak", 5, least(0.8),
          is_quick=True),
    _timed("scan", "scan_volumes", "digest scan of a layer of 128k tokens", most(12, "us"),
           context=CONTEXT),
    _timed("scan-tokens", "scan_tokens", "2-bit token index of a layer of 128k tokens",
           most(20, "us"), context=CONTEXT),
    _timed("select-time", "select_pages", "select in a layer of 128k tokens", context=CONTEXT),
    _timed("append-time", "append_token", "append in a layer"),
    _timed("seal-time", "seal_page", "seal_newest in a layer, 16 bits", preset="K16V16"),
    _timed("seal-time-K4V2", "seal_page", "seal_newest in a layer, K4V2", preset="K4V2"),
    _timed("attend-32k", "attend_budget", "2048 tokens in pages against torch over 32k",
           least(7, "x"), context=32 << 10, preset="K16V16"),
    _timed("attend-32k-K4V2", "attend_budget", "the same, pages packed as K4V2",
           least(7, "x"), context=32 << 10, preset="K4V2"),
    _timed("attend-128k", "attend_budget", "2048 tokens in pages against torch over 128k",
           least(7, "x"), context=CONTEXT, preset="K16V16"),
    # Fast, as a whole
    _step(32 << 10, 1, 30),
    _step(CONTEXT, 1, 35),
    _step(32 << 10, 4, 35),
    Check("step-7b-30k-b4", "gpu_decode:whole_step",
          "a decode step of a 7B multi-head Llama at 30k, batch 4: StaticCache over a tenth "
          "recalled",
          60, least(3, "x"), "x",
          {"shape": "7b", "context": 30720, "batch": 4, "against": "static"}),
    _throughput("K16V16", 60),
    _throughput("K4V2", 45),
    _step(32 << 10, 16, 60),
    _step(CONTEXT, 4, 60),
    _step(CONTEXT, 16, 90),
    Check("sanitizer", "gpu_sanitizer:sanitizer",
          "compute-sanitizer's memcheck, and racecheck if quick, over a tiny run", 100),
]  # fmt: skip
