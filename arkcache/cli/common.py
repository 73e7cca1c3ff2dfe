"""What the commands share: errors in a line, progress, results as tables or JSON, sizes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

import arkcache
from arkcache.cli.installing import say_what_to_install

if TYPE_CHECKING:
    from rich.console import RenderableType

    from arkcache.demo.run import Progress

INTERRUPTED = 130
"""The exit code after Ctrl-C."""

_UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base**exponent
    for exponent, prefix in enumerate("KMGT", start=1)
    for base, suffix in ((1000, "B"), (1024, "iB"))
}

T = TypeVar("T")


@contextmanager
def told_in_a_line(command: str) -> Iterator[None]:
    """Turns what a user can mend into a line on stderr and an exit code."""
    try:
        yield
    except ModuleNotFoundError as error:
        say_what_to_install(error.name or str(error))
    except arkcache.ArkCacheError as error:
        typer.echo(f"arkcache {command}: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"arkcache {command}: interrupted; nothing was kept.", err=True)
        raise typer.Exit(INTERRUPTED) from None


def with_progress(work: Callable[[Progress], T]) -> T:
    """Does work that tells what is under way: a bar on a terminal, else a line for each stage."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours says what is loaded
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description:30}"),
        BarColumn(),
        TaskProgressColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    stages: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        bar.update(task, description=stage, completed=done, total=total)
        if not console.is_terminal and stage not in stages:
            typer.echo(stage, err=True)
        stages.append(stage)

    with bar:
        task = bar.add_task("Starting", total=1)
        return work(progress)


def print_result(
    values: dict[str, Any], render: Callable[[], RenderableType], as_json: bool
) -> None:
    """Print a result as a table, or as one JSON object."""
    if as_json:
        typer.echo(json.dumps(values, indent=2, default=str))
        return
    from rich.console import Console

    Console().print(render())


def replace_file(path: Path, values: dict[str, Any]) -> None:
    """Write a file of JSON whole, so that an interrupt leaves the one before it."""
    draft = path.with_name(path.name + ".part")
    try:
        draft.write_text(json.dumps(values, indent=1, default=str) + "\n", encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise arkcache.InputError(f"cannot write {path}: {error.strerror or error}") from None


def listed(given: str, separator: str) -> list[str]:
    """The parts of an option with several."""
    return [part.strip() for part in given.split(separator) if part.strip()]


def parse_bytes(text: str) -> int:
    """A number of bytes from "2GiB", "500 MB" or "4096".

    Raises `InputError` for anything else, and for less than a byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    size = units.get(match[2].lower() or "b") if match else None
    if match is None or size is None or int(float(match[1]) * size) < 1:
        raise arkcache.InputError(
            f"{text!r} bytes: expected a number and one of {', '.join(_UNITS)}, as in 2GiB"
        )
    return int(match[1]) * size if match[1].isdigit() else int(float(match[1]) * size)
