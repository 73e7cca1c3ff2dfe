"""The command line. Needs the extra "cli"; `main` says so without it.

Everything heavy is imported when a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import arkcache
from arkcache.cli.installing import say_what_to_install

try:
    import typer
except ModuleNotFoundError as error:
    _missing = error.name
else:
    _missing = None


def main() -> None:
    """The entry point of the command `arkcache`."""
    if _missing is not None:
        say_what_to_install(_missing)
    app()


def _version(asked: bool) -> None:
    if asked:
        typer.echo(arkcache.__version__)
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A paged KV cache for long contexts: evict, recall, never lose."""


if _missing is None:
    from arkcache.cli.benching import bench
    from arkcache.cli.chatting import chat, generate
    from arkcache.cli.common import EXIT_CODES
    from arkcache.cli.comparing import demo, sweep
    from arkcache.cli.diagnosing import DOCTOR_CODES, doctor
    from arkcache.cli.evaluating import evaluate
    from arkcache.cli.planning import describe
    from arkcache.cli.sharing import share
    from arkcache.cli.tracing import report, trace

    app = typer.Typer(no_args_is_help=True, epilog=EXIT_CODES)
    app.callback()(_root)
    app.command()(demo)
    app.command()(chat)
    app.command()(generate)
    app.command()(describe)
    app.command()(sweep)
    app.command("eval")(evaluate)
    app.command()(share)
    app.add_typer(bench, name="bench")
    app.command(epilog=DOCTOR_CODES)(doctor)
    app.command()(trace)
    app.command()(report)
    for command in (*app.registered_commands, *bench.registered_commands):
        command.epilog = command.epilog or EXIT_CODES
