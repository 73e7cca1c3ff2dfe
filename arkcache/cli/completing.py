"""What a shell completes: names that are known without loading anything."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from arkcache.config import INDEXES, CacheConfig
from arkcache.formats import PRESETS


def complete(kind: str) -> Callable[[str], list[str]]:
    """For an option: the names of a kind that begin as what was typed."""

    def names(incomplete: str) -> list[str]:
        return [name for name in _NAMES[kind](incomplete) if name.startswith(incomplete)]

    return names


def _models(incomplete: str) -> list[str]:
    """smollm2, what the Hugging Face hub gave before, and folders with a config."""
    home = Path(os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser())
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    kept = [path.name.removeprefix("models--").replace("--", "/") for path in hub.glob("models--*")]
    folder = incomplete[: incomplete.rfind("/") + 1] or "."
    here = [path.parent for path in Path(folder).glob("*/config.json")]
    prefix = "./" if incomplete.startswith("./") else ""
    return ["smollm2", *sorted(kept), *sorted(f"{prefix}{path}" for path in here)]


_NAMES: dict[str, Callable[[str], list[str]]] = {
    "device": lambda _: ["auto", "cpu", "cuda"],
    "dtype": lambda _: ["auto", "bfloat16", "float16", "float32"],
    "format": lambda _: [*PRESETS],
    "index": lambda _: [*INDEXES],
    "model": _models,
    "setting": lambda _: [f"{field.name}=" for field in fields(CacheConfig)],
}
