"""How much attention decode steps leave out: what the index makes of it, and the truth.

The missed mass of a step, for one sequence and KV head, is the softmax mass of the pages that it
does not attend, the mean over the head's query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.engines.step import Step, additive, expanded, view_logits, with_sink_logits
from arkcache.engines.views import Held
from arkcache.pages.bookkeeping import Ids
from arkcache.stats import AUDIT_MARGIN, MissedMass
from arkcache.tiering.device import Geometry

Mass = NDArray[np.floating[Any]]


class MissedLog:
    """What the decode steps of one layer missed, by KV head.

    Args:
        num_kv_heads: of the layer.
        audit_every: one layer in so many steps is audited; None for never.
        number, num_layers: which of how many layers this is: they take turns.
    """

    def __init__(
        self, num_kv_heads: int, audit_every: int | None, number: int, num_layers: int
    ) -> None:
        self._audit_every, self._number, self._num_layers = audit_every, number, num_layers
        self._num_steps = 0
        self.heads = [MissedMass()] * num_kv_heads

    def begin_step(self) -> bool:
        """Count a step; returns whether to audit it."""
        step, every = self._num_steps, self._audit_every
        self._num_steps += 1
        if every is None or step % every:
            return False
        return step // every % self._num_layers == self._number

    def note(self, estimate: Mass, is_capped: NDArray[np.bool_]) -> None:
        """A step's estimates, and whether places ended before the target was met [rows]."""
        self._add(
            [
                MissedMass(
                    num_estimates=len(own),
                    estimated_sum=float(own.sum()),
                    estimated_worst=float(own.max()),
                    num_capped=int(np.count_nonzero(capped)),
                )
                for own, capped in zip(
                    self._by_head(estimate), self._by_head(is_capped), strict=True
                )
            ]
        )

    def audit(self, truth: Mass, estimate: Mass | None) -> None:
        """What a step really missed [rows] and, where the index rates mass, its estimate."""
        compared = truth if estimate is None else estimate
        self._add(
            [
                MissedMass(
                    num_audits=len(own),
                    true_sum=float(own.sum()),
                    true_worst=float(own.max()),
                    num_compared=0 if estimate is None else len(own),
                    compared_sum=0.0 if estimate is None else float(guess.sum()),
                    num_low=int(np.count_nonzero(guess < own - AUDIT_MARGIN)),
                )
                for own, guess in zip(self._by_head(truth), self._by_head(compared), strict=True)
            ]
        )

    def _by_head(self, rows: NDArray[Any]) -> NDArray[Any]:
        """[rows] to [kv_heads, sequences]."""
        return rows.reshape(-1, len(self.heads)).T

    def _add(self, new: list[MissedMass]) -> None:
        self.heads = [held + one for held, one in zip(self.heads, new, strict=True)]


def log_mass(step: Step, parts: Iterator[tuple[Tensor, Tensor]], mask: Tensor | None) -> Tensor:
    """What the exponentials of a step's logits over tokens add up to, sink logits included.

    parts: key, value [batch, kv_heads, tokens, dim]; mask over all of them as in `attend_view`.
    Returns its logarithm [batch, heads], in fp32.
    """
    start, masses = 0, []
    for key, value in parts:
        stop = start + key.shape[2]
        own = None if mask is None else mask[..., start:stop]
        logits = view_logits(step, expanded(step, key, value)[0], own)
        masses.append(logits.logsumexp(dim=-1, keepdim=True))
        start = stop
    mass = torch.cat(masses, dim=-1).logsumexp(dim=-1, keepdim=True)
    return with_sink_logits(step, mass).flatten(1)


def true_missed_mass(
    step: Step,
    blocks: Iterator[tuple[Tensor, Tensor, Ids]],
    left_out: Held,
    config: CacheConfig,
    geometry: Geometry,
    page_of: Callable[[Ids], Ids],
) -> Mass:
    """The share of a step's attention that pages hold which it does not attend [rows].

    blocks: all tokens of the layer; left_out: which selectable pages are not attended
    [rows, pages]; page_of: the pages of token numbers [batch, tokens], by KV head or for all
    [batch, kv_heads or 1, tokens].
    """
    batch, num_kv_heads = geometry.batch, geometry.num_kv_heads
    # One more, for tokens that are on no selectable page.
    missed = np.pad(left_out, ((0, 0), (0, 1))).reshape(batch, num_kv_heads, -1)
    total, outside = [], []
    for key, value, numbers in blocks:
        logits = view_logits(step, expanded(step, key, value)[0], _mask(step, numbers))
        page = page_of(numbers) - config.num_sink_pages
        page = np.where((page < 0) | (page >= left_out.shape[1]), left_out.shape[1], page)
        by_head = np.broadcast_to(page, (batch, num_kv_heads, page.shape[2]))
        is_out = np.take_along_axis(missed, by_head, axis=2)
        hidden = torch.from_numpy(~is_out).to(logits.device)[:, :, None]
        total.append(logits.logsumexp(dim=-1, keepdim=True))
        outside.append(logits.masked_fill(hidden, float("-inf")).logsumexp(dim=-1, keepdim=True))
    everything = with_sink_logits(step, torch.cat(total, dim=-1).logsumexp(dim=-1, keepdim=True))
    share = torch.cat(outside, dim=-1).logsumexp(dim=-1, keepdim=True).sub_(everything).exp_()
    # A sequence without a token attends nothing and misses nothing.
    by_row = share.nan_to_num_().reshape(geometry.num_rows, -1).mean(dim=1)
    result: Mass = by_row.double().cpu().numpy()
    return result


def _mask(step: Step, numbers: Ids) -> Tensor:
    """The additive mask of a block's token numbers [batch, tokens], -1 where there is none."""
    mask = additive(numbers[:, None] >= 0, step.query.device)
    if step.bias is None:
        return mask
    return mask + step.bias(np.maximum(numbers, 0)[:, None])[:, :, :, 0]
