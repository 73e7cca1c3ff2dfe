"""The obvious version of the paged decode attention: one row, one page, one token after another."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from arkcache.formats import PageLayout
from arkcache.kernels import reference
from arkcache.kernels.arguments import Counts, Estimates, PageSet, Window


def paged_attention(
    query: Tensor,
    pages: PageSet | None,
    window: Window,
    counts: Counts,
    *,
    layout: PageLayout | None,
    num_sink_pages: int,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    bias: Tensor | None = None,
    estimates: Estimates | None = None,
    log_mass: Tensor | None = None,
) -> Tensor:
    """Attend one token over sinks, chosen pages and the recent window, by one softmax.

    Rows are (sequence, KV head) pairs, R of them, with G query heads each.

    Args:
        query: [R, G, head_dim].
        pages: attended with the sealed ones of the first `num_sink_pages` pages; None attends the
            window only.
        window: attended are the tokens that are not in sealed pages.
        counts: how far pages and window are filled.
        layout: may be None where `pages` is and nothing is sealed.
        num_sink_pages: pages attended whatever is chosen.
        scale: of the logits.
        softcap: where given, logits become softcap * tanh(logits / softcap).
        sink_logits: fp32 [R, G], logits that take probability and give nothing.
        bias: fp32 [R, G, tokens], by token number, added after the softcap.
        estimates: ln(page_size) is added to these tokens' logits, too.
        log_mass: fp32 [R, G], written: the logarithm of what the exponentials of all logits add up
            to, those of `sink_logits` included.

    Returns [R, G, value_dim] in fp32, zeros where nothing may be attended.
    """
    outputs, ring = [], window.key.shape[1]
    for row in range(query.shape[0]):
        keys, values, tokens, first = [], [], [], 0
        if layout is not None:
            first = int(counts.sealed[row]) * layout.page_size
        if pages is not None and layout is not None:
            for slot, page in _attended(row, pages, counts.sealed, num_sink_pages):
                data = bytes(pages.slots[row, slot].tolist())
                key, value = reference.unpack_page(data, layout, query.dtype)
                keys += [*key.to(query.device)]
                values += [*value.to(query.device)]
                tokens += [page * layout.page_size + i for i in range(layout.page_size)]
        for token in range(first, int(counts.lengths[row])):
            keys.append(window.key[row, token % ring])
            values.append(window.value[row, token % ring])
            tokens.append(token)
        mask = torch.zeros(query.shape[1], len(tokens), device=query.device)
        if bias is not None:
            mask = bias[row][:, tokens]
        if estimates is not None and layout is not None:
            means, estimated, page_bias = estimates
            rest = estimated[row, : max(0, int(counts.sealed[row]) - num_sink_pages)].nonzero()
            numbers = rest[:, 0] + num_sink_pages
            weight = mask.new_full((query.shape[1], len(numbers)), log(layout.page_size))
            weight = weight if page_bias is None else weight + page_bias[row][:, numbers]
            keys += [*means[row, numbers, : layout.head_dim]]
            values += [*means[row, numbers, layout.head_dim :]]
            mask = torch.cat((mask, weight), dim=1)
        states = [window.key[row, :0], window.value[row, :0]]
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
    row: int, pages: PageSet, sealed: Tensor, num_sink_pages: int
) -> list[tuple[int, int]]:
    """The slots that a row attends, and the page in each."""
    held = [(page, page) for page in range(int(sealed[row]))]
    if pages.chosen is None or pages.num_chosen is None or pages.page_of is None:
        return held
    places = [int(place) for place in pages.chosen[row, : int(pages.num_chosen[row])]]
    return held[:num_sink_pages] + [
        (num_sink_pages + place, int(pages.page_of[row, place])) for place in places
    ]
