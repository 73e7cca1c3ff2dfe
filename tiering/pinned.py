"""Host memory that a GPU reaches by itself: the part of an arena that the driver has pinned.

Memory is registered in place as the arena grows, so a tier is pinned to the size it needs and never
copied for it. What is pinned stays so until the arena goes: the device keeps the physical pages it
was shown, so giving such memory back to the system would leave it reading others.

Registering takes the driver about as long as touching the memory does. So while the arena grows, a
thread registers what is likely to be needed next, and only what it did not foresee is waited for.
"""

from __future__ import annotations

import math
import mmap
import os
import warnings
import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from arkcache.errors import HostTierFullError, InputError
from arkcache.tiering.mapping import keep_from_forks, share_with_forks
from arkcache.tiering.registration import (
    OtherAddressesError,
    RegistrationAhead,
    Span,
    check_addresses,
    driver,
    logger,
    register,
    unregister,
)
from arkcache.tiering.streams import numbered

CHUNK_BYTES = 256 << 20
"""Memory is pinned in multiples of about this: what is pinned but unused is wasted."""

MAX_CHUNK_BYTES = 2 << 30
"""More than this in one registration is refused by some drivers."""

MAX_AT_ONCE_BYTES = 1 << 30
"""The most that one registration of several chunks takes."""

MAX_AHEAD_BYTES = 1 << 30
"""The thread pins at most so much beyond what is needed."""

NO_DEVICE = "there is no CUDA device to pin it for"
NOT_YET = "it has reserved no memory yet"

_has_warned = False


class Run(NamedTuple):
    """Adjacent places of an arena: `length` entries of a list from `entry` on are `first` and those
    that follow it."""

    first: int
    entry: int
    length: int


