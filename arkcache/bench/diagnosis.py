"""What this machine has for ArkCache, what of that can be used, and how to get the rest.

Needs no optional package, so that it can say which are missing.
"""

from __future__ import annotations

import importlib.util
import os
import resource
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from arkcache.backend import WHY_NOT_HERE, choose_backend
from arkcache.bench import tiers
from arkcache.bench.device_routes import why_no_device
from arkcache.bench.routes import make_pool
from arkcache.config import CacheConfig
from arkcache.demo.machine import describe_machine, versions
from arkcache.errors import ArkCacheError
from arkcache.tiering.system_memory import (
    available_memory_bytes,
    machine_memory_bytes,
    physical_memory_bytes,
)

PACKAGES = {
    "transformers": ("hf", "attaching a cache to a model, bench decode and prefill"),
    "numba": ("cpu", "the compiled kernels of a CPU"),
    "psutil": ("cli", "the command line"),
    "matplotlib": ("plot", "pictures"),
}
"""Optional packages that any machine can use: the extra that brings each, and what it is for."""

VERSIONS = (
    *("numpy", "safetensors", "numba", "triton", "cupy-cuda12x", "cupy-cuda13x", "psutil"),
    "matplotlib",
)

PROBED_BYTES = 16 << 20
"""Host memory that is pinned to see whether that works."""


@dataclass(frozen=True)
class Missing:
    """Something that is not installed, or does not work.

    Attributes:
        what: what it is.
        without: what cannot be done, or is slower.
        cure: what to do, a command wherever one will do.
        is_waste: whether hardware that this machine has goes unused for it.
    """

    what: str
    without: str
    cure: str
    is_waste: bool = False


@dataclass
class Diagnosis:
    """All that was found; sizes in bytes, `paths` as in `tiers.Result`, None where not measured."""

    versions: dict[str, str]
    machine: dict[str, Any]
    device: dict[str, Any]
    memory: dict[str, Any]
    threads: dict[str, int]
    backend: dict[str, str]
    kernels: dict[str, Any]
    missing: list[Missing] = field(default_factory=list)
    paths: tiers.Result | None = None

    @property
    def is_fine(self) -> bool:
        """Whether all hardware that was found can be used."""
        return not any(one.is_waste for one in self.missing)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        paths = None if self.paths is None else self.paths.to_dict()
        return asdict(self) | {"paths": paths, "is_fine": self.is_fine}


def diagnose(*, measure: bool = True) -> Diagnosis:
    """Look at everything; `measure` takes two seconds or so, 80 MiB of memory and 16 of disk."""
    reason = why_no_device()
    device = torch.device("cpu" if reason is not None else "cuda")
    found = Diagnosis(
        versions(*VERSIONS),
        describe_machine(device),
        _device(device, reason),
        _memory(device),
        {
            "torch": torch.get_num_threads(),
            "cores": os.cpu_count() or 1,
            "cores_allowed": _allowed_cores(),
        },
        _backend(device),
        compiled_kernels(),
    )
    found.missing = list(_missing(found, device))
    if measure:
        settings = tiers.Settings((64 << 10,), (1, 64), 3, 16 << 20, needs_file=False)
        try:
            found.paths = tiers.run(settings)
        except ArkCacheError as error:
            found.missing.append(Missing("measured paths", str(error), "arkcache bench tiers"))
    return found


def _device(device: torch.device, reason: str | None) -> dict[str, Any]:
    built_for = torch.version.cuda or torch.version.hip
    found: dict[str, Any] = {"torch_built_for": built_for, "driver": _driver(), "why_not": reason}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        found |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "total_bytes": total,
            "free_bytes": free,
        }
    return found


def _driver() -> str | None:
    """The version of the NVIDIA driver that the kernel has loaded; None for none."""
    try:
        lines = Path("/proc/driver/nvidia/version").read_text().splitlines()
    except OSError:
        return None
    return lines[0].partition(":")[2].strip() if lines else None


