"""Which pages a decode step attends: scores in, page ids out. Pure functions on small tensors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]


def aggregate(score: Tensor, reduction: str) -> Tensor:
    """Reduce page scores [rows, group, pages] over a KV head's query heads to [rows, pages].

    "softmax-mean" turns each query head's scores into shares of probability first, so that a head
    with large logits cannot outvote the others; "raw-mean" is what ArkVale's code does.
    """
    if score.shape[1] == 1:
        return score[:, 0].float()
    if reduction == "softmax-mean":
        score = torch.softmax(score, dim=-1, dtype=torch.float32)
    return score.float().mean(dim=1)


def top_pages(score: Tensor, num_selected: int) -> Ids:
    """The `num_selected` best pages of each row of `score` [rows, pages], in any order."""
    if score.device.type == "cpu" and score.dtype == torch.float32:
        # Four times faster than torch.topk at 2048 pages.
        split = score.shape[1] - num_selected
        return np.argpartition(score.numpy(), split, axis=1)[:, split:]
    best: Ids = torch.topk(score, num_selected, dim=1, sorted=False).indices.cpu().numpy()
    return best


def ranked_pages(score: Tensor, max_selected: int) -> Ids:
    """Like `top_pages`, best first: for rows that take different numbers of pages."""
    best: Ids = torch.topk(score, max_selected, dim=1, sorted=True).indices.cpu().numpy()
    return best


def page_shares(score: Tensor, fixed: Tensor) -> Tensor:
    """Which share of attention each page holds [rows, pages]: the mean over the query heads.

    score [rows, group, pages]: log mass of the pages to select from; fixed [rows, group]: that of
    everything which is attended anyhow. Shares of a row, and of what is fixed, add up to 1.
    """
    total = torch.logaddexp(score.logsumexp(dim=2), fixed)
    # Where nothing has any mass, nothing is a share of it.
    return (score - total[:, :, None]).exp_().nan_to_num_(nan=0.0).mean(dim=1)


class Cover(NamedTuple):
    """Pages that reach a target.

    pages [rows, max_selected], best first, of which row r takes the first `num_taken[r]`; missed
    [rows]: the share of attention of all others; is_capped [rows]: whether that exceeds the target.
    """

    pages: Ids
    num_taken: Ids
    missed: NDArray[np.float64]
    is_capped: NDArray[np.bool_]


def fewest_pages(share: Tensor, target: float, cap: Ids) -> Cover:
    """The fewest pages of each row without which at most `target` of its attention is missed.

    Twilight's top-p, by pages: the least c for which what is fixed and the c pages of
    the largest shares [rows, pages] hold 1 - target. cap [rows]: pages that a row may take.
    """
    max_selected = int(cap.max(initial=0))
    best = share.topk(max_selected, dim=1, sorted=True)
    rest = share.scatter(1, best.indices, 0.0).sum(dim=1, keepdim=True)
    # Summed from the smallest on: 1 - (what is covered) would lose the digits of a small target.
    missed = torch.cat((best.values, rest), dim=1).double().cpu().numpy()
    missed = missed[:, ::-1].cumsum(axis=1)[:, ::-1]  # after 0, 1, ... `max_selected` pages
    count = np.minimum((missed > target).sum(axis=1), cap)
    left = np.take_along_axis(missed, count[:, None], axis=1)[:, 0]
    return Cover(best.indices.cpu().numpy(), count, left, left > target)
