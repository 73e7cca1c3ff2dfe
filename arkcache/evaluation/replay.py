"""Attention itself: which pages an index finds, what a step misses, how far its output is off.

The cache of a method is given the keys that every layer had while the full cache decoded, and asked
the queries that it had, so that no layer answers for the errors of those before it. What runs is
the decode step that users run; the truth beside it is `attention.py`'s.

Recall at k is ArkVale's (section 6, figure 7): which share of the k truly best pages the k best by
rating hold, among those that a step selects from (no sinks, nothing of the recent window).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from arkcache.demo.baselines import EvictingLayer
from arkcache.engines.missed import Mass, MissedLog
from arkcache.evaluation.attention import LayerSteps, Recorded, Truth
from arkcache.evaluation.records import AttendedLayer
from arkcache.huggingface.cache import PagedCacheLayer
from arkcache.stats import AUDIT_MARGIN

LADDER = (1, 2, 4, 8, 10, 16, 32, 40, 64)
"""Every k of a recall for which there are pages enough; 1, 4, 10 and 40 are ArkVale's."""


class Recalls(NamedTuple):
    """Of one step [num_kv_heads, k]; see `AttendedLayer`."""

    together: Tensor
    alone: Tensor
    peak: Tensor


@dataclass(frozen=True)
class Look:
    """What was seen of one step of one layer, by KV head.

    Attributes:
        missed: None where everything is attended.
        recalls: None where no pages are rated.
    """

    error: Tensor
    missed: Mass | None
    estimated: Mass | None = None
    recalls: Recalls | None = None


class StepLog(MissedLog):
    """Keeps what the latest step missed; it is audited if `looks`."""

    def __init__(self, num_kv_heads: int) -> None:
        super().__init__(num_kv_heads, None, 0, 1)
        self.looks = False
        self.missed: Mass | None = None
        self.estimated: Mass | None = None

    def begin_step(self) -> bool:
        """Whether to audit the step; forgets the one before it."""
        self.missed = self.estimated = None
        return self.looks

    def audit(self, truth: Mass, estimate: Mass | None) -> None:
        """Keep what a step missed [num_kv_heads], and the index's estimate of it."""
        self.missed, self.estimated = truth, estimate


class PagedView:
    """Replays the steps of a layer through its layer of an `ArkCache`.

    Attributes:
        num_pages: to select from in the first step; 0 where no pages are rated.
    """

    def __init__(self, layer: PagedCacheLayer, steps: LayerSteps) -> None:
        assert layer.manager is not None
        self._manager, self._index = layer.manager, layer.index
        self._steps = steps
        self._log = StepLog(steps.key.shape[0])
        self._manager.log_missed(self._index, self._log)
        self.num_pages = 0

    def step(self, number: int) -> Look | None:
        """Append a step's key and value and attend its query; what was seen, if it is to be."""
        query, key, value = self._steps.at(number)
        truth = self._steps.truth.get(number)
        self._manager.append(self._index, key, value)
        self._log.looks = truth is not None
        recalls = None if truth is None else self._recalls(query, truth)
        output = self._manager.attend(self._index, query, scale=self._steps.scale)
        if truth is None:
            return None
        error = relative_error(output, truth)
        return Look(error, self._log.missed, self._log.estimated, recalls)

    def _recalls(self, query: Tensor, truth: Truth) -> Recalls | None:
        rating = self._ratings(query)
        if rating is None or rating.shape[1] == 0:
            return None
        self.num_pages = self.num_pages or rating.shape[1]
        ladder, config = ladder_of(self.num_pages), self._manager.config
        tokens = self._manager.page_tokens(self._index)
        assert tokens is not None
        pages = truth.pages(torch.from_numpy(tokens[0, :, config.num_sink_pages :]))
        mass, peak = pages.logsumexp(dim=3), pages.amax(dim=3)
        group = mass.shape[1]
        alone, highest = [], []
        for head in range(group):
            # A group of one head alone agrees on what this head rates the best.
            only = query.unflatten(1, (-1, group))[:, :, [head] * group].flatten(1, 2)
            rating_alone = self._ratings(only)
            assert rating_alone is not None
            alone.append(recall_at(rating_alone, mass[:, head], ladder))
            highest.append(recall_at(rating_alone, peak[:, head], ladder))
        return Recalls(
            recall_at(rating, mass.logsumexp(dim=1), ladder),
            torch.stack(alone).mean(dim=0),
            torch.stack(highest).mean(dim=0),
        )

    def _ratings(self, query: Tensor) -> Tensor | None:
        """By what pages are selected for a query [num_kv_heads, pages]."""
        found = self._manager.ratings(self._index, query, scale=self._steps.scale)
        return None if found is None else found[0]


