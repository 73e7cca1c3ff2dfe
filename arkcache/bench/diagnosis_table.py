"""Renders a diagnosis: what there is, line by line; then what is missing."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from arkcache.bench.diagnosis import Diagnosis, Missing
from arkcache.bench.tiers import Result
from arkcache.bench.tiers_table import rate_text
from arkcache.sizes import bytes_text


def render(found: Diagnosis) -> RenderableType:
    """Everything that was found."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, said in _lines(found):
        table.add_row(name, Text(said))
    parts: list[RenderableType] = [Padding(table, (1, 0))]
    if found.paths is not None:
        parts.append(_paths(found.paths))
    parts += [_one_missing(one) for one in found.missing]
    parts.append(Padding(Text(_verdict(found), style="bold"), (1, 1)))
    return Group(*parts)


def _lines(found: Diagnosis) -> Iterator[tuple[str, str]]:
    yield "versions", ", ".join(f"{name} {version}" for name, version in found.versions.items())
    machine, threads = found.machine, found.threads
    yield "processor", f"{machine['processor']}, {machine['system']}"
    yield (
        "threads",
        f"{threads['torch']} of torch, on {threads['cores_allowed']} of {threads['cores']} cores",
    )
    yield "device", _device(found)
    yield "memory", _memory(found)
    yield "pinning", _pinning(found)
    yield "backend", f"{found.backend['chosen']}: {found.backend['why']}"
    yield "kernels", _kernels(found)


def _device(found: Diagnosis) -> str:
    device = found.device
    built_for = device["torch_built_for"] or "no GPU"
    driver = device["driver"] or "none"
    if device["why_not"] is not None:
        return f"cpu: {device['why_not']} (torch is built for {built_for}, driver: {driver})"
    return (
        f"{device['name']} (sm {device['capability']}), {bytes_text(device['free_bytes'])} of "
        f"{bytes_text(device['total_bytes'])} free; torch is built for {built_for}, driver: "
        f"{driver}"
    )


def _memory(found: Diagnosis) -> str:
    memory = found.memory
    limit = memory["cgroup_limit_bytes"]
    said = "no limit of a control group" if limit is None else f"control group: {bytes_text(limit)}"
    return (
        f"{bytes_text(memory['total_bytes'])}, {bytes_text(memory['available_bytes'])} of it for "
        f"a host tier; {said}"
    )


def _pinning(found: Diagnosis) -> str:
    memory, limit = found.memory, found.memory["locked_limit_bytes"]
    said = "works" if memory["why_pageable"] is None else f"not here: {memory['why_pageable']}"
    locked = "no limit" if limit is None else bytes_text(limit)
    return f"{said}; locked memory (ulimit -l): {locked}"


def _kernels(found: Diagnosis) -> str:
    kernels = found.kernels
    if kernels["why_not"] is not None:
        return f"none are kept: {kernels['why_not']}"
    compiled = ", ".join(kernels["compiled"]) or "none yet"
    return f"compiled for {compiled}; kept in {kernels['folder']}"


def _paths(paths: Result) -> RenderableType:
    """One line for each path: its best rate, the time of one piece, the peak beside it."""
    peaks = {peak.name: peak for peak in paths.peaks}
    size = paths.settings["piece_bytes"][0]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(f"pieces of {bytes_text(size)}")
    for name in ("one alone", "64 together", "one large copy"):
        table.add_column(name, justify="right")
    for route, peak in paths.peak_of.items():
        one, many = sorted(
            (row for row in paths.rows if row.route == route), key=lambda row: row.num_pieces
        )
        table.add_row(
            route,
            f"{one.median_us:,.0f} us",
            f"{rate_text(many.gb_s)} GB/s",
            f"{rate_text(peaks[peak].gb_s)} GB/s",
        )
    for name, _reason in paths.absent:
        table.add_row(name, "-", "-", "-", style="dim")
    return table


def _one_missing(one: Missing) -> RenderableType:
    said = Text.assemble(
        ("unused hardware: " if one.is_waste else "missing: ", "red" if one.is_waste else "yellow"),
        (one.what, "bold"),
        f": {one.without}\n    {one.cure}",
    )
    return Padding(said, (0, 1))


def _verdict(found: Diagnosis) -> str:
    if not found.is_fine:
        return "Hardware that this machine has cannot be used; see above."
    if found.missing:
        return "All hardware that was found can be used; what is missing is optional."
    return "All hardware that was found can be used, and nothing is missing."
