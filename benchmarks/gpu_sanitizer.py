"""A tiny run of the manager under compute-sanitizer, in a process of its own.

As a program it is that run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_common import Bench, Outcome, Skipped, find_repository

TOOLS = ("memcheck", "racecheck")
MOST_SECONDS = {"memcheck": 150, "racecheck": 90}
QUICK_SECONDS = 45
"""Racecheck is several times slower: it is run only after a memcheck that took no longer."""

FOUND = 9


def sanitizer(bench: Bench) -> Outcome:
    """Out-of-bounds accesses and races in shared memory; the run itself first."""
    if bench.rehearsing:
        tiny_run(bench.device)
        return Outcome()
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        raise Skipped("compute-sanitizer is not on PATH")
    details: dict[str, Any] = {}
    for tool in TOOLS:
        start = time.monotonic()
        options = ["--tool", tool, "--error-exitcode", str(FOUND), "--report-api-errors", "no"]
        command = [program, *options, sys.executable, __file__]
        # Without torch's pool, every tensor is an allocation of its own with bounds of its own.
        env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(
                command, env=env, capture_output=True, text=True, timeout=MOST_SECONDS[tool]
            )
        except subprocess.TimeoutExpired:
            details[tool] = f"did not end within {MOST_SECONDS[tool]} s"
            break
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-12:])
        if "Device not supported" in done.stdout:
            raise Skipped(f"compute-sanitizer refuses this machine: {tail}")
        assert done.returncode == 0, f"{tool}: exit code {done.returncode}\n{tail}"
        details[tool] = f"clean in {time.monotonic() - start:.0f} s"
        if time.monotonic() - start > QUICK_SECONDS:
            break
    return Outcome(details=details)


def tiny_run(device: torch.device) -> None:
    """Two layers, both raw and packed: a prompt, then steps that seal, recall and speculate."""
    from arkcache import CacheConfig, KVCacheManager

    sizes = {"page_size": 4, "budget_tokens": 32, "num_sink_tokens": 4, "num_recent_tokens": 4}
    for bits in ({}, {"key_bits": 4, "value_bits": 2, "group_size": 8, "index": "tokens"}):
        settings = sizes | bits | {"num_dense_layers": 1, "device_pool_factor": 2.0}
        config = CacheConfig(backend="triton", **settings)
        manager = KVCacheManager(2, 2, 16, config, device=device)
        for tokens in (70, *[1] * 6):
            for layer in range(2):
                states = torch.randn(3, 2, 2, tokens, 16, device=device)
                manager.append(layer, states[0], states[1])
                manager.attend(layer, states[2].repeat(1, 3, 1, 1))
        manager.check_integrity()


if __name__ == "__main__":
    find_repository()
    tiny_run(torch.device("cuda", 0))
