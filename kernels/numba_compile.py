"""How the kernels of a CPU are compiled: by numba, once per machine, without a compiler.

What numba compiled is kept in the user's cache folder, in a folder of its own for each version of
these sources, of numba and of its debug switch: numba itself sees only whether the file of the
outermost function has changed. `NUMBA_CACHE_DIR` moves it, as ever; where nothing can be written,
every process compiles for itself.

NUMBA_BOUNDSCHECK=1 has every index checked, for tests and for hunting.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
from numba import njit

try:
    import fcntl
except ImportError:  # Windows, where nobody waits for anybody
    fcntl = None  # type: ignore[assignment]

FAST_MATH = frozenset(("reassoc", "contract", "arcp", "nsz"))
"""Sums may be taken in any order, which is what vectorises them. Infinities and NaN keep their
meaning: a mask is made of the one, and a broken model of the other."""


@functools.cache
def cache_folder() -> Path | None:
    """Where compiled kernels are kept; None where nothing can be written."""
    own = os.environ.get("NUMBA_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    folder = Path(own or home) / "arkcache" / f"numba-{_fingerprint()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


def _fingerprint() -> str:
    """Of all that decides what a kernel compiles to, beside the processor, which numba looks at."""
    sources = sorted(Path(__file__).parent.glob("numba_*.py"))
    digest = hashlib.sha256()
    for part in (numba.__version__, str(numba.config.BOUNDSCHECK), *map(Path.read_text, sources)):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


@contextmanager
def own_cache() -> Iterator[bool]:
    """Have functions that are decorated inside kept in our folder; gives whether they can be."""
    folder, before = cache_folder(), numba.config.CACHE_DIR
    if folder is not None:
        numba.config.CACHE_DIR = str(folder)  # other people's functions stay where they are kept
    try:
        yield folder is not None
    finally:
        numba.config.CACHE_DIR = before


def kernel(
    function: Callable[..., Any] | None = None, *, fast: bool = True, inline: bool = False
) -> Any:
    """Compile a function when it is first called, without the interpreter's lock.

    fast: whether `FAST_MATH` holds for it. inline: compile it anew in every place that calls it,
    for the constants that it is given there.
    """
    if function is None:
        return functools.partial(kernel, fast=fast, inline=inline)
    with own_cache() as kept:
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "cache": kept}
        options["inline"] = "always" if inline else "never"
        compiled = njit(fastmath=set(FAST_MATH) if fast else False, **options)(function)
    if kept:
        keep_one_by_one(compiled)
    return compiled


def keep_one_by_one(compiled: Any) -> None:
    """Have one process at a time keep what it compiled of a function.

    numba writes which file holds which signature, and then that file: of two processes that keep
    different signatures at once, one would find the other's code under its own.
    """
    save = compiled._cache.save_overload

    def save_alone(*args: Any) -> None:
        with _lock():
            save(*args)

    compiled._cache.save_overload = save_alone


@contextmanager
def _lock() -> Iterator[None]:
    """Wait for other processes that hold the lock of the folder."""
    folder = cache_folder()
    if folder is None or fcntl is None:
        yield
        return
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield
