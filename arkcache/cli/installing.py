"""Says what to install for what is missing."""

from __future__ import annotations

import sys
from typing import NoReturn

COMMAND_NEEDS = ("the command line needs", "cli")
NEEDS = {
    "matplotlib": ("pictures need", "plot"),
    "prometheus_client": ("metrics need", "metrics"),
}
"""Modules of extras of their own."""


def say_what_to_install(module: str) -> NoReturn:
    """Leave with the line that installs a module which is missing."""
    needed, extra = NEEDS.get(module.partition(".")[0], COMMAND_NEEDS)
    sys.exit(f"arkcache: {module} is not installed; {needed}: pip install 'arkcache[{extra}]'")
