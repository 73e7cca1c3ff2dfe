"""The obvious version of `triton_append` and `triton_seal`: same signatures, one page at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from arkcache.formats import PageLayout
from arkcache.kernels import reference


def append(
    key: Tensor,
    value: Tensor,
    window_key: Tensor,
    window_value: Tensor,
    lengths: Tensor,
    sealed: Tensor,
    *,
    recent: int,
    page_size: int,
) -> None:
    """Write a token into every row's ring and count it."""
    rows = zip(key.flatten(0, 1), value.flatten(0, 1), strict=True)
    for row, (new_key, new_value) in enumerate(rows):
        length = int(lengths[row])
        window_key[row, length % window_key.shape[1]] = new_key
        window_value[row, length % window_key.shape[1]] = new_value
        lengths[row] = length + 1
        sealed[row] = max(0, (length + 1 - recent) // page_size)


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
    """Pack and digest the pages of a prompt."""
    for row in range(key.shape[0]):
        for page in range(key.shape[1]):
            packed[row, page] = _packed(key[row, page], value[row, page], layout)
            if digests is not None:
                digest = _digest(digest_key[row, page], index, index_bits)
                digests[row, first + page] = digest.to(digests)
            if means is not None:
                means[row, first + page] = _means(key[row, page], value[row, page])


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
    """Pack and digest the page that the newest token sealed, in the rows where it sealed one."""
    size, window = layout.page_size, window_key.shape[1]
    for row, (length, num_sealed) in enumerate(zip(lengths.tolist(), sealed.tolist(), strict=True)):
        if num_sealed == 0 or length - recent != num_sealed * size:
            continue
        page = num_sealed - 1
        positions = [token % window for token in range(page * size, page * size + size)]
        packed[row] = _packed(window_key[row, positions], window_value[row, positions], layout)
        if digests is not None:
            digest = _digest(digest_window[row, positions], index, index_bits)
            digests[row, page] = digest.to(digests)
        if means is not None:
            means[row, page] = _means(window_key[row, positions], window_value[row, positions])
        if page_of is None or num_places is None or page < num_sink_pages:
            slots[row, page] = packed[row]
        elif page < num_sink_pages + int(num_places[row]):
            slots[row, page] = packed[row]
            page_of[row, page - num_sink_pages] = page


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
