"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arkcache.cli.completing import complete

File = Annotated[
    Path | None, typer.Option(help="Text to read (UTF-8).", show_default="Python's help topics")
]
PageSize = Annotated[int, typer.Option(help="Tokens per page.")]
PageSizeOrAuto = Annotated[
    int | None,
    typer.Option(help="Tokens per page.", show_default="8, or 32 where keys are quantised"),
]
GroupSize = Annotated[int, typer.Option(help="Channels of a value that share a scale.")]
Index = Annotated[str, typer.Option(help="How pages are rated.", autocompletion=complete("index"))]
Context = Annotated[int, typer.Option(help="Tokens to read; the text is cut or repeated.")]
Facts = Annotated[int, typer.Option(help="Facts to hide in the text.")]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        help="As in K4V4 or K8V4+K4V2; may be repeated.",
        show_default="all presets",
        autocompletion=complete("format"),
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Any causal language model: a folder, a Hugging Face id, or smollm2, a small "
        "chat model.",
        show_default="the shipped model",
        autocompletion=complete("model"),
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", autocompletion=complete("device"))]
Dtype = Annotated[
    str,
    typer.Option(help="auto, float32, bfloat16 or float16.", autocompletion=complete("dtype")),
]
Seed = Annotated[int, typer.Option(help="Draws other facts and other places.")]
Config = Annotated[
    Path | None,
    typer.Option(
        help="Settings of the cache, in TOML.", show_default="arkcache.toml here, or your own"
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A setting of the cache, as in key_bits=4; may be repeated.",
        show_default=False,
        autocompletion=complete("setting"),
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else.")]
Output = Annotated[
    Path | None, typer.Option(help="Also write that JSON object to this file.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no hints.")]
