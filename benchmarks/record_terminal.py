"""Records a conversation of `arkcache chat` in a real terminal, as a picture for docs/chat.md.

    python benchmarks/record_terminal.py docs/chat.svg

Needs the extras cli, smollm2 and docs (pyte). What is typed is below; everything else on the
picture is what the program wrote, interpreted as a terminal does. Takes about a minute.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import select
import struct
import sys
import tempfile
import termios
import time
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

COLUMNS, ROWS = 88, 70
PROMPT = r"\n> $"
CTRL_C = "\x03"
TALK = [
    ("Which command continues execution until a line is reached?\n", PROMPT),
    ("How do I set a breakpoint?\n", r"breakpoint\?[^?]{120}"),
    (CTRL_C, PROMPT),
    ("/stats\n", PROMPT),
    ("/save talk\n", PROMPT),
    ("/quit\n", ""),
]
TALK_AGAIN = [
    ("Which command prints the value of an expression?\n", PROMPT),
    ("/quit\n", ""),
]
"""What is typed, and what is waited for then; "" is the end of the program."""


def run(screen: pyte.ByteStream, arguments: list[str], folder: str, typed: list) -> None:
    """Run a chat in a pseudo-terminal and have the screen show it."""
    screen.feed(f"$ arkcache {' '.join(arguments)}\r\n".encode())
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.environ |= {
            "TERM": "xterm",
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        }
        os.environ.pop("COLUMNS", None)
        os.execv(sys.executable, [sys.executable, "-m", "arkcache.cli", *arguments])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    wait(screen, terminal, PROMPT)
    for keys, until in typed:
        time.sleep(0.3)  # a line is waited for a moment after its prompt is shown
        os.write(terminal, keys.encode())
        wait(screen, terminal, until)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit(f"arkcache {' '.join(arguments)} failed: {status}")


def wait(screen: pyte.ByteStream, terminal: int, until: str, seconds: float = 600) -> None:
    """Show what comes, until it ends as expected; "" is until nothing comes any more."""
    new, end = "", time.monotonic() + seconds
    while not (until and re.search(until, re.sub(r"\x1b\[[?\d;]*\w|\r", "", new))):
        if time.monotonic() > end:
            raise SystemExit(f"{until!r} was not shown within {seconds} s; this was: {new}")
        if not select.select([terminal], [], [], 0.2)[0]:
            continue
        try:
            part = os.read(terminal, 4096)
        except OSError:  # Linux says so when the program has ended
            part = b""
        if not part:
            return
        new += part.decode(errors="replace")
        screen.feed(part.replace(b"\x1b[2m", b"\x1b[90m"))  # pyte knows no dim text


def picture(screen: pyte.Screen) -> str:
    """The screen as SVG, which loads nothing."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    filled = [row for row in range(ROWS) if screen.display[row].strip()]
    for row in range(filled[-1] + 1):
        line = Text()
        chars = [screen.buffer[row][column] for column in range(COLUMNS)]
        for (color, bold), own in groupby(chars, lambda char: (char.fg, char.bold)):
            name = {"default": None, "brown": "yellow"}.get(color, color)
            name = name and name.replace("bright", "bright_")
            line.append("".join(char.data for char in own), Style(color=name, bold=bold))
        if line.plain.startswith(("$ ", "> ")):
            line.stylize("bold")
        line.rstrip()
        console.print(line, no_wrap=True)
    svg = console.export_svg(title="arkcache chat", theme=DIMMED_MONOKAI)
    return re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.DOTALL)


def main() -> None:
    """Record, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="the SVG to write")
    output = parser.parse_args().output.resolve()
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    with tempfile.TemporaryDirectory() as folder:
        run(stream, ["chat", "--model", "smollm2", "--budget", "512"], folder, TALK)
        stream.feed(b"\r\n")
        again = ["chat", "--model", "smollm2", "--load", "talk", "--max-tokens", "64"]
        run(stream, again, folder, TALK_AGAIN)
    output.write_text(picture(screen))


if __name__ == "__main__":
    main()
