"""The obvious version of scoring and selecting pages: same signatures and effects as the kernels.

Loops over rows, pages and places in plain Python and fp32; the oracle of the kernels' tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arkcache.kernels.reference import token_score, volume_score
from arkcache.kernels.triton_score import HIDDEN, PAGES_PER_BLOCK, Scores
from arkcache.kernels.triton_select import Selection


def score_volumes(
    query: Tensor,
    digests: Tensor,
    sealed: Tensor,
    *,
    num_sinks: int,
    kind: str,
    scale: float,
    hidden: Tensor | None = None,
) -> Scores:
    """Rate pages by bounding volumes; what the kernel does not write is NaN."""
    score = volume_score(query.float() * scale, digests[:, num_sinks:], kind)
    return _scores(score, sealed, num_sinks, hidden)


def score_tokens(
    query: Tensor,
    digests: Tensor,
    sealed: Tensor,
    *,
    num_sinks: int,
    page_size: int,
    bits: int,
    scale: float,
    hidden: Tensor | None = None,
) -> Scores:
    """Rate pages by the token index; what the kernel does not write is NaN."""
    digests = digests[:, num_sinks:].contiguous()
    score = token_score(query.float() * scale, *unpack_tokens(digests, query.shape[-1], bits))
    return _scores(score, sealed, num_sinks, hidden)


def unpack_tokens(digests: Tensor, head_dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [rows, pages, page_size, head_dim], scale and zero [rows, pages, 1, head_dim]."""
    header = digests[..., : 4 * head_dim].contiguous().view(torch.bfloat16).float()
    plane_dim = -(-head_dim * bits // 8)
    packed = digests[..., 4 * head_dim :].unflatten(-1, (plane_dim, -1))
    channels = []
    for channel in range(head_dim):
        plane, byte = divmod(channel, plane_dim)
        channels.append((packed[:, :, byte] >> (plane * bits)) & (2**bits - 1))
    codes = torch.stack(channels, dim=-1).float()
    return codes, header[:, :, None, :head_dim], header[:, :, None, head_dim:]


def _scores(score: Tensor, sealed: Tensor, num_sinks: int, hidden: Tensor | None) -> Scores:
    rows, group, pages = score.shape
    blocks = -(-pages // PAGES_PER_BLOCK)
    peak = score.new_full((rows, group, blocks), float("-inf"))
    mass = torch.zeros_like(peak)
    for row in range(rows):
        selectable = max(0, int(sealed[row]) - num_sinks)
        score[row, :, selectable:] = float("nan")
        seen = torch.ones(pages, dtype=torch.bool)
        if hidden is not None:
            seen = ~hidden[row].bool()
            score[row, :, :selectable][:, ~seen[:selectable]] = HIDDEN
        for block in range(blocks):
            inside = torch.arange(block * PAGES_PER_BLOCK, (block + 1) * PAGES_PER_BLOCK)
            inside = inside[inside < selectable]
            own = score[row][:, inside[seen[inside]]]
            if own.numel():
                peak[row, :, block] = own.amax(dim=-1)
                mass[row, :, block] = (own - own.amax(dim=-1, keepdim=True)).exp().sum(dim=-1)
    return Scores(score, peak, mass)


def select(
    scores: Scores,
    sealed: Tensor,
    page_of: Tensor,
    num_selected: Tensor,
    num_places: Tensor,
    speculated: Tensor,
    counters: Tensor,
    *,
    num_sinks: int,
    most: int,
    reduction: str,
    speculative: bool = False,
) -> Selection:
    """Choose pages and the places of those that are missing; the lists' unused ends are -1."""
    rows = page_of.shape[0]
    lists = [torch.full((rows, most), -1, dtype=torch.int32) for _ in range(3)]
    counts = [torch.zeros(rows, dtype=torch.int32) for _ in range(2)]
    for row in range(rows):
        selectable = max(0, int(sealed[row]) - num_sinks)
        places = range(min(int(num_places[row]), page_of.shape[1]))
        rating = _ratings(scores.score[row, :, :selectable], reduction)
        count = min(int(num_selected[row]), selectable, len(places), most)
        best = sorted(range(selectable), key=lambda page: (rating[page], -page), reverse=True)
        wanted = {num_sinks + page for page in best[:count]}

        held = page_of[row].tolist()
        kept = [place for place in places if held[place] in wanted]
        missing = sorted(wanted - {held[place] for place in kept})
        spare = [place for place in places if place not in kept]
        order = sorted(
            spare, key=lambda place: _worth(held[place], num_sinks, selectable, rating, place)
        )
        victims = sorted(order[: len(missing)])

        evicted = sum(held[place] >= 0 for place in victims)
        hits = sum(bool(speculated[row, place]) for place in kept)
        if speculative:
            counters[row] += torch.tensor([0, 0, evicted, 0, len(missing)])
        else:
            counters[row] += torch.tensor([len(kept), len(missing), evicted, hits, 0])
            speculated[row, kept] = 0
        speculated[row, victims] = int(speculative)
        page_of[row, victims] = torch.tensor(missing, dtype=torch.int32)
        chosen = sorted(kept + victims)
        for target, values in zip(lists, (missing, victims, chosen), strict=True):
            target[row, : len(values)] = torch.tensor(values, dtype=torch.int32)
        counts[0][row], counts[1][row] = len(missing), len(chosen)
    return Selection(lists[0], lists[1], counts[0], lists[2], counts[1])


def _ratings(score: Tensor, reduction: str) -> list[tuple[bool, float]]:
    """What each page is worth to all query heads: whether it is visible, then its rating."""
    visible = score[0] != HIDDEN
    if reduction == "softmax-mean" and len(score) > 1:
        score = torch.nan_to_num(score.masked_fill(~visible, float("-inf")).softmax(dim=-1))
    return list(zip(visible.tolist(), score.sum(dim=0).tolist(), strict=True))


def _worth(
    page: int, num_sinks: int, selectable: int, rating: list[tuple[bool, float]], place: int
) -> tuple[bool, bool, float, int]:
    """Sorts places by who goes first: the empty, then the worst rated, then the lowest."""
    rated = num_sinks <= page < num_sinks + selectable
    return (page >= 0, *(rating[page - num_sinks] if rated else (False, float("-inf"))), place)
