"""Backup: sealed pages leave the device through staging blocks, while attention goes on.

    layers:         borrow a block -> fill it (main stream) -> submit it
    backup stream:                                    wait for main -> copy into the host tier
    layers:                                  settle, before the main stream reads those pages

Three barriers make that right, and each is a wait of one stream for another: the main stream waits
before it fills a block whose last copy is still under way, the backup stream waits for what fills
the block, and the main stream waits for the copy before it reads the pages. The host waits for
nothing, unless a copy failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arkcache.errors import InputError, TransferError
from arkcache.tiering.host import HostTier
from arkcache.tiering.pinned import Run, runs_of
from arkcache.tiering.streams import Event, Streams, numbered, streams_of

Ids = NDArray[np.int64]

BLOCK_BYTES = 32 << 20
"""Of a staging block. Copies of 32 MiB reach the full speed of the bus."""

NUM_BLOCKS = 3
"""One is filled while one is copied; a third evens out a slow moment of either."""

_FAILURES = (RuntimeError, MemoryError, OSError)


@dataclass(eq=False)
class StagingBlock:
    """A staging block while it is borrowed.

    Attributes:
        data: uint8 [nbytes] on the device, to be filled by work of the main stream.
    """

    data: Tensor


class _Slot:
    """What a block is made of, and why it may not be lent again."""

    def __init__(self) -> None:
        self.storage: Tensor | None = None
        self.lent: StagingBlock | None = None
        self.copied: Event | None = None
        self.failed: Ticket | None = None


@dataclass(eq=False)
class Ticket:
    """A submitted copy: settle it before the pages are read.

    Attributes:
        host: the tier that it goes to.
        handles: int64 [pieces], what the tier calls them.
        copied: reached when it has landed.
        failure: why it did not, or not all of it; the engine holds references to the pieces then.
        staged: the pages [pieces, bytes of a piece], where they still are after a failure.
    """

    host: HostTier
    handles: Ids
    copied: Event
    failure: str | None = None
    staged: Tensor | None = None


class BackupEngine:
    """Copies blocks of pages from one device into host tiers.

    A copy that the driver refuses loses nothing: its block keeps the pages, and they are written
    once more, the host waiting, when the ticket is settled.

    Args:
        streams: of the device.
        device: where staging blocks are.
        block_bytes: of a staging block; a larger request enlarges the block that it gets.
        num_blocks: staging blocks, each allocated when first lent.
    """

    def __init__(
        self,
        streams: Streams,
        device: torch.device,
        block_bytes: int = BLOCK_BYTES,
        num_blocks: int = NUM_BLOCKS,
    ) -> None:
        self.streams, self.device, self.block_bytes = streams, device, block_bytes
        self._slots = [_Slot() for _ in range(num_blocks)]

    @property
    def staging_bytes(self) -> int:
        """Bytes of the staging blocks allocated so far."""
        return sum(slot.storage.numel() for slot in self._slots if slot.storage is not None)

    def borrow(self, nbytes: int) -> StagingBlock:
        """A block to fill on the main stream: it is free when the stream gets there.

        Where all are lent, the one that was borrowed first is lent again: its borrower met an error
        and will not submit it. Raises `TransferError` where failed copies hold
        all blocks and fail once more.
        """
        slot = self._free_slot()
        self._slots.remove(slot)
        self._slots.append(slot)  # lent in turn, so that the longest copied is next
        if slot.copied is not None:
            self.streams.main.wait(slot.copied)
        if slot.storage is None or slot.storage.numel() < nbytes:
            if slot.storage is not None:
                self.streams.backup.keep(slot.storage)
            with torch.inference_mode(False):
                size = max(nbytes, self.block_bytes)
                slot.storage = torch.empty(size, dtype=torch.uint8, device=self.device)
        slot.lent = StagingBlock(slot.storage[:nbytes])
        return slot.lent

    def submit(self, block: StagingBlock, host: HostTier, handles: Ids) -> Ticket:
        """Copy a block, [len(handles), bytes of a piece], to where the host tier has its pieces.

        handles: int64 [pieces], distinct. Where the tier is pageable, it is written at once. Raises
        `InputError` if the block is not borrowed or of another size; a copy that fails is the
        ticket's matter.
        """
        slot = next((slot for slot in self._slots if slot.lent is block), None)
        size = host.piece_bytes[0]
        if slot is None or block.data.numel() != len(handles) * size:
            raise InputError(
                f"a block of {block.data.numel()} bytes for {len(handles)} pieces of {size}: "
                "expected a block of just their size, borrowed last and not submitted yet"
            )
        handles, content = np.array(handles, dtype=np.int64), block.data.view(-1, size)
        main, stream, failure = self.streams.main, self.streams.backup, None
        try:
            if host.pieces_per_chunk is None:
                main.record().synchronize()
                host.write(handles, content)
            else:
                runs = runs_of(host.positions(handles), host.pieces_per_chunk)
                stream.wait(main.record())
                stream.run(partial(_copy_runs, host.pieces(), runs, content))
        except _FAILURES as error:
            failure = f"{type(error).__name__}: {error}"
        ticket = Ticket(host, handles, stream.record(), failure)
        slot.copied, slot.lent = ticket.copied, None
        if failure is not None:
            slot.failed, ticket.staged = ticket, content
            host.retain(handles)  # their places must not be given away before they are written
        return ticket

    def settle(self, ticket: Ticket) -> None:
        """Let what the main stream does from now on find the pages in the host tier.

        And those of all tickets before it for that tier. Raises `TransferError` if some could not
        be copied, nor written here; they stay in the block, and to settle again tries again.
        """
        self._write_failed(ticket.host)
        self.streams.main.wait(ticket.copied)

    def settle_all(self) -> None:
        """Settle all tickets there are."""
        self._write_failed(None)
        self.streams.main.wait(self.streams.backup.record())

    def _free_slot(self) -> _Slot:
        usable = [slot for slot in self._slots if slot.failed is None]
        if usable:
            return next((slot for slot in usable if slot.lent is None), usable[0])
        slot = self._slots[0]
        assert slot.failed is not None
        self._write(slot, slot.failed)
        return slot

    def _write_failed(self, host: HostTier | None) -> None:
        for slot in self._slots:
            if slot.failed is not None and host in (None, slot.failed.host):
                self._write(slot, slot.failed)

    def _write(self, slot: _Slot, ticket: Ticket) -> None:
        """Write the pages of a failed copy, the host waiting for all that may touch either end."""
        assert ticket.staged is not None
        host, streams = ticket.host, self.streams
        # The others have been released since: only the reference held here is left.
        wanted = np.flatnonzero(host.references(ticket.handles) > 1)
        try:
            for stream in (streams.main, streams.backup, streams.side):
                stream.record().synchronize()
            if len(wanted):
                host.write(ticket.handles[wanted], ticket.staged[torch.from_numpy(wanted)])
        except _FAILURES as error:
            raise TransferError(
                f"{len(wanted)} pages could not be copied from {self.device} into the host tier "
                f"({ticket.failure}), nor written there ({error}); they are still staged on the "
                "device: free host memory and repeat the step, or release the cache"
            ) from error
        ticket.copied = slot.copied = streams.main.record()
        slot.failed = ticket.failure = ticket.staged = None
        host.release(ticket.handles)


def _copy_runs(pieces: Tensor, runs: list[Run], content: Tensor) -> None:
    """One copy per run, which the host does not wait for."""
    for first, entry, length in runs:
        source = content[entry : entry + length]
        pieces[first : first + length].copy_(source, non_blocking=True)


def backup_engine_of(device: torch.device) -> BackupEngine:
    """The engine of a device, the same for all models: hold the device rather than this."""
    return _engine_of(numbered(device))


@cache
def _engine_of(device: torch.device) -> BackupEngine:
    return BackupEngine(streams_of(device), device)
