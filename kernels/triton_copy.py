"""Pages between the host tier and the device tier, by kernels that address pinned memory directly.

A recall is many small pieces from all over the host tier. Copy engines need a call for each and
reach a tenth of the bus with pieces of a page; a kernel reads them all in one launch, and what it
reads is decided on the device. Each program has up to `BLOCK_WORDS` words in flight at a time, each
row up to `PROGRAMS_PER_ROW` programs, so that even one row keeps a PCIe bus busy.

The host tier is passed as what it is, a CPU tensor: Triton resolves pinned or registered memory to
its device address when it launches, and refuses any other.
"""

# Triton reads annotations of kernels as its own: parameters of a kernel can have none.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arkcache.errors import InputError
from arkcache.kernels.arguments import HostPages, Selection
from arkcache.kernels.triton_checked import check
from arkcache.kernels.triton_sizes import cdiv, power_of_two

PROGRAMS_PER_ROW = 16
"""Programs that share the missing pages of one row."""

BLOCK_WORDS = 1024
"""Words that a program copies at a time: 8 KiB of 8-byte words, 4 loads of 16 bytes per thread."""

WORD_BYTES = 8


@triton.jit
def _copy_chunk(source_ptr, target_ptr, chunk, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Copy one of the `BLOCK` words wide chunks of a page of `WORDS` words."""
    word = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = word < WORDS
    tl.store(target_ptr + word, tl.load(source_ptr + word, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["capacity", "max_selected", "num_slots", "num_sink_pages"])
def gather_kernel(
    pieces_ptr,  # [lines, WORDS]
    located_ptr,  # [R, capacity]
    pages_ptr,  # [R, max_selected]
    places_ptr,  # [R, max_selected]
    counts_ptr,  # [R]
    slots_ptr,  # [R, num_slots, WORDS]
    capacity,
    max_selected,
    num_slots,
    num_sink_pages,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Program (row, i) copies chunks i, i + PROGRAMS ... of the pages that the row misses."""
    row = tl.program_id(0).to(tl.int64)
    num_chunks = tl.load(counts_ptr + row) * CHUNKS
    item = tl.program_id(1)  # not a range(): interpreters before 3.7 take no tensors in one
    while item < num_chunks:
        entry = row * max_selected + item // CHUNKS
        page = tl.load(pages_ptr + entry)
        slot = row * num_slots + num_sink_pages + tl.load(places_ptr + entry)
        line = tl.load(located_ptr + row * capacity + page)
        _copy_chunk(
            pieces_ptr + line * WORDS, slots_ptr + slot * WORDS, item % CHUNKS, WORDS, BLOCK
        )
        item += PROGRAMS


@triton.jit(do_not_specialize=["capacity"])
def scatter_kernel(
    packed_ptr,  # [R, WORDS]
    lines_ptr,  # [R]
    pieces_ptr,  # [lines, WORDS]
    located_ptr,  # [R, capacity]
    sealed_ptr,  # [R]
    capacity,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, i) copies chunk i of the row's page; the first also notes its line."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    line = tl.load(lines_ptr + row)
    if line >= 0:
        _copy_chunk(packed_ptr + row * WORDS, pieces_ptr + line * WORDS, chunk, WORDS, BLOCK)
        if chunk == 0:
            page = tl.load(sealed_ptr + row) - 1
            tl.store(located_ptr + row * capacity + page, line)


@triton.jit
def gather_lines_kernel(
    pieces_ptr,  # [lines, WORDS]
    lines_ptr,  # [n]
    target_ptr,  # [n, WORDS]
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (n, i) copies chunk i of line n."""
    entry = tl.program_id(0).to(tl.int64)
    line = tl.load(lines_ptr + entry)
    _copy_chunk(
        pieces_ptr + line * WORDS, target_ptr + entry * WORDS, tl.program_id(1), WORDS, BLOCK
    )


def gather(host: HostPages, selection: Selection, slots: Tensor, *, num_sink_pages: int) -> None:
    """Recall what a selection misses: slots[r, num_sink_pages + places[r, i]] =
    pieces[located[r, pages[r, i]]] for i < num_missing[r]; other slots are left as they are.

    Args:
        host: where the pages are.
        selection: the places of a row differ from each other; what is chosen is not looked at.
        slots: uint8 [rows, num_slots, nbytes], written.
        num_sink_pages: slots before place 0.

    All contiguous. Raises `InputError` for any other dtype, shape or layout.
    """
    rows, num_slots, nbytes = check("slots", slots, (None, None, None), torch.uint8)
    capacity = _check_host(host, rows, nbytes)
    max_selected = check("selection.pages", selection.pages, (rows, None), torch.int32)[1]
    check("selection.places", selection.places, (rows, max_selected), torch.int32)
    check("selection.num_missing", selection.num_missing, (rows,), torch.int32)
    if not 0 <= num_sink_pages <= num_slots:
        raise InputError(
            f"num_sink_pages={num_sink_pages}: expected 0 to {num_slots}, the slots of a row"
        )
    if max_selected == 0 or slots.numel() == 0:
        return
    pieces, slots = _in_words(host.pieces, slots)
    words = slots.shape[-1]
    block = _block(words)
    gather_kernel[(rows, PROGRAMS_PER_ROW)](
        pieces,
        host.located,
        *selection[:3],
        slots,
        capacity,
        max_selected,
        num_slots,
        num_sink_pages,
        WORDS=words,
        BLOCK=block,
        CHUNKS=cdiv(words, block),
        PROGRAMS=PROGRAMS_PER_ROW,
    )


def scatter(packed: Tensor, lines: Tensor, host: HostPages, sealed: Tensor) -> None:
    """Back up each row's newest sealed page: host.pieces[lines[r]] = packed[r] if lines[r] >= 0.

    There host.located[r, sealed[r] - 1] becomes lines[r]; rows with a negative line change nothing.

    Args:
        packed: uint8 [rows, nbytes].
        lines: int64 [rows]; those that are not negative differ from each other.
        host: written.
        sealed: int32 [rows], the pages sealed so far, this one included.

    All contiguous. Raises `InputError` for any other dtype, shape or layout.
    """
    rows, nbytes = check("packed", packed, (None, None), torch.uint8)
    capacity = _check_host(host, rows, nbytes)
    check("lines", lines, (rows,), torch.int64)
    check("sealed", sealed, (rows,), torch.int32)
    if packed.numel() == 0:
        return
    packed, pieces = _in_words(packed, host.pieces)
    words = packed.shape[-1]
    block = _block(words)
    scatter_kernel[(rows, cdiv(words, block))](
        packed, lines, pieces, host.located, sealed, capacity, WORDS=words, BLOCK=block
    )


def gather_lines(pieces: Tensor, lines: Tensor, target: Tensor) -> None:
    """Stream pages: target[i] = pieces[lines[i]].

    Args:
        pieces: uint8 [lines, nbytes], the host tier; pinned if the rest is on a GPU.
        lines: int64 [n].
        target: uint8 [n, nbytes], written.

    All contiguous. Raises `InputError` for any other dtype, shape or layout.
    """
    num_lines, nbytes = check("target", target, (None, None), torch.uint8)
    check("pieces", pieces, (None, nbytes), torch.uint8)
    check("lines", lines, (num_lines,), torch.int64)
    if target.numel() == 0:
        return
    pieces, target = _in_words(pieces, target)
    words = target.shape[-1]
    block = _block(words)
    gather_lines_kernel[(num_lines, cdiv(words, block))](
        pieces, lines, target, WORDS=words, BLOCK=block
    )


def _block(words: int) -> int:
    return min(BLOCK_WORDS, power_of_two(words))


def _in_words(*pages: Tensor) -> list[Tensor]:
    """The same memory in the widest words that divide pages and addresses: 8 bytes, else 1."""
    wide = all(
        number % WORD_BYTES == 0
        for page in pages
        for number in (page.shape[-1], page.storage_offset(), page.data_ptr())
    )
    return [page.view(torch.int64) if wide else page for page in pages]


def _check_host(host: HostPages, rows: int, nbytes: int) -> int:
    """For how many pages of a row there is room, or `InputError`."""
    check("host.pieces", host.pieces, (None, nbytes), torch.uint8)
    return check("host.located", host.located, (rows, None), torch.int64)[1]
