"""The obvious version of the paged decode attention: one row, one page, one token after another."""

from __future__ import annotations

import torch
from torch import Tensor

from arkcache.formats import PageLayout
from arkcache.kernels import reference


def paged_attention(
    query: Tensor,
    slots: Tensor | None,
    chosen: Tensor | None,
    num_chosen: Tensor | None,
    page_of: Tensor | None,
    window_key: Tensor,
    window_value: Tensor,
    lengths: Tensor,
    sealed: Tensor,
    *,
    layout: PageLayout | None,
    num_sinks: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attend one token over sinks, chosen pages and the recent window, by one softmax.

    Rows are (sequence, KV head) pairs, R of them, with G query heads each.

    Args:
        query: [R, G, head_dim].
        slots: uint8 [R, num_slots, nbytes], pages as `layout` says; None attends the window only.
        chosen: int32 [R, most]: page places, attended with the sealed ones of the first `num_sinks`
            pages; place i is slot num_sinks + i. None attends all sealed pages, page p in slot p.
        num_chosen: int32 [R], how many entries of `chosen` count.
        page_of: int32 [R, num_places], the page in each place.
        window_key: [R, ring, head_dim], token t at t % ring. Attended: those not in sealed pages.
        window_value: [R, ring, value_dim].
        lengths: int32 [R], tokens, the newest included.
        sealed: int32 [R], sealed pages.
        layout: may be None where `slots` is and nothing is sealed.
        num_sinks: pages attended whatever is chosen.
        scale: of the logits.
        softcap: where given, logits become softcap * tanh(logits / softcap).
        sinks: fp32 [R, G], logits that take probability and give nothing.
        bias: fp32 [R, G, tokens], by token number, added after the softcap.

    Returns [R, G, value_dim] in fp32, zeros where nothing may be attended.
    """
    outputs = []
    for row in range(query.shape[0]):
        keys, values, tokens, first = [], [], [], 0
        if layout is not None:
            first = int(sealed[row]) * layout.page_size
        if slots is not None and layout is not None:
            for slot, page in _attended(row, chosen, num_chosen, page_of, sealed, num_sinks):
                data = bytes(slots[row, slot].tolist())
                key, value = reference.unpack_page(data, layout, query.dtype)
                keys += [*key.to(query.device)]
                values += [*value.to(query.device)]
                tokens += [page * layout.page_size + i for i in range(layout.page_size)]
        for token in range(first, int(lengths[row])):
            keys.append(window_key[row, token % window_key.shape[1]])
            values.append(window_value[row, token % window_key.shape[1]])
            tokens.append(token)
        outputs.append(
            reference.attention(
                query[row, None, :, None],
                torch.stack(keys)[None, None] if keys else window_key[None, None, row, :0],
                torch.stack(values)[None, None] if keys else window_value[None, None, row, :0],
                scale=scale,
                softcap=softcap,
                sinks=None if sinks is None else sinks[row],
                mask=None if bias is None else bias[row][None, :, None, tokens],
            )[0, :, 0]
        )
    return torch.stack(outputs)


def _attended(
    row: int,
    chosen: Tensor | None,
    num_chosen: Tensor | None,
    page_of: Tensor | None,
    sealed: Tensor,
    num_sinks: int,
) -> list[tuple[int, int]]:
    """The slots that a row attends, and the page in each."""
    pages = [(page, page) for page in range(int(sealed[row]))]
    if chosen is None or num_chosen is None or page_of is None:
        return pages
    places = [int(place) for place in chosen[row, : int(num_chosen[row])]]
    return pages[:num_sinks] + [(num_sinks + place, int(page_of[row, place])) for place in places]
