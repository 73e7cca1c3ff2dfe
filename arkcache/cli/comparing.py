"""The commands `demo` and `sweep`."""

from __future__ import annotations

from typing import Annotated

import typer

from arkcache.cli.common import (
    print_result,
    told_in_a_line,
    with_progress,
)
from arkcache.cli.completing import complete
from arkcache.cli.options import (
    Context,
    Device,
    Dtype,
    Facts,
    File,
    Formats,
    GroupSize,
    Index,
    Json,
    Model,
    Output,
    PageSize,
    Quiet,
    Seed,
)
from arkcache.cli.settings import say_unused
from arkcache.sizes import parse_bytes


def demo(
    file: File = None,
    budget: Annotated[int, typer.Option(help="Tokens attended per step and KV head.")] = 512,
    page_size: PageSize = 8,
    context: Context = 8192,
    facts: Facts = 16,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    live: Annotated[
        bool, typer.Option("--live", help="Show meanwhile what each cache does, and its answers.")
    ] = False,
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Hide facts in a long text, read it once, ask for them, and compare five caches.

    All get the same text and, but for the full cache, the same budget.

        arkcache demo --context 4096 --budget 256 --live

        arkcache demo --model my/model --file book.txt --output demo.json
    """
    with told_in_a_line("demo", output):
        from arkcache.demo.live import LiveView
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
        if not quiet:
            say_unused()
        view = LiveView()
        watched = {"watch": view.look} if live else {}
        result = with_progress(
            lambda progress: run(settings, progress, **watched),
            quiet,
            below=view.show if live else None,
        )
        print_result(result.to_dict(), lambda: render(result), as_json, output)


def sweep(
    file: File = None,
    budget: Annotated[int, typer.Option(help="Tokens attended, at equal tokens.")] = 512,
    device_bytes: Annotated[
        str | None,
        typer.Option(
            help="Bytes of the device tier, at equal bytes, as in 2MiB.",
            show_default="what 384 tokens take in 16 bits",
        ),
    ] = None,
    formats: Formats = None,
    page_size: PageSize = 32,
    group_size: GroupSize = 32,
    index: Index = "cuboid-mean",
    context: Context = 8192,
    facts: Facts = 16,
    draws: Annotated[int, typer.Option(help="Texts with other facts, to average.")] = 1,
    model: Model = None,
    device: Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="auto (bfloat16 for the shipped model), float32, bfloat16 or float16.",
            autocompletion=complete("dtype"),
        ),
    ] = "auto",
    seed: Seed = 0,
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Compare the formats of pages, at equal tokens and at equal bytes.

    The same text, facts and questions as the demonstration, about two minutes for each draw.

        arkcache sweep --format K4V4 --format K4V2 --output sweep.json
    """
    with told_in_a_line("sweep", output):
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
        if not quiet:
            say_unused()
        result = with_progress(lambda progress: run(settings, progress), quiet)
        print_result(result.to_dict(), lambda: render(result), as_json, output)
