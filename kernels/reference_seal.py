"""The obvious version of `triton_append` and `triton_seal`: same signatures, one page at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from arkcache.formats import PageLayout
from arkcache.kernels import reference
from arkcache.kernels.arguments import Counts, Places, Summaries, Window


def append(
    key: Tensor,
    value: Tensor,
    window: Window,
    counts: Counts,
    *,
    recent: int,
    page_size: int,
) -> None:
    """Write a token into every row's ring and count it."""
    rows = zip(key.flatten(0, 1), value.flatten(0, 1), strict=True)
    for row, (new_key, new_value) in enumerate(rows):
        length = int(counts.lengths[row])
        position = length % window.key.shape[1]
        window.key[row, position], window.value[row, position] = new_key, new_value
        counts.lengths[row] = length + 1
        counts.sealed[row] = max(0, (length + 1 - recent) // page_size)


def seal_pages(
    key: Tensor,
    value: Tensor,
    digest_key: Tensor,
    packed: Tensor,
    summaries: Summaries,
    *,
    first: int,
    layout: PageLayout,
    index: str,
    index_bits: int = 2,
) -> None:
    """Pack and digest the pages of a prompt."""
    for row in range(key.shape[0]):
        for page in range(key.shape[1]):
            packed[row, page] = _packed(key[row, page], value[row, page], layout)
            if summaries.digests is not None:
                digest = _digest(digest_key[row, page], index, index_bits)
                summaries.digests[row, first + page] = digest.to(summaries.digests)
            if summaries.means is not None:
                summaries.means[row, first + page] = _means(key[row, page], value[row, page])


def seal_newest(
    window: Window,
    digest_window: Tensor,
    counts: Counts,
    slots: Tensor,
    packed: Tensor,
    places: Places | None,
    summaries: Summaries,
    *,
    recent: int,
    num_sink_pages: int,
    layout: PageLayout,
    index: str,
    index_bits: int = 2,
) -> None:
    """Pack and digest the page that the newest token sealed, in the rows where it sealed one."""
    size, ring = layout.page_size, window.key.shape[1]
    for row, (length, sealed) in enumerate(zip(*(held.tolist() for held in counts), strict=True)):
        if sealed == 0 or length - recent != sealed * size:
            continue
        page = sealed - 1
        positions = [token % ring for token in range(page * size, page * size + size)]
        key, value = (states[row, positions] for states in window)
        packed[row] = _packed(key, value, layout)
        if summaries.digests is not None:
            digest = _digest(digest_window[row, positions], index, index_bits)
            summaries.digests[row, page] = digest.to(summaries.digests)
        if summaries.means is not None:
            summaries.means[row, page] = _means(key, value)
        if places is None or page < num_sink_pages:
            slots[row, page] = packed[row]
        elif page < num_sink_pages + int(places.num_places[row]):
            slots[row, page] = packed[row]
            places.page_of[row, page - num_sink_pages] = page


def _packed(key: Tensor, value: Tensor, layout: PageLayout) -> Tensor:
    data = reference.pack_page(key.cpu(), value.cpu(), layout, key.dtype)
    return torch.tensor(list(data), dtype=torch.uint8, device=key.device)


def _means(key: Tensor, value: Tensor) -> Tensor:
    """Mean key and mean value of a page, side by side."""
    return torch.cat([states.float().mean(dim=0) for states in (key, value)]).to(key.dtype)


def _digest(key: Tensor, index: str, bits: int) -> Tensor:
    return _token_digest(key, bits) if index == "tokens" else reference.bounding_volume(key, index)


def _token_digest(key: Tensor, bits: int) -> Tensor:
    """Scales and zeros in bf16, then byte by byte the codes: `kernels/torch_tokens.py`."""
    key, levels = key.cpu().float(), 2**bits - 1
    page_size, head_dim = key.shape
    plane_dim = -(-head_dim * bits // 8)
    zero = key.amin(dim=0).bfloat16()
    scale = ((key.amax(dim=0) - zero.float()) / levels).bfloat16()
    packed = [0] * (plane_dim * page_size)
    for channel in range(head_dim):
        plane, byte = divmod(channel, plane_dim)
        step = scale[channel].float() if scale[channel] else torch.tensor(1.0)
        codes = ((key[:, channel] - zero[channel].float()) / step).round().clamp(0, levels)
        for token, code in enumerate(codes.tolist()):
            packed[byte * page_size + token] |= int(code) << (plane * bits)
    header = torch.cat((scale, zero)).view(torch.uint8)
    return torch.cat((header, torch.tensor(packed, dtype=torch.uint8)))
