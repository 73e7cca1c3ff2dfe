"""Transfers between the tiers: the peaks of this machine, and what share of them is reached."""

from __future__ import annotations

import statistics
import time

import torch
from gpu_common import Bench, Outcome, Skipped
from torch import Tensor

from arkcache.tiering.host import HostTier, Ids

COPY_BYTES = 256 << 20


def pinned_lines(bench: Bench, nbytes: int, total: int) -> tuple[HostTier, Ids, Tensor]:
    """A host tier of `total` bytes in pieces of `nbytes`, all written; their handles; the bytes."""
    count = total // nbytes
    host = HostTier([nbytes], count * nbytes, pin_to=bench.device)
    handles = host.allocate(count)
    if not (host.pinned or bench.rehearsing):
        raise Skipped(f"host memory cannot be pinned: {host.why_pageable}")
    lines = host.pieces()[:count]
    lines.view(torch.int64).random_()
    return host, handles, lines


def peaks(bench: Bench) -> Outcome:
    """Copies of 256 MiB by the copy engines, to and from the pinned arena, and on the device."""
    total = bench.pick(COPY_BYTES, 1 << 16)
    host, _handles, lines = pinned_lines(bench, 4096, total)
    # No copy may cross from one registration into the next.
    lines = lines[: host.rows_per_chunk]
    first, second = (torch.empty_like(lines, device=bench.device) for _ in range(2))
    copies = {
        "host_to_device": (lines.numel(), lambda _: first.copy_(lines, non_blocking=True)),
        "device_to_host": (lines.numel(), lambda _: lines.copy_(second, non_blocking=True)),
        "device": (2 * lines.numel(), lambda _: second.copy_(first)),
    }
    second.copy_(first)
    for name, (nbytes, copy) in copies.items():
        timing = bench.time_calls(copy, repeats=10)
        bench.peaks[name] = nbytes / timing.median_us * 1e6
    figures = {f"{name}_gb_s": round(rate / 1e9, 1) for name, rate in bench.peaks.items()}
    return Outcome(figures["host_to_device_gb_s"], details=figures)


def gather(bench: Bench, nbytes: int) -> Outcome:
    """Recall the selection of 8 KV heads, 58 pages each, from all over 512 MiB of pinned memory."""
    from arkcache.kernels.triton_copy import gather

    rows, most = 8, bench.pick(58, 3)
    _host, _handles, lines = pinned_lines(bench, nbytes, bench.pick(512 << 20, 64 * nbytes))
    count, device = len(lines), bench.device
    located = torch.stack([torch.randperm(count) for _ in range(rows)]).to(device)
    sets = bench.pick(8, 1)
    pages = [
        torch.stack([torch.randperm(count)[:most] for _ in range(rows)]).int().to(device)
        for _ in range(sets)
    ]
    places = torch.arange(most, dtype=torch.int32, device=device).repeat(rows, 1)
    counts = torch.full((rows,), most, dtype=torch.int32, device=device)
    slots = torch.zeros((rows, most + 1, nbytes), dtype=torch.uint8, device=device)

    def recall(number: int) -> None:
        gather(lines, located, pages[number], places, counts, slots, num_sinks=1)

    timing = bench.time(recall, sets)
    recall(0)
    wanted = lines[located.gather(1, pages[0].long()).cpu()]
    assert torch.equal(slots[:, 1:].cpu(), wanted), "a recalled page differs from what was sealed"
    rate = rows * most * nbytes / timing.median_us * 1e6
    share = rate / bench.peak("host_to_device")
    details = {"gb_s": round(rate / 1e9, 2), "pieces": rows * most, **timing.asdict()}
    return Outcome(share, share, details)


def backup(bench: Bench) -> Outcome:
    """Blocks of 32 MiB through `BackupEngine`, filled and submitted one after another."""
    from arkcache.tiering.backup import BLOCK_BYTES, backup_engine_of

    nbytes, num_blocks = 1 << 17, bench.pick(16, 2)
    per_block = bench.pick(BLOCK_BYTES // nbytes, 2)
    host, pieces, _lines = pinned_lines(bench, nbytes, num_blocks * per_block * nbytes)
    handles = pieces.reshape(num_blocks, per_block)
    engine = backup_engine_of(bench.device)
    content = torch.randint(256, (per_block, nbytes), dtype=torch.uint8, device=bench.device)
    seconds = []
    for _ in range(bench.pick(5, 1)):
        bench.synchronize()
        start = time.perf_counter()
        for own in handles:
            block = engine.borrow(content.numel())
            block.data.view_as(content).copy_(content)
            engine.submit(block, host, own)
        engine.settle_all()
        bench.synchronize()
        seconds.append(time.perf_counter() - start)
    last = host.pieces()[host.rows(handles[-1])]
    assert torch.equal(last, content.cpu()), "a page in the host tier differs from what was sealed"
    rate = handles.size * nbytes / statistics.median(seconds)
    share = rate / bench.peak("device_to_host")
    return Outcome(share, share, {"gb_s": round(rate / 1e9, 2), "block_mib": BLOCK_BYTES >> 20})
