"""Settings of a cache from outside: a TOML file and the environment.

`load_config` is for programs, `gather` and `build` are for who wants to say where each came from.
Nothing else in the library reads either.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from arkcache.config import CacheConfig
from arkcache.errors import ConfigError, InputError
from arkcache.sizes import parse_bytes

PREFIX = "ARKCACHE_"
"""Of the environment's variables: ARKCACHE_BUDGET_TOKENS is `budget_tokens`."""

FILE_VARIABLE = f"{PREFIX}CONFIG"
"""Names the file."""

FILE_HERE = "arkcache.toml"
"""The file in the working directory."""

_TYPES: dict[str, tuple[str, tuple[type, ...]]] = {
    "bool": ("true or false", (bool,)),
    "float": ("a number", (int, float)),
    "int": ("an integer", (int,)),
    "str": ("a string", (str,)),
}
_KINDS = {
    field.name: (str(field.type).split(" | "), field.default) for field in fields(CacheConfig)
}


@dataclass(frozen=True)
class Given:
    """A setting's value, and who gave it: "FILE:LINE", "ARKCACHE_PAGE_SIZE", "--budget" ..."""

    value: Any
    source: str


def load_config(
    path: str | os.PathLike[str] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    **settings: Any,
) -> CacheConfig:
    """Settings by name, before those of the environment, before those of a file.

        config = load_config(num_recent_tokens=64)

    Args:
        path: a TOML file with fields of `CacheConfig`; None is the one that `find_file` finds.
        environ: where ARKCACHE_<FIELD> is looked for; None is `os.environ`.
        settings: fields of `CacheConfig`, which count before all others.

    Raises `ConfigError` for a file that cannot be read, and for a setting that is unknown or
    impossible; it says which file and line, or which variable.
    """
    given = gather(path, os.environ if environ is None else environ)
    return build(given | {name: Given(value, "") for name, value in settings.items()})


