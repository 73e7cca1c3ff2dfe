"""Files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from arkcache.errors import InputError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that an interrupt leaves the one before it.

    A link goes on pointing where it did; a terminal, a pipe or a device is written to. Raises
    `InputError` where it cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        draft = draft_of(path)
        try:
            draft.write_bytes(content)
            draft.replace(path.resolve())
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def draft_of(path: Path) -> Path:
    """Where a file is written before it is renamed."""
    whole = path.resolve()
    return whole.with_name(whole.name + ".part")
