"""The obvious version of scoring and selecting pages: same signatures and effects as the kernels.

Loops over rows, pages and places in plain Python and fp32; the oracle of the kernels' tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arkcache.kernels.arguments import Places, Scores, Selection
from arkcache.kernels.reference import token_score, volume_score
from arkcache.kernels.triton_score import HIDDEN, PAGES_PER_BLOCK


def score_volumes(
    query: Tensor,
    digests: Tensor,
    sealed: Tensor,
    *,
    num_sink_pages: int,
    kind: str,
    scale: float,
    hidden: Tensor | None = None,
) -> Scores:
    """Rate pages by bounding volumes; what the kernel does not write is NaN."""
    score = volume_score(query.float() * scale, digests[:, num_sink_pages:], kind)
    return _scores(score, sealed, num_sink_pages, hidden)


def score_tokens(
    query: Tensor,
    digests: Tensor,
    sealed: Tensor,
    *,
    num_sink_pages: int,
    page_size: int,
    bits: int,
    scale: float,
    hidden: Tensor | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Scores:
    """Rate pages by the token index; what the kernel does not write is NaN."""
    digests = digests[:, num_sink_pages:].contiguous()
    codes = unpack_tokens(digests, query.shape[-1], bits)
    score = token_score(query.float() * scale, *codes)
    if softcap is not None or bias is not None:
        logits = torch.einsum(
            "rgd,rptd->rgpt", query.float() * scale, codes[0] * codes[1] + codes[2]
        )
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        score = _masked(logits, sealed, num_sink_pages, page_size, bias).logsumexp(dim=-1)
    return _scores(score, sealed, num_sink_pages, hidden)


def _masked(
    logits: Tensor, sealed: Tensor, num_sink_pages: int, page_size: int, bias: Tensor | None
) -> Tensor:
    """Logits of tokens [rows, group, pages, page_size] with a mask by token number added."""
    if bias is not None:
        for row, count in enumerate(sealed.tolist()):
            own = bias[row, :, num_sink_pages * page_size : max(count, num_sink_pages) * page_size]
            own = own.unflatten(1, (-1, page_size)) if own.numel() else own[:, None]
            logits[row, :, : own.shape[1]] += own if count > num_sink_pages else 0.0
    return logits


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


def _scores(score: Tensor, sealed: Tensor, num_sink_pages: int, hidden: Tensor | None) -> Scores:
    rows, group, pages = score.shape
    blocks = -(-pages // PAGES_PER_BLOCK)
    peak = score.new_full((rows, group, blocks), float("-inf"))
    mass = torch.zeros_like(peak)
    for row in range(rows):
        selectable = max(0, int(sealed[row]) - num_sink_pages)
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
    places: Places,
    num_selected: Tensor,
    speculated: Tensor,
    counters: Tensor,
    *,
    num_sink_pages: int,
    max_selected: int,
    reduction: str,
    speculative: bool = False,
    num_estimated: int | None = 0,
    fixed: Tensor | None = None,
    target: float | None = None,
    missed: Tensor | None = None,
) -> Selection:
    """Choose pages and the places of those that are missing; the lists' unused ends are -1."""
    page_of, num_pages = places.page_of, scores.score.shape[-1]
    rows = page_of.shape[0]
    estimated = None if num_estimated == 0 else torch.zeros(rows, num_pages, dtype=torch.int32)
    lists = [torch.full((rows, max_selected), -1, dtype=torch.int32) for _ in range(3)]
    counts = [torch.zeros(rows, dtype=torch.int32) for _ in range(2)]
    for row in range(rows):
        selectable = max(0, int(sealed[row]) - num_sink_pages)
        usable = range(min(int(places.num_places[row]), page_of.shape[1]))
        rating = _ratings(scores.score[row, :, :selectable], reduction)
        if fixed is not None:
            rating = _shares(scores.score[row, :, :selectable], fixed[row])
        count = min(int(num_selected[row]), selectable, len(usable), max_selected)
        best = sorted(range(selectable), key=lambda page: (rating[page], -page), reverse=True)
        if target is not None and missed is not None:
            count = _cover([rating[page][1] for page in best], count, target, missed[row])
        wanted = {num_sink_pages + page for page in best[:count]}
        if estimated is not None:
            limit = num_pages if num_estimated is None else num_estimated
            estimated[row, best[count : count + limit]] = 1

        held = page_of[row].tolist()
        kept = [place for place in usable if held[place] in wanted]
        missing = sorted(wanted - {held[place] for place in kept})
        spare = [place for place in usable if place not in kept]
        order = sorted(
            spare, key=lambda place: _worth(held[place], num_sink_pages, selectable, rating, place)
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
        for entries, values in zip(lists, (missing, victims, chosen), strict=True):
            entries[row, : len(values)] = torch.tensor(values, dtype=torch.int32)
        counts[0][row], counts[1][row] = len(missing), len(chosen)
    return Selection(lists[0], lists[1], counts[0], lists[2], counts[1], estimated)


def _ratings(score: Tensor, reduction: str) -> list[tuple[bool, float]]:
    """What each page is worth to all query heads: whether it is visible, then its rating."""
    visible = score[0] != HIDDEN
    if reduction == "softmax-mean" and len(score) > 1:
        score = torch.nan_to_num(score.masked_fill(~visible, float("-inf")).softmax(dim=-1))
    # Exactly: in fp32 torch adds up some pages in another order than others, and equal ones differ.
    return list(zip(visible.tolist(), score.double().sum(dim=0).tolist(), strict=True))


def _shares(score: Tensor, fixed: Tensor) -> list[tuple[bool, float]]:
    """Whether a page is visible, and which share of all attention it holds, by the mean."""
    visible = score[0] != HIDDEN
    logits = torch.cat((score.masked_fill(~visible, float("-inf")), fixed[:, None]), dim=1)
    share = logits.softmax(dim=1).nan_to_num()[:, :-1].double().mean(dim=0)
    return list(zip(visible.tolist(), share.tolist(), strict=True))


def _cover(shares: list[float], max_selected: int, target: float, missed: Tensor) -> int:
    """How many of these shares, largest first, a row takes so as to miss no more than a target."""
    needed = next(count for count in range(len(shares) + 1) if sum(shares[count:]) <= target)
    count = min(needed, max_selected)
    own = sum(shares[count:])
    log = missed.tolist()
    steps, total, worst, capped = log[0] + 1, log[1] + own, max(log[2], own), log[3]
    missed.copy_(
        torch.tensor([steps, total, worst, capped + (needed > max_selected), max_selected - count])
    )
    return count


def _worth(
    page: int, num_sink_pages: int, selectable: int, rating: list[tuple[bool, float]], place: int
) -> tuple[bool, bool, float, int]:
    """Sorts places by who goes first: the empty, then the worst rated, then the lowest."""
    rated = num_sink_pages <= page < num_sink_pages + selectable
    return (page >= 0, *(rating[page - num_sink_pages] if rated else (False, float("-inf"))), place)