def runs_of(places: NDArray[np.int64], per_chunk: int) -> list[Run]:
    """`places` [n] as runs of adjacent ones, none of which crosses from one chunk into the next.

    A copy must not cross: to the driver the chunks are two registrations, however close they lie.
    """
    if len(places) == 0:
        return []
    is_start = (np.diff(places) != 1) | (np.diff(places // per_chunk) != 0)
    bounds = np.concatenate(([0], np.flatnonzero(is_start) + 1, [len(places)]))
    starts, counts = bounds[:-1], np.diff(bounds)
    triples = zip(places[starts].tolist(), starts.tolist(), counts.tolist(), strict=True)
    return [Run(*triple) for triple in triples]


class PinnedArena:
    """Registers an arena with the driver from its start on; one per host tier.

    Whether it is pinned is decided when the first chunk is: if that is refused the arena is
    pageable for good, and once it was accepted a later refusal is an error.

    Args:
        device: the CUDA device that is to reach it; None, or a CPU, leaves it pageable.
        piece_bytes: size of a piece; none lies in two chunks.
        may_take: whether so many bytes in all may be pinned ahead of need.

    Attributes:
        why_pageable: why it is not pinned; None if it is.
        chunk_bytes: no copy may cross a multiple of this, where a registration may end.
        nbytes: bytes pinned, from the start of the arena on.
    """

    def __init__(
        self,
        device: torch.device | None,
        piece_bytes: int,
        may_take: Callable[[int], bool] = lambda _nbytes: True,
    ) -> None:
        has_device = device is not None and device.type == "cuda"
        self._device = numbered(device) if device is not None and has_device else None
        self.why_pageable: str | None = NOT_YET if has_device else NO_DEVICE
        step = math.lcm(piece_bytes, mmap.PAGESIZE)
        self.chunk_bytes = max(1, CHUNK_BYTES // step) * step
        self.nbytes = 0
        self._may_take = may_take
        self._spans: list[Span] = []
        self._ahead: RegistrationAhead | None = None
        self._asked_bytes, self._may_look_ahead = 0, True
        self._mapping: mmap.mmap | None = None
        self._address = self._size = 0
        self._process = os.getpid()

    @property
    def claimed_bytes(self) -> int:
        """Bytes that are pinned or being pinned, from the start of the arena on."""
        return self.nbytes + (self._ahead.span.size if self._ahead is not None else 0)

    def reach(self, nbytes: int) -> int:
        """Bytes that pinning `nbytes` takes: whole chunks; the same where it is pageable."""
        return nbytes if self._device is None else -(-nbytes // self.chunk_bytes) * self.chunk_bytes

    def close_with(self, owner: object) -> None:
        """Close when `owner` is garbage collected, or at exit."""
        if self._device is not None:
            weakref.finalize(owner, self.close)

    def open(self, mapping: mmap.mmap, address: int, size: int) -> None:
        """Take charge of `size` bytes at a page's `address` that hold nothing; pin the first chunk.

        mapping: what begins at `address`.
        Raises `HostTierFullError` if that is refused though the arena before was pinned.
        """
        if self._device is None:
            return
        self._mapping, self._address, self._size = mapping, address, size
        keep_from_forks(mapping)
        if self.why_pageable is None:
            self.extend(1)
            return
        try:
            check_addresses(self._device)
            self._pin(1)
        except (ImportError, RuntimeError) as error:
            share_with_forks(mapping)
            self._device, self._mapping = None, None
            self.why_pageable = f"{type(error).__name__}: {error}"
            _warn_once(self.why_pageable, error)
        else:
            self.why_pageable = None

    def extend(self, nbytes: int) -> None:
        """Pin the arena up to `nbytes` or a little more; nothing to do if it is pageable.

        Waits for a registration ahead only if it is needed by now, and may start the next.
        Raises `HostTierFullError` if a chunk is refused; what was pinned before stays so.
        """
        if self.why_pageable is not None:
            return
        self._check_process()
        self._take_over(nbytes)
        before = len(self._spans)
        try:
            self._pin(nbytes)
        except RuntimeError as error:
            pinned = self._unpin_from(before)
            raise HostTierFullError(
                f"the driver refused to pin more of the host tier: {pinned} bytes are pinned and "
                f"{nbytes} are needed ({error}). Raise the limit on locked memory (ulimit -l, or "
                "the container's memory), lower host_bytes, or release another cache"
            ) from error
        if len(self._spans) > before:
            self._may_look_ahead = True
        self._look_ahead(nbytes)

    def synchronize(self) -> None:
        """Wait for all work on the device, before the host reads or moves what that may write."""
        if self._spans:
            self._check_process()
            assert self._device is not None
            with driver(self._device) as runtime:
                runtime.deviceSynchronize()

    def close(self) -> None:
        """Unpin everything, once the device has done what it was given. May be called again.

        What is being pinned ahead is unpinned when that is over; nobody waits for it here.
        """
        ahead, self._ahead = self._ahead, None
        self._asked_bytes, self._may_look_ahead, self._mapping = 0, True, None
        if os.getpid() != self._process:  # a fork: the registrations are its parent's
            self._spans, self.nbytes = [], 0
            return
        if ahead is not None:
            ahead.give_up()
        if not self._spans:
            return
        try:
            self.synchronize()
        except RuntimeError as error:
            logger.warning("the device failed before its host memory was unpinned: %s", error)
        self._unpin_from(0)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise InputError(
                f"this cache belongs to process {self._process}, which has forked: pinned memory "
                "and the GPU stay with that one. Build a cache in each process, or start processes "
                "by 'spawn'"
            )

    def _pin(self, nbytes: int) -> None:
        """Pin up to `nbytes`, in whole chunks. Raises why not; the caller unpins what was done."""
        if self.chunk_bytes > MAX_CHUNK_BYTES:
            raise RuntimeError(
                f"no whole number of pieces ends with a page within {MAX_CHUNK_BYTES} bytes"
            )
        assert self._device is not None
        while self.nbytes < nbytes:
            span = self._next_span(nbytes)
            register(self._device, span)
            self._add(span)

    def _add(self, span: Span) -> None:
        self._spans.append(span)
        self.nbytes += span.size

    def _next_span(self, nbytes: int) -> Span:
        """What to register next on the way to `nbytes`."""
        most = max(1, MAX_AT_ONCE_BYTES // self.chunk_bytes) * self.chunk_bytes
        size = min(self.reach(nbytes) - self.nbytes, most, self._size - self.nbytes)
        return Span(self._address + self.nbytes, size)

    def _take_over(self, nbytes: int) -> None:
        """Count what was registered ahead as pinned, waiting for it only if `nbytes` need it."""
        ahead = self._ahead
        if ahead is None or (ahead.is_alive() and nbytes <= self.nbytes):
            return
        try:
            ahead.take()
        except RuntimeError as error:
            # Not before it is needed is that an error, and then it is tried once more.
            logger.warning(f"the driver refused to pin host memory ahead of need: {error}")
            self._may_look_ahead = False
        else:
            self._add(ahead.span)
        self._ahead = None

    def _look_ahead(self, nbytes: int) -> None:
        """Let a thread pin what comes next, if less than half of what it should be is pinned.

        That is a quarter of what is held; and where the arena grows by steps, as with a prompt that
        is read in chunks, as much as the last step took.
        """
        if nbytes <= self._asked_bytes:
            return
        step, self._asked_bytes = nbytes - self._asked_bytes, nbytes
        least = step if 2 * step <= nbytes else 0
        lead = min(max(least, nbytes // 4), MAX_AHEAD_BYTES)
        target = min(nbytes + lead, self._size)
        is_enough = self.nbytes >= min(nbytes + max(least, lead // 2), target)
        if is_enough or self._ahead is not None or not self._may_look_ahead:
            return
        span = self._next_span(target)
        if not self._may_take(self.nbytes + span.size):
            return
        assert self._device is not None
        assert self._mapping is not None
        try:
            self._ahead = RegistrationAhead(self._device, self._mapping, span)
        except RuntimeError as error:  # the system has no more threads
            logger.warning(f"host memory is not pinned ahead of need: {error}")
            self._may_look_ahead = False

    def _unpin_from(self, first: int) -> int:
        """Unpin all spans but the first ones; the bytes that stay pinned."""
        spans, self._spans = self._spans[first:], self._spans[:first]
        self.nbytes = sum(span.size for span in self._spans)
        if spans:
            assert self._device is not None
            unregister(self._device, spans)
        return self.nbytes


def _warn_once(reason: str, error: Exception) -> None:
    global _has_warned
    if _has_warned:
        return
    _has_warned = True
    major = (torch.version.cuda or "13").partition(".")[0]
    if isinstance(error, ImportError):
        cure = f"To pin it, install cupy: pip install 'arkcache[gpu-cuda{major}]'"
    elif isinstance(error, OtherAddressesError):
        cure = "Nothing can be done about that on this machine"
    else:
        cure = (
            "To pin it, raise the limit on locked memory (ulimit -l, or the container's), update "
            "the driver"
        )
    warnings.warn(
        f"the host tier stays pageable ({reason}): pages are recalled by plain copies that the "
        "host waits for, not by a kernel that reads host memory directly, and decoding is slower. "
        f"{cure}",
        stacklevel=5,
    )
