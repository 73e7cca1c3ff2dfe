"""What memory this process may use, and what of it is still to be had.

The machine has so much, and every control group around the process (a container, a batch job, a
service) may allow less; a group counts all processes in it, and file pages that the kernel would
drop on demand. Linux tells both. Elsewhere only the size of the machine's memory is known.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path("/")

MIN_MARGIN_BYTES = 256 << 20
MAX_MARGIN_BYTES = 8 << 30
"""Between these lies the margin: a sixteenth of the memory, and at most a quarter of it. It is for
what others take between two looks at it, and for what this process needs beside the host tier."""


class _Bound(NamedTuple):
    """The machine or a control group: what it has in all, and what of that is available."""

    total: int
    available: int


def machine_memory_bytes(root: Path = ROOT) -> int:
    """Bytes of RAM that the machine has, whatever a control group allows."""
    return _machine(root).total


def physical_memory_bytes(root: Path = ROOT) -> int:
    """Bytes of RAM that this process may use: the machine's, or the least that a group allows."""
    return min(bound.total for bound in _bounds(root))


def available_memory_bytes(root: Path = ROOT) -> int:
    """Bytes of RAM that this process may still take, less a margin: no less than 0.

    Read anew at every call: some small files, too many for every step. Never counts swap: what is
    pinned cannot go there.

    Args:
        root: where `proc` and `sys` are.
    """
    return max(0, min(bound.available - _margin(bound.total) for bound in _bounds(root)))


def _margin(total: int) -> int:
    least = max(total // 16, MIN_MARGIN_BYTES)
    return min(least, MAX_MARGIN_BYTES, total // 4)


def _bounds(root: Path) -> Iterator[_Bound]:
    machine = _machine(root)
    yield machine
    for group in _groups(root):
        yield from _bound_of(group, machine.total)


def _machine(root: Path) -> _Bound:
    known = _table(root / "proc/meminfo")
    if "MemTotal:" in known and "MemAvailable:" in known:
        return _Bound(known["MemTotal:"] << 10, known["MemAvailable:"] << 10)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _Bound(total, total)


@cache
def _groups(root: Path) -> list[Path]:
    """The control groups around this process that are to be seen, of version 1 and 2."""
    groups: list[Path] = []
    own: dict[str, str] = {}
    for line in _lines(root / "proc/self/cgroup"):
        _number, controllers, path = line.split(":", 2)
        if controllers == "":
            own["cgroup2"] = path
        elif "memory" in controllers.split(","):
            own["cgroup"] = path
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, system = line.partition(" - ")
        kind, _source, options = system.split()[:3]
        if kind in own and (kind == "cgroup2" or "memory" in options.split(",")):
            _id, _parent, _device, inside, point = mount.split()[:5]
            groups += _from_own_to_top(root / point.lstrip("/"), own[kind], inside)
    return groups


def _from_own_to_top(top: Path, own: str, inside: str) -> Iterator[Path]:
    """The group `own`, as the kernel names it, and all around it up to the mounted one.

    A container's mount shows a part of the hierarchy, which begins at `inside`.
    """
    path = PurePosixPath(own)
    is_seen = path.is_relative_to(inside) and ".." not in path.parts
    group = top / path.relative_to(inside) if is_seen else top
    while group != top:
        yield group
        group = group.parent
    yield top


def _bound_of(group: Path, physical: int) -> Iterator[_Bound]:
    """The group's limit, if it has one below the machine's memory: version 2, then version 1."""
    for limits, usage, prefix in (
        (("memory.max", "memory.high"), "memory.current", ""),
        (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_"),
    ):
        total = min((n for name in limits if (n := _number(group / name)) is not None), default=-1)
        if not 0 <= total < physical:
            continue
        used = _number(group / usage)
        if used is not None:
            counted = _table(group / "memory.stat")
            # Of file pages in use half may be hard to miss; the kernel guesses so for the machine.
            files = counted.get(f"{prefix}inactive_file", 0)
            files += counted.get(f"{prefix}active_file", 0) // 2
            yield _Bound(total, total - used + min(files, used))


def _number(file: Path) -> int | None:
    """What a file of one number holds; None where there is no such file, or no limit in it."""
    text = "".join(_lines(file))
    return int(text) if text.isdecimal() else None


def _table(file: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    rows = [line.split() for line in _lines(file)]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _lines(file: Path) -> list[str]:
    """The lines of a file; none where the system does not have it, or shows it to others only."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
