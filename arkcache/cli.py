"""The command line: demo, describe, sweep, eval. Needs the extra "cli"; `main` says so without it.

Everything heavy is imported when a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import arkcache

try:
    import typer
except ModuleNotFoundError as error:
    _missing = error.name
else:
    _missing = None
    # Options of several commands.
    _File = Annotated[
        Path | None, typer.Option(help="Text to read (UTF-8).", show_default="Python's help topics")
    ]
    _PageSize = Annotated[int, typer.Option(help="Tokens per page.")]
    _PageSizeOrAuto = Annotated[
        int | None,
        typer.Option(help="Tokens per page.", show_default="8, or 32 where keys are quantised"),
    ]
    _GroupSize = Annotated[int, typer.Option(help="Channels of a value that share a scale.")]
    _Index = Annotated[str, typer.Option(help="How pages are rated.")]
    _Context = Annotated[int, typer.Option(help="Tokens to read; the text is cut or repeated.")]
    _Facts = Annotated[int, typer.Option(help="Facts to hide in the text.")]
    _Model = Annotated[
        str | None,
        typer.Option(
            help="Any causal language model: a folder, a Hugging Face id, or smollm2, a small "
            "chat model.",
            show_default="the shipped model",
        ),
    ]
    _Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
    _Seed = Annotated[int, typer.Option(help="Draws other facts and other places.")]
    _Json = Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the tables.")
    ]

if TYPE_CHECKING:
    from rich.console import RenderableType

    from arkcache.demo.run import Progress
    from arkcache.memory import CacheShape

_COMMAND_NEEDS = ("the command line needs", "cli")
_INTERRUPTED = 130
_UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base**exponent
    for exponent, prefix in enumerate("KMGT", start=1)
    for base, suffix in ((1000, "B"), (1024, "iB"))
}

T = TypeVar("T")


def main() -> None:
    """The entry point of the command `arkcache`."""
    if _missing is not None:
        _say_what_to_install(_missing)
    app()


def demo(
    file: _File = None,
    budget: Annotated[int, typer.Option(help="Tokens attended per step and KV head.")] = 512,
    page_size: _PageSize = 8,
    context: _Context = 8192,
    facts: _Facts = 16,
    model: _Model = None,
    device: _Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: _Seed = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the table.")
    ] = False,
) -> None:
    """Hide facts in a long text, read it once, ask for them, and compare five caches.

    All get the same text and, but for the full cache, the same budget.
    """
    with _told_in_a_line("demo"):
        from arkcache.demo.run import Settings, run
        from arkcache.demo.table import render

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
        result = _with_progress(lambda progress: run(settings, progress))
        _print(result.to_dict(), lambda: render(result), as_json)


def describe(
    model: Annotated[
        str | None, typer.Option(help="Take the sizes from this model's config: a folder or an id.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers, instead of a model.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="KV heads of each layer.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Elements of a key.")] = None,
    value_dim: Annotated[
        int | None, typer.Option(help="Elements of a value.", show_default="as the key's")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16.", show_default="the model's, else bfloat16"
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 131072,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    budget: Annotated[
        int | None,
        typer.Option(
            help="Tokens attended per step and KV head.",
            show_default="2048, or what fits in the device bytes",
        ),
    ] = None,
    dense_layers: Annotated[int, typer.Option(help="First layers that attend everything.")] = 0,
    page_size: _PageSizeOrAuto = None,
    group_size: _GroupSize = 32,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format", help="As in K4V4 or K8V4+K4V2; may be repeated.", show_default="all presets"
        ),
    ] = None,
    device_bytes: Annotated[
        str | None, typer.Option(help="Limit of the device tier, as in 2GiB or 500MB.")
    ] = None,
    rotation: Annotated[str, typer.Option(help="none, keys, values or both.")] = "none",
    packed_slots: Annotated[
        bool | None,
        typer.Option(
            "--packed-slots/--unpacked-slots",
            help="Whether pages stay packed on the device.",
            show_default="packed on cuda",
        ),
    ] = None,
    index: _Index = "tokens",
    device: Annotated[str, typer.Option(help="cuda or cpu; it need not be here.")] = "cuda",
    as_json: _Json = False,
) -> None:
    """Say what a cache will take, in each format, before anything is loaded."""
    with _told_in_a_line("describe"):
        from arkcache.config import CacheConfig
        from arkcache.demo.describe import render
        from arkcache.formats import PRESETS
        from arkcache.memory import plan_memory

        sizes = {"layers": layers, "kv-heads": kv_heads, "head-dim": head_dim}
        shape, numbers = _shape(model, sizes | {"value-dim": value_dim}, dtype)
        num_dense = sum(number < dense_layers for number in numbers) if dense_layers > 0 else 0
        settings: dict[str, Any] = {
            "page_size": page_size,
            "group_size": group_size,
            "num_dense_layers": dense_layers if dense_layers < 0 else num_dense,
            "budget_tokens": "auto" if budget is None else budget,
            "device_bytes": None if device_bytes is None else parse_bytes(device_bytes),
            "rotation": rotation,
            "packed_slots": packed_slots,
            "index": index,
        }
        plans = {
            name: plan_memory(CacheConfig.preset(name, **settings), shape, context, batch, device)
            for name in formats or PRESETS
        }
        heading = f"What a cache of {model or 'these sizes'} takes on {device}."
        values = {
            "model": model,
            "device": device,
            "settings": settings,
            "shape": vars(shape) | {"dtype": str(shape.dtype).removeprefix("torch.")},
            "formats": {name: plan.to_dict() for name, plan in plans.items()},
        }
        _print(values, lambda: render(plans, shape, heading), as_json)


def sweep(
    file: _File = None,
    budget: Annotated[int, typer.Option(help="Tokens attended, at equal tokens.")] = 512,
    device_bytes: Annotated[
        str | None,
        typer.Option(
            help="Bytes of the device tier, at equal bytes, as in 2MiB.",
            show_default="what 384 tokens take in 16 bits",
        ),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="May be repeated.", show_default="all presets"),
    ] = None,
    page_size: _PageSize = 32,
    group_size: _GroupSize = 32,
    index: _Index = "cuboid-mean",
    context: _Context = 8192,
    facts: _Facts = 16,
    draws: Annotated[int, typer.Option(help="Texts with other facts, to average.")] = 1,
    model: _Model = None,
    device: _Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(help="auto (bfloat16 for the shipped model), float32, bfloat16 or float16."),
    ] = "auto",
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Compare the formats of pages, at equal tokens and at equal bytes.

    The same text, facts and questions as the demonstration, about two minutes for each draw.
    """
    with _told_in_a_line("sweep"):
        from arkcache.demo.sweep import Settings, run
        from arkcache.demo.sweep_table import render
        from arkcache.formats import PRESETS

        settings = Settings(
            context_tokens=context,
            num_facts=facts,
            num_draws=draws,
            budget_tokens=budget,
            device_bytes=None if device_bytes is None else parse_bytes(device_bytes),
            page_size=page_size,
            group_size=group_size,
            index=index,
            formats=tuple(formats or PRESETS),
            file=file,
            model=model,
            seed=seed,
            device=device,
            dtype=dtype,
        )
        result = _with_progress(lambda progress: run(settings, progress))
        _print(result.to_dict(), lambda: render(result), as_json)


