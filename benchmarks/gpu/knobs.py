"""What a kernel's launcher leaves open, found by looking: constants, and options of its launches.

A knob is a number that a kernel module names in capitals, such as `PAGE_SPLIT`, an entry of such
a table of numbers, or a keyword that a launch is given, such as `num_stages`. Nothing here knows
which there are.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

OPTION_VALUES = {
    "stages": (1, 2, 3, 4, 6, 8),
    "ahead": (1, 2, 3, 4, 6),
    "warps": (1, 2, 4, 8, 16),
}
"""What is tried, by the end of an option's name; the nearest first."""

FACTORS = (0.5, 2, 0.25, 4)
"""By which a constant is multiplied, the nearest first."""


Numbers = dict[str, dict[str, int]]
"""Keywords of launches and their values, by kernel."""


@dataclass(frozen=True)
class Knob:
    """One number that can be set.

    Attributes:
        where: "triton_attention.PAGE_SPLIT", "triton_select.CHUNK_WARPS[256]" for an entry, or
            "partial_kernel(num_stages)" for an option.
        current: what it is.
        values: what to try.
    """

    where: str
    current: int
    values: tuple[int, ...]


class Launches:
    """Stands in a module for a kernel: sees what its launches are given, and gives them other.

    Args:
        kernel: what is launched.
        name: what the module calls it.
        given: integer keywords of launches so far, by kernel; added to.
        instead: keywords of this kernel to replace.
    """

    def __init__(self, kernel: Any, name: str, given: Numbers, instead: dict[str, int]) -> None:
        self._kernel, self._name, self._given, self._instead = kernel, name, given, instead

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        """As a kernel's: what launches it."""

        def launch(*args: Any, **kwargs: Any) -> Any:
            numbers = {name: value for name, value in kwargs.items() if type(value) is int}
            self._given.setdefault(self._name, {}).update(numbers)
            present = {name: self._instead[name] for name in self._instead if name in kwargs}
            return self._kernel[grid](*args, **kwargs | present)

        return launch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


def kernel_modules() -> list[ModuleType]:
    """All modules of GPU kernels that are imported."""
    return [
        module
        for name, module in sorted(sys.modules.items())
        if name.startswith("arkcache.kernels.triton_")
    ]


def constants(module: str, pattern: str) -> list[Knob]:
    """Numbers of a kernel module, and of its tables, whose names match."""
    found = []
    for name, value in sorted(vars(sys.modules[f"arkcache.kernels.{module}"]).items()):
        if not (name.isupper() and re.search(pattern, name)):
            continue
        if type(value) is int:
            found.append(Knob(f"{module}.{name}", value, _multiples(value)))
        elif _is_table(value):
            entries = ((f"{module}.{name}[{key}]", number) for key, number in value.items())
            found += [Knob(where, number, _multiples(number)) for where, number in entries]
    return found


def _multiples(value: int) -> tuple[int, ...]:
    """What to try instead of a number, the nearest first."""
    return tuple(dict.fromkeys(int(value * factor) for factor in FACTORS if value * factor >= 1))


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and {type(number) for number in value.values()} == {int}


def _distance(one: int, other: int) -> float:
    return abs(math.log(one / other))


def others(module: str, pattern: str) -> list[str]:
    """Constants of a kernel module whose names match, but that are no single number to turn."""
    found = vars(sys.modules[f"arkcache.kernels.{module}"])
    return [
        f"{module}.{name} is {value!r}"[:120]
        for name, value in sorted(found.items())
        if name.isupper() and re.search(pattern, name)
        if type(value) is not int and not _is_table(value)
    ]


def options(run: Callable[[], Any]) -> list[Knob]:
    """Options of the kernels that `run` launches whose names end as one of `OPTION_VALUES`."""
    given: Numbers = {}
    with _launches(given, {}):
        run()
    found = []
    for kernel, numbers in sorted(given.items()):
        for name, value in sorted(numbers.items()):
            ends = name.lower().rpartition("_")[2]
            if ends in OPTION_VALUES:
                values = [other for other in OPTION_VALUES[ends] if other != value]
                values.sort(key=partial(_distance, max(1, value)))
                found.append(Knob(f"{kernel}({name})", value, tuple(values)))
    return found


@contextmanager
def turned(knob: Knob, value: int) -> Iterator[None]:
    """Within it the knob has another value, wherever it is known; nothing remembers the old one."""
    if knob.where.endswith(")"):
        kernel, _, option = knob.where.rstrip(")").partition("(")
        with _launches({}, {kernel: {option: value}}):
            yield
        return
    module, _, name = knob.where.partition(".")
    name, _, key = name.rstrip("]").partition("[")
    current = vars(sys.modules[f"arkcache.kernels.{module}"])[name]
    holders = [m for m in kernel_modules() if vars(m).get(name) == current]
    instead = current | {type(next(iter(current)))(key): value} if key else value
    _set(holders, name, instead)
    try:
        yield
    finally:
        _set(holders, name, current)


def _set(modules: list[ModuleType], name: str, value: Any) -> None:
    for module in modules:
        setattr(module, name, value)
    for module in kernel_modules():
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


@contextmanager
def _launches(given: Numbers, instead: Numbers) -> Iterator[None]:
    """Within it all kernels are launched through `Launches`."""
    replaced = []
    for module in kernel_modules():
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel") and hasattr(value, "__getitem__"):
                replaced.append((module, name, value))
                setattr(module, name, Launches(value, name, given, instead.get(name, {})))
    try:
        yield
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)
