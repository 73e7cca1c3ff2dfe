"""The commands `trace` and `report`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import arkcache
from arkcache.cli.chatting import (
    Budget,
    Files,
    MaxTokens,
    Model,
    PastLimit,
    Penalty,
    System,
    Temperature,
    TopP,
    make_session,
)
from arkcache.cli.common import INTERRUPTED, told_in_a_line, with_progress
from arkcache.cli.options import Config, Device, Dtype, Json, Quiet, Set
from arkcache.cli.settings import settings_given
from arkcache.files import write_whole
from arkcache.settings import build
from arkcache.sizes import bytes_text

if TYPE_CHECKING:
    from arkcache.chat.session import Session
    from arkcache.demo.run import Progress
    from arkcache.tracing.recorder import Recorder
    from arkcache.tracing.trace import Trace


def trace(
    output: Annotated[Path, typer.Option(help="The file to write.")],
    file: Files = None,
    question: Annotated[
        str | None, typer.Option(help="What to ask.", show_default="what the text is about")
    ] = None,
    model: Model = "smollm2",
    budget: Budget = None,
    system: System = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    past_limit: PastLimit = False,
    steps: Annotated[int, typer.Option(help="Keep the newest so many steps.")] = 1024,
    time_every: Annotated[int, typer.Option(help="Time the parts of one step in so many.")] = 8,
    mass_every: Annotated[
        int, typer.Option(help="Look at attention masses in one step in so many.")
    ] = 64,
    config: Config = None,
    settings: Set = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Record what the cache does while a model answers; `arkcache report` makes a page of it.

    Without a file, about the help of Python's debugger. Ctrl-C keeps what was recorded.

        arkcache trace --file book.txt --question "Who wrote the letter?" --output letter.trace
    """
    with told_in_a_line("trace", output):
        from arkcache.chat.documents import HELP_TOPIC, help_text, load_document
        from arkcache.tracing.recorder import Recorder

        texts = {path.name: load_document(path) for path in file or []}
        if not texts:
            texts = {f"Python's help on {HELP_TOPIC}": help_text()}
            question = question or "How do I set a breakpoint?"
        question = question or "What is this text about?"
        recorder = Recorder(max_steps=steps, time_every=time_every, mass_every=mass_every)
        cache = build(settings_given(config, settings, budget_tokens=("--budget", budget)))
        session = make_session(model, device, dtype, cache, system, past_limit, quiet)
        recorder.about |= _about(session, model, question, [*texts])
        how = {
            "max_new_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
        }
        try:
            with_progress(
                lambda told: _record(session, recorder, texts, question, how, told), quiet
            )
        except KeyboardInterrupt:
            if not recorder.num_steps:
                raise
            _save(session, recorder, output, as_json, quiet)
            typer.echo("arkcache trace: interrupted; what was recorded is kept.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        _save(session, recorder, output, as_json, quiet)


def report(
    trace_file: Annotated[
        Path, typer.Argument(metavar="TRACE", help="A file that `arkcache trace` wrote.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="The page to write.", show_default="TRACE.html")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page about a trace: it loads nothing and can be sent as it is.

    arkcache report letter.trace --output letter.html

    arkcache report letter.trace --json
    """
    with told_in_a_line("report", output):
        from arkcache.tracing.file import load
        from arkcache.tracing.report import render

        kept = load(trace_file)
        page = render(kept).encode()
        if output is not None and output.resolve() == trace_file.resolve():
            raise arkcache.InputError(f"--output {output} is the trace itself: give another file")
        target = output or trace_file.with_name(trace_file.name + ".html")
        write_whole(target, page)
        if as_json:
            _print_json(kept, target)
        elif not quiet:
            typer.echo(f"{target}: {bytes_text(len(page))}")


def _record(
    session: Session,
    recorder: Recorder,
    texts: dict[str, str],
    question: str,
    how: dict[str, Any],
    progress: Progress,
) -> None:
    for name, text in texts.items():
        session.read(text, partial(progress, f"Reading {name}"))
    with session.cache.trace(recorder):
        for _ in session.ask(question, **how):
            progress("Recording", recorder.num_steps, how["max_new_tokens"])


def _about(session: Session, model: str, question: str, files: list[str]) -> dict[str, Any]:
    import torch

    from arkcache.demo.machine import describe_machine

    first: torch.Tensor = next(session.model.parameters())
    machine = describe_machine(first.device)
    return {
        "model": model,
        "question": question,
        "files": files,
        "budget_tokens": session.cache.config.budget_tokens,
        "num_layers": len(session.cache.layers),
        "dtype": str(first.dtype).removeprefix("torch."),
        "machine": f"{machine.get('gpu', machine['processor'])}, {machine['num_cores']} cores",
        "date": time.strftime("%Y-%m-%d"),
    }


def _save(session: Session, recorder: Recorder, output: Path, as_json: bool, quiet: bool) -> None:
    from arkcache.tracing.figures import figures_of
    from arkcache.tracing.file import save
    from arkcache.tracing.trace import trace_of

    if not recorder.num_steps:
        raise arkcache.InputError(
            "no decode step to record: the answer was empty, or every layer attends everything"
        )
    recorder.about["answer"] = session.turns[-1].text.strip()
    kept = trace_of(recorder)
    save(kept, output)
    if as_json:
        _print_json(kept, output)
    if as_json or quiet:
        return
    figures = figures_of(kept)
    typer.echo(
        f"{output}: {figures.num_steps} steps, {figures.page_share:.1%} of the pages attended, "
        f"{figures.hit_rate:.1%} hits, {bytes_text(output.stat().st_size)}"
    )


def _print_json(trace: Trace, written: Path) -> None:
    """What was written, the trace's settings, and what its page says in numbers."""
    from arkcache.tracing.figures import figures_of

    values = {
        "output": str(written),
        "bytes": written.stat().st_size,
        "about": trace.about,
        "figures": asdict(figures_of(trace)),
    }
    typer.echo(json.dumps(values, indent=2))
