"""Everything that can only be seen on a GPU: right on the real compiler, and fast.

    python3 benchmarks/gpu_check.py [--write] [--output FILE] [--only NAME ...]
    python3 benchmarks/gpu_check.py --list
    python3 benchmarks/gpu_check.py --rehearse [--quick]

Needs a CUDA GPU, torch, triton, numpy, cupy and transformers; ArkCache itself need not be
installed. The checks are listed in `gpu_catalogue.py`, each with the function that does it. They
run one after another in this process for at most ten minutes: one that there is no time left for is
skipped, one that fails is recorded, and the others go on. Every result is written as soon as it is
known. A rehearsal runs them at tiny sizes on the CPU, in Triton's interpreter; it times nothing and
writes nothing.

Exit code: 0; 1 if a check failed; 2 without a GPU. An aim that is missed is only reported.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import traceback
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gpu_catalogue import CHECKS, Check

LEDGER = Path(__file__).resolve().parent / "results" / "gpu.json"
LINE = "{:<26} {:>10} {:<14} {:>8}  {:<8} {:>6.1f} s"


class Ledger:
    """The results so far: printed, and in files that are whole after every check.

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

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Keep the result of a check."""
        self.entry["checks"][name] = result
        for file, earlier in self._earlier.items():
            content = self.entry if earlier is None else [*earlier, self.entry]
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_suffix(".tmp")
            draft.write_text(json.dumps(content, indent=1, default=str) + "\n")
            draft.replace(file)


def _entries(file: Path) -> list[Any] | None:
    """What a ledger holds; None for any other file."""
    if file != LEDGER:
        return None
    return json.loads(file.read_text()) if file.exists() else []


def run_check(check: Check, bench: Any) -> dict[str, Any]:
    """Do a check, whatever comes of it."""
    from gpu_common import Outcome, Skipped

    start, outcome, reason = time.monotonic(), Outcome(), None
    try:
        if check.seconds > bench.seconds_left():
            raise Skipped(f"takes about {check.seconds} s, {bench.seconds_left():.0f} are left")
        outcome = check.run(bench)
        bench.synchronize()
        status = check.verdict(outcome.figure)
    except Skipped as error:
        status, reason = "skipped", str(error)
    except Exception as error:
        traceback.print_exc()
        status, reason = "failed", f"{type(error).__name__}: {error}"
    result = {
        "status": status,
        "figure": None if outcome.figure is None else round(outcome.figure, 4),
        "unit": check.unit,
        "aim": None if check.aim is None else str(check.aim),
        "of_peak": None if outcome.of_peak is None else round(outcome.of_peak, 3),
        "seconds": round(time.monotonic() - start, 1),
        **({} if reason is None else {"reason": reason}),
        "details": outcome.details,
    }
    return result


def line(name: str, result: dict[str, Any]) -> str:
    """One line of the table."""
    figure, share = (
        None if number is None or math.isnan(number) else number
        for number in (result["figure"], result["of_peak"])
    )
    return LINE.format(
        name,
        "-" if figure is None else f"{figure:.4g} {result['unit']}".rstrip(),
        "" if result["aim"] is None else f"aim {result['aim']}",
        "" if share is None else f"{share:.0%} peak",
        result["status"],
        result["seconds"],
    )


def run_checks(checks: list[Check], bench: Any, ledger: Ledger) -> int:
    """All of them; the exit code."""
    for check in checks:
        result = run_check(check, bench)
        ledger.add(check.name, result)
        print(line(check.name, result), result.get("reason", ""), flush=True)
        try:
            bench.synchronize()
            bench.release()
        except RuntimeError as error:
            print(f"The device failed in {check.name}, nothing more can run: {error}")
            break
    done = ledger.entry["checks"]
    if not bench.rehearsing:
        print("\n" + json.dumps(ledger.entry, default=str) + "\n")
    for name, result in done.items():
        print(line(name, result))
    for status in ("failed", "missed", "skipped"):
        names = [name for name, result in done.items() if result["status"] == status]
        print(f"{len(names)} {status}: {' '.join(names)}")
    return int(any(result["status"] == "failed" for result in done.values()))


def list_checks(checks: list[Check]) -> None:
    """Print what there is, without importing what it needs."""
    for check in checks:
        aim = "" if check.aim is None else f" [aim {check.aim}]"
        print(f"{check.name:<26} {check.seconds:>4} s  {check.shows}{aim}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the checks and their aims")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these; 'step-*' for all such")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--quick", action="store_true", help="of a rehearsal: what takes seconds")
    parser.add_argument("--write", action="store_true", help=f"append to {LEDGER.name}")
    parser.add_argument("--output", type=Path, help="write the results to this file")
    parser.add_argument("--seconds", type=float, default=580, help="for all checks together")
    parser.add_argument("--host-gib", type=float, help="host memory to use; default: what there is")
    parser.add_argument("--threads", type=int, default=8, help="that compile kernels")
    options = parser.parse_args(arguments)
    for pattern in options.only or ():
        if not any(fnmatch(check.name, pattern) for check in CHECKS):
            parser.error(f"--only {pattern}: no check is called that; see --list")
    return options


def chosen(options: argparse.Namespace) -> list[Check]:
    """The checks that were asked for."""
    return [
        check
        for check in CHECKS
        if (not options.quick or check.is_quick)
        and (options.only is None or any(fnmatch(check.name, name) for name in options.only))
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for; the exit code."""
    options = parse(arguments)
    checks = chosen(options)
    if options.list:
        list_checks(checks)
        return 0
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel module is imported

    import torch
    from gpu_common import Bench, find_repository

    find_repository()
    from gpu_environment import host_memory

    from tests.interpreter import why_it_fails

    if options.rehearse and (reason := why_it_fails()) is not None:
        print(f"No rehearsal here: {reason}.")
        return 2
    if not (options.rehearse or torch.cuda.is_available()):
        print("No CUDA GPU here: --list shows the checks, --rehearse runs them at tiny sizes.")
        return 2
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", 0)
    files = [] if options.rehearse else [LEDGER] * options.write
    files += [options.output] if options.output and not options.rehearse else []
    host_bytes = host_memory() if options.host_gib is None else int(options.host_gib * 2**30)
    # The interpreter is safe in one thread only, and takes its time.
    limits = (1e9, 1) if options.rehearse else (options.seconds, options.threads)
    torch.manual_seed(0)
    return run_checks(checks, Bench(device, host_bytes, *limits), Ledger(files))


if __name__ == "__main__":
    sys.exit(main())
