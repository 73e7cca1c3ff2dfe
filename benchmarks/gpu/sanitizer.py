"""A tiny run of the manager under compute-sanitizer, in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.gpu.card import Card
from tests.gpu.outcome import Skipped

TOOLS = ("memcheck", "racecheck")
MAX_SECONDS = {"memcheck": 100, "racecheck": 60}
QUICK_SECONDS = 15
"""Racecheck is several times slower: it is run only after a memcheck that took no longer."""

FOUND = 9

RUN = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from gpu_check import find_repository
find_repository()
import torch
from benchmarks.gpu.sanitizer import tiny_run
tiny_run(torch.device("cuda", 0))
"""


def sanitizer(bench: Card) -> None:
    """Out-of-bounds accesses and races in shared memory; the run itself first."""
    if bench.rehearsing:
        tiny_run(bench.device, num_steps=1)
        return
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        raise Skipped("compute-sanitizer is not on PATH")
    for tool in TOOLS:
        start = time.monotonic()
        options = ["--tool", tool, "--error-exitcode", str(FOUND), "--report-api-errors", "no"]
        command = [program, *options, sys.executable, "-c", RUN]
        # Without torch's pool, every tensor is an allocation of its own with bounds of its own.
        env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(
                command, env=env, capture_output=True, text=True, timeout=MAX_SECONDS[tool]
            )
        except subprocess.TimeoutExpired:
            bench.note(**{tool: f"did not end within {MAX_SECONDS[tool]} s"})
            break
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-12:])
        if "Device not supported" in done.stdout:
            raise Skipped(f"compute-sanitizer refuses this machine: {tail}")
        assert done.returncode == 0, f"{tool}: exit code {done.returncode}\n{tail}"
        bench.note(**{tool: f"clean in {time.monotonic() - start:.0f} s"})
        if time.monotonic() - start > QUICK_SECONDS:
            break


def tiny_run(device: torch.device, num_steps: int = 6) -> None:
    """Two layers, both raw and packed: a prompt, then steps that seal, recall and speculate."""
    from arkcache import CacheConfig, KVCacheManager

    sizes = {"page_size": 4, "budget_tokens": 32, "num_sink_tokens": 4, "num_recent_tokens": 4}
    for bits in ({}, {"key_bits": 4, "value_bits": 2, "group_size": 8, "index": "tokens"}):
        settings = sizes | bits | {"num_dense_layers": 1, "device_pool_factor": 2.0}
        config = CacheConfig(backend="triton", **settings)
        manager = KVCacheManager(2, 2, 16, config, device=device)
        for tokens in (70, *[1] * num_steps):
            for layer in range(2):
                states = torch.randn(3, 2, 2, tokens, 16, device=device)
                manager.append(layer, states[0], states[1])
                manager.attend(layer, states[2].repeat(1, 3, 1, 1))
        manager.check_integrity()
