"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

File = Annotated[
    Path | None, typer.Option(help="Text to read (UTF-8).", show_default="Python's help topics")
]
PageSize = Annotated[int, typer.Option(help="Tokens per page.")]
PageSizeOrAuto = Annotated[
    int | None,
    typer.Option(help="Tokens per page.", show_default="8, or 32 where keys are quantised"),
]
GroupSize = Annotated[int, typer.Option(help="Channels of a value that share a scale.")]
Index = Annotated[str, typer.Option(help="How pages are rated.")]
Context = Annotated[int, typer.Option(help="Tokens to read; the text is cut or repeated.")]
Facts = Annotated[int, typer.Option(help="Facts to hide in the text.")]
Model = Annotated[
    str | None,
    typer.Option(
        help="Any causal language model: a folder, a Hugging Face id, or smollm2, a small "
        "chat model.",
        show_default="the shipped model",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option(help="Draws other facts and other places.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the tables.")]
