"""The command `eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arkcache.cli.common import (
    INTERRUPTED,
    listed,
    numbers,
    print_result,
    replace_file,
    told_in_a_line,
    with_progress,
)
from arkcache.cli.options import (
    Device,
    Dtype,
    Json,
    Model,
    Output,
    Quiet,
    Seed,
)
from arkcache.cli.settings import say_unused


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
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
    plots: Annotated[
        Path | None,
        typer.Option(help="Draw pictures into this folder; they need the extra plot."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Show and draw this file of --output, measure nothing."),
    ] = None,
) -> None:
    """Measure what a model still knows behind a cache, against its full cache.

    Every text is read once; then each method answers the same questions, or predicts the same real
    text, token by token. --output grows as the run goes on. Ctrl-C shows what was measured so far.

        arkcache eval --model my/model --budgets 1/8 --methods "ark;sinks" --output eval.json

        arkcache eval --from eval.json --plots pictures
    """
    with told_in_a_line("eval", output):
        from arkcache.evaluation.figures import to_dict
        from arkcache.evaluation.records import Result, load
        from arkcache.evaluation.run import Settings, run
        from arkcache.evaluation.table import render
        from arkcache.evaluation.tasks import task_names

        if plots is not None:  # what is missing is missed now rather than after hours
            from arkcache.evaluation.plots import draw, prepare

            prepare(plots)

        def keep(result: Result) -> None:
            if output is not None:
                replace_file(output, result.to_dict())

        settings = Settings(
            tasks=task_names(tasks),
            lengths=numbers("--lengths", lengths),
            budgets=tuple(listed(budgets, ",")),
            methods=tuple(spec for given in methods or ["ark"] for spec in listed(given, ";")),
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
            if not quiet:
                say_unused()
            result = with_progress(lambda progress: run(settings, progress, keep), quiet)
        values = {"figures": to_dict(result)} | result.to_dict()
        print_result(values, lambda: render(result), as_json, output)
        if plots is not None:
            for path in draw(result, plots):
                if not quiet:
                    typer.echo(path, err=True)
        if not result.finished:
            raise typer.Exit(INTERRUPTED)