def evaluate(
    tasks: Annotated[
        str,
        typer.Option(help="Names, with commas between; niah, ruler, infinitebench, trained, all."),
    ] = "magic,language",
    lengths: Annotated[str, typer.Option(help="Tokens to read, with commas between.")] = "3072",
    budgets: Annotated[
        str,
        typer.Option(
            help="Tokens, as in 512, shares of the length, as in 1/8, or of the full cache's bytes "
            "on the device, as in 1/8B."
        ),
    ] = "1/8,1/16",
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "--methods",
            help="ark, or with settings as in ark:index=tokens,page_size=16; oracle and random "
            "likewise; sinks, h2o, scissorhands, snapkv, pyramidkv. May be repeated, or with ; "
            "between.",
            show_default="ark",
        ),
    ] = None,
    questions: Annotated[int, typer.Option(help="Of each task and length.")] = 16,
    passages: Annotated[int, typer.Option(help="Real texts of the language task.")] = 3,
    steps: Annotated[int, typer.Option(help="Tokens predicted after each real text.")] = 64,
    model: _Model = None,
    device: _Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: _Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option("--json", help="Write all that was measured to this file, as it comes."),
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(help="Draw pictures into this folder; they need the extra plot."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Show and draw this file of --json, measure nothing."),
    ] = None,
) -> None:
    """Measure what a model still knows behind a cache, against its full cache.

    Every text is read once; then each method answers the same questions, or predicts the same real
    text, token by token. Ctrl-C shows what was measured so far.
    """
    with _told_in_a_line("eval"):
        from arkcache.evaluation.figures import to_dict
        from arkcache.evaluation.records import Result, load
        from arkcache.evaluation.run import Settings, run
        from arkcache.evaluation.table import render
        from arkcache.evaluation.tasks import task_names

        if plots is not None:  # what is missing is missed now rather than after hours
            from arkcache.evaluation.plots import draw, prepare

            prepare(plots)

        def keep(result: Result) -> None:
            if out is not None:
                _replace(out, result.to_dict())

        settings = Settings(
            tasks=task_names(tasks),
            lengths=_lengths(lengths),
            budgets=tuple(_listed(budgets, ",")),
            methods=tuple(spec for given in methods or ["ark"] for spec in _listed(given, ";")),
            num_questions=questions,
            num_passages=passages,
            num_steps=steps,
            model=model,
            seed=seed,
            device=device,
            dtype=dtype,
        )
        if source is not None:
            result = load(source)
        else:
            result = _with_progress(lambda progress: run(settings, progress, keep))
        if out is not None:
            _replace(out, {"figures": to_dict(result)} | result.to_dict())
        _print({}, lambda: render(result), as_json=False)
        if plots is not None:
            for path in draw(result, plots):
                typer.echo(path, err=True)
        if not result.finished:
            raise typer.Exit(_INTERRUPTED)


