"""The commands `bench tiers`, `decode`, `prefill`, `kernels` and `compare`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import arkcache
from arkcache.cli.common import (
    INTERRUPTED,
    check_writable,
    listed,
    parse_bytes,
    print_result,
    told_in_a_line,
    with_bar,
    with_progress,
)
from arkcache.cli.options import Json, Output, Quiet

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType

bench = typer.Typer(no_args_is_help=True, help="Measure this machine, and compare measurements.")

Rounds = Annotated[int, typer.Option(help="How often everything is timed.")]
Threads = Annotated[
    int | None, typer.Option(help="Threads to compute with.", show_default="as torch has it")
]
Contexts = Annotated[str, typer.Option(help="Tokens, with commas between.")]
Quick = Annotated[bool, typer.Option("--quick", help="Less of everything: some seconds.")]

TROUBLE = 2
"""The exit code of `bench compare` for a mistake, as 1 says that something got slower."""


@bench.command()
def tiers(
    piece_bytes: Annotated[
        str, typer.Option("--pieces", help="Sizes of a piece, with commas between.")
    ] = "4KiB,16KiB,64KiB,256KiB,1MiB",
    counts: Annotated[
        str, typer.Option(help="Pieces per step, with commas between.")
    ] = "1,8,64,512",
    rounds: Rounds = 15,
    pool: Annotated[
        str, typer.Option(help="Memory that pieces are read from, and size of the temporary file.")
    ] = "256MiB",
    folder: Annotated[
        Path | None,
        typer.Option(help="Where the temporary file is made.", show_default="the system's"),
    ] = None,
    threads: Threads = None,
    quick: Quick = False,
    output: Output = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw a picture; it needs the extra plot.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bandwidth and latency of every path that a page can take on this machine.

    Takes 512 MiB of memory, and 256 MiB of disk for a file without a name, which is gone with the
    process whatever happens; --pool sets both (the memory is 256 MiB more). Ctrl-C shows the rounds
    so far. --quick is two sizes, two counts, five rounds and a pool of 64 MiB.
    """
    with told_in_a_line("bench tiers", output), _threads(threads):
        from arkcache.bench import tiers as measuring
        from arkcache.bench.file_pool import file_system_of
        from arkcache.bench.tiers_table import render

        if plot is not None:
            check_writable(plot)
            from arkcache.bench.plot_tiers import draw  # what is missing is missed now
        settings = measuring.Settings(
            tuple(parse_bytes(size) for size in listed(piece_bytes, ",")),
            _numbers("counts", counts),
            rounds,
            parse_bytes(pool),
            folder,
        )
        if quick:
            settings = measuring.Settings.quick(folder)
        result = with_bar(lambda progress: measuring.run(settings, progress), quiet)
        values = result.to_dict()
        values["settings"]["file_system"] = file_system_of(folder or Path(tempfile.gettempdir()))
        entry = _entry("tiers", **values)
        print_result(entry, lambda: render(result), as_json, output)
        if plot is not None:
            draw(result, plot)
        _leave(result.finished)


