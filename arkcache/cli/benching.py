"""The commands `bench tiers`, `decode`, `prefill`, `kernels` and `compare`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

import arkcache
from arkcache.cli.common import (
    EXIT_CODES,
    INTERRUPTED,
    check_writable,
    listed,
    numbers,
    print_result,
    told_in_a_line,
    with_bar,
    with_progress,
)
from arkcache.cli.options import Json, Output, Quiet
from arkcache.sizes import parse_bytes

bench = typer.Typer(
    no_args_is_help=True, help="Measure this machine, and compare measurements.", epilog=EXIT_CODES
)


def _open(said: str, default: str) -> Any:
    """An option that --quick decides where it is left out."""
    return typer.Option(help=said, show_default=default)


Threads = Annotated[
    int | None, typer.Option(help="Threads to compute with.", show_default="as torch has it")
]
CONTEXTS = "Tokens, with commas between."
ROUNDS = "How often everything is timed."
Quick = Annotated[bool, typer.Option("--quick", help="Less of everything: some seconds.")]

TROUBLE = 2
"""The exit code of `bench compare` for a mistake, as 1 says that something got slower."""


@bench.command()
def tiers(
    pieces: Annotated[
        str | None, _open("Sizes of a piece, with commas between.", "4KiB,16KiB,64KiB,256KiB,1MiB")
    ] = None,
    counts: Annotated[
        str | None, _open("Pieces per step, with commas between.", "1,8,64,512")
    ] = None,
    rounds: Annotated[int | None, _open(ROUNDS, "15")] = None,
    pool: Annotated[
        str | None,
        _open("Memory that pieces are read from, and size of the temporary file.", "256MiB"),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Where the temporary file is made.", show_default="the system's"),
    ] = None,
    threads: Threads = None,
    quick: Quick = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw a picture; it needs the extra plot.")
    ] = None,
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Bandwidth and latency of every path that a page can take on this machine.

    Takes 512 MiB of memory, and 256 MiB of disk for a file without a name, which is gone with the
    process whatever happens; --pool sets both (the memory is 256 MiB more). Ctrl-C shows the rounds
    so far. --quick has two sizes, two counts, five rounds and a pool of 64 MiB, where nothing else
    is given.

        arkcache bench tiers --quick --output tiers.json --plot tiers.png
    """
    with told_in_a_line("bench tiers", output), _threads(threads):
        from arkcache.bench import tiers as measuring
        from arkcache.bench.file_pool import file_system_of
        from arkcache.bench.tiers_table import render

        if plot is not None:
            check_writable(plot)
            from arkcache.bench.plot_tiers import draw  # what is missing is missed now
        settings = measuring.Settings.quick(folder) if quick else measuring.Settings(folder=folder)
        given: dict[str, Any] = {}
        if pieces is not None:
            given["piece_bytes"] = tuple(parse_bytes(size) for size in listed(pieces, ","))
        if counts is not None:
            given["counts"] = numbers("--counts", counts)
        if rounds is not None:
            given["rounds"] = rounds
        if pool is not None:
            given["pool_bytes"] = parse_bytes(pool)
        settings = replace(settings, **given)
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
    contexts: Annotated[str | None, _open(CONTEXTS, "4096,16384,65536")] = None,
    budget: Annotated[int, typer.Option(help="Tokens attended per step and KV head.")] = 2048,
    rounds: Annotated[int, typer.Option(help=ROUNDS)] = 3,
    steps: Annotated[int | None, _open("Steps of a round.", "40")] = None,
    methods: Annotated[str, typer.Option(help="Only those whose name contains this.")] = "",
    threads: Threads = None,
    quick: Quick = False,
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """A decode step of a small random model on the CPU, against the caches of transformers.

    --quick is 4096 tokens and 10 steps, where nothing else is given.

        arkcache bench decode --contexts 16384 --methods Ark --output decode.json
    """
    with told_in_a_line("bench decode", output), _threads(threads):
        from arkcache.bench import decode as measuring

        contexts = contexts or ("4096" if quick else "4096,16384,65536")
        steps = (10 if quick else 40) if steps is None else steps
        settings = measuring.Settings(
            numbers("--contexts", contexts), budget, rounds, steps, methods
        )
        _measure("decode", measuring, settings, as_json, output, quiet)


@bench.command()
def prefill(
    contexts: Annotated[str | None, _open(CONTEXTS, "7168,16384")] = None,
    chunk: Annotated[int | None, _open("Tokens that are read at a time.", "2048")] = None,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 2,
    dense: Annotated[int, typer.Option(help="Layers that attend everything.")] = 0,
    rounds: Annotated[int | None, _open(ROUNDS, "3")] = None,
    threads: Threads = None,
    quick: Quick = False,
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """Seconds to read a prompt into a small random model on the CPU, against a full cache.

    --quick is 2048 tokens in chunks of 512, once, where nothing else is given.

        arkcache bench prefill --contexts 16384 --output prefill.json
    """
    with told_in_a_line("bench prefill", output), _threads(threads):
        from arkcache.bench import prefill as measuring

        contexts = contexts or ("2048" if quick else "7168,16384")
        chunk = (512 if quick else 2048) if chunk is None else chunk
        rounds = (1 if quick else 3) if rounds is None else rounds
        settings = measuring.Settings(numbers("--contexts", contexts), chunk, layers, dense, rounds)
        _measure("prefill", measuring, settings, as_json, output, quiet)


@bench.command()
def kernels(
    contexts: Annotated[str | None, _open(CONTEXTS, "4096,65536")] = None,
    budget: Annotated[int, typer.Option(help="Tokens attended per step and KV head.")] = 2048,
    rounds: Annotated[int | None, _open(ROUNDS, "25")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Threads = None,
    quick: Quick = False,
    as_json: Json = False,
    output: Output = None,
    quiet: Quiet = False,
) -> None:
    """The parts of one layer's decode step, on the backend that this machine has.

    --quick is 4096 tokens and 5 rounds, where nothing else is given.

        arkcache bench kernels --quick --device cpu
    """
    with told_in_a_line("bench kernels", output), _threads(threads):
        from arkcache.bench import kernels as measuring
        from arkcache.demo.models import pick_device

        contexts = contexts or ("4096" if quick else "4096,65536")
        rounds = (5 if quick else 25) if rounds is None else rounds
        chosen = pick_device(device)
        settings = measuring.Settings(numbers("--contexts", contexts), budget, rounds, str(chosen))
        _measure("kernels", measuring, settings, as_json, output, quiet, device=chosen)


@bench.command(
    epilog="Exit codes: 0 compared; 1 slower than --fail-above allows; 2 a ledger that cannot be "
    "read, a file that cannot be written, or wrong usage; 130 interrupted."
)
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

        arkcache bench compare before.json after.json --fail-above 10
    """
    with told_in_a_line("bench compare", output, TROUBLE):
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


def _measure(
    benchmark: str,
    measuring: ModuleType,
    settings: object,
    as_json: bool,
    output: Path | None,
    quiet: bool,
    **more: Any,
) -> None:
    """Run a module's benchmark and print its rows; more: goes into the ledger beside them."""
    done = with_progress(lambda progress: measuring.run(settings, progress), quiet)
    entry = _entry(benchmark, vars(settings), **more, rows=[vars(row) for row in done.rows])
    print_result(entry, lambda: measuring.render(done.rows), as_json, output)
    _leave(done.finished)


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
