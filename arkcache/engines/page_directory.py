"""The page directory: of each sealed page its digest, its mean and its address in the host tier.

All grow with the context, page by page; what grows changes its address, so `reserve` before a step
is captured in a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.engines.engine import State
from arkcache.kernels.arguments import Scores
from arkcache.kernels.torch_digest import num_features
from arkcache.kernels.torch_tokens import digest_bytes
from arkcache.kernels.triton_score import score_tokens, score_volumes
from arkcache.pages.bookkeeping import Ids
from arkcache.tiering.device import Geometry
from arkcache.tiering.growing import FIRST_ENTRIES, GrowingTensor
from arkcache.tiering.transfer import upload


class PageDirectory:
    """What is known of every sealed page of a layer, on the device, whether it is recalled or not.

    Digests [batch, kv_heads, pages, features] and lines of the host tier [..., pages]; where
    pages are estimated, their mean keys and mean values side by side [..., pages, both dims].

    Args:
        config: the cache's settings.
        geometry: sizes.
    """

    def __init__(self, config: CacheConfig, geometry: Geometry) -> None:
        self._config, self._geometry = config, geometry
        pages = max(FIRST_ENTRIES, config.num_sink_pages)
        shape = (geometry.batch, geometry.num_kv_heads, pages)
        dtype = torch.uint8 if config.index == "tokens" else geometry.dtype
        features = digest_features(config, geometry.head_dim)
        self._digests = GrowingTensor((*shape, features), 2, dtype, geometry.device)
        self._located = GrowingTensor(shape, 2, torch.int64, geometry.device)
        self._means: GrowingTensor | None = None
        if config.estimates:
            dims = geometry.head_dim + geometry.value_dim
            self._means = GrowingTensor((*shape, dims), 2, geometry.dtype, geometry.device)

    @property
    def _all(self) -> list[GrowingTensor]:
        means = [] if self._means is None else [self._means]
        return [self._digests, self._located, *means]

    @property
    def num_pages(self) -> int:
        """Pages of a sequence that there is room for."""
        return self._located.capacity

    @property
    def addresses(self) -> tuple[int, ...]:
        """How many pages there is room for, and where."""
        return self.num_pages, *(tensor.data.data_ptr() for tensor in self._all)

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return sum(tensor.nbytes for tensor in self._all)

    @property
    def digests(self) -> Tensor:
        """Digests of every row's pages [rows, pages, features]."""
        return self._digests.data.flatten(0, 1)

    @property
    def means(self) -> Tensor | None:
        """Mean key and mean value of every row's pages [rows, pages, head_dim + value_dim], as they
        were sealed, before they were quantised; None where no page is estimated."""
        return None if self._means is None else self._means.data.flatten(0, 1)

    @property
    def located(self) -> Tensor:
        """Line of the host tier that holds a page, int64 [rows, pages]."""
        return self._located.data.flatten(0, 1)

    def reserve(self, num_pages: int) -> None:
        """Make room for so many pages of every sequence."""
        for tensor in self._all:
            tensor.reserve(num_pages)

    def locate(self, seqs: slice, first: int, lines: Ids) -> None:
        """Note where pages from `first` on are: lines [seqs, kv_heads, pages]."""
        self.reserve(first + lines.shape[2])
        self._located.write(seqs, first, upload(lines, self._geometry.device))

    def state(self, num_pages: int) -> State:
        """What is known of the first pages, but for where they are."""
        means = {} if self._means is None else {"digest_means": self._means.first(num_pages)}
        return {"digests": self._digests.first(num_pages), **means}

    def restore(self, state: State) -> None:
        """Know what `state` gave."""
        self.reserve(state["digests"].shape[2])
        self._digests.write(slice(None), 0, state["digests"])
        if self._means is not None:
            self._means.write(slice(None), 0, state["digest_means"])

    def score(
        self,
        query: Tensor,
        sealed: Tensor,
        scale: float,
        hidden: Tensor | None,
        softcap: float | None = None,
        bias: Tensor | None = None,
    ) -> Scores:
        """Rate all pages but the sinks for queries [rows, group, dim]; see `triton_score`.

        softcap, bias: of an index that rates mass, where all that attention does is to be part of
        it; None elsewhere.
        """
        config = self._config
        if config.index == "tokens":
            return score_tokens(
                query,
                self.digests,
                sealed,
                num_sink_pages=config.num_sink_pages,
                page_size=config.page_size,
                bits=config.packed_index_bits,
                scale=scale,
                hidden=hidden,
                softcap=softcap,
                bias=bias,
            )
        return score_volumes(
            query,
            self.digests,
            sealed,
            num_sink_pages=config.num_sink_pages,
            kind=config.index,
            scale=scale,
            hidden=hidden,
        )

    def keep_sequences(self, index: Tensor, geometry: Geometry) -> None:
        """Make sequence i what sequence `index[i]` was."""
        self._geometry = geometry
        for tensor in self._all:
            tensor.keep_sequences(index)


def digest_features(config: CacheConfig, head_dim: int) -> int:
    """Numbers of a page's digest; bytes, for the token index."""
    if config.index == "tokens":
        return digest_bytes(head_dim, config.page_size, config.packed_index_bits)
    return num_features(config.index, head_dim)
