"""What the demonstration ran on: kept beside its figures."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import torch
import transformers

import arkcache


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """Processor, cores, memory in bytes, system; the GPU's name if it is used."""
    machine: dict[str, str | int] = {
        "processor": _processor(),
        "num_cores": os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def versions() -> dict[str, str]:
    """Of ArkCache, Python, torch and transformers."""
    return {
        "arkcache": arkcache.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
