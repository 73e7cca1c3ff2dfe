"""The results of a run: in files that are whole after every check, and as a table."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.check import BROKEN, Check

LEDGER = Path(__file__).resolve().parents[1] / "results" / "gpu.json"
LINE = "{:<26} {:>12} {:<22} {:>9}  {:<9} {:>6.1f} s"
RUNNING = "running"
"""The status of a check that is under way, should the files never hear what came of it."""


class Ledger:
    """The results so far.

    Args:
        files: where to write; a list of entries, of which this run's is the last, or the entry.
    """

    def __init__(self, files: list[Path]) -> None:
        self.entry: dict[str, Any] = {
            "benchmark": "gpu_check",
            "date": time.strftime("%Y-%m-%d"),
            "checks": {},
        }
        self._earlier = {file: _entries(file) for file in files}

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """By the name of the check, in the order in which they ran."""
        checks: dict[str, dict[str, Any]] = self.entry["checks"]
        return checks

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Keep the result of a check, in place of what was known of it."""
        self.results[name] = result
        for file, earlier in self._earlier.items():
            content = self.entry if earlier is None else [*earlier, self.entry]
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_name(file.name + ".tmp")
            draft.write_text(json.dumps(content, indent=1) + "\n")
            draft.replace(file)

    def is_done(self, check: Check) -> bool:
        """Whether the check's result is known."""
        result = self.results.get(check.name)
        return result is not None and result["status"] != RUNNING

    @property
    def has_failures(self) -> bool:
        """Whether a check failed or did not end."""
        return any(result["status"] in BROKEN for result in self.results.values())

    def table(self) -> str:
        """A line for every check, and the names of those that are not "ok"."""
        lines = [line(name, result) for name, result in self.results.items()]
        for status in (*BROKEN, "missed", "below aim", "skipped"):
            names = [name for name, result in self.results.items() if result["status"] == status]
            lines.append(f"{len(names)} {status}: {' '.join(names)}".rstrip())
        return "\n".join(lines)


def line(name: str, result: dict[str, Any]) -> str:
    """One line of the table."""
    figure, share, expected = (result[key] for key in ("figure", "of_peak", "expected"))
    return LINE.format(
        name,
        "-" if figure is None else f"{figure:.4g} {result['unit']}".rstrip(),
        "" if expected is None else f"want {expected:g}, aim {result['aim']:g}",
        "" if share is None else f"{share:.0%} peak",
        result["status"],
        result["seconds"],
    )


def _entries(file: Path) -> list[Any] | None:
    """What the ledger holds; None for any other file."""
    if file != LEDGER:
        return None
    return json.loads(file.read_text()) if file.exists() else []
