"""What the benchmarks outside of the package share: where the ledgers are."""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
