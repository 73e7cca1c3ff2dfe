"""Texts to talk about: files, and Python's own help where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

from arkcache.errors import InputError

HELP_TOPIC = "debugger"
"""Of Python's help: some 5,000 tokens about the commands of pdb."""


def load_document(path: Path) -> str:
    """The text of a UTF-8 file. Raises `InputError` for one that is missing, empty or no text."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start} cannot be read): give a plain text file"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    if "\0" in text:
        raise InputError(f"{path} holds zero bytes: give a plain text file")
    if not text.strip():
        raise InputError(f"{path} is empty")
    return text


def read_input() -> str:
    """The text on standard input. Raises `InputError` for what is no UTF-8."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"standard input is not UTF-8 text (byte {error.start} cannot be read)"
        ) from None


def help_text() -> str:
    """A topic of Python's help."""
    from pydoc_data.topics import topics

    return str(topics[HELP_TOPIC])