@bench.command()
def decode(
    contexts: Contexts = "4096,16384,65536",
    budget: Annotated[int, typer.Option(help="Tokens attended per step and KV head.")] = 2048,
    rounds: Rounds = 3,
    steps: Annotated[int, typer.Option(help="Steps of a round.")] = 40,
    methods: Annotated[str, typer.Option(help="Only those whose name contains this.")] = "",
    threads: Threads = None,
    quick: Quick = False,
    output: Output = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A decode step of a small random model on the CPU, against the caches of transformers.

    --quick is 4096 tokens and 10 steps.
    """
    with told_in_a_line("bench decode", output), _threads(threads):
        from arkcache.bench import decode as measuring

        if quick:
            contexts, steps = "4096", 10
        settings = measuring.Settings(
            _numbers("contexts", contexts), budget, rounds, steps, methods
        )
        done = with_progress(lambda progress: measuring.run(settings, progress), quiet)
        entry = _entry("decode", vars(settings), rows=[vars(row) for row in done.rows])
        print_result(entry, lambda: measuring.render(done.rows), as_json, output)
        _leave(done.finished)


@bench.command()
def prefill(
    contexts: Contexts = "7168,16384",
    chunk: Annotated[int, typer.Option(help="Tokens that are read at a time.")] = 2048,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 2,
    dense: Annotated[int, typer.Option(help="Layers that attend everything.")] = 0,
    rounds: Rounds = 3,
    threads: Threads = None,
    quick: Quick = False,
    output: Output = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Seconds to read a prompt into a small random model on the CPU, against a full cache.

    --quick is 2048 tokens in chunks of 512, once.
    """
    with told_in_a_line("bench prefill", output), _threads(threads):
        from arkcache.bench import prefill as measuring

        if quick:
            contexts, chunk, rounds = "2048", 512, 1
        settings = measuring.Settings(_numbers("contexts", contexts), chunk, layers, dense, rounds)
        done = with_progress(lambda progress: measuring.run(settings, progress), quiet)
        entry = _entry("prefill", vars(settings), rows=[vars(row) for row in done.rows])
        print_result(entry, lambda: measuring.render(done.rows), as_json, output)
        _leave(done.finished)


@bench.command()
def kernels(
    contexts: Contexts = "4096,65536",
    budget: Annotated[int, typer.Option(help="Tokens attended per step and KV head.")] = 2048,
    rounds: Rounds = 25,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Threads = None,
    quick: Quick = False,
    output: Output = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The parts of one layer's decode step, on the backend that this machine has.

    --quick is 4096 tokens and 5 rounds.
    """
    with told_in_a_line("bench kernels", output), _threads(threads):
        from arkcache.bench import kernels as measuring
        from arkcache.demo.models import pick_device

        if quick:
            contexts, rounds = "4096", 5
        chosen = pick_device(device)
        settings = measuring.Settings(_numbers("contexts", contexts), budget, rounds, str(chosen))
        done = with_bar(lambda progress: measuring.run(settings, progress), quiet)
        rows = [vars(row) for row in done.rows]
        entry = _entry("kernels", vars(settings), device=chosen, rows=rows)
        print_result(entry, lambda: measuring.render(done.rows), as_json, output)
        _leave(done.finished)


@bench.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A ledger: of --output, or of pytest-benchmark.")],
    second: Annotated[Path, typer.Argument(help="Another of the same benchmark.")],
    fail_above: Annotated[
        float | None,
        typer.Option(help="Exit with 1 where a case got slower by more than so many percent."),
    ] = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Ratios of medians between two ledgers; marked is what differs by more than the spread.

    That is where the middle halves of the rounds have no time in common. Exit code 0, also where
    something differs; 1 only with --fail-above, where a marked case took so many percent longer;
    2 for a file that is missing or no ledger. Of a ledger with several entries, the last is taken.
    """
    with told_in_a_line("bench compare", output, TROUBLE):
        from dataclasses import asdict

        from arkcache.bench import comparing
        from arkcache.bench.comparing_table import render

        found = comparing.compare(first, second)
        slower = [] if fail_above is None else found.slower_than(fail_above)
        values = asdict(found) | {"too_slow": [one.name for one in slower]}
        for case, one in zip(values["cases"], found.cases, strict=True):
            case |= {"first": one.first._asdict(), "second": one.second._asdict()}
        print_result(values, lambda: render(found, slower), as_json, output)
        if slower:
            raise typer.Exit(1)


def _entry(benchmark: str, settings: dict[str, Any], **measured: Any) -> dict[str, Any]:
    import torch

    from arkcache.bench.ledger import entry_of

    settings = dict(settings) | {"num_threads": torch.get_num_threads()}
    return entry_of(benchmark, settings, **measured)


def _leave(finished: bool) -> None:
    if not finished:
        typer.echo("arkcache bench: interrupted; this is what was measured by then.", err=True)
        raise typer.Exit(INTERRUPTED)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Lets torch compute with so many threads; None leaves it as it is."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise arkcache.InputError(f"--threads {count}: expected at least 1")
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _numbers(name: str, given: str) -> tuple[int, ...]:
    """Numbers from "1,8,64". Raises `InputError` for anything else."""
    parts = listed(given, ",")
    if not parts or not all(part.isdecimal() for part in parts):
        raise arkcache.InputError(f"--{name} {given!r}: expected numbers with commas between")
    return tuple(map(int, parts))
