"""The settings of a cache as the commands take them: options, environment, file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer

import arkcache
from arkcache.settings import Given, check_setting, find_file, from_environment, from_text, gather


def settings_given(
    config: Path | None, assignments: list[str] | None, **options: tuple[str, Any]
) -> dict[str, Given]:
    """What a command's options, the environment and the file give, in this order of precedence.

    Args:
        config: the option --config.
        assignments: those of --set, as in "key_bits=4".
        options: for fields of `CacheConfig` that have an option of their own, its name and value;
            None is an option that was left out.

    Raises `ConfigError`, and `InputError` for what is no assignment and for a field given twice.
    """
    given = {
        name: Given(value, option) for name, (option, value) in options.items() if value is not None
    }
    for assignment in assignments or []:
        name, equals, text = (part.strip() for part in assignment.partition("="))
        source = f"--set {name}"
        if not equals or not text:
            raise arkcache.InputError(f"--set {assignment}: expected NAME=VALUE, as in key_bits=4")
        check_setting(name, "--set")
        if name in given:
            raise arkcache.InputError(f"{source} beside {given[name].source}: expected one of them")
        given[name] = Given(from_text(name, text, source), source)
    return gather(config, os.environ) | given


def say_unused() -> None:
    """A line on stderr where settings from outside are set that a comparison does not take."""
    found = [one.source for one in from_environment(os.environ).values()]
    file = find_file(os.environ)
    found += [] if file is None else [str(file)]
    if found:
        typer.echo(
            f"Not used, caches are compared as this command sets them: {', '.join(found)}", err=True
        )