def _memory(device: torch.device) -> dict[str, Any]:
    total, limit = machine_memory_bytes(), physical_memory_bytes()
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return {
        "total_bytes": total,
        "available_bytes": available_memory_bytes(),
        "cgroup_limit_bytes": limit if limit < total else None,
        "locked_limit_bytes": None if soft == resource.RLIM_INFINITY else soft,
        "why_pageable": why_pageable(device),
    }


def why_pageable(device: torch.device) -> str | None:
    """Why host memory cannot be pinned for a device, which is tried; None where it was."""
    if device.type != "cuda":
        return "there is no GPU to pin it for"
    host, _pool = make_pool(PROBED_BYTES, device)
    return host.why_pageable


def _allowed_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _backend(device: torch.device) -> dict[str, str]:
    """What the default settings would run on, and why."""
    wanted = "numba" if device.type == "cpu" else "triton"
    reason = WHY_NOT_HERE[wanted](device)
    if reason is not None:  # choosing would warn of what is said here
        return {"chosen": "torch", "why": reason}
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    chosen = choose_backend(CacheConfig(), device, dtype, latent=False)
    return {"chosen": chosen, "why": f"it serves the default settings on {device.type}"}


def compiled_kernels() -> dict[str, Any]:
    """Where the kernels of a CPU are kept, None where they are not; for which dtypes they are."""
    if importlib.util.find_spec("numba") is None:
        return {"folder": None, "compiled": [], "why_not": "numba is not installed"}
    from arkcache.kernels.numba_compile import cache_folder
    from arkcache.kernels.numba_launch import kept_dtypes

    folder = cache_folder()
    why_not = None if folder is not None else "no folder for them can be written to"
    return {
        "folder": None if folder is None else str(folder),
        "compiled": kept_dtypes(),
        "why_not": why_not,
    }


def _missing(found: Diagnosis, device: torch.device) -> Iterator[Missing]:
    for name, (extra, used_for) in PACKAGES.items():
        if importlib.util.find_spec(name) is None:
            yield Missing(name, f"needed for {used_for}", f"pip install 'arkcache[{extra}]'")
    if device.type == "cuda":
        yield from _missing_for_gpu(found)
    elif found.device["driver"] is not None:
        yield Missing(
            "a torch that finds the GPU",
            f"an NVIDIA driver is loaded, but {found.device['why_not']}",
            "install the torch that fits the driver: https://pytorch.org/get-started/locally",
            is_waste=True,
        )
    threads, allowed = found.threads["torch"], found.threads["cores_allowed"]
    if threads < allowed:
        yield Missing(
            f"{allowed - threads} of {allowed} cores",
            f"torch computes with {threads} threads (OMP_NUM_THREADS, torch.set_num_threads)",
            "unset OMP_NUM_THREADS",
        )
    kernels = found.kernels
    if device.type == "cpu" and kernels["folder"] is not None and not kernels["compiled"]:
        yield Missing(
            "compiled kernels",
            "the first cache of each dtype waits for about a minute",
            'python -c "from arkcache.kernels.numba_launch import compile_all; compile_all()"',
        )


def _missing_for_gpu(found: Diagnosis) -> Iterator[Missing]:
    extra = f"gpu-cuda{(torch.version.cuda or '13').partition('.')[0]}"
    cure = f"pip install 'arkcache[{extra}]'"
    if importlib.util.find_spec("triton") is None:
        without = "steps run on plain torch, which waits for the GPU in every layer"
        yield Missing("triton", without, cure, is_waste=True)
    if importlib.util.find_spec("cupy") is None:
        without = "host memory stays pageable, and recalls are copies that the host waits for"
        yield Missing("cupy", without, cure, is_waste=True)
    elif found.memory["why_pageable"] is not None:
        cure = "raise the limit on locked memory (ulimit -l, or the container's), update the driver"
        yield Missing("pinned memory", found.memory["why_pageable"], cure, is_waste=True)
