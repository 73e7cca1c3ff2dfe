"""Numbers of bytes as people read and write them."""

from __future__ import annotations

import re

from arkcache.errors import InputError

UNITS = {"B": 1} | {
    f"{prefix}{suffix}": base**exponent
    for exponent, prefix in enumerate("KMGT", start=1)
    for base, suffix in ((1000, "B"), (1024, "iB"))
}
"""What may be written, and its bytes."""


def unit_of(num_bytes: float) -> tuple[str, int]:
    """The largest of B, KiB to TiB in which so many bytes are at least one, and its bytes."""
    fitting = [
        (unit, size)
        for unit, size in UNITS.items()
        if size <= num_bytes and (unit == "B" or unit.endswith("iB"))
    ]
    return fitting[-1] if fitting else ("B", 1)


def bytes_text(num_bytes: float) -> str:
    """Bytes in their unit, with a digit behind the point where there is one: "1.5 GiB", "8 MiB"."""
    unit, size = unit_of(num_bytes)
    number = f"{num_bytes / size:,.1f}".removesuffix(".0")
    return f"{number} {unit}"


def parse_bytes(text: str) -> int:
    """A number of bytes from "2GiB", "500 MB" or "4096".

    Raises `InputError` for anything else, and for less than a byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    units = {unit.lower(): size for unit, size in UNITS.items()}
    size = units.get(match[2].lower() or "b") if match else None
    if match is None or size is None or int(float(match[1]) * size) < 1:
        raise InputError(
            f"{text!r} bytes: expected a number and one of {', '.join(UNITS)}, as in 2GiB"
        )
    return int(match[1]) * size if match[1].isdigit() else int(float(match[1]) * size)