def _listed(given: str, separator: str) -> list[str]:
    return [part.strip() for part in given.split(separator) if part.strip()]


def _lengths(given: str) -> tuple[int, ...]:
    """Lengths from "3072,7168". Raises `InputError` for anything else."""
    parts = _listed(given, ",")
    if not parts or not all(part.isdecimal() for part in parts):
        raise arkcache.InputError(f"lengths {given!r}: expected tokens, as in 3072,7168")
    return tuple(map(int, parts))


def _replace(path: Path, values: dict[str, Any]) -> None:
    """Write a file of JSON whole, so that an interrupt leaves the one before it."""
    draft = path.with_name(path.name + ".part")
    try:
        draft.write_text(json.dumps(values, indent=1, default=str) + "\n", encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise arkcache.InputError(f"cannot write {path}: {error.strerror or error}") from None


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


def _shape(
    model: str | None, sizes: dict[str, int | None], dtype: str | None
) -> tuple[CacheShape, list[int]]:
    """The sizes to plan for, and the numbers of the layers that they are of."""
    from arkcache.demo.describe import parse_dtype, shape_of_model
    from arkcache.memory import CacheShape

    given = [f"--{name}" for name, size in sizes.items() if size is not None]
    if model is not None:
        if given:
            raise arkcache.InputError(
                f"{', '.join(given)} beside --model: expected one or the other"
            )
        return shape_of_model(model, dtype)
    layers, kv_heads, head_dim, value_dim = sizes.values()
    if layers is None or kv_heads is None or head_dim is None:
        raise arkcache.InputError(
            f"{', '.join(given) or 'no sizes'} given: expected --model, or all of --layers, "
            "--kv-heads and --head-dim"
        )
    value_dim = head_dim if value_dim is None else value_dim
    shape = CacheShape(layers, kv_heads, head_dim, value_dim, parse_dtype(dtype or "bfloat16"))
    return shape, list(range(layers))


@contextmanager
def _told_in_a_line(command: str) -> Iterator[None]:
    """Turns what a user can mend into a line on stderr and an exit code."""
    try:
        yield
    except ModuleNotFoundError as error:
        _say_what_to_install(error.name or str(error))
    except arkcache.ArkCacheError as error:
        typer.echo(f"arkcache {command}: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"arkcache {command}: interrupted; nothing was kept.", err=True)
        raise typer.Exit(_INTERRUPTED) from None


def _with_progress(work: Callable[[Progress], T]) -> T:
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


def _print(values: dict[str, Any], render: Callable[[], RenderableType], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(values, indent=2, default=str))
        return
    from rich.console import Console

    Console().print(render())


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
    needed, extra = ("pictures need", "plot") if module == "matplotlib" else _COMMAND_NEEDS
    sys.exit(f"arkcache: {module} is not installed; {needed}: pip install 'arkcache[{extra}]'")


if _missing is None:
    app = typer.Typer(no_args_is_help=True, add_completion=False)
    app.callback()(_root)
    app.command()(demo)
    app.command()(describe)
    app.command()(sweep)
    app.command("eval")(evaluate)

if __name__ == "__main__":
    main()
