"""The paths that a page can take to a GPU, on it, and back."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from arkcache.bench.routes import (
    MOVED_BYTES,
    Absent,
    Bind,
    Chunks,
    Paths,
    Peak,
    Route,
    Step,
    pieces_of,
)
from arkcache.bench.timing import synchronize
from arkcache.sizes import bytes_text
from arkcache.tiering.host import HostTier
from arkcache.tiering.pieces import Ids, take
from arkcache.tiering.pinned import runs_of
from arkcache.tiering.reading import copy_runs, gather
from arkcache.tiering.transfer import upload

ON_DEVICE = "device to device, gather"
BY_COPY, BY_KERNEL = "pinned to device, a copy per run", "pinned to device, gather kernel"
BACK, PAGEABLE = "device to pinned, a copy per run", "pageable to device"
DEVICE = "device, in one run"
TO_DEVICE, TO_HOST = "host to device, in one run", "device to host, in one run"

EVERY = (ON_DEVICE, BY_COPY, BY_KERNEL, BACK, PAGEABLE)


def why_no_device() -> str | None:
    """Why torch has no GPU here; None where it has one."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "there is no CUDA device: the installed torch is a CPU build"
    return "there is no CUDA device that torch finds"


def why_no_room(pool_bytes: int) -> str | None:
    """Why the current GPU cannot take a copy of the pool; None where it can."""
    needed, free = pool_bytes + 4 * MOVED_BYTES, torch.cuda.mem_get_info()[0]
    if needed <= free:
        return None
    return (
        f"the GPU has {bytes_text(free)} free, and {bytes_text(needed)} are needed (less with "
        "--pool)"
    )


def why_no_kernel() -> str | None:
    """Why the gather kernel cannot run here; None where it can."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def no_device_paths(reason: str) -> Paths:
    """All of them absent."""
    return Paths(absent=[Absent(name, reason) for name in EVERY])


def device_paths(host: HostTier, pool: Tensor, device: torch.device) -> Paths:
    """All of them; those that need pinned memory or a kernel only where there is one.

    Args:
        host: a host tier pinned to `device`, if that was possible.
        pool: uint8 [nbytes], its pieces.
        device: a GPU. A CPU is served too, for tests: nothing is pinned there.
    """
    wait = lambda: synchronize(device)  # noqa: E731
    on_device = pool.to(device)
    target = torch.zeros(min(len(pool), MOVED_BYTES), dtype=torch.uint8, device=device)
    paths = Paths(
        [
            Route(ON_DEVICE, DEVICE, _on_device(on_device), finish=wait),
            Route(PAGEABLE, TO_DEVICE, _pageable(pool, device), finish=wait),
        ],
        [
            Peak(DEVICE, len(target), _copy(on_device, target), finish=wait),
            Peak(TO_DEVICE, len(target), _copy(pool, target), finish=wait),
        ],
    )
    if device.type == "cuda" and not host.pinned:
        reason = f"host memory cannot be pinned ({host.why_pageable})"
        paths.absent += [Absent(name, reason) for name in (BY_COPY, BY_KERNEL, BACK)]
        return paths
    paths.routes.append(Route(BY_COPY, TO_DEVICE, _by_copies(pool, target), finish=wait))
    paths.routes.append(Route(BACK, TO_HOST, _back(pool, target), finish=wait))
    first = pool[: len(target)]
    paths.peaks.append(
        Peak(TO_HOST, len(first), lambda: first.copy_(target, non_blocking=True), finish=wait)
    )
    missing = why_no_kernel()
    if missing is None:
        paths.routes.append(Route(BY_KERNEL, TO_DEVICE, _by_kernel(pool, target), finish=wait))
    else:
        paths.absent.append(Absent(BY_KERNEL, missing))
    return paths


def _copy(source: Tensor, target: Tensor) -> Callable[[], object]:
    chunks = Chunks(source, len(target))
    return lambda: target.copy_(chunks.next(), non_blocking=True)


def _on_device(pool: Tensor) -> Bind:
    def bind(piece_bytes: int) -> Step:
        pieces = pieces_of(pool, piece_bytes)
        words = pieces.view(torch.int64) if piece_bytes % 8 == 0 else pieces
        return lambda positions: words.index_select(0, upload(positions, pool.device))

    return bind


def _pageable(pool: Tensor, device: torch.device) -> Bind:
    def bind(piece_bytes: int) -> Step:
        pieces = pieces_of(pool, piece_bytes)
        return lambda positions: take(pieces, positions).to(device)

    return bind


def _by_copies(pool: Tensor, target: Tensor) -> Bind:
    def bind(piece_bytes: int) -> Step:
        pieces, own = pieces_of(pool, piece_bytes), pieces_of(target, piece_bytes)

        def step(positions: Ids) -> Tensor:
            copy_runs(pieces, runs_of(positions, len(pieces)), own)
            return own

        return step

    return bind


def _by_kernel(pool: Tensor, target: Tensor) -> Bind:
    def bind(piece_bytes: int) -> Step:
        pieces, own = pieces_of(pool, piece_bytes), pieces_of(target, piece_bytes)

        def step(positions: Ids) -> Tensor:
            gather(pieces, positions, own[: len(positions)])
            return own

        return step

    return bind


def _back(pool: Tensor, content: Tensor) -> Bind:
    """The other way: what arrives at the positions is the first pieces of `content`."""

    def bind(piece_bytes: int) -> Step:
        pieces, own = pieces_of(pool, piece_bytes), pieces_of(content, piece_bytes)

        def step(positions: Ids) -> Tensor:
            for first, entry, length in runs_of(positions, len(pieces)):
                source = own[entry : entry + length]
                pieces[first : first + length].copy_(source, non_blocking=True)
            return own

        return step

    return bind
