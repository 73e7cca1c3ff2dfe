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
from arkcache.kernels.arguments import Counts, Places, Summaries, Window
from arkcache.kernels.torch_digest import num_features
from arkcache.kernels.torch_tokens import digest_bytes
from arkcache.kernels.triton_checked import check
from arkcache.kernels.triton_seal_kernel import seal_kernel

TILE = 4096
"""Elements that a program holds at a time: 32 registers of each of its 128 threads."""

DTYPES = {4: (torch.float32,), 2: (torch.float16, torch.bfloat16)}
"""Of keys and values, by the bytes of an element."""

NO_SUMMARIES = Summaries(None)
"""Of a layer that attends everything."""


def seal_pages(
    key: Tensor,
    value: Tensor,
    digest_key: Tensor,
    packed: Tensor,
    summaries: Summaries = NO_SUMMARIES,
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
        summaries: the last stride 1, lines from `first` on are written.
        first: number of the first page.
        layout: of a page.
        index, index_bits: as in `CacheConfig`.

    Raises `InputError` where a shape, a dtype or a stride is another.
    """
    lead = (None, None, layout.page_size)
    rows, num_pages, *_ = _check_states(
        ("key", key), ("value", value), ("digest_key", digest_key), lead, layout
    )
    _check_packed("packed", packed, (rows, num_pages, layout.nbytes), key.dtype)
    _check_summaries(summaries, rows, key.dtype, layout, index, index_bits)
    for what, lines in zip(Summaries._fields, summaries, strict=True):
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
        summaries,
        (None, None, None, None, None, num_pages, first, 0, 0, 0, 0),
        _constants(layout, key.dtype, index if summaries.digests is not None else "", index_bits),
    )


def seal_newest(
    window: Window,
    digest_window: Tensor,
    counts: Counts,
    slots: Tensor,
    packed: Tensor,
    places: Places | None = None,
    summaries: Summaries = NO_SUMMARIES,
    *,
    recent: int,
    num_sink_pages: int,
    layout: PageLayout,
    index: str,
    index_bits: int = 2,
) -> None:
    """Pack and digest the page that the newest token sealed, in the rows where it sealed one.

    Args:
        window: of a multiple of page_size tokens, the last stride 1.
        digest_window: what is digested, like window.key; the same tensor unless keys are rotated.
        counts: contiguous, the newest token counted: page sealed - 1 is new where
            lengths - recent == sealed * page_size.
        slots: uint8 [rows, num_slots, nbytes], rows contiguous. Page p goes into slot p if that is
            a sink's or its place is among `num_places`; whichever it is without `places`.
        packed: uint8 [rows, nbytes], the last stride 1, aligned as in `seal_pages`.
        places: contiguous; `page_of` becomes p where p went into a place.
        summaries: as in `seal_pages`; line p is written.
        recent: tokens that stay unsealed.
        num_sink_pages: slots of the first pages.
        layout, index, index_bits: as in `seal_pages`.

    Raises `InputError` where a shape, a dtype or a stride is another.
    """
    key, value = ("window.key", window.key), ("window.value", window.value)
    digest_key, dtype, size = ("digest_window", digest_window), window.key.dtype, layout.page_size
    rows, tokens, _ = _check_states(key, value, digest_key, (None, None), layout)
    if tokens % size or not tokens:
        raise InputError(f"a window of {tokens}: expected a multiple of {size} tokens")
    _check_packed("packed", packed, (rows, layout.nbytes), dtype)
    _check_packed("slots", slots, (rows, None, layout.nbytes), dtype)
    if slots.stride(1) != layout.nbytes:
        raise InputError(f"slots of strides {slots.stride()}: expected contiguous slots in a row")
    check("counts.lengths", counts.lengths, (rows,), torch.int32)
    check("counts.sealed", counts.sealed, (rows,), torch.int32)
    if places is not None:
        check("places.page_of", places.page_of, (rows, None), torch.int32)
        check("places.num_places", places.num_places, (rows,), torch.int32)
    _check_summaries(summaries, rows, dtype, layout, index, index_bits)
    if not rows:
        return
    page_of, num_places = (None, None) if places is None else places
    max_places = 0 if page_of is None else page_of.shape[1]
    sizes = (tokens // size, 0, recent, num_sink_pages, slots.stride(0), max_places)
    _launch(
        rows,
        tuple(ring.unflatten(1, (-1, size)) for ring in (*window, digest_window)),
        (packed, packed.stride(0), 0),
        summaries,
        (*counts, slots, page_of, num_places, *sizes),
        _constants(layout, dtype, index if summaries.digests is not None else "", index_bits),
    )


def _launch(
    programs: int,
    states: tuple[Tensor, ...],
    packed: tuple[Tensor, int, int],
    summaries: Summaries,
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


def _check_states(
    key: tuple[str, Tensor],
    value: tuple[str, Tensor],
    digest_key: tuple[str, Tensor],
    lead: tuple[int | None, ...],
    layout: PageLayout,
) -> torch.Size:
    """The sizes of a key; `InputError` unless all are [*lead, dim] of one dtype, the layout's."""
    dtypes, dtype = DTYPES.get(layout.element_bytes), key[1].dtype
    if dtypes is None:
        raise InputError(f"a layout of {layout.element_bytes} bytes per element: expected 2 or 4")
    shape = check(*key, (*lead, layout.head_dim), *dtypes, strides="last stride 1")
    check(*value, (*shape[:-1], layout.value_dim), dtype, strides="last stride 1")
    check(*digest_key, shape, dtype, strides="last stride 1")
    return shape


def _check_packed(
    name: str, packed: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype
) -> None:
    check(name, packed, shape, torch.uint8, strides="last stride 1")
    if any(number % dtype.itemsize for number in (packed.data_ptr(), *packed.stride()[:-1])):
        raise InputError(
            f"{name} at {packed.data_ptr():#x}, strides {packed.stride()}: expected multiples of "
            f"the {dtype.itemsize} bytes of an element"
        )


def _check_summaries(
    summaries: Summaries,
    rows: int,
    dtype: torch.dtype,
    layout: PageLayout,
    index: str,
    bits: int,
) -> None:
    if summaries.means is not None:
        shape = (rows, None, layout.head_dim + layout.value_dim)
        check("summaries.means", summaries.means, shape, dtype, strides="last stride 1")
    if summaries.digests is None:
        return
    if index not in INDEXES or bits not in (2, 4, 8):
        raise InputError(
            f"index={index!r}, index_bits={bits}: expected 2, 4 or 8 bits and one of "
            f"{', '.join(INDEXES)}"
        )
    if index == "tokens":
        dtype, features = torch.uint8, digest_bytes(layout.head_dim, layout.page_size, bits)
    else:
        features = num_features(index, layout.head_dim)
    check(
        "summaries.digests",
        summaries.digests,
        (rows, None, features),
        dtype,
        strides="last stride 1",
    )
