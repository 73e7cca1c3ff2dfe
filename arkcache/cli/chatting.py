"""The commands `chat` and `generate`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import arkcache
from arkcache.cli.common import told_in_a_line
from arkcache.cli.options import Device

if TYPE_CHECKING:
    from arkcache.chat.session import Session

Model = Annotated[
    str, typer.Option(help="Any causal language model: a folder, a Hugging Face id, or smollm2.")
]
Files = Annotated[
    list[Path] | None, typer.Option("--file", help="A text to read (UTF-8); may be repeated.")
]
Budget = Annotated[int, typer.Option(help="Tokens attended per step and KV head.")]
System = Annotated[
    str | None, typer.Option(help="Who the assistant is.", show_default="as the model has it")
]
MaxTokens = Annotated[int, typer.Option(help="The longest answer.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most likely token each time.")]
TopP = Annotated[float, typer.Option(help="Draw among tokens that have this share together.")]
Penalty = Annotated[
    float,
    typer.Option("--repetition-penalty", help="Above 1: what was said already is less likely."),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
PastLimit = Annotated[
    bool, typer.Option("--past-limit", help="Read more tokens than the model was made for.")
]


def chat(
    file: Files = None,
    model: Model = "smollm2",
    budget: Budget = 2048,
    system: System = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    past_limit: PastLimit = False,
    no_file: Annotated[bool, typer.Option("--no-file", help="Begin without a text.")] = False,
    load: Annotated[
        Path | None,
        typer.Option(help="Go on with a conversation that /save has saved in this folder."),
    ] = None,
) -> None:
    """Talk with a model about long texts; without a file, about the help of Python's debugger.

    What is typed is a question, or a command such as /help. Ctrl-C stops an answer.

        arkcache chat --file book.txt --budget 1024
    """
    with told_in_a_line("chat"):
        from rich.console import Console

        from arkcache.chat.documents import HELP_TOPIC, help_text, load_document
        from arkcache.chat.terminal import Chat, Sampling, use_line_editing
        from arkcache.saving.folder import read_header

        if file and no_file:
            raise arkcache.InputError("--file beside --no-file: expected one or the other")
        if load is not None:
            read_header(load)  # what is no session is said before the model loads
        texts = [(path.name, load_document(path)) for path in file or []]
        if not texts and not no_file and load is None:
            texts = [(f"Python's help on {HELP_TOPIC}", help_text())]
        sampling = Sampling(max_tokens, temperature, top_p, repetition_penalty)
        console = Console()
        session = _session(model, device, dtype, budget, system, past_limit)
        talk = Chat(session, sampling, console)
        if load is not None:
            talk.load(load)
        for name, text in texts:
            talk.read(name, text)
        use_line_editing()
        talk.run()


def generate(
    question: Annotated[
        str, typer.Argument(help="What to ask; - reads it from standard input.")
    ] = "-",
    file: Files = None,
    model: Model = "smollm2",
    budget: Budget = 2048,
    system: System = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    past_limit: PastLimit = False,
    exact: Annotated[bool, typer.Option("--exact", help="Attend everything in each step.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the answer.")
    ] = False,
) -> None:
    """Print one answer, to a question about texts or to what comes on standard input.

    arkcache generate --file report.txt "What was decided?"

    git log | arkcache generate --model my/model -
    """
    with told_in_a_line("generate"):
        from arkcache.chat.documents import load_document

        texts = [load_document(path) for path in file or []]
        asked = sys.stdin.read() if question == "-" else question
        session = _session(model, device, dtype, budget, system, past_limit)
        start = time.perf_counter()
        for text in texts:
            session.read(text)
        parts = []
        for part in session.ask(
            asked,
            max_new_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            exact=exact,
        ):
            parts.append(part)
            if not as_json:
                typer.echo(part, nl=False)
        if as_json:
            stats = session.cache.stats()
            values = {
                "answer": "".join(parts).strip(),
                "tokens": len(session.ids),
                "seconds": round(time.perf_counter() - start, 3),
                "device_bytes": stats.device_bytes + stats.digest_bytes,
                "host_bytes": stats.host_bytes,
            }
            typer.echo(json.dumps(values, indent=2))
        else:
            typer.echo()


def _session(
    model: str, device: str, dtype: str, budget: int, system: str | None, past_limit: bool
) -> Session:
    from transformers.utils import logging

    from arkcache.chat.session import Session
    from arkcache.config import CacheConfig
    from arkcache.demo.models import load_model, pick_device

    config = CacheConfig(budget_tokens=budget)  # what is impossible is said before the model loads
    if sys.stderr.isatty():
        typer.echo(f"Loading {model} ...", err=True)
    logging.disable_progress_bar()
    loaded, tokenizer = load_model(model, pick_device(device), dtype)
    return Session(loaded, tokenizer, config, system=system, past_limit=past_limit)
