"""Seals pages on the device: packs and digests them, one program per page and row.

The bytes are those of `kernels/torch_pages.py` on a CPU (formats.PageLayout says where they lie),
token digests those of `kernels/torch_tokens.py`, bounding volumes those of
`kernels/torch_digest.py`, computed in fp32 and rounded once, as means are. A NaN is lost in a
quantised page.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from arkcache.config import INDEXES
from arkcache.errors import InputError
from arkcache.formats import PageLayout
from arkcache.kernels.triton_seal_kernel import seal_kernel

TILE = 4096
"""Elements that a program holds at a time: 32 registers of each of its 128 threads."""


def seal_pages(
    key: Tensor,
    value: Tensor,
    digest_key: Tensor,
    packed: Tensor,
    digests: Tensor | None,
    means: Tensor | None = None,
    *,
    first: int,
    layout: PageLayout,
    index: str,
    index_bits: int = 2,
) -> None:
    """Pack and digest the pages of a prompt.

    Args:
        key, value: [rows, pages, page_size, head_dim] and [..., value_dim], the last stride 1.
        digest_key: what is digested, like key; the same tensor unless keys are rotated.
        packed: uint8 [rows, pages, nbytes], the last stride 1, aligned to the dtype of the keys.
        digests: [rows, capacity, features], the last stride 1, in the dtype of the keys; uint8
            [rows, capacity, bytes] for the token index. Lines from `first` on are written. None
            for a layer without an index.
        means: mean key and mean value side by side [rows, capacity, head_dim + value_dim], the last
            stride 1, in the dtype of the keys, lines as for digests; None where none are kept.
        first: number of the first page.
        layout: of a page.
        index, index_bits: as in `CacheConfig`.

    Raises `InputError` where a shape, a dtype or a stride is another.
    """
    rows, num_pages = key.shape[:2]
    _check_states(key, value, digest_key, layout)
    _check_packed(packed, (rows, num_pages, layout.nbytes), key.dtype)
    if digests is not None:
        _check_digests(digests, rows, key.dtype, layout, index, index_bits)
    if means is not None:
        _check_means(means, rows, key.dtype, layout)
    for what, lines in (("digests", digests), ("means", means)):
        if lines is not None and not 0 <= first <= lines.shape[1] - num_pages:
            raise InputError(
                f"pages {first} to {first + num_pages - 1} and {what} of {lines.shape[1]} "
                "pages: expected room for all"
            )
    if rows * num_pages == 0:
        return
    _launch(
        rows * num_pages,
        (key, value, digest_key),
        (packed, packed.stride(0), packed.stride(1)),
        (digests, means),
        (None, None, None, None, None, num_pages, first, 0, 0, 0, 0),
        _constants(layout, key.dtype, index if digests is not None else "", index_bits),
    )


def seal_newest(
    window_key: Tensor,
    window_value: Tensor,
    digest_window: Tensor,
    lengths: Tensor,
    sealed: Tensor,
    slots: Tensor,
    page_of: Tensor | None,
    num_places: Tensor | None,
    packed: Tensor,
    digests: Tensor | None,
    means: Tensor | None = None,
    *,
    recent: int,
    num_sink_pages: int,
    layout: PageLayout,
    index: str,
    index_bits: int = 2,
) -> None:
    """Pack and digest the page that the newest token sealed, in the rows where it sealed one.

    Args:
        window_key, window_value, digest_window: rings [rows, window, dim], the last stride 1;
            window is a multiple of page_size.
        lengths, sealed: int32 [rows], the newest token counted: page sealed - 1 is new where
            lengths - recent == sealed * page_size.
        slots: uint8 [rows, num_slots, nbytes], rows contiguous. Page p goes into slot p if that is
            a sink's or its place is within `num_places`; whichever it is if that is None.
        page_of: int32 [rows, places], contiguous, becomes p where p went into a place.
        num_places: int32 [rows], contiguous; None together with `page_of`.
        packed: uint8 [rows, nbytes], the last stride 1, aligned as in `seal_pages`.
        digests, means: as in `seal_pages`; line p is written.
        recent: tokens that stay unsealed.
        num_sink_pages: slots of the first pages.
        layout, index, index_bits: as in `seal_pages`.

    Raises `InputError` where a shape, a dtype or a stride is another.
    """
    rows, window = window_key.shape[:2]
    if window % layout.page_size or not window:
        raise InputError(f"a window of {window}: expected a multiple of {layout.page_size} tokens")
    rings = (window_key, window_value, digest_window)
    key, value, digest_key = (ring.unflatten(1, (-1, layout.page_size)) for ring in rings)
    _check_states(key, value, digest_key, layout)
    _check_packed(packed, (rows, layout.nbytes), window_key.dtype)
    _check_packed(slots, (rows, slots.shape[1], layout.nbytes), window_key.dtype)
    if slots.stride(1) != layout.nbytes:
        raise InputError(f"slots of strides {slots.stride()}: expected contiguous slots in a row")
    _check_counts(rows, lengths=lengths, sealed=sealed)
    if (page_of is None) != (num_places is None):
        raise InputError("one of page_of and num_places is None: expected both or neither")
    if page_of is not None and num_places is not None:
        _check_counts(rows, page_of=page_of, num_places=num_places)
    if digests is not None:
        _check_digests(digests, rows, window_key.dtype, layout, index, index_bits)
    if means is not None:
        _check_means(means, rows, window_key.dtype, layout)
    if not rows:
        return
    places = 0 if page_of is None else page_of.shape[1]
    counts = (window // layout.page_size, 0, recent, num_sink_pages, slots.stride(0), places)
    _launch(
        rows,
        (key, value, digest_key),
        (packed, packed.stride(0), 0),
        (digests, means),
        (lengths, sealed, slots, page_of, num_places, *counts),
        _constants(layout, window_key.dtype, index if digests is not None else "", index_bits),
    )


def _launch(
    programs: int,
    states: tuple[Tensor, ...],
    packed: tuple[Tensor, int, int],
    summaries: tuple[Tensor | None, ...],
    newest: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    """Queue `seal_kernel`; `newest` is what its arguments between the strides and constants are."""
    strides = [(0, 0) if lines is None else lines.stride()[:2] for lines in summaries]
    places = [tensor for tensor in (packed[0], newest[2]) if tensor is not None]
    wide = all(
        number % 8 == 0
        for tensor in places
        for number in (tensor.data_ptr(), tensor.shape[-1], *tensor.stride()[:-1])
    )
    seal_kernel[(programs,)](
        *states,
        packed[0],
        *summaries,
        *(stride for tensor in states for stride in tensor.stride()[:3]),
        *packed[1:],
        *(stride for pair in strides for stride in pair),
        *newest,
        WORD=tl.int64 if wide else tl.uint8,
        **constants,
    )


@lru_cache(maxsize=256)
def _constants(
    layout: PageLayout, dtype: torch.dtype, index: str, index_bits: int
) -> dict[str, Any]:
    """What `seal_kernel` is compiled for; `index` is empty where nothing is digested."""
    power = triton.next_power_of_2
    shape, _, radius = index.partition("-")
    group, tokens = layout.format.group_size, int(power(layout.page_size))
    num_groups = layout.value_dim // group
    group_block = power(group)
    planes = {name: 8 // bits for name, bits in (("key", layout.key.bits), ("index", index_bits))}
    value_planes = max(1, layout.value.num_planes)
    value_block = power(-(-layout.value_dim // value_planes))

    def channels(planes: int, dim: int = layout.head_dim) -> int:
        """Columns of bytes whose codes, of all tokens, are one tile."""
        planes = max(1, planes)
        block = int(power(-(-dim // planes)))
        return min(block, max(1, TILE // (tokens * planes)))

    return {
        "T": layout.page_size,
        "KEY_DIM": layout.head_dim,
        "VALUE_DIM": layout.value_dim,
        "KEY_BITS": layout.key.bits,
        "VALUE_BITS": layout.value.bits,
        "INDEX_BITS": index_bits,
        "GROUP": group,
        "KEY_NBYTES": layout.key.nbytes,
        "VALUE_NBYTES": layout.value.nbytes,
        "META": tl.bfloat16 if dtype == torch.bfloat16 else tl.float16,
        "SHAPE": shape,
        "RADIUS": radius,
        "BLOCK_T": tokens,
        "KEY_BLOCK": channels(planes["key"]),
        "INDEX_BLOCK": channels(planes["index"] if index == "tokens" else 1),
        "KEY_MEANS": channels(1),
        "VALUE_MEANS": channels(1, layout.value_dim),
        "GROUPS_BLOCK": min(power(layout.page_size * num_groups), max(1, TILE // group_block)),
        "GROUP_BLOCK": group_block,
        "VALUE_TOKENS": min(tokens, max(1, TILE // (value_block * value_planes))),
        "VALUE_BLOCK": value_block,
        "RAW_BLOCK": TILE,
        "WORDS_BLOCK": TILE // 4,
    }


def _check_states(key: Tensor, value: Tensor, digest_key: Tensor, layout: PageLayout) -> None:
    if key.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(f"keys of {key.dtype}: expected float32, float16 or bfloat16")
    if key.element_size() != layout.element_bytes:
        raise InputError(f"keys of {key.dtype}: expected {layout.element_bytes} bytes per element")
    dims = (layout.head_dim, layout.value_dim, layout.head_dim)
    for states, dim in zip((key, value, digest_key), dims, strict=True):
        expected = (*key.shape[:2], layout.page_size, dim)
        if states.shape != expected or states.stride(-1) != 1 or states.dtype != key.dtype:
            raise InputError(
                f"pages of shape {list(states.shape)}, strides {states.stride()} and "
                f"{states.dtype}: expected {list(expected)}, the last stride 1, {key.dtype}"
            )


def _check_packed(packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if packed.dtype != torch.uint8 or packed.shape != shape or packed.stride(-1) != 1:
        raise InputError(
            f"packed pages of {packed.dtype} {list(packed.shape)}, strides {packed.stride()}: "
            f"expected uint8 {list(shape)}, the last stride 1"
        )
    if any(number % dtype.itemsize for number in (packed.data_ptr(), *packed.stride()[:-1])):
        raise InputError(
            f"packed pages at {packed.data_ptr():#x}, strides {packed.stride()}: expected "
            f"multiples of the {dtype.itemsize} bytes of an element"
        )


def _check_counts(rows: int, **counts: Tensor) -> None:
    for name, tensor in counts.items():
        fits = tensor.dtype == torch.int32 and tensor.shape[0] == rows and tensor.is_contiguous()
        if not fits or tensor.dim() != (2 if name == "page_of" else 1):
            raise InputError(
                f"{name} of {tensor.dtype} {list(tensor.shape)}: expected contiguous int32 with "
                f"{rows} rows"
            )


def _check_digests(
    digests: Tensor, rows: int, dtype: torch.dtype, layout: PageLayout, index: str, bits: int
) -> None:
    if index not in INDEXES or bits not in (2, 4, 8):
        raise InputError(
            f"index={index!r}, index_bits={bits}: expected 2, 4 or 8 bits and one of "
            f"{', '.join(INDEXES)}"
        )
    features = layout.head_dim
    if index == "tokens":
        dtype = torch.uint8
        features = 4 * layout.head_dim + -(-layout.head_dim * bits // 8) * layout.page_size
    elif index != "centroid":
        features += layout.head_dim if index.startswith("cuboid") else 1
    expected = (rows, digests.shape[1], features)
    if digests.dtype != dtype or digests.shape != expected or digests.stride(-1) != 1:
        raise InputError(
            f"digests of {digests.dtype} {list(digests.shape)}, strides {digests.stride()}: "
            f"expected {dtype} {list(expected)}, the last stride 1"
        )


def _check_means(means: Tensor, rows: int, dtype: torch.dtype, layout: PageLayout) -> None:
    expected = (rows, means.shape[1], layout.head_dim + layout.value_dim)
    if means.dtype != dtype or means.shape != expected or means.stride(-1) != 1:
        raise InputError(
            f"means of {means.dtype} {list(means.shape)}, strides {means.stride()}: expected "
            f"{dtype} {list(expected)}, the last stride 1"
        )
