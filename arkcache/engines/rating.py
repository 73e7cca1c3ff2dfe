"""The digests of a layer's pages, and how a step rates pages by them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.engines.step import Step
from arkcache.engines.views import hidden_pages, token_bias
from arkcache.kernels.torch_hadamard import rotate
from arkcache.pages.bookkeeping import Ids
from arkcache.pages.grouping import PageTokens
from arkcache.pages.index import PageIndex, make_index, mass_index
from arkcache.pages.policy import aggregate, page_shares
from arkcache.tiering.device import Geometry
from arkcache.tiering.growing import FIRST_ENTRIES, GrowingTensor


class PageRatings:
    """Digests of every sealed page of a layer, on the device, and what they say about a query.

    Args:
        config: the cache's settings.
        geometry: sizes.
        latent: rate pages by key and value side by side (multi-head latent attention).
        listed: the tokens of grouped pages.

    Attributes:
        digests: of all pages, sinks included; None before the first is sealed.
    """

    def __init__(
        self,
        config: CacheConfig,
        geometry: Geometry,
        latent: bool,
        listed: PageTokens | None = None,
    ) -> None:
        self._config, self._geometry, self._latent = config, geometry, latent
        self._listed = listed
        index_dim = geometry.head_dim + (geometry.value_dim if latent else 0)
        self._index: PageIndex = make_index(config, index_dim, geometry.device)
        self.digests: GrowingTensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the digests."""
        return 0 if self.digests is None else self.digests.nbytes

    @property
    def are_mass(self) -> bool:
        """Whether the index rates mass, so that there are `shares`."""
        return self._index.rates == "mass"

    def use(self, index: PageIndex) -> None:
        """Rate by another index, and forget all digests."""
        self._index, self.digests = index, None

    def write(self, seqs: slice, first: int, key: Tensor, value: Tensor) -> None:
        """Digest pages [seqs, kv_heads, pages, page_size, dim] from number `first` on."""
        # Boxes fit keys better as the model made them: a rotation evens out their channels.
        key = rotate(key) if self._config.rotates_keys else key
        if self._latent:
            value = rotate(value) if self._config.rotates_values else value
            key = torch.cat((key, value), dim=-1)
        self._write(seqs, first, self._index.digest(key))

    def _write(self, seqs: slice, first: int, digest: Tensor) -> None:
        dim = self._index.page_dim
        if self.digests is None:
            shape = list(digest.shape)
            shape[0], shape[dim] = self._geometry.batch, FIRST_ENTRIES
            device = self._geometry.device
            self.digests = GrowingTensor(tuple(shape), dim, digest.dtype, device)
        self.digests.write(seqs, first, digest)

    @property
    def name(self) -> str:
        """What the index is, among those that may rate these pages."""
        return type(self._index).__name__

    def first(self, num_pages: int) -> Tensor:
        """The digests of the first pages, of which there is one at least."""
        assert self.digests is not None
        return self.digests.first(num_pages)

    def restore(self, digests: Tensor) -> None:
        """Hold what `first` gave, and nothing else."""
        self._write(slice(None), 0, digests)

    def keep_sequences(self, index: Tensor, geometry: Geometry) -> None:
        """Make sequence i what sequence `index[i]` was."""
        self._geometry = geometry
        if self.digests is not None:
            self.digests.keep_sequences(index)

    def rate(self, step: Step, sealed: Ids, max_selectable: int, *, uniform: bool) -> Tensor:
        """Rate the first `max_selectable` pages of every row, sinks apart, [rows, pages].

        sealed: pages of each sequence; uniform: all have as many tokens.
        """
        query, digests = self._inputs(step, max_selectable)
        score = self._index.score(query * step.scale, digests)
        if uniform and step.bias is None:
            return aggregate(score, self._config.score_reduction)
        outside = self._outside(sealed, max_selectable, score.device)
        hidden = hidden_pages(step, self._config, self._geometry, max_selectable, self._listed)
        hidden = hidden | outside
        score = score.masked_fill(hidden[:, None], torch.finfo(score.dtype).min)
        rating = aggregate(score, self._config.score_reduction)
        # Again, because a share of a page that exists may underflow to 0 too; pages that do not
        # exist come after those that the user's mask hides.
        rating = rating.masked_fill(hidden, torch.finfo(rating.dtype).min)
        return rating.masked_fill(outside, float("-inf"))

    def shares(
        self, step: Step, sealed: Ids, max_selectable: int, fixed: Tensor, *, uniform: bool
    ) -> Tensor:
        """Estimate which share of attention each of these pages holds [rows, pages].

        fixed [rows, group]: log mass of what the step attends anyhow.
        """
        query, digests = self._inputs(step, max_selectable)
        bias = token_bias(step, self._config, self._geometry, max_selectable, self._listed)
        index = mass_index(self._index)
        score = index.log_mass(query.float() * step.scale, digests, step.softcap, bias)
        if not uniform:
            outside = self._outside(sealed, max_selectable, score.device)
            score = score.masked_fill(outside[:, None], float("-inf"))
        return page_shares(score, fixed)

    def rank_last(self, rating: Tensor, sealed: Ids) -> Tensor:
        """Rate pages [rows, pages] that a row does not have below all that it has."""
        outside = self._outside(sealed, rating.shape[1], rating.device)
        return rating.masked_fill(outside, float("-inf"))

    def _inputs(self, step: Step, max_selectable: int) -> tuple[Tensor, Tensor]:
        """Queries [rows, group, dim] and digests of the first pages behind the sinks."""
        assert self.digests is not None
        first = self._config.num_sink_pages
        digests = self.digests.read(first, first + max_selectable)
        _, heads, _, dim = step.index_query.shape
        group = heads // self._geometry.num_kv_heads
        query = step.index_query.reshape(self._geometry.num_rows, group, dim)
        return query, digests.flatten(0, 1)

    def _outside(self, sealed: Ids, max_selectable: int, device: torch.device) -> Tensor:
        """Which of the first `max_selectable` pages a row does not have [rows, pages]."""
        own = np.repeat(sealed, self._geometry.num_kv_heads)[:, None]
        outside = torch.from_numpy(np.arange(max_selectable) >= own - self._config.num_sink_pages)
        return outside.to(device)
