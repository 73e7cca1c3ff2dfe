"""The file of a trace: one safetensors file, whose format docs/trace.md describes."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from arkcache.errors import InputError
from arkcache.files import write_whole
from arkcache.tracing.recorder import Counted
from arkcache.tracing.trace import LAYER_FIELDS, STEP_FIELDS, Ints, Trace

FORMAT, VERSION = "arkcache-trace", 1

DTYPES = {
    "steps": np.int64,
    "layers": np.int64,
    "counts": np.int32,
    "pages": np.uint8,
    "recalled": np.uint8,
    "mass_of": np.int32,
    "mass": np.float32,
}


def save(trace: Trace, path: Path | str) -> None:
    """Write a trace whole: an interrupt leaves what was there before.

    Raises `InputError` where the file cannot be written.
    """
    path = Path(path)
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "step_fields": json.dumps(STEP_FIELDS),
        "layer_fields": json.dumps(LAYER_FIELDS),
        "about": json.dumps(trace.about),
    }
    tensors: dict[str, NDArray[Any]] = {
        "steps": trace.steps,
        "layers": trace.layers,
        "counts": trace.counts,
        "pages": _deflated(_gaps(trace.pages, trace.counts).astype("<u4").tobytes()),
        "recalled": _deflated(np.packbits(trace.recalled).tobytes()),
        "mass_of": trace.mass_of,
        "mass": trace.mass,
    }
    write_whole(path, to_bytes(tensors, header))


def load(path: Path | str) -> Trace:
    """Read a trace.

    Raises `InputError` for a file that cannot be read, is cut off, is no trace, or is one of
    another version.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            _check_header(path, header)
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise InputError(
            f"{path} is no trace, or was cut off ({error}): expected a file that `arkcache trace` "
            "wrote"
        ) from None
    try:
        trace = _trace(header, held)
        _check(trace)
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise InputError(f"{path} is a damaged trace ({error}): record it again") from None
    return trace


def _check_header(path: Path, header: dict[str, str]) -> None:
    if header.get("format") != FORMAT:
        raise InputError(f"{path} is no trace: expected a file that `arkcache trace` wrote")
    if header.get("version") != str(VERSION):
        raise InputError(
            f"{path} is a trace of version {header.get('version')}: this ArkCache reads version "
            f"{VERSION}; record it again, or read it with the ArkCache that wrote it"
        )


def _trace(header: dict[str, str], held: dict[str, NDArray[Any]]) -> Trace:
    for name, dtype in DTYPES.items():
        if held[name].dtype != dtype:
            raise ValueError(f"{name} is {held[name].dtype}, not {np.dtype(dtype)}")
    counts, recalled = held["counts"], held["recalled"]
    size = int(np.maximum(counts, 0).astype(np.int64).sum())
    gaps = np.frombuffer(_inflated(held["pages"], 4 * size), "<u4")
    bits = np.frombuffer(_inflated(recalled, math.ceil(size / 8)), np.uint8)
    return Trace(
        about=json.loads(header["about"]),
        steps=held["steps"],
        layers=held["layers"],
        counts=counts,
        pages=_ungapped(gaps.astype(np.int64), counts),
        recalled=np.unpackbits(bits, count=size).astype(np.bool_),
        mass_of=held["mass_of"],
        mass=held["mass"],
    )


def _check(trace: Trace) -> None:
    """Raise `ValueError` unless sizes agree with each other."""
    about, num_steps, num_layers = trace.about, len(trace.steps), len(trace.about["layers"])
    shapes = {
        "steps": (trace.steps.shape, (num_steps, len(STEP_FIELDS))),
        "layers": (trace.layers.shape, (num_steps, num_layers, len(LAYER_FIELDS))),
        "counts": (trace.counts.shape[:2], (num_steps, num_layers)),
        "mass_of": (trace.mass_of.shape, (len(trace.mass_of), 2)),
        "num_kv_heads": (len(about["num_kv_heads"]), num_layers),
        "forgotten": (set(about["forgotten"]), set(Counted._fields)),
    }
    for name, (given, expected) in shapes.items():
        if given != expected:
            raise ValueError(f"{name}: {given} where {expected} was expected")
    step, layer = trace.mass_of.T
    if (trace.mass_of < 0).any() or (step >= num_steps).any() or (layer >= num_layers).any():
        raise ValueError("mass_of names steps or layers that are not there")
    if len(trace.mass) != sum(trace.mass_sizes):
        raise ValueError(f"mass: {len(trace.mass)} where {sum(trace.mass_sizes)} was expected")


# -- pages as gaps --------------------------------------------------------------------------------


def _gaps(pages: NDArray[np.int32], counts: NDArray[np.int32]) -> Ints:
    """Each page's distance from the one before it in its row; of a row's first, its number."""
    numbers = pages.astype(np.int64)
    gaps, first = numbers.copy(), _firsts(counts)
    gaps[1:] -= numbers[:-1]
    gaps[first] = numbers[first]
    return gaps


def _ungapped(gaps: Ints, counts: NDArray[np.int32]) -> NDArray[np.int32]:
    sums, sizes = gaps.cumsum(), counts[counts > 0]
    first = _firsts(counts)
    return (sums - np.repeat(sums[first] - gaps[first], sizes)).astype(np.int32)


def _firsts(counts: NDArray[np.int32]) -> Ints:
    """Where rows that have pages begin."""
    sizes = counts[counts > 0].astype(np.int64)
    firsts: Ints = sizes.cumsum() - sizes
    return firsts


def _deflated(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(zlib.compress(data), np.uint8)


def _inflated(data: NDArray[np.uint8], size: int) -> bytes:
    """So many bytes; `ValueError` where there are not just as many."""
    found = zlib.decompressobj().decompress(data.tobytes(), size + 1)
    if len(found) != size:
        raise ValueError(f"{size} bytes of pages expected, not {len(found)}")
    return found
