"""The command line of `benchmarks/gpu_check.py`.

Needs a CUDA GPU, torch, triton, numpy, cupy and transformers; neither ArkCache nor pytest need be
installed. The checks are in `catalogue.py`, in the order in which they tell most: they run for at
most ten minutes, so that what is cut off is the least. Every result is written as soon as it is
known. A rehearsal runs them at tiny sizes on the CPU, in Triton's interpreter; it times nothing and
adds nothing to the ledger.

Exit code: 0; 1 if a check failed or did not end; 2 without a GPU; 130 if it was interrupted. What
was expected of a figure and missed is only reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.gpu.catalogue import CHECKS
from benchmarks.gpu.check import Check
from benchmarks.gpu.ledger import LEDGER, Ledger
from benchmarks.gpu.supervisor import Supervisor

PROGRAM = Path(__file__).resolve().parents[1] / "gpu_check.py"

SECONDS = 580.0
"""For all checks together: ten minutes, less what it takes to start and to end."""

REHEARSAL_SECONDS = {True: 120.0, False: 900.0}
"""For a rehearsal, quick or not, before it is cut off."""

REHEARSAL_LIMIT = 240.0
"""Seconds that a check of a rehearsal may take: the interpreter on a busy machine is slow."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM.name, description="Prove and measure the GPU engine of ArkCache."
    )
    parser.add_argument("--list", action="store_true", help="print the checks and their goals")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these; 'step-*' for all such")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--quick", action="store_true", help="of a rehearsal: what takes seconds")
    parser.add_argument("--write", action="store_true", help=f"append to {LEDGER.name}")
    parser.add_argument("--output", type=Path, help="write the results to this file")
    parser.add_argument("--model", type=Path, help="a folder with a real checkpoint to run")
    parser.add_argument("--seconds", type=float, help="for all checks together")
    parser.add_argument("--host-gib", type=float, help="host memory to use; default: what there is")
    parser.add_argument("--threads", type=int, help="that compile kernels; default: up to 16")
    parser.add_argument("--report", type=int, help=argparse.SUPPRESS)  # a worker's pipe
    options = parser.parse_args(arguments)
    for pattern in options.only or ():
        if not any(fnmatch(check.name, pattern) for check in CHECKS):
            parser.error(f"--only {pattern}: no check is called that; see --list")
    if options.output is not None and options.output.is_dir():
        parser.error(f"--output {options.output} is a folder: expected the name of a file")
    if options.model is not None and not options.model.is_dir():
        parser.error(f"--model {options.model} is no folder: expected one with a checkpoint")
    if options.seconds is None:
        options.seconds = REHEARSAL_SECONDS[options.quick] if options.rehearse else SECONDS
    return options


def chosen(options: argparse.Namespace) -> list[Check]:
    """The checks that were asked for."""
    checks = [
        check
        for check in CHECKS
        if (not options.quick or check.is_quick)
        and (options.only is None or any(fnmatch(check.name, name) for name in options.only))
    ]
    if options.rehearse:
        limit = {"seconds": 0, "most_seconds": REHEARSAL_LIMIT}
        checks = [dataclasses.replace(check, **limit) for check in checks]
    return checks


def list_checks(checks: list[Check]) -> None:
    """Print what there is, without importing what it needs."""
    for check in checks:
        goal = "" if check.goal is None else f" [{check.goal}]"
        print(f"{check.name:<26} {check.seconds:>4} s  {check.shows}{goal}")
    print(f"{len(checks)} checks, about {sum(check.seconds for check in checks)} s together")


def worker_command(checks: Sequence[Check], seconds: float, report: int) -> list[str]:
    """This program as a worker: the arguments of this run, and what is left of it."""
    given = [*sys.argv[1:], "--report", str(report), "--seconds", str(seconds)]
    return [sys.executable, str(PROGRAM), *given, "--only", *(check.name for check in checks)]


def work(options: argparse.Namespace, checks: list[Check]) -> int:
    """Be a worker; the exit code."""
    from benchmarks.gpu.worker import sender, serve

    send = sender(options.report)
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel module is imported

    import torch

    from benchmarks.gpu.bench import Bench
    from tests.interpreter import why_it_fails

    if not (options.rehearse or torch.cuda.is_available()):
        how = "--list shows the checks, --rehearse runs them at tiny sizes"
        send({"event": "refuse", "reason": f"No CUDA GPU here: {how}"})
        return 0
    if options.rehearse and (reason := why_it_fails()) is not None:
        send({"event": "refuse", "reason": f"No rehearsal here: {reason}"})
        return 0
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", 0)
    bench = Bench(
        device,
        seconds=options.seconds,
        # The interpreter is safe in one thread only.
        threads=1 if options.rehearse else options.threads or min(16, os.cpu_count() or 1),
        host_bytes=None if options.host_gib is None else int(options.host_gib * 2**30),
        checkpoint=options.model,
    )
    return serve(checks, bench, send)


def supervise(options: argparse.Namespace, checks: list[Check]) -> int:
    """Have workers do the checks, and say what came of them; the exit code."""
    files = [LEDGER] if options.write and not options.rehearse else []
    files += [options.output.resolve()] if options.output else []
    ledger = Ledger(files)
    supervisor = Supervisor(checks, worker_command, ledger, options.seconds)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # workers are ended then, too
    interrupted = False
    try:
        supervisor.run()
    except KeyboardInterrupt:
        interrupted = True
    if supervisor.refusal is not None:
        print(f"{supervisor.refusal}.")
        return 2
    if not options.rehearse:
        print("\n" + json.dumps(ledger.entry) + "\n")
    print(ledger.table())
    return 130 if interrupted else int(ledger.has_failures)


def main(arguments: list[str] | None = None) -> int:
    """Do what was asked for; the exit code."""
    options = parse(arguments)
    checks = chosen(options)
    if options.list:
        list_checks(checks)
        return 0
    if options.report is None:
        return supervise(options, checks)
    code = work(options, checks)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # what frees memory of a device that failed may hang or abort
    return code
