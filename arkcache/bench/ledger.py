"""Ledgers: what was measured, where and with what, as one JSON object or a list of them."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import arkcache
from arkcache.demo.machine import describe_machine, versions
from arkcache.errors import InputError

PACKAGES = ("numpy", "numba", "triton", "cupy-cuda12x", "cupy-cuda13x", "optimum-quanto", "hqq")
"""Packages whose versions are kept, as far as they are installed."""


def entry_of(
    benchmark: str, settings: dict[str, Any], device: torch.device | None = None, **measured: Any
) -> dict[str, Any]:
    """One entry of a ledger: machine, versions, commit and date beside what was measured."""
    return {
        "benchmark": benchmark,
        "settings": settings,
        "machine": describe_machine(device or torch.device("cpu")),
        "versions": versions(*PACKAGES),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        **measured,
    }


def commit() -> str | None:
    """The commit that the library was run from, marked where files differ; None outside git."""
    root = Path(arkcache.__file__).parents[1]
    if not (root / ".git").exists():  # an installed wheel, be it inside of some other checkout
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def append_to_ledger(ledger: Path, entry: dict[str, Any]) -> None:
    """Add an entry to the end of a ledger of several."""
    entries = json.loads(ledger.read_text()) if ledger.exists() else []
    ledger.parent.mkdir(exist_ok=True)
    ledger.write_text(json.dumps([*entries, entry], indent=1) + "\n")


def read_ledger(path: Path) -> dict[str, Any]:
    """One entry: the object in a file, or the last of a list. Raises `InputError`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): expected a ledger") from None
    if isinstance(found, list) and found:
        found = found[-1]
    if not isinstance(found, dict):
        raise InputError(
            f"{path} holds {type(found).__name__}, no ledger: expected what --output writes"
        )
    return found
