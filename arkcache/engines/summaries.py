"""Estimating the pages that a decode step leaves out (RetroInfer's estimation zone).

A page of n tokens with logits l_t = q.k_t adds sum exp(l_t) v_t to the numerator of attention and
sum exp(l_t) to its denominator. Where it is not attended, one pseudo token stands for it: its mean
key, its mean value, and ln n added to the logit, so that it adds n exp(q.mean(k)) mean(v) and
n exp(q.mean(k)). By Jensen's inequality that weight is never too large; it is exact where the
page's keys are equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from math import log
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.engines.step import Step
from arkcache.engines.views import Held, page_bias
from arkcache.pages.bookkeeping import Ids
from arkcache.pages.grouping import PageTokens
from arkcache.tiering.device import Geometry
from arkcache.tiering.growing import FIRST_ENTRIES, GrowingTensor


class PseudoTokens(NamedTuple):
    """One token for each page that is estimated, attended after a view's own tokens.

    key, value [batch, kv_heads, pages, dim] in the basis of the stored ones; mask, additive
    [batch, kv_heads, group or 1, pages]: ln n, or -inf for a page that is not to be estimated.
    """

    key: Tensor
    value: Tensor
    mask: Tensor

    def after(
        self, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A view's key, value [batch, kv_heads, tokens, dim] and mask, with these at its end."""
        mask = self.after_mask(mask, key.shape[2])
        return torch.cat((key, self.key), dim=2), torch.cat((value, self.value), dim=2), mask

    def after_parts(
        self, parts: Iterator[tuple[Tensor, Tensor]], mask: Tensor | None, num_tokens: int
    ) -> tuple[Iterator[tuple[Tensor, Tensor]], Tensor]:
        """`after`, for a view of `num_tokens` tokens that comes in parts."""
        return chain(parts, [(self.key, self.value)]), self.after_mask(mask, num_tokens)

    def after_mask(self, mask: Tensor | None, num_tokens: int) -> Tensor:
        """The mask of a view (None: all is attended) with that of these at its end."""
        if mask is None:
            mask = self.mask.new_zeros((1, 1, 1, num_tokens))
        rows = torch.broadcast_shapes(mask.shape[:3], self.mask.shape[:3])
        return torch.cat((mask.expand(*rows, -1), self.mask.expand(*rows, -1)), dim=3)


class PageSummaries:
    """Mean key and mean value of every sealed page of a layer, on the device.

    They are those of the page as it was sealed, before it was quantised, in the model's dtype.

    Args:
        config: the cache's settings; `estimate_pages` is not 0.
        geometry: sizes.
        listed: the tokens of grouped pages.
    """

    def __init__(
        self, config: CacheConfig, geometry: Geometry, listed: PageTokens | None = None
    ) -> None:
        self._config, self._geometry, self._listed = config, geometry, listed
        shape = (geometry.batch, geometry.num_kv_heads, FIRST_ENTRIES)
        self._key, self._value = (
            GrowingTensor((*shape, dim), 2, geometry.dtype, geometry.device)
            for dim in (geometry.head_dim, geometry.value_dim)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self._key.nbytes + self._value.nbytes

    def write(self, seqs: slice, first: int, key: Tensor, value: Tensor) -> None:
        """Summarise pages [seqs, kv_heads, pages, page_size, dim] from number `first` on."""
        self._key.write(seqs, first, key.mean(dim=3))
        self._value.write(seqs, first, value.mean(dim=3))

    def state(self, num_pages: int) -> dict[str, Tensor]:
        """What is held of the first pages."""
        return {
            "digest_mean_key": self._key.first(num_pages),
            "digest_mean_value": self._value.first(num_pages),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Hold what `state` gave."""
        self._key.write(slice(None), 0, state["digest_mean_key"])
        self._value.write(slice(None), 0, state["digest_mean_value"])

    def keep_sequences(self, index: Tensor, geometry: Geometry) -> None:
        """Make sequence i what sequence `index[i]` was."""
        self._geometry = geometry
        self._key.keep_sequences(index)
        self._value.keep_sequences(index)

    def estimate(self, step: Step, left_out: Held, rating: Tensor | None) -> PseudoTokens | None:
        """The pseudo tokens of a step; None where no page is left out.

        Args:
            step: how its token attends.
            left_out: selectable pages that exist and are not attended [rows, pages].
            rating: of those pages [rows, pages], by which the best `estimate_pages` are taken;
                None is for a step that left out nothing, and where all are estimated.
        """
        if not left_out.any():
            return None
        first, num_pages = self._config.num_sink_pages, left_out.shape[1]
        key, value = (plane.read(first, first + num_pages) for plane in (self._key, self._value))
        pages, limit = None, self._config.estimate_pages
        if limit is not None and limit < num_pages:
            assert rating is not None
            on_device = torch.from_numpy(left_out).to(rating.device)
            best = rating.masked_fill(~on_device, float("-inf")).topk(limit, dim=1).indices
            pages = best.cpu().numpy()
            left_out = np.take_along_axis(left_out, pages, axis=1)
            best = best.unflatten(0, key.shape[:2])[..., None]
            key, value = (
                plane.gather(2, best.expand(-1, -1, -1, plane.shape[3])) for plane in (key, value)
            )
        return PseudoTokens(key, value, self._mask(step, left_out, pages))

    def _mask(self, step: Step, left_out: Held, pages: Ids | None) -> Tensor:
        """ln n of selectable pages [rows, pages] that are left out; pages: None is all in order."""
        config, geometry = self._config, self._geometry
        weight = np.where(left_out, np.float32(log(config.page_size)), np.float32(-np.inf))
        rows = (geometry.batch, geometry.num_kv_heads)
        on_device = torch.from_numpy(weight).to(geometry.device)
        mask: Tensor = on_device.view(*rows, 1, left_out.shape[1])
        if step.bias is None:
            return mask
        if pages is None:
            numbers = np.broadcast_to(np.arange(left_out.shape[1]), (rows[0], 1, left_out.shape[1]))
        else:
            numbers = pages.reshape(*rows, -1)
        return mask + page_bias(step, config, numbers + config.num_sink_pages, self._listed)
