"""Transfers between the tiers: the peaks of this machine, and what share of them is reached."""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from arkcache.kernels.arguments import HostPages, Selection
from arkcache.tiering.host import HostTier
from arkcache.tiering.pieces import Ids
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.check import Outcome
from tests.gpu.outcome import Skipped

COPY_BYTES = 256 << 20

REGISTERED_BYTES = (256 << 20, 1 << 30, 2 << 30)
"""Sizes of a registration whose rates are measured."""

LARGE_BYTES = 16 << 30
"""Of host memory that a large recall reads from: far more than what any table of addresses caches
for the bus."""

SATURATED_BYTES = 1 << 30
"""Of device memory that a kernel reads and writes over and over beside a recall."""

SATURATED_SECONDS = 0.5
"""For which it does: several times what a graph of recalls takes alone."""


def pinned_lines(
    bench: Bench, nbytes: int, total: int, is_large: bool = False
) -> tuple[HostTier, Ids, Tensor]:
    """A host tier of `total` bytes in pieces of `nbytes`, all written; their handles; the bytes.

    Of a large one only the first 8 bytes of a piece are written, which number it.
    """
    count = total // nbytes
    host = HostTier([nbytes], count * nbytes, pin_to=bench.device)
    handles = host.allocate(count)
    if not (host.pinned or bench.rehearsing):
        raise Skipped(f"host memory cannot be pinned: {host.why_pageable}")
    lines = host.pieces()[:count]
    words = lines.view(torch.int64)
    if is_large:
        words[:, 0] = torch.arange(count)
    else:
        words.random_()
    return host, handles, lines


def peaks(bench: Bench) -> Outcome:
    """Copies of 256 MiB by the copy engines, to and from the pinned arena, and on the device."""
    total = bench.pick(COPY_BYTES, 1 << 16)
    host, _handles, lines = pinned_lines(bench, 4096, total)
    # No copy may cross from one registration into the next.
    lines = lines[: host.pieces_per_chunk]
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


class Recall(NamedTuple):
    """The selection of 8 KV heads, 58 pages each, from all over a host tier.

    Attributes:
        host: where they are, pinned.
        selections: several of them.
        slots: uint8 [rows, num_slots, nbytes], that they are recalled into.
        num_pieces: of a selection.
    """

    host: HostPages
    selections: list[Selection]
    slots: Tensor
    num_pieces: int

    def run(self, number: int) -> None:
        """Recall one selection."""
        from arkcache.kernels.triton_copy import gather

        gather(self.host, self.selections[number], self.slots, num_sink_pages=1)

    @property
    def nbytes(self) -> int:
        """Bytes of a selection."""
        return self.num_pieces * self.slots.shape[2]


def make_recall(bench: Bench, lines: Tensor) -> Recall:
    """Selections of random pages; every head has its own order of them."""
    rows, max_selected, count, device = 8, bench.pick(58, 3), len(lines), bench.device
    located = torch.stack([torch.randperm(count) for _ in range(rows)]).to(device)
    places = torch.arange(max_selected, dtype=torch.int32, device=device).repeat(rows, 1)
    counts = torch.full((rows,), max_selected, dtype=torch.int32, device=device)
    slots = torch.zeros((rows, max_selected + 1, lines.shape[1]), dtype=torch.uint8, device=device)
    pages = [
        torch.stack([torch.randperm(count)[:max_selected] for _ in range(rows)]).int().to(device)
        for _ in range(bench.pick(8, 1))
    ]
    selections = [Selection(own, places, counts, places, counts) for own in pages]
    return Recall(HostPages(lines, located), selections, slots, rows * max_selected)


def check_recalled(recall: Recall) -> None:
    """Raise `AssertionError` if a selection comes back with other bytes."""
    recall.run(0)
    (pieces, located), pages = recall.host, recall.selections[0].pages
    wanted, slots = pieces[located.gather(1, pages.long()).cpu()], recall.slots[:, 1:].cpu()
    assert torch.equal(slots, wanted), "a recalled page differs from what was sealed"


def gather(bench: Bench, nbytes: int) -> Outcome:
    """Recall from 512 MiB of pinned memory."""
    _host, _handles, lines = pinned_lines(bench, nbytes, bench.pick(512 << 20, 64 * nbytes))
    recall = make_recall(bench, lines)
    timing = bench.time(recall.run, len(recall.selections))
    check_recalled(recall)
    rate = recall.nbytes / timing.median_us * 1e6
    share = rate / bench.peak("host_to_device")
    details = {"gb_s": round(rate / 1e9, 2), "pieces": recall.num_pieces, **timing.asdict()}
    return Outcome(share, share, details)


