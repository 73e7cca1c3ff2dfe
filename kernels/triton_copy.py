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


def gather(
    pieces: Tensor,
    located: Tensor,
    pages: Tensor,
    places: Tensor,
    counts: Tensor,
    slots: Tensor,
    *,
    num_sink_pages: int,
) -> None:
    """Recall pages: slots[r, num_sink_pages + places[r, i]] = pieces[located[r, pages[r, i]]].

    For i < counts[r]; other slots are left as they are.

    Args:
        pieces: uint8 [lines, nbytes], the host tier; pinned if the rest is on a GPU.
        located: int64 [rows, capacity], the line that holds each page.
        pages, places: int32 [rows, max_selected]; the places of a row differ from each other.
        counts: int32 [rows], at most `max_selected`.
        slots: uint8 [rows, num_slots, nbytes], written.
        num_sink_pages: slots before place 0.

    All contiguous. Raises `InputError` for any other dtype, shape or layout.
    """
    _check_pages("slots", slots, 3)
    rows, num_slots, nbytes = slots.shape
    _check_pages("pieces", pieces, 2, nbytes)
    _check("located", located, torch.int64, (rows, None))
    _check("pages", pages, torch.int32, (rows, None))
    max_selected = pages.shape[1]
    _check("places", places, torch.int32, (rows, max_selected))
    _check("counts", counts, torch.int32, (rows,))
    if not 0 <= num_sink_pages <= num_slots:
        raise InputError(
            f"num_sink_pages={num_sink_pages}: expected 0 to {num_slots}, the slots of a row"
        )
    if max_selected == 0 or slots.numel() == 0:
        return
    pieces, slots = _in_words(pieces, slots)
    words = slots.shape[-1]
    block = _block(words)
    gather_kernel[(rows, PROGRAMS_PER_ROW)](
        pieces,
        located,
        pages,
        places,
        counts,
        slots,
        located.shape[1],
        max_selected,
        num_slots,
        num_sink_pages,
        WORDS=words,
        BLOCK=block,
        CHUNKS=cdiv(words, block),
        PROGRAMS=PROGRAMS_PER_ROW,
    )


def scatter(packed: Tensor, lines: Tensor, pieces: Tensor, located: Tensor, sealed: Tensor) -> None:
    """Back up each row's newest sealed page: pieces[lines[r]] = packed[r], where lines[r] >= 0.

    There located[r, sealed[r] - 1] becomes lines[r]; rows with a negative line change nothing.

    Args:
        packed: uint8 [rows, nbytes].
        lines: int64 [rows]; those that are not negative differ from each other.
        pieces: uint8 [lines, nbytes], the host tier, written; pinned if the rest is on a GPU.
        located: int64 [rows, capacity], written.
        sealed: int32 [rows], the pages sealed so far, this one included.

    All contiguous. Raises `InputError` for any other dtype, shape or layout.
    """
    _check_pages("packed", packed, 2)
    rows, nbytes = packed.shape
    _check_pages("pieces", pieces, 2, nbytes)
    _check("lines", lines, torch.int64, (rows,))
    _check("located", located, torch.int64, (rows, None))
    _check("sealed", sealed, torch.int32, (rows,))
    if packed.numel() == 0:
        return
    packed, pieces = _in_words(packed, pieces)
    words = packed.shape[-1]
    block = _block(words)
    scatter_kernel[(rows, cdiv(words, block))](
        packed, lines, pieces, located, sealed, located.shape[1], WORDS=words, BLOCK=block
    )


def gather_lines(pieces: Tensor, lines: Tensor, target: Tensor) -> None:
    """Stream pages: target[i] = pieces[lines[i]].

    Args:
        pieces: uint8 [lines, nbytes], the host tier; pinned if the rest is on a GPU.
        lines: int64 [n].
        target: uint8 [n, nbytes], written.

    All contiguous. Raises `InputError` for any other dtype, shape or layout.
    """
    _check_pages("target", target, 2)
    num_lines, nbytes = target.shape
    _check_pages("pieces", pieces, 2, nbytes)
    _check("lines", lines, torch.int64, (num_lines,))
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


def _check_pages(name: str, tensor: Tensor, ndim: int, nbytes: int | None = None) -> None:
    _check(name, tensor, torch.uint8, (*(None,) * (ndim - 1), nbytes))


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    fits = len(tensor.shape) == len(shape) and all(
        expected is None or size == expected
        for size, expected in zip(tensor.shape, shape, strict=True)
    )
    if tensor.dtype != dtype or not fits or not tensor.is_contiguous():
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}: "
            f"expected contiguous {dtype} [{expected}]"
        )
