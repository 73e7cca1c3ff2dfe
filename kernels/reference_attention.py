"""The obvious version of the paged decode attention: one row, one page, one token after another."""

from __future__ import annotations

from math import log

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
    num_sink_pages: int,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    bias: Tensor | None = None,
    means: Tensor | None = None,
    estimated: Tensor | None = None,
    page_bias: Tensor | None = None,
    log_mass: Tensor | None = None,
) -> Tensor:
    """Attend one token over sinks, chosen pages and the recent window, by one softmax.

    Rows are (sequence, KV head) pairs, R of them, with G query heads each.

    Args:
        query: [R, G, head_dim].
        slots: uint8 [R, num_slots, nbytes], pages as `layout` says; None attends the window only.
        chosen: int32 [R, max_selected]: page places, attended with the sealed ones of the first
            `num_sink_pages` pages; place i is slot num_sink_pages + i. None attends all sealed
            pages, page p in slot p.
        num_chosen: int32 [R], how many entries of `chosen` count.
        page_of: int32 [R, num_places], the page in each place.
        window_key: [R, ring, head_dim], token t at t % ring. Attended: those not in sealed pages.
        window_value: [R, ring, value_dim].
        lengths: int32 [R], tokens, the newest included.
        sealed: int32 [R], sealed pages.
        layout: may be None where `slots` is and nothing is sealed.
        num_sink_pages: pages attended whatever is chosen.
        scale: of the logits.
        softcap: where given, logits become softcap * tanh(logits / softcap).
        sink_logits: fp32 [R, G], logits that take probability and give nothing.
        bias: fp32 [R, G, tokens], by token number, added after the softcap.
        means: [R, capacity, head_dim + value_dim], mean key and mean value of every page: one token
            with ln(page_size) added to its logit after the softcap.
        estimated: int32 [R, capacity - num_sink_pages], 1 for each page from `num_sink_pages` on
            that is to be attended so; looked at as far as pages are sealed. None together with
            `means`.
        page_bias: fp32 [R, G, pages], by page number: `bias` for these tokens.
        log_mass: fp32 [R, G], written: the logarithm of what the exponentials of all logits add up
            to, those of `sink_logits` included.

    Returns [R, G, value_dim] in fp32, zeros where nothing may be attended.
    """
    outputs = []
    for row in range(query.shape[0]):
        keys, values, tokens, first = [], [], [], 0
        if layout is not None:
            first = int(sealed[row]) * layout.page_size
        if slots is not None and layout is not None:
            for slot, page in _attended(row, chosen, num_chosen, page_of, sealed, num_sink_pages):
                data = bytes(slots[row, slot].tolist())
                key, value = reference.unpack_page(data, layout, query.dtype)
                keys += [*key.to(query.device)]
                values += [*value.to(query.device)]
                tokens += [page * layout.page_size + i for i in range(layout.page_size)]
        for token in range(first, int(lengths[row])):
            keys.append(window_key[row, token % window_key.shape[1]])
            values.append(window_value[row, token % window_key.shape[1]])
            tokens.append(token)
        mask = torch.zeros(query.shape[1], len(tokens), device=query.device)
        if bias is not None:
            mask = bias[row][:, tokens]
        if means is not None and estimated is not None and layout is not None:
            pages = estimated[row, : max(0, int(sealed[row]) - num_sink_pages)].nonzero()[:, 0]
            pages = pages + num_sink_pages
            weight = mask.new_full((query.shape[1], len(pages)), log(layout.page_size))
            weight = weight if page_bias is None else weight + page_bias[row][:, pages]
            keys += [*means[row, pages, : layout.head_dim]]
            values += [*means[row, pages, layout.head_dim :]]
            mask = torch.cat((mask, weight), dim=1)
        states = [window_key[row, :0], window_value[row, :0]]
        if keys:
            states = [torch.stack(keys), torch.stack(values)]
        own = None if sink_logits is None else sink_logits[row]
        outputs.append(
            reference.attention(
                query[row, None, :, None],
                *(plane[None, None] for plane in states),
                scale=scale,
                softcap=softcap,
                sink_logits=own,
                mask=mask[None, :, None],
            )[0, :, 0]
        )
        if log_mass is not None:
            log_mass[row] = _log_mass(query[row], states[0], mask, scale, softcap, own)
    return torch.stack(outputs)


def _log_mass(
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Of queries [G, head_dim] over keys [tokens, head_dim], mask [G, tokens], sink_logits [G]."""
    logits = query.float() @ key.float().T * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits + mask
    if sink_logits is not None:
        logits = torch.cat((logits, sink_logits[:, None]), dim=1)
    return logits.logsumexp(dim=1)


def _attended(
    row: int,
    chosen: Tensor | None,
    num_chosen: Tensor | None,
    page_of: Tensor | None,
    sealed: Tensor,
    num_sink_pages: int,
) -> list[tuple[int, int]]:
    """The slots that a row attends, and the page in each."""
    pages = [(page, page) for page in range(int(sealed[row]))]
    if chosen is None or num_chosen is None or page_of is None:
        return pages
    places = [int(place) for place in chosen[row, : int(num_chosen[row])]]
    return pages[:num_sink_pages] + [
        (num_sink_pages + place, int(page_of[row, place])) for place in places
    ]