class EvictedView:
    """Replays the steps of a layer through one that evicts for good."""

    num_pages = 0

    def __init__(self, layer: EvictingLayer, steps: LayerSteps) -> None:
        self._layer, self._steps = layer, steps

    def step(self, number: int) -> Look | None:
        """As `PagedView.step`."""
        query, *new = self._steps.at(number)
        key, value = self._layer.update(*new)
        scale, truth = self._steps.scale, self._steps.truth.get(number)
        self._layer.see(query, key, scale)
        if truth is None:
            return None
        output = scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)
        grouped = query[0].unflatten(0, (key.shape[1], -1))[:, :, 0].float() * scale
        kept = (grouped @ key[0].float().transpose(1, 2)).logsumexp(dim=-1, keepdim=True)
        missed = 1 - (kept - truth.log_mass).exp().clamp_(max=1).mean(dim=(1, 2))
        return Look(relative_error(output, truth), missed.double().cpu().numpy())


@dataclass(frozen=True)
class Seen:
    """What replaying a passage came to; see `Attended`."""

    num_steps: int
    num_pages: int
    ladder: list[int]
    layers: list[AttendedLayer]


def replay(recorded: Recorded, cache: DynamicCache) -> Seen:
    """Put what was recorded to a method's cache, which holds the same text."""
    views = {number: _view(cache, number, steps) for number, steps in recorded.items()}
    looks: dict[int, list[Look]] = {number: [] for number in views}
    steps = next(iter(recorded.values()))
    for step in range(steps.num_steps):
        for number, view in views.items():
            look = view.step(step)
            if look is not None:
                looks[number].append(look)
    num_pages = max(view.num_pages for view in views.values())
    layers = [_layer(number, own) for number, own in looks.items()]
    return Seen(len(steps.truth), num_pages, ladder_of(num_pages), layers)


def _view(cache: DynamicCache, number: int, steps: LayerSteps) -> PagedView | EvictedView:
    layer = cache.layers[number]
    if isinstance(layer, PagedCacheLayer):
        return PagedView(layer, steps)
    assert isinstance(layer, EvictingLayer)
    return EvictedView(layer, steps)


def _layer(number: int, looks: list[Look]) -> AttendedLayer:
    """The means over the steps of a layer."""
    error = torch.stack([look.error for look in looks]).mean(dim=0)
    missed = [look.missed for look in looks if look.missed is not None]
    estimated = [look.estimated for look in looks if look.estimated is not None]
    low = [guess < true - AUDIT_MARGIN for guess, true in zip(estimated, missed, strict=False)]
    recalls = [look.recalls for look in looks if look.recalls is not None]
    means = [torch.stack(kind).mean(dim=0).tolist() for kind in zip(*recalls, strict=True)]
    together, alone, peak = means if means else ([], [], [])
    return AttendedLayer(
        number,
        is_dense=not missed,
        recall=together,
        recall_alone=alone,
        recall_peak=peak,
        missed=np.mean(missed, axis=0).tolist() if missed else [0.0] * len(error),
        estimated=np.mean(estimated, axis=0).tolist() if estimated else None,
        low=np.mean(low, axis=0).tolist() if estimated else None,
        error=error.tolist(),
    )


def ladder_of(num_pages: int) -> list[int]:
    """The k of `LADDER` for so many pages."""
    return [k for k in LADDER if k <= num_pages]


def recall_at(rating: Tensor, truth: Tensor, ladder: Sequence[int]) -> Tensor:
    """The share of the k best pages by truth that the k best by rating hold.

    rating, truth: [rows, pages], the best the highest. Returns [rows, k], for every k of `ladder`.
    """
    order = rating.argsort(dim=1, descending=True, stable=True)
    place = truth.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    found = place.gather(1, order)
    return torch.stack([(found[:, :k] < k).float().mean(dim=1) for k in ladder], dim=1)


def relative_error(output: Tensor, truth: Truth) -> Tensor:
    """How far an output [1, heads, 1, value_dim] is off, by KV head [num_kv_heads]."""
    expected = truth.output.flatten(1)
    difference = output.float().reshape(expected.shape) - expected
    error: Tensor = difference.norm(dim=1) / expected.norm(dim=1)
    return error
