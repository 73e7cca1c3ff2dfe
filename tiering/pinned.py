"""Host memory that a GPU reaches by itself: the part of an arena that the driver has pinned.

Memory is registered in place, chunk by chunk as the arena grows, so a tier is pinned to the size it
needs and never copied for it. What is pinned stays so until the arena goes: the device keeps the
physical pages it was shown, so giving such memory back to the system would leave it reading others.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from arkcache.errors import HostTierFullError
from arkcache.tiering.lanes import numbered

CHUNK_BYTES = 256 << 20
"""Memory is pinned so much at a time: a registration costs the driver about as long as touching
the memory does, and what is pinned but unused is wasted."""

MOST_CHUNK_BYTES = 2 << 30
"""More than this in one registration is refused by some drivers."""

NO_DEVICE = "there is no CUDA device to pin it for"
NOT_YET = "it has reserved no memory yet"

logger = logging.getLogger("arkcache")

_has_warned = False


class Run(NamedTuple):
    """Adjacent rows: `num_rows` entries of a list from `position` on are `row` and following."""

    row: int
    position: int
    num_rows: int


def runs_of(rows: NDArray[np.int64], rows_per_chunk: int) -> list[Run]:
    """`rows` [n] as runs of adjacent ones, none of which crosses from one chunk into the next.

    One copy may not: the driver knows two registrations, however close they lie.
    """
    if len(rows) == 0:
        return []
    is_start = (np.diff(rows) != 1) | (np.diff(rows // rows_per_chunk) != 0)
    bounds = np.concatenate(([0], np.flatnonzero(is_start) + 1, [len(rows)]))
    starts, counts = bounds[:-1], np.diff(bounds)
    triples = zip(rows[starts].tolist(), starts.tolist(), counts.tolist(), strict=True)
    return [Run(*triple) for triple in triples]


class PinnedArena:
    """Registers an arena with the driver from its start on; one per host tier.

    Whether it is pinned is decided when the first chunk is: if that is refused the arena is
    pageable for good, and once it was accepted a later refusal is an error.

    Args:
        device: the CUDA device that is to reach it; None, or a CPU, leaves it pageable.
        piece_bytes: size of a piece; none lies in two chunks.

    Attributes:
        why_pageable: why it is not pinned; None if it is.
        chunk_bytes: bytes of a registration; the last of an arena may be shorter.
        nbytes: bytes pinned, from the start of the arena on.
    """

    def __init__(self, device: torch.device | None, piece_bytes: int) -> None:
        has_device = device is not None and device.type == "cuda"
        self._device = numbered(device) if device is not None and has_device else None
        self.why_pageable: str | None = NOT_YET if has_device else NO_DEVICE
        step = math.lcm(piece_bytes, mmap.PAGESIZE)
        self.chunk_bytes = max(1, CHUNK_BYTES // step) * step
        self.nbytes = 0
        self._chunks: list[int] = []
        self._address = self._size = 0
        self._process = os.getpid()

    def close_with(self, owner: object) -> None:
        """Close when `owner` is garbage collected, or at exit."""
        if self._device is not None:
            weakref.finalize(owner, self.close)

    def open(self, address: int, size: int) -> None:
        """Take charge of `size` bytes at a page's `address` that hold nothing; pin the first chunk.

        Raises `HostTierFullError` if that is refused though the arena before was pinned.
        """
        if self._device is None:
            return
        self._address, self._size = address, size
        if self.why_pageable is None:
            self.extend(1)
            return
        try:
            self._pin_next()
        except (ImportError, RuntimeError) as error:
            self._unpin_from(0)
            self._device, self.why_pageable = None, f"{type(error).__name__}: {error}"
            _warn_once(self.why_pageable, isinstance(error, ImportError))
        else:
            self.why_pageable = None

    def extend(self, nbytes: int) -> None:
        """Pin the arena up to `nbytes` or a little more; nothing to do if it is pageable.

        Raises `HostTierFullError` if a chunk is refused; what was pinned before stays so.
        """
        if self.why_pageable is not None:
            return
        before = len(self._chunks)
        try:
            while self.nbytes < nbytes:
                self._pin_next()
        except RuntimeError as error:
            pinned = self._unpin_from(before)
            raise HostTierFullError(
                f"the driver refused to pin more of the host tier: {pinned} bytes are pinned and "
                f"{nbytes} are needed ({error}). Raise the limit on locked memory (ulimit -l, or "
                "the container's memory), lower host_bytes, or release another cache"
            ) from error

    def synchronize(self) -> None:
        """Wait for all work on the device, before the host reads or moves what that may write."""
        if self._chunks:
            with self._driver() as runtime:
                runtime.deviceSynchronize()

    def close(self) -> None:
        """Unpin everything, once the device has done what it was given. May be called again."""
        if os.getpid() != self._process:  # a fork: the registrations are its parent's
            self._chunks, self.nbytes = [], 0
        if not self._chunks:
            return
        try:
            self.synchronize()
        except RuntimeError as error:
            logger.warning("the device failed before its host memory was unpinned: %s", error)
        self._unpin_from(0)

    def _pin_next(self) -> None:
        """Pin one more chunk. Raises why not; the caller unpins what was half done."""
        start = self.nbytes
        size = min(self.chunk_bytes, self._size - start)
        if self.chunk_bytes > MOST_CHUNK_BYTES:
            raise RuntimeError(
                f"no whole number of pieces ends with a page within {MOST_CHUNK_BYTES} bytes"
            )
        with self._driver() as runtime:
            address = self._address + start
            runtime.hostRegister(address, size, 0)
            self._chunks.append(address)
            self.nbytes = start + size
            if runtime.pointerGetAttributes(address).devicePointer != address:
                raise RuntimeError("the device sees host memory at other addresses than the host")

    def _unpin_from(self, first: int) -> int:
        """Unpin all chunks but the first ones; the bytes that stay pinned."""
        chunks, self._chunks = self._chunks[first:], self._chunks[:first]
        self.nbytes = min(self.nbytes, first * self.chunk_bytes)
        if chunks:
            with self._driver() as runtime:
                for address in chunks:
                    try:
                        runtime.hostUnregister(address)
                    except RuntimeError as error:
                        logger.warning("the driver could not unpin host memory: %s", error)
        return self.nbytes

    @contextlib.contextmanager
    def _driver(self) -> Iterator[Any]:
        """CUDA's runtime, for the arena's device."""
        import cupy

        assert self._device is not None
        # cupy makes the device before current again, and where that has no context yet creates
        # one there; within torch's guard it is this same device.
        with torch.cuda.device(self._device), cupy.cuda.Device(self._device.index):
            yield cupy.cuda.runtime


def _warn_once(reason: str, is_missing: bool) -> None:
    global _has_warned
    if _has_warned:
        return
    _has_warned = True
    major = (torch.version.cuda or "13").partition(".")[0]
    cure = (
        f"install cupy: pip install 'arkcache[gpu-cuda{major}]'"
        if is_missing
        else "raise the limit on locked memory (ulimit -l, or the container's), update the driver"
    )
    warnings.warn(
        f"the host tier stays pageable ({reason}): pages are recalled by plain copies that the "
        "host waits for, not by a kernel that reads host memory directly, and decoding is slower. "
        f"To pin it, {cure}",
        stacklevel=4,
    )
