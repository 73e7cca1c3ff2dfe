"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import arkcache
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.check import Outcome
from benchmarks.gpu_check import ROOT

PACKAGES = ("triton", "numpy", "transformers", "cupy-cuda13x", "cupy-cuda12x", "cupy")
LIMITS = ("memory.max", "memory.current", "cpu.max", "cpuset.cpus.effective")


def environment(bench: Bench) -> Outcome:
    """The GPU and its driver, versions, the commit, host memory and the limits on it."""
    details: dict[str, Any] = {
        "arkcache": arkcache.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        **_packages(),
        **_gpu(bench),
        "processor": _processor(),
        "num_cores": os.cpu_count(),
        "memory": _lines("/proc/meminfo", "MemTotal", "MemAvailable"),
        "locked_memory": _lines("/proc/self/limits", "Max locked memory"),
        "host_bytes": bench.host_bytes,
        "limits": _limits(),
    }
    return Outcome(details=details)


def commit() -> str | None:
    """The commit of the working tree, marked where files differ; None outside git."""
    described = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40")
    return described or None


def host_memory() -> int:
    """Bytes of RAM that this process may still take."""
    from arkcache.tiering.system_memory import available_memory_bytes

    return available_memory_bytes()


def _gpu(bench: Bench) -> dict[str, Any]:
    if bench.rehearsing:
        return {}
    properties = torch.cuda.get_device_properties(bench.device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "nvidia_smi": _output(
            "nvidia-smi",
            "--query-gpu=driver_version,pcie.link.gen.max,pcie.link.width.max,clocks.max.sm",
            "--format=csv,noheader",
        ),
    }


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _limits() -> dict[str, str]:
    folder = Path("/sys/fs/cgroup")
    return {
        name: (folder / name).read_text().strip() for name in LIMITS if (folder / name).exists()
    }


def _lines(path: str, *starts: str) -> list[str]:
    file = Path(path)
    lines = file.read_text().splitlines() if file.exists() else []
    return [" ".join(line.split()) for line in lines if line.startswith(starts)]


def _processor() -> str:
    names = _lines("/proc/cpuinfo", "model name")
    return names[0].partition(": ")[2] if names else platform.processor()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
