"""Everything that can only be seen on a GPU: right on the real compiler, and fast.

    python3 benchmarks/gpu_check.py [--write] [--output FILE] [--only NAME ...] [--model FOLDER]
    python3 benchmarks/gpu_check.py --list
    python3 benchmarks/gpu_check.py --rehearse [--quick]

The program itself is `benchmarks/gpu/main.py`. This file makes `arkcache`, `tests` and
`benchmarks` of this working tree importable, whatever is installed.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def find_repository() -> None:
    """See this working tree first."""
    sys.path.insert(0, str(ROOT))
    # Neither has an __init__.py: any package of that name that is installed would win.
    for name in ("tests", "benchmarks"):
        package = types.ModuleType(name)
        package.__path__ = [str(ROOT / name)]
        sys.modules.setdefault(name, package)


if __name__ == "__main__":
    find_repository()
    from benchmarks.gpu.main import main

    sys.exit(main())
