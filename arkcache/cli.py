"""The command line: `arkcache demo`. Needs the extra "cli"; `main` says so where it is missing.

Everything heavy is imported when a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import arkcache

try:
    import typer
except ModuleNotFoundError as error:
    _missing = error.name
else:
    _missing = None

if TYPE_CHECKING:
    from arkcache.demo.run import Result, Settings

_INTERRUPTED = 130


def main() -> None:
    """The entry point of the command `arkcache`."""
    if _missing is not None:
        _say_what_to_install(_missing)
    app()


def demo(
    file: Annotated[
        Path | None, typer.Option(help="Text to read (UTF-8).", show_default="Python's help topics")
    ] = None,
    budget: Annotated[int, typer.Option(help="Tokens attended per step and KV head.")] = 512,
    page_size: Annotated[int, typer.Option(help="Tokens per page.")] = 32,
    context: Annotated[
        int, typer.Option(help="Tokens to read; the text is cut or repeated.")
    ] = 8192,
    facts: Annotated[int, typer.Option(help="Facts to hide in the text.")] = 16,
    model: Annotated[
        str | None,
        typer.Option(
            help="Any causal language model: a folder or a Hugging Face id.",
            show_default="the shipped model",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Draws other facts and other places.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the table.")
    ] = False,
) -> None:
    """Hide facts in a long text, read it once, ask for them, and compare five caches.

    All get the same text and, but for the full cache, the same budget.
    """
    try:
        from arkcache.demo.run import Settings

        settings = Settings(
            context_tokens=context,
            num_facts=facts,
            budget_tokens=budget,
            page_size=page_size,
            file=file,
            model=model,
            seed=seed,
            device=device,
            dtype=dtype,
        )
        result = _run_with_progress(settings)
    except ModuleNotFoundError as error:
        _say_what_to_install(error.name or str(error))
    except arkcache.ArkCacheError as error:
        typer.echo(f"arkcache demo: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("arkcache demo: interrupted; nothing was kept.", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    _print_result(result, as_json)


def _run_with_progress(settings: Settings) -> Result:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from transformers.utils import logging

    from arkcache.demo.run import run

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
        return run(settings, progress)


def _print_result(result: Result, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
        return
    from rich.console import Console

    from arkcache.demo.table import render

    Console().print(render(result))


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


def _say_what_to_install(module: str) -> NoReturn:
    sys.exit(
        f"arkcache: {module} is not installed; the command line needs: pip install 'arkcache[cli]'"
    )


if _missing is None:
    app = typer.Typer(no_args_is_help=True, add_completion=False)
    app.callback()(_root)
    app.command()(demo)

if __name__ == "__main__":
    main()