def gather(path: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> dict[str, Given]:
    """What the file and the environment give, by field; see `load_config`."""
    found = find_file(environ) if path is None else Path(path)
    return ({} if found is None else from_file(found)) | from_environment(environ)


def build(
    given: Mapping[str, Given], make: Callable[..., CacheConfig] = CacheConfig
) -> CacheConfig:
    """The settings together; an error says where those come from that it speaks of."""
    try:
        return make(**{name: one.value for name, one in given.items()})
    except ConfigError as error:
        named = [name for name in given if re.search(rf"\b{name}\b", str(error))]
        blamed = {name: given[name].source for name in named or given if given[name].source}
        sources = ", ".join(f"{name} from {source}" for name, source in blamed.items())
        raise ConfigError(f"{error} ({sources})" if sources else str(error)) from None


def find_file(environ: Mapping[str, str]) -> Path | None:
    """The file of settings: the first of ARKCACHE_CONFIG, arkcache.toml in the working directory
    and arkcache/config.toml in XDG_CONFIG_HOME (~/.config); None where there is none.

    A file that ARKCACHE_CONFIG names need not exist: who reads it says so.
    """
    if environ.get(FILE_VARIABLE):
        return Path(environ[FILE_VARIABLE])
    home = Path(environ["HOME"]) / ".config" if environ.get("HOME") else None
    user = Path(environ["XDG_CONFIG_HOME"]) if environ.get("XDG_CONFIG_HOME") else home
    places = [Path(FILE_HERE)] + ([user / "arkcache" / "config.toml"] if user else [])
    return next((place for place in places if place.is_file()), None)


def from_file(path: Path) -> dict[str, Given]:
    """The settings in a TOML file. Raises `ConfigError`, with file and line."""
    import tomllib

    try:
        text = path.read_bytes().decode()
        values = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # no UTF-8, or no TOML
        raise ConfigError(f"{path}: expected settings in TOML: {error}") from None
    found = {}
    for name, value in values.items():
        source = f"{path}:{_line_of(name, text)}"
        check_setting(name, source)
        found[name] = Given(converted(name, value, source), source)
    return found


def from_environment(environ: Mapping[str, str]) -> dict[str, Given]:
    """The settings in ARKCACHE_<FIELD>; an empty variable is none. Raises `ConfigError`."""
    found = {}
    for variable in sorted(environ):
        text = environ[variable]
        if not variable.startswith(PREFIX) or variable == FILE_VARIABLE or not text:
            continue
        name = variable.removeprefix(PREFIX).lower()
        if variable != variable.upper() or name not in _KINDS:
            hint = _nearest(name, lambda near: f"{PREFIX}{near.upper()}")
            raise ConfigError(f"the environment has {variable}, which is no setting: {hint}")
        found[name] = Given(from_text(name, text, variable), variable)
    return found


def from_text(name: str, text: str, source: str) -> Any:
    """A field's value as it is written in TOML, where words need no quotes: "4096", "keys"."""
    import tomllib

    try:
        values = tomllib.loads(f"value = {text}")
    except ValueError:
        values = {}
    word = {"true": True, "false": False}.get(text.lower(), text)
    return converted(name, values["value"] if [*values] == ["value"] else word, source)


def check_setting(name: str, source: str) -> None:
    """Raise `ConfigError` unless there is such a field."""
    if name not in _KINDS:
        raise ConfigError(f"{source}: unknown setting {name!r}: {_nearest(name)}")


def converted(name: str, value: Any, source: str) -> Any:
    """A value of TOML as the field has it; "none" is None. Raises `ConfigError` for other types."""
    kinds, default = _KINDS[name]
    try:
        return _converted(kinds, default is None, name, value)
    except TypeError as error:
        raise ConfigError(f"{source}: {name} = {value!r}: expected {error}") from None


def _converted(kinds: list[str], optional: bool, name: str, value: Any) -> Any:
    """Raises `TypeError` with what was expected."""
    optional = optional or "None" in kinds
    or_none = ' or "none"' if optional else ""
    if optional and value == "none":
        return None
    if kinds == ["Budget"]:
        return _budget(value, depth=2)
    if name == "layer_sources":
        return _sources(value)
    if name.endswith("_bytes") and isinstance(value, str):
        try:
            return parse_bytes(value)
        except InputError:
            raise TypeError(f"bytes, as in 2GiB or 4096{or_none}") from None
    kind = next(kind for kind in kinds if kind != "None")
    expected, types = _TYPES[kind]
    if not isinstance(value, types) or (isinstance(value, bool) and kind != "bool"):
        raise TypeError(f"{expected}{or_none}")
    return value


def _budget(value: Any, depth: int) -> Any:
    if value == "none":
        return None
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if depth and isinstance(value, list) and value:
        return tuple(_budget(item, depth - 1) for item in value)
    raise TypeError(
        'an integer, "auto", "none", or a list of them per layer (and lists in it per KV head)'
    )


def _sources(value: Any) -> tuple[int, ...]:
    """A list of layers, or "@FILE" with what `arkcache share --output FILE` wrote."""
    if isinstance(value, str) and value.startswith("@"):
        value = _sources_in(Path(value[1:]))
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return tuple(value)
    raise TypeError('a list of layers as in [0, 0, 2, 2], "@FILE" of arkcache share, or "none"')


def _sources_in(path: Path) -> Any:
    """The entry "layer_sources" of a file of JSON."""
    import json

    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # no UTF-8, or no JSON
        raise ConfigError(f"{path}: expected what arkcache share wrote: {error}") from None
    if not isinstance(found, dict) or "layer_sources" not in found:
        raise ConfigError(
            f"{path}: expected a JSON object with layer_sources, as arkcache share writes it"
        )
    return found["layer_sources"]


def _nearest(name: str, spelled: Callable[[str], str] = str) -> str:
    near = get_close_matches(name.lower(), _KINDS, n=1, cutoff=0.5)
    return f"did you mean {spelled(near[0])}?" if near else f"expected one of {', '.join(_KINDS)}"


def _line_of(name: str, text: str) -> int:
    """The line that sets a key or opens its table, from 1."""
    found = re.search(rf"""(?m)^[ \t]*\[*[ \t]*["']?{re.escape(name)}["']?[ \t]*[=.\]]""", text)
    return text.count("\n", 0, found.start()) + 1 if found else 1
