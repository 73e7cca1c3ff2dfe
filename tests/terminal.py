"""Commands in a real pseudo-terminal, as a user has them."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

TAKE_TERMINAL = """
import fcntl, runpy, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests were started with
runpy.run_module("arkcache.cli", run_name="__main__", alter_sys=True)
"""
"""Makes the pseudo-terminal the process's own, so that Ctrl-C typed there reaches it, and runs the
command line. Not before the program starts: that would fork a process of much memory."""


class Terminal:
    """A command in a pseudo-terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._main, inner = pty.openpty()
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "TERM": "xterm",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", TAKE_TERMINAL, *arguments]
        self._process = subprocess.Popen(
            command,
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )
        os.close(inner)
        self.shown = ""

    def type(self, keys: str, until: str) -> str:
        """Type, wait until the screen shows this, and return what is new on it."""
        self.write(keys)
        return self.wait(until)

    def write(self, keys: str) -> None:
        """Type, and wait for nothing."""
        os.write(self._main, keys.encode())

    def wait(self, until: str, seconds: float = 120) -> str:
        """What comes until this is shown."""
        new, end = "", time.monotonic() + seconds
        while not re.search(until, new):
            assert time.monotonic() < end, f"{until!r} not shown after {self.shown}{new}"
            if select.select([self._main], [], [], 0.2)[0]:
                new += os.read(self._main, 4096).decode(errors="replace")
        self.shown += new
        return new

    def read_all(self) -> int:
        """What comes until the command ends; its exit code."""
        with suppress(OSError):  # Linux has no end of file for a terminal that nobody holds
            while part := os.read(self._main, 4096):
                self.shown += part.decode(errors="replace")
        return self._process.wait(timeout=60)

    def leave(self) -> int:
        """Ctrl-D; the exit code."""
        self.write("\x04")
        return self._process.wait(timeout=60)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._main)
