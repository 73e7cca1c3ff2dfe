"""The host tier: one arena of equal blocks, each holding a sealed page of all KV heads.

The arena is a single anonymous mapping, reserved once at its limit and backed by memory only as
blocks are first written. It therefore grows without ever copying what it holds, and a block has one
address for life, which is what a copy kernel and the driver's page registration need.

Blocks are immutable once written and counted by reference, so that beams, returned sequences and
copies of a cache share them instead of copying the context.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arkcache.errors import HostTierFullError, IntegrityError

Ids = NDArray[np.int64]


def physical_memory_bytes() -> int:
    """Bytes of RAM that this process may use: the machine's, or its container's if that is less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.exists() else "max"
    return physical if allowed == "max" else min(physical, int(allowed))


class HostTier:
    """An arena of blocks of `block_shape` elements of `dtype`.

    Args:
        block_shape: shape of one block; the first axis is the KV head.
        dtype: element type, untouched copies of the model's own.
        limit_bytes: the most it may hold; None is the machine's memory.

    Raises `HostTierFullError` from `allocate` before anything has changed.
    """

    def __init__(
        self, block_shape: tuple[int, ...], dtype: torch.dtype, limit_bytes: int | None
    ) -> None:
        self.block_shape, self.dtype = block_shape, dtype
        self.block_bytes = int(np.prod(block_shape)) * dtype.itemsize
        self.limit_bytes = physical_memory_bytes() if limit_bytes is None else limit_bytes
        self.blocks = torch.empty((0, *block_shape), dtype=dtype)
        self._references: Ids = np.zeros(0, dtype=np.int64)
        self._free: list[int] = []
        self._origin: Ids = np.zeros(0, dtype=np.int64)

    @property
    def num_blocks(self) -> int:
        """Blocks that hold a page."""
        return len(self._references) - len(self._free)

    @property
    def used_bytes(self) -> int:
        """Bytes of the blocks that hold a page."""
        return self.num_blocks * self.block_bytes

    def bytes_of(self, blocks: Ids) -> int:
        """Bytes of the listed blocks, each counted once however often it is listed."""
        return len(np.unique(blocks)) * self.block_bytes

    def check_room(self, count: int) -> None:
        """Raise `HostTierFullError` unless `count` more blocks fit the limit and the system."""
        if (self.num_blocks + count) * self.block_bytes > self.limit_bytes:
            raise HostTierFullError(
                f"the host tier holds {self.used_bytes} bytes of at most {self.limit_bytes} and "
                f"{count} more pages need {count * self.block_bytes}: raise host_bytes, shorten "
                "the context, or release another cache with reset()"
            )
        if count and len(self.blocks) == 0:
            self.blocks = self._reserve()

    def allocate(self, count: int) -> Ids:
        """Take `count` blocks, freed ones first; each is held by one reference."""
        self.check_room(count)
        fresh = max(0, count - len(self._free))
        first = len(self._references)
        reused = [self._free.pop() for _ in range(count - fresh)]
        if fresh:
            self._references = np.concatenate((self._references, np.zeros(fresh, dtype=np.int64)))
        blocks = np.concatenate(
            (np.array(reused, dtype=np.int64), np.arange(first, first + fresh, dtype=np.int64))
        )
        self._references[blocks] = 1
        return blocks

    def retain(self, blocks: Ids) -> None:
        """Add one reference per listed block (a block may be listed several times)."""
        np.add.at(self._references, blocks, 1)

    def release(self, blocks: Ids) -> None:
        """Drop one reference per listed block; a block without any is free again."""
        np.add.at(self._references, blocks, -1)
        freed = np.unique(blocks[self._references[blocks] == 0])
        self._free.extend(freed.tolist())
        if self._free and self.num_blocks == 0:
            self.blocks = self.blocks[:0].clone()
            self._references = np.zeros(0, dtype=np.int64)
            self._free.clear()

    def extract(self, blocks: Ids) -> HostTier:
        """A new tier that holds a copy of the listed blocks, one reference for each listing."""
        tier = HostTier(self.block_shape, self.dtype, self.limit_bytes)
        tier._origin, listings = np.unique(blocks, return_counts=True)
        own = tier.allocate(len(tier._origin))
        tier.blocks[torch.from_numpy(own)] = self.blocks[torch.from_numpy(tier._origin)]
        tier._references[own] = listings
        return tier

    def extracted(self, blocks: Ids) -> Ids:
        """Where the blocks of the tier that this one was extracted from are here."""
        own: Ids = np.searchsorted(self._origin, blocks)
        return own

    def check(self, holders: list[Ids]) -> None:
        """Raise `IntegrityError` unless `holders` account for all references; free + held = all."""
        expected = np.zeros_like(self._references)
        for blocks in holders:
            np.add.at(expected, blocks, 1)
        if not np.array_equal(expected, self._references):
            raise IntegrityError("the host tier's references differ from what the caches hold")
        if not np.array_equal(np.sort(self._free), np.flatnonzero(expected == 0)):
            raise IntegrityError("the host tier's free blocks are not those without a reference")

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"blocks": self.blocks[: len(self._references)].clone()}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        content = self.blocks
        if len(content):
            self.blocks = self._reserve()
            self.blocks[: len(content)] = content

    def _reserve(self) -> Tensor:
        """Map address space for the limit; the mapping goes when the last view of it does."""
        capacity = max(1, self.limit_bytes // self.block_bytes)
        mapping = _map_anonymous(capacity * self.block_bytes)
        with torch.inference_mode(False):
            return torch.frombuffer(mapping, dtype=self.dtype).view(capacity, *self.block_shape)


def _map_anonymous(size: int) -> mmap.mmap:
    try:
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
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
