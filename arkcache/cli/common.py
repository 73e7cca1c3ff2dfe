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
from arkcache.files import draft_of, write_whole

if TYPE_CHECKING:
    from rich.console import RenderableType

    from arkcache.demo.run import Progress

INTERRUPTED = 130
"""The exit code after Ctrl-C."""

EXIT_CODES = (
    "Exit codes: 0 done; 1 a mistake in what was given, or a failure; 2 wrong usage; "
    f"{INTERRUPTED} interrupted."
)
"""The last line of every command's help."""

_OPTION_OF = {
    "budget_tokens": "--budget",
    "max_new_tokens": "--max-tokens",
    "max_steps": "--steps",
    "num_dense_layers": "--dense-layers",
    "num_passages": "--passages",
    "num_questions": "--questions",
    "num_steps": "--steps",
}
"""What the library calls otherwise than the options that set it."""

T = TypeVar("T")


@contextmanager
def told_in_a_line(command: str, output: Path | None = None, code: int = 1) -> Iterator[None]:
    """Turns what a user can mend into a line on stderr and an exit code.

    Args:
        command: for the line.
        output: a file that is to be written in the end; that it can be is seen to first.
        code: the exit code.
    """
    try:
        if output is not None:
            check_writable(output)
        yield
    except ModuleNotFoundError as error:
        say_what_to_install(error.name or str(error))
    except arkcache.ArkCacheError as error:
        typer.echo(f"arkcache {command}: {error}{_options_in(str(error))}", err=True)
        raise typer.Exit(code) from None
    except KeyboardInterrupt:
        typer.echo(f"arkcache {command}: interrupted; nothing was kept.", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _options_in(message: str) -> str:
    """Which options a message speaks of by other names: " (budget_tokens is --budget)"."""
    names = dict.fromkeys(re.findall(r"\b([a-z_]+)=", message))
    told = [
        f"{name} is {_OPTION_OF[name]}"
        for name in names
        if name in _OPTION_OF and f"{name} from " not in message
    ]
    return f" ({', '.join(told)})" if told else ""


def with_progress(
    work: Callable[[Progress], T],
    quiet: bool = False,
    below: Callable[[], RenderableType] | None = None,
) -> T:
    """`with_bar`, in the place of the bars of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours says what is loaded
    return with_bar(work, quiet, below)


def with_bar(
    work: Callable[[Progress], T],
    quiet: bool = False,
    below: Callable[[], RenderableType] | None = None,
) -> T:
    """Does work that tells what is under way: a bar on a terminal, else a line for each stage.

    below: what is shown under the bar, asked for at each refresh.
    """
    if quiet:
        return work(lambda *_: None)
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    class Bar(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield from super().get_renderables()
            if below is not None:
                yield below()

    console = Console(stderr=True)
    bar = Bar(
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
    values: dict[str, Any],
    render: Callable[[], RenderableType],
    as_json: bool,
    output: Path | None = None,
) -> None:
    """Print a result as a table, or as one JSON object, which may go to a file as well."""
    if as_json:
        typer.echo(json.dumps(values, indent=2, default=str))
    else:
        from rich.console import Console

        Console().print(render())
    if output is not None:  # last: what a full disk refuses has been printed
        replace_file(output, values)


def check_writable(path: Path) -> None:
    """Raise `InputError` unless a file can be written there. What it holds stays."""
    try:
        if path.is_dir():
            raise arkcache.InputError(f"cannot write {path}: it is a folder")
        if path.exists() and not path.is_file():  # a terminal, a pipe
            return
        draft = draft_of(path)
        draft.touch()
        draft.unlink()
    except OSError as error:
        raise arkcache.InputError(f"cannot write {path}: {error.strerror or error}") from None


def replace_file(path: Path, values: dict[str, Any]) -> None:
    """Write a file of JSON whole, so that an interrupt leaves the one before it."""
    text = json.dumps(values, indent=1, default=str) + "\n"
    write_whole(path, text.encode())


def listed(given: str, separator: str) -> list[str]:
    """The parts of an option with several."""
    return [part.strip() for part in given.split(separator) if part.strip()]


def numbers(option: str, given: str) -> tuple[int, ...]:
    """Numbers from "1,8,64". Raises `InputError` for anything else."""
    parts = listed(given, ",")
    if not parts or not all(part.isdecimal() for part in parts):
        raise arkcache.InputError(f"{option} {given!r}: expected numbers with commas between")
    return tuple(map(int, parts))
