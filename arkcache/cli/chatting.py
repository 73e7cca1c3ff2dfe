"""The commands `chat` and `generate`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import arkcache
from arkcache.cli.common import replace_file, told_in_a_line
from arkcache.cli.completing import complete
from arkcache.cli.options import Config, Device, Dtype, Json, Output, Quiet, Set
from arkcache.cli.settings import settings_given
from arkcache.settings import Given, build

if TYPE_CHECKING:
    from arkcache.chat.session import Session
    from arkcache.chat.terminal import Chat
    from arkcache.config import CacheConfig

Model = Annotated[
    str,
    typer.Option(
        help="Any causal language model: a folder, a Hugging Face id, or smollm2.",
        autocompletion=complete("model"),
    ),
]
Files = Annotated[
    list[Path] | None, typer.Option("--file", help="A text to read (UTF-8); may be repeated.")
]
Budget = Annotated[
    int | None, typer.Option(help="Tokens attended per step and KV head.", show_default="2048")
]
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
PastLimit = Annotated[
    bool, typer.Option("--past-limit", help="Read more tokens than the model was made for.")
]


def chat(
    file: Files = None,
    model: Model = "smollm2",
    budget: Budget = None,
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
    live: Annotated[
        bool, typer.Option("--live", help="Show below an answer what the cache does meanwhile.")
    ] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Serve Prometheus metrics at this port of 127.0.0.1; 0 is any."),
    ] = None,
    config: Config = None,
    settings: Set = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the conversation as JSON in the end, the rest on stderr."
        ),
    ] = False,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Talk with a model about long texts; without a file, about the help of Python's debugger.

    What is typed is a question, or a command such as /help. Ctrl-C stops an answer.

        arkcache chat --file book.txt --budget 1024

        arkcache chat --model my/model --set key_bits=4 --set value_bits=4
    """
    with told_in_a_line("chat", output):
        from rich.console import Console

        from arkcache.chat.documents import HELP_TOPIC, help_text, load_document
        from arkcache.chat.terminal import Chat, Sampling, use_line_editing
        from arkcache.saving.folder import read_header

        if file and no_file:
            raise arkcache.InputError("--file beside --no-file: expected one or the other")
        if load is not None:
            read_header(load)  # what is no session is said before the model loads
            if system is not None:
                raise arkcache.InputError("--system beside --load: it is said already")
        texts = [(path.name, load_document(path)) for path in file or []]
        if not texts and not no_file and load is None:
            texts = [(f"Python's help on {HELP_TOPIC}", help_text())]
        sampling = Sampling(max_tokens, temperature, top_p, repetition_penalty)
        given = settings_given(config, settings, budget_tokens=("--budget", budget))
        session = make_session(model, device, dtype, build(given), system, past_limit, quiet)
        ask_line = _ask_on_stderr if as_json else input
        talk = Chat(session, sampling, Console(stderr=as_json), ask_line, quiet=quiet, live=live)
        with _metrics_of(talk, metrics_port):
            if load is not None:
                talk.load(load, **_typed(given, config))
            for name, text in texts:
                talk.read(name, text)
            use_line_editing()
            talk.run()
        session = talk.session
        values = {"turns": [turn._asdict() for turn in session.turns]} | _figures(session)
        if as_json:
            typer.echo(json.dumps(values, indent=2))
        if output is not None:
            replace_file(output, values)


def generate(
    question: Annotated[
        str, typer.Argument(help="What to ask; - reads it from standard input.")
    ] = "-",
    file: Files = None,
    model: Model = "smollm2",
    budget: Budget = None,
    system: System = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    past_limit: PastLimit = False,
    exact: Annotated[bool, typer.Option("--exact", help="Attend everything in each step.")] = False,
    config: Config = None,
    settings: Set = None,
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Print one answer, to a question about texts or to what comes on standard input.

    arkcache generate --file report.txt "What was decided?"

    git log | arkcache generate --model my/model -
    """
    with told_in_a_line("generate", output):
        from arkcache.chat.documents import load_document, read_input

        texts = [load_document(path) for path in file or []]
        asked = read_input() if question == "-" else question
        cache = _config(config, settings, budget)
        session = make_session(model, device, dtype, cache, system, past_limit, quiet)
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
        values = {
            "answer": "".join(parts).strip(),
            "seconds": round(time.perf_counter() - start, 3),
        } | _figures(session)
        typer.echo(json.dumps(values, indent=2) if as_json else "")
        if output is not None:
            replace_file(output, values)


def _config(config: Path | None, settings: list[str] | None, budget: int | None) -> CacheConfig:
    """The settings of the cache: what is impossible is said before the model loads."""
    return build(settings_given(config, settings, budget_tokens=("--budget", budget)))


def _typed(given: dict[str, Given], config: Path | None) -> dict[str, Any]:
    """The settings that the command line gives, --config among them: they replace those of a saved
    conversation, which settings from elsewhere do not."""
    named = ("--", *(() if config is None else (f"{config}:",)))
    return {name: one.value for name, one in given.items() if one.source.startswith(named)}


def make_session(
    model: str,
    device: str,
    dtype: str,
    config: CacheConfig,
    system: str | None,
    past_limit: bool,
    quiet: bool,
) -> Session:
    """A session with a model that is loaded now; what is impossible is said before."""
    from transformers.utils import logging

    from arkcache.chat.session import Session
    from arkcache.demo.models import load_model, pick_device

    if sys.stderr.isatty() and not quiet:
        typer.echo(f"Loading {model} ...", err=True)
    logging.disable_progress_bar()
    loaded, tokenizer = load_model(model, pick_device(device), dtype)
    return Session(loaded, tokenizer, config, system=system, past_limit=past_limit)


@contextmanager
def _metrics_of(talk: Chat, port: int | None) -> Iterator[None]:
    """Metrics of the conversation's cache, if a port is given; says where they are."""
    if port is None:
        yield
        return
    from arkcache.metrics import CacheMetrics, served

    metrics = CacheMetrics()
    with metrics.watching(talk, "chat"), served(metrics, port) as taken:
        talk.before_change = metrics.read
        typer.echo(f"Metrics at http://127.0.0.1:{taken}/metrics", err=True)
        yield


def _figures(session: Session) -> dict[str, Any]:
    """What the session holds, as plain numbers."""
    stats = session.cache.stats()
    return {
        "tokens": len(session.ids),
        "device_bytes": stats.device_bytes + stats.digest_bytes,
        "host_bytes": stats.host_bytes,
    }


def _ask_on_stderr(prompt: str) -> str:
    """A line from standard input, for a conversation whose standard output is its JSON."""
    typer.echo(prompt, nl=False, err=True)
    return input()
