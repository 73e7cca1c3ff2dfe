"""The commands `demo` and `sweep`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from arkcache.cli.common import (
    parse_bytes,
    print_result,
    told_in_a_line,
    with_progress,
)
from arkcache.cli.options import (
    Context,
    Device,
    Facts,
    File,
    GroupSize,
    Index,
    Json,
    Model,
    PageSize,
    Seed,
)

if TYPE_CHECKING:
    pass


def demo(
    file: File = None,
    budget: Annotated[int, typer.Option(help="Tokens attended per step and KV head.")] = 512,
    page_size: PageSize = 8,
    context: Context = 8192,
    facts: Facts = 16,
    model: Model = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: Seed = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the table.")
    ] = False,
) -> None:
    """Hide facts in a long text, read it once, ask for them, and compare five caches.

    All get the same text and, but for the full cache, the same budget.
    """
    with told_in_a_line("demo"):
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
        result = with_progress(lambda progress: run(settings, progress))
        print_result(result.to_dict(), lambda: render(result), as_json)


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
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="May be repeated.", show_default="all presets"),
    ] = None,
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
        typer.Option(help="auto (bfloat16 for the shipped model), float32, bfloat16 or float16."),
    ] = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare the formats of pages, at equal tokens and at equal bytes.

    The same text, facts and questions as the demonstration, about two minutes for each draw.
    """
    with told_in_a_line("sweep"):
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
        result = with_progress(lambda progress: run(settings, progress))
        print_result(result.to_dict(), lambda: render(result), as_json)
