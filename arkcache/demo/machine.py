"""What something was measured on: kept beside its figures. Needs no optional package."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import arkcache
from arkcache.tiering.system_memory import physical_memory_bytes


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """Processor, cores, bytes of memory for this process, system; the GPU's name if it is used."""
    machine: dict[str, str | int] = {
        "processor": _processor(),
        "num_cores": os.cpu_count() or 1,
        "memory_bytes": physical_memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def versions(*packages: str) -> dict[str, str]:
    """Of ArkCache, Python, torch and transformers, and of more packages; only what is installed."""
    found = {
        "arkcache": arkcache.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    for package in ("transformers", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
