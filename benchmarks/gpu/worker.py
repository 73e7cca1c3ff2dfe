"""A process that does checks one after another and reports each step of them at once.

What it reports, a line of JSON each: "ready"; then per check "begin", "note" with details as they
are found, "end" with the result. The supervisor ends it where a check takes too long; it ends
itself where the device failed, since nothing can run in a process after that.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu.check import Check, Outcome
from tests.gpu.outcome import Skipped

DEVICE_FAILED = 75
"""The exit code of a process whose device failed."""

Send = Callable[[dict[str, Any]], None]


def sender(descriptor: int) -> Send:
    """What writes messages to a pipe."""

    def send(message: dict[str, Any]) -> None:
        line = json.dumps(message, default=str).encode() + b"\n"
        while line:
            line = line[os.write(descriptor, line) :]

    return send


def serve(checks: Sequence[Check], bench: Any, send: Send) -> int:
    """Do the checks with a `Bench`; the exit code."""
    faulthandler.register(signal.SIGUSR1)  # where it hangs, should it be ended
    send({"event": "ready"})
    for check in checks:
        send({"event": "begin", "name": check.name})
        bench.begin(lambda details: send({"event": "note", "details": details}))
        send({"event": "end", "result": run_check(check, bench)})
        try:
            bench.synchronize()
            bench.release()
        except RuntimeError as error:
            print(f"The device failed in {check.name}: {error}", flush=True)
            return DEVICE_FAILED
    return 0


def run_check(check: Check, bench: Any) -> dict[str, Any]:
    """Do a check, whatever comes of it; what was noted before it ended is kept."""
    start, outcome, reason = time.monotonic(), Outcome(), None
    try:
        if check.seconds > bench.seconds_left():
            raise Skipped(f"takes about {check.seconds} s, {bench.seconds_left():.0f} are left")
        outcome = check.function(bench, **check.settings) or outcome
        bench.synchronize()
        status = check.verdict(outcome.figure)
    except Skipped as error:
        status, reason = "skipped", str(error)
    except Exception as error:
        traceback.print_exc()
        status, reason = "failed", f"{type(error).__name__}: {error}"
    return check.result(status, time.monotonic() - start, bench.notes, outcome, reason)
