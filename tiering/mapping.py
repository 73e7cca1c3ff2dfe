"""Anonymous mappings: address space that takes memory as it is first written."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import platform
import sys
import weakref

from arkcache.errors import HostTierFullError

logger = logging.getLogger("arkcache")

HUGE_PAGE = 2 << 20
"""Bytes: on x86, and on most of ARM."""

_X86_AND_ARM = 0x4000
NO_RESERVE = getattr(
    mmap,
    "MAP_NORESERVE",
    _X86_AND_ARM if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0,
)
"""Where Python has no name for it. Without it, mappings that lie side by side count as one which is
larger than the memory, and Linux refuses to fork the process."""

MAP_FIXED = 0x10
"""Of Linux and macOS; Python has no name for it."""

_parents_own: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def map_anonymous(size: int) -> mmap.mmap:
    """A private mapping of `size` bytes. Raises `HostTierFullError` if the system refuses it."""
    try:
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # A recall reads scattered pieces: with huge pages it takes 15 % less time.
            with contextlib.suppress(OSError):  # a kernel built without them
                mapping.madvise(mmap.MADV_HUGEPAGE)
        return mapping
    except (OSError, ValueError, OverflowError) as error:
        raise HostTierFullError(
            f"the system refused to reserve {size} bytes of address space for the host tier "
            f"({error}): set host_bytes to what this machine may use"
        ) from error


def map_over(address: int, nbytes: int, descriptor: int, offset: int) -> None:
    """Have a file, from `offset` on, in place of what is mapped at an address: to be read only.

    All three in whole pages of the system. It goes with the mapping that it lies in. Raises
    `OSError`.
    """
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    found = library.mmap(
        address, nbytes, mmap.PROT_READ, mmap.MAP_PRIVATE | MAP_FIXED, descriptor, offset
    )
    if found != address:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def ask_for_huge_pages(address: int, nbytes: int) -> None:
    """Have memory that was not touched yet backed by huge pages, where the system has them.

    Of memory that is read from end to end in every step, as an index is: a fifth less time.
    """
    start = -(-address // HUGE_PAGE) * HUGE_PAGE
    length = (address + nbytes) // HUGE_PAGE * HUGE_PAGE - start
    if length <= 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    library = ctypes.CDLL(None)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.madvise(start, length, mmap.MADV_HUGEPAGE)  # advice: it does no harm where it fails


def keep_from_forks(mapping: mmap.mmap) -> None:
    """Let no process that is forked from now on inherit the mapping.

    After a fork, the first write to a page that both have moves the writer to a copy, while a
    device goes on using the page it was shown. And pages that are pinned are copied at the fork
    itself: a data loader would cost the size of the tier.
    """
    if not hasattr(mmap, "MADV_DONTFORK"):
        return
    try:
        mapping.madvise(mmap.MADV_DONTFORK)
    except OSError as error:
        logger.warning(f"a fork will copy the pinned host tier: {error}")
    else:
        _parents_own.add(mapping)


def share_with_forks(mapping: mmap.mmap) -> None:
    """Take `keep_from_forks` back."""
    if mapping in _parents_own:
        mapping.madvise(mmap.MADV_DOFORK)
        _parents_own.discard(mapping)


def _never_unmap() -> None:
    """In the child, the addresses are free and may serve others: what lies there is not ours."""
    for mapping in list(_parents_own):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(mapping))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_never_unmap)
