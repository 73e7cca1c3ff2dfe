"""Seals one page per program: packs it, digests it, puts the newest page into its slot.

`kernels/triton_seal.py` launches it for the pages of a prompt and for that of the newest token.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from arkcache.kernels.triton_pack import narrow, pack_channels, pack_raw, pack_tokens, pad, widen


@triton.jit
def _radius(
    distance: tl.tensor, there: tl.tensor, T: tl.constexpr, KIND: tl.constexpr
) -> tl.tensor:
    """Of distances along axis 0 (ArkVale, equations 2 and 4)."""
    if KIND == "mean":
        return tl.div_rn(tl.sum(tl.where(there, distance, 0.0), axis=0), T * 1.0)
    else:
        high = tl.max(tl.where(there, distance, 0.0), axis=0)
        if KIND == "max":
            return high
        else:
            low = tl.min(tl.where(there, distance, float("inf")), axis=0)
            return low * 0.5 + high * 0.5


@triton.jit
def digest_volume(
    states_ptr: tl.tensor,
    stride: tl.tensor,
    target_ptr: tl.tensor,
    T: tl.constexpr,
    DIM: tl.constexpr,
    SHAPE: tl.constexpr,
    RADIUS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A bounding volume: center and radius, or the mean."""
    DTYPE: tl.constexpr = target_ptr.dtype.element_ty
    token = tl.arange(0, BLOCK_T)
    there = (token < T)[:, None]
    squares = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for start in range(0, DIM, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        inside = channel < DIM
        states = states_ptr + token[:, None] * stride + channel[None, :]
        x = widen(tl.load(states, mask=there & inside[None, :], other=0.0))
        if SHAPE == "centroid":
            center = tl.div_rn(tl.sum(x, axis=0), T * 1.0)
        else:
            low = tl.min(tl.where(there, x, float("inf")), axis=0)
            high = tl.max(tl.where(there, x, float("-inf")), axis=0)
            center = low * 0.5 + high * 0.5
            distance = tl.abs(x - center[None, :])
            if SHAPE == "sphere":
                squares += tl.sum(distance * distance, axis=1)
            else:
                radius = narrow(_radius(distance, there, T, RADIUS), DTYPE)
                tl.store(target_ptr + DIM + channel, radius, mask=inside)
        tl.store(target_ptr + channel, narrow(center, DTYPE), mask=inside)
    if SHAPE == "sphere":
        radius = _radius(tl.sqrt_rn(squares), token < T, T, RADIUS)
        tl.store(target_ptr + DIM, narrow(radius, DTYPE))


@triton.jit
def _pack_page(
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    T: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_NBYTES: tl.constexpr,
    VALUE_NBYTES: tl.constexpr,
    META: tl.constexpr,
    BLOCK_T: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    VALUE_TOKENS: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    RAW_BLOCK: tl.constexpr,
) -> None:
    """Keys and values to NBYTES bytes."""
    if KEY_BITS == 16:
        pack_raw(key_ptr, key_stride, packed_ptr, T, KEY_DIM, RAW_BLOCK)
    else:
        pack_channels(
            key_ptr, key_stride, packed_ptr, T, KEY_DIM, KEY_BITS, META, False, BLOCK_T, KEY_BLOCK
        )
        pad(packed_ptr, T, KEY_DIM, KEY_BITS, KEY_DIM, KEY_NBYTES)
    packed_ptr += KEY_NBYTES
    if VALUE_BITS == 16:
        pack_raw(value_ptr, value_stride, packed_ptr, T, VALUE_DIM, RAW_BLOCK)
    else:
        pack_tokens(
            value_ptr,
            value_stride,
            packed_ptr,
            T,
            VALUE_DIM,
            VALUE_BITS,
            META,
            GROUP,
            GROUPS_BLOCK,
            GROUP_BLOCK,
            VALUE_TOKENS,
            VALUE_BLOCK,
        )
        pad(packed_ptr, T, VALUE_DIM, VALUE_BITS, T * (VALUE_DIM // GROUP), VALUE_NBYTES)


@triton.jit
def _place(
    packed_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    page_of_ptr: tl.tensor,
    num_places_ptr: tl.tensor,
    row: tl.tensor,
    page: tl.tensor,
    num_sink_pages: tl.tensor,
    slots_stride_row: tl.tensor,
    places: tl.tensor,
    NBYTES: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Copy a packed page into its slot, where it has one."""
    WORDS: tl.constexpr = NBYTES * 8 // WORD.primitive_bitwidth
    if page_of_ptr is not None:
        fits = page < num_sink_pages + tl.load(num_places_ptr + row)
        entry = page_of_ptr + row * places + page - num_sink_pages
        tl.store(entry, page.to(tl.int32), mask=fits & (page >= num_sink_pages))
    else:
        fits = page >= 0
    tl.debug_barrier()  # the page is copied by other threads than wrote it
    source = packed_ptr.to(tl.pointer_type(WORD))
    target = (slots_ptr + row * slots_stride_row + page * NBYTES).to(tl.pointer_type(WORD))
    for start in range(0, WORDS, BLOCK):
        word = start + tl.arange(0, BLOCK)
        inside = fits & (word < WORDS)
        tl.store(target + word, tl.load(source + word, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["num_pages", "first"])
def seal_kernel(
    key_ptr: tl.tensor,  # [R, num_pages, T, KEY_DIM]
    value_ptr: tl.tensor,  # [R, num_pages, T, VALUE_DIM]
    digest_key_ptr: tl.tensor,  # [R, num_pages, T, KEY_DIM]
    packed_ptr: tl.tensor,  # [R, num_pages, NBYTES], of the newest page [R, NBYTES]
    digests_ptr: tl.tensor,  # [R, capacity, features]
    means_ptr: tl.tensor,  # [R, capacity, KEY_DIM + VALUE_DIM]
    key_stride_row: tl.tensor,
    key_stride_page: tl.tensor,
    key_stride: tl.tensor,
    value_stride_row: tl.tensor,
    value_stride_page: tl.tensor,
    value_stride: tl.tensor,
    digest_key_stride_row: tl.tensor,
    digest_key_stride_page: tl.tensor,
    digest_key_stride: tl.tensor,
    packed_stride_row: tl.tensor,
    packed_stride_page: tl.tensor,
    digests_stride_row: tl.tensor,
    digests_stride_page: tl.tensor,
    means_stride_row: tl.tensor,
    means_stride_page: tl.tensor,
    lengths_ptr: tl.tensor,  # [R], None unless the newest page is sealed; so the next four
    sealed_ptr: tl.tensor,  # [R]
    slots_ptr: tl.tensor,  # [R, num_slots, NBYTES]
    page_of_ptr: tl.tensor,  # [R, places]
    num_places_ptr: tl.tensor,  # [R]
    num_pages: tl.tensor,
    first: tl.tensor,
    recent: tl.tensor,
    num_sink_pages: tl.tensor,
    slots_stride_row: tl.tensor,
    places: tl.tensor,
    WORD: tl.constexpr,
    T: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_NBYTES: tl.constexpr,
    VALUE_NBYTES: tl.constexpr,
    META: tl.constexpr,
    SHAPE: tl.constexpr,
    RADIUS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    INDEX_BLOCK: tl.constexpr,
    KEY_MEANS: tl.constexpr,
    VALUE_MEANS: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    VALUE_TOKENS: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    RAW_BLOCK: tl.constexpr,
    WORDS_BLOCK: tl.constexpr,
) -> None:
    """One program per page; of the newest token, one per row."""
    row = tl.program_id(0).to(tl.int64)
    if sealed_ptr is not None:
        num_sealed = tl.load(sealed_ptr + row)
        if (num_sealed < 1) | (tl.load(lengths_ptr + row) - recent != num_sealed * T):
            return
        number = num_sealed.to(tl.int64) - 1
        page = number % num_pages
    else:
        page = row % num_pages
        number = first + page
        row = row // num_pages
    packed_ptr += row * packed_stride_row + page * packed_stride_page
    key_ptr += row * key_stride_row + page * key_stride_page
    value_ptr += row * value_stride_row + page * value_stride_page
    _pack_page(
        key_ptr,
        value_ptr,
        packed_ptr,
        key_stride,
        value_stride,
        T,
        KEY_DIM,
        VALUE_DIM,
        KEY_BITS,
        VALUE_BITS,
        GROUP,
        KEY_NBYTES,
        VALUE_NBYTES,
        META,
        BLOCK_T,
        KEY_BLOCK,
        GROUPS_BLOCK,
        GROUP_BLOCK,
        VALUE_TOKENS,
        VALUE_BLOCK,
        RAW_BLOCK,
    )
    if digests_ptr is not None:
        digest_key_ptr += row * digest_key_stride_row + page * digest_key_stride_page
        digests_ptr += row * digests_stride_row + number * digests_stride_page
        stride = digest_key_stride
        if SHAPE == "tokens":
            pack_channels(
                digest_key_ptr,
                stride,
                digests_ptr,
                T,
                KEY_DIM,
                INDEX_BITS,
                tl.bfloat16,
                True,
                BLOCK_T,
                INDEX_BLOCK,
            )
        else:
            digest_volume(
                digest_key_ptr, stride, digests_ptr, T, KEY_DIM, SHAPE, RADIUS, BLOCK_T, INDEX_BLOCK
            )
    if means_ptr is not None:
        means_ptr += row * means_stride_row + number * means_stride_page
        digest_volume(
            key_ptr, key_stride, means_ptr, T, KEY_DIM, "centroid", "", BLOCK_T, KEY_MEANS
        )
        means_ptr += KEY_DIM
        digest_volume(
            value_ptr, value_stride, means_ptr, T, VALUE_DIM, "centroid", "", BLOCK_T, VALUE_MEANS
        )
    if slots_ptr is not None:
        _place(
            packed_ptr,
            slots_ptr,
            page_of_ptr,
            num_places_ptr,
            row,
            number,
            num_sink_pages,
            slots_stride_row,
            places,
            KEY_NBYTES + VALUE_NBYTES,
            WORD,
            WORDS_BLOCK,
        )
