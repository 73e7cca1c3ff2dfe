"""The command `share`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from arkcache.cli.common import (
    INTERRUPTED,
    print_result,
    replace_file,
    told_in_a_line,
    with_progress,
)
from arkcache.cli.options import Device, Dtype, Json, Model, Output, Quiet, Seed

if TYPE_CHECKING:
    from arkcache.evaluation.sharing import Found


def share(
    layers: Annotated[
        int | None,
        typer.Option(help="Layers that are to store nothing.", show_default="a quarter of them"),
    ] = None,
    most_kl: Annotated[
        float,
        typer.Option(help="Divergence that they may cost, in nats: at answers, and in texts."),
    ] = 0.1,
    tries: Annotated[int, typer.Option(help="Pairs of layers to try.")] = 64,
    alike_first: Annotated[
        bool,
        typer.Option("--alike-first", help="Try layers first that are alike, not those unlike."),
    ] = False,
    task: Annotated[
        str | None,
        typer.Option(
            help="What asks the questions: a task of arkcache eval.",
            show_default="magic; facts for the shipped model",
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of the text that is asked about.")] = 512,
    questions: Annotated[int, typer.Option(help="Questions about it.")] = 8,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Look for layers that may attend the keys and values of others, and store none.

    Pairs are tried in KVSharer's order, the most unlike first; a pair is kept if the model still
    answers, and predicts real texts, nearly as before. --output grows as the search goes on. Ctrl-C
    shows what was found so far.

        arkcache share --model my/model --output shared.json

        arkcache describe --model my/model --set layer_sources=@shared.json
    """
    with told_in_a_line("share", output):
        from arkcache.evaluation.sharing import Settings, run
        from arkcache.evaluation.sharing_table import render

        def keep(found: Found) -> None:
            if output is not None:
                replace_file(output, found.to_dict())

        settings = Settings(
            num_shared=layers,
            most_kl=most_kl,
            most_tries=tries,
            alike_first=alike_first,
            task=task,
            length=length,
            num_questions=questions,
            model=model,
            seed=seed,
            device=device,
            dtype=dtype,
        )
        found = with_progress(lambda progress: run(settings, progress, keep), quiet)
        print_result(found.to_dict(), lambda: render(found), as_json, output)
        if not found.finished:
            raise typer.Exit(INTERRUPTED)