def gather_large(bench: Bench, nbytes: int) -> Outcome:
    """Recall from 16 GiB or more, alone and while a kernel saturates the device's memory."""
    total = bench.pick(LARGE_BYTES, 64 * nbytes)
    if 2 * total > bench.host_bytes:
        raise Skipped(f"needs {total >> 30} GiB and as much spare, of {bench.host_bytes >> 30} GiB")
    start = time.perf_counter()
    _host, _handles, lines = pinned_lines(bench, nbytes, total, is_large=True)
    bench.note(gib=total / 2**30, seconds_to_pin=round(time.perf_counter() - start, 2))
    recall = make_recall(bench, lines)
    replay, calls = bench.record(recall.run, len(recall.selections))
    alone = bench.time_calls(replay, repeats=20, calls=calls)
    check_recalled(recall)
    rate = recall.nbytes / alone.median_us * 1e6
    bench.note(gb_s=round(rate / 1e9, 2), alone=alone.asdict())
    beside = beside_a_saturating_kernel(bench, lambda: replay(0))
    if not bench.rehearsing:
        beside["gb_s"] = round(calls * recall.nbytes / beside["ms"] / 1e6, 2)
    share = rate / bench.peak("host_to_device")
    return Outcome(share, share, {"beside_a_saturating_kernel": beside})


def beside_a_saturating_kernel(bench: Bench, run: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of `run` while another stream reads and writes device memory without a pause."""
    nbytes = bench.pick(SATURATED_BYTES, 1 << 10)
    first, second = (torch.zeros(nbytes, dtype=torch.uint8, device=bench.device) for _ in range(2))
    if bench.rehearsing:
        torch.add(first, 1, out=second)
        run()
        return {}
    begun, ended, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(4))
    times = int(SATURATED_SECONDS * bench.peak("device") / (2 * nbytes)) + 1
    stream = torch.cuda.Stream(bench.device)
    bench.synchronize()
    with torch.cuda.stream(stream):
        begun.record()
        for _ in range(times):
            torch.add(first, 1, out=second)
        ended.record()
    torch.cuda.current_stream(bench.device).wait_event(begun)
    start.record()
    run()
    end.record()
    bench.synchronize()
    rate = 2 * nbytes * times / begun.elapsed_time(ended) * 1e3
    return {
        "ms": round(start.elapsed_time(end), 3),
        "saturated_throughout": end.elapsed_time(ended) >= 0,
        "saturating_kernel_of_peak": round(rate / bench.peak("device"), 3),
    }


def register(bench: Bench) -> Outcome:
    """GB/s at which host memory that nobody has touched is registered, by the size of a chunk."""
    runtime: Any = SimpleNamespace(hostRegister=lambda *_: None, hostUnregister=lambda _: None)
    if not bench.rehearsing:
        import cupy

        bench.synchronize()  # a context is current, which cupy takes
        runtime = cupy.cuda.runtime
    rates = []
    for nbytes in bench.pick(REGISTERED_BYTES, (1 << 16,)):
        if 4 * nbytes > bench.host_bytes:
            continue
        # As the arena of the host tier is mapped.
        with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
            if hasattr(mmap, "MADV_HUGEPAGE"):
                mapping.madvise(mmap.MADV_HUGEPAGE)
            address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
            seconds = []
            for call in (lambda a=address, n=nbytes: runtime.hostRegister(a, n, 0),
                         lambda a=address: runtime.hostUnregister(a)):  # fmt: skip
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
        rates.append(nbytes / seconds[0] / 1e9)
        name = f"{nbytes >> 20}_mib"
        bench.note(**{
            f"register_{name}_gb_s": round(rates[-1], 2),
            f"unregister_{name}_gb_s": round(nbytes / seconds[1] / 1e9, 2),
        })  # fmt: skip
    if not rates:
        raise Skipped(f"needs 1 GiB of host memory, of {bench.host_bytes >> 20} MiB")
    return Outcome(None if bench.rehearsing else max(rates))


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
    last = host.pieces()[host.positions(handles[-1])]
    assert torch.equal(last, content.cpu()), "a page in the host tier differs from what was sealed"
    rate = handles.size * nbytes / statistics.median(seconds)
    share = rate / bench.peak("device_to_host")
    return Outcome(share, share, {"gb_s": round(rate / 1e9, 2), "block_mib": BLOCK_BYTES >> 20})
