"""Runs the checks in worker processes, and outlives them.

A worker does one check after another. Where one does not end in its time, or ends its process, or
leaves the device in a state in which nothing runs any more, the next worker goes on with the check
after it. Everything a worker says is in the ledger at once. No CUDA and no torch in here.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.check import Check
from benchmarks.gpu.ledger import RUNNING, Ledger, line

START_SECONDS = 120.0
"""That a worker may take to import what it needs and to open the device."""

PAUSE_SECONDS = 60.0
"""That it may take between two checks, to free what the first one held."""

LOOK_SECONDS = 0.5
"""How often a worker that says nothing is looked at: its pipe may stay open without it."""

DUMP_SECONDS = 1.0
"""That a worker gets to say where it hangs."""

MAX_BAD_STARTS = 2
"""Workers in a row that end before they did a check."""

Command = Callable[[Sequence[Check], float, int], list[str]]
"""checks, seconds for all of them, descriptor to report to -> the command line of a worker."""


class Worker:
    """A process that does checks, and the pipe that it reports through."""

    def __init__(self, command: Command, checks: Sequence[Check], seconds: float) -> None:
        self._read, write = os.pipe()
        try:
            arguments = command(checks, seconds, write)
            # In a group of its own, so that its compilers end with it.
            self._process = subprocess.Popen(arguments, pass_fds=[write], start_new_session=True)
        finally:
            os.close(write)
        self._unread = b""

    def messages(self, seconds: float) -> list[dict[str, Any]] | None:
        """What it reported, waiting so long for more; None once it has ended and said all."""
        has_ended = self._process.poll() is not None  # before looking: what it said last counts
        seconds = min(max(0.0, seconds), LOOK_SECONDS)
        ready, _, _ = select.select([self._read], [], [], 0.0 if has_ended else seconds)
        data = os.read(self._read, 1 << 16) if ready else b""
        if not data and (ready or has_ended):
            return None
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [json.loads(one) for one in lines]

    def stop(self) -> None:
        """End it and what it has started, after it has said where it is."""
        self._signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(DUMP_SECONDS)
        self._signal(signal.SIGKILL)

    def close(self) -> str:
        """Wait until it is gone; how it ended."""
        os.close(self._read)
        with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may still unpin memory
            self._process.wait(PAUSE_SECONDS)
        self._signal(signal.SIGKILL)
        code = self._process.poll()
        if code is None:
            return "it does not end"
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


@dataclass
class Progress:
    """Of a worker: the check under way, since when, what it noted, and until when it may go on."""

    until: float
    check: Check | None = None
    since: float = 0.0
    num_done: int = 0


class Supervisor:
    """Does checks by workers.

    Args:
        checks: in the order in which they are done.
        command: how a worker is started.
        ledger: where results go.
        seconds: for all checks together.

    Attributes:
        refusal: why no check can be done here; None where they can.
    """

    def __init__(
        self, checks: Sequence[Check], command: Command, ledger: Ledger, seconds: float
    ) -> None:
        self._checks, self._command, self._ledger = checks, command, ledger
        self._ends = time.monotonic() + seconds
        self._seconds, self._num_bad_starts = seconds, 0
        self.refusal: str | None = None

    def run(self) -> None:
        """Do them all, whatever becomes of each; every one has a result afterwards."""
        try:
            while (rest := self._rest()) and self.refusal is None:
                if self._seconds_left() <= 0:
                    self._finish_rest("skipped", self._over)
                elif self._num_bad_starts >= MAX_BAD_STARTS:
                    self._finish_rest("failed", "worker processes end before they do anything")
                else:
                    self._employ(rest)
        except KeyboardInterrupt:
            self._finish_rest("skipped", "interrupted")
            raise

    def _employ(self, checks: Sequence[Check]) -> None:
        """One worker, for as long as it does."""
        worker = Worker(self._command, checks, self._seconds_left())
        progress = Progress(min(self._ends, time.monotonic() + START_SECONDS))
        status, reason = "failed", "its process ended"
        try:
            while (messages := worker.messages(progress.until - time.monotonic())) is not None:
                for message in messages:
                    self._hear(message, progress)
                if time.monotonic() >= progress.until:
                    status, reason = self._why_late(progress)
                    worker.stop()
                    break
        except BaseException:
            worker.stop()
            raise
        finally:
            ending = worker.close()
        if progress.check is not None:
            reason += f": {ending}" if status == "failed" else ""
            self._finish(progress.check, status, reason, time.monotonic() - progress.since)
            progress.num_done += 1
        self._num_bad_starts = 0 if progress.num_done else self._num_bad_starts + 1

    def _hear(self, message: dict[str, Any], progress: Progress) -> None:
        """Enter what a worker reports."""
        now = time.monotonic()
        match message["event"]:
            case "ready":
                progress.until = min(self._ends, now + PAUSE_SECONDS)
            case "refuse":
                self.refusal = message["reason"]
            case "begin":
                check = next(check for check in self._checks if check.name == message["name"])
                progress.check, progress.since = check, now
                progress.until = min(self._ends, now + check.limit)
                self._ledger.add(check.name, check.result(RUNNING, 0.0, {}))
            case "note":
                assert progress.check is not None
                name, seconds = progress.check.name, now - progress.since
                noted = self._ledger.results[name]["details"] | message["details"]
                self._ledger.add(name, progress.check.result(RUNNING, seconds, noted))
            case "end":
                assert progress.check is not None
                self._enter(progress.check, message["result"])
                progress.check, progress.num_done = None, progress.num_done + 1
                progress.until = min(self._ends, now + PAUSE_SECONDS)

    def _why_late(self, progress: Progress) -> tuple[str, str]:
        """The status and the reason of a check that is stopped."""
        if self._seconds_left() <= 0:  # which is not the check's fault
            return "skipped", f"cut off: {self._over}"
        limit = 0.0 if progress.check is None else progress.check.limit
        return "timeout", f"did not end within {limit:g} s"

    @property
    def _over(self) -> str:
        return f"the {self._seconds:.0f} s for all checks are over"

    def _finish(self, check: Check, status: str, reason: str, seconds: float = 0.0) -> None:
        """Enter a check that says nothing any more; what it noted is kept."""
        noted = self._ledger.results.get(check.name, {}).get("details", {})
        self._enter(check, check.result(status, seconds, noted, reason=reason))

    def _finish_rest(self, status: str, reason: str) -> None:
        for check in self._rest():
            self._finish(check, status, reason)

    def _enter(self, check: Check, result: dict[str, Any]) -> None:
        self._ledger.add(check.name, result)
        print(line(check.name, result), result.get("reason", ""), flush=True)

    def _rest(self) -> list[Check]:
        return [check for check in self._checks if not self._ledger.is_done(check)]

    def _seconds_left(self) -> float:
        return self._ends - time.monotonic()
