"""Bounding volumes as page digests (ArkVale, section 5.2), scored as one matrix product.

Every volume's score is linear in a few numbers per page once the query is mapped to features:

    cuboid    q.c + |q|.r      features [q, |q|]      digest [c, r]      2 * head_dim numbers
    sphere    q.c + ||q|| r    features [q, ||q||]    digest [c, r]      head_dim + 1
    centroid  q.mean(k)        features q             digest mean(k)     head_dim

so that rating all pages is `features @ digests`, with digests stored [batch, kv_head, features,
pages]: the layout that the matrix product reads fastest (measured 15 us against 26 us for
[pages, features] at 2048 pages of head_dim 64, 197 against 330 us at 8192).
"""

from __future__ import annotations

import torch
from torch import Tensor


def num_features(kind: str, head_dim: int) -> int:
    """Numbers of a page's digest, for the index named so."""
    sizes = {"cuboid": 2 * head_dim, "sphere": head_dim + 1, "centroid": head_dim}
    return sizes[kind.partition("-")[0]]


class BoundingVolumes:
    """The index named "cuboid-mean" and its six siblings.

    Args:
        kind: "cuboid-mean", "cuboid-max", "cuboid-center", the same for "sphere", or "centroid".
    """

    page_dim = 3
    rates = "bound"

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.shape, _, self.radius = kind.partition("-")

    def digest(self, key: Tensor) -> Tensor:
        """Digest pages [batch, kv_heads, pages, page_size, head_dim].

        Returns [batch, kv_heads, features, pages] in the keys' dtype.
        """
        if self.shape == "centroid":
            return key.mean(dim=-2).transpose(-1, -2)
        low, high = torch.aminmax(key, dim=-2)
        center = (low + high) / 2
        distance = (key - center.unsqueeze(-2)).abs_()
        if self.shape == "sphere":
            distance = torch.linalg.vector_norm(distance, dim=-1, keepdim=True)
        digest = torch.cat((center, self._radius(distance)), dim=-1)
        return digest.transpose(-1, -2)

    def score(self, query: Tensor, digests: Tensor) -> Tensor:
        """Rate pages: query [rows, group, head_dim], digests [rows, features, pages].

        Returns [rows, group, pages].
        """
        return torch.bmm(self._features(query), digests)

    def _radius(self, distance: Tensor) -> Tensor:
        """Equations 2 and 4, over the tokens of each page."""
        if self.radius == "mean":
            return distance.mean(dim=-2)
        if self.radius == "max":
            return distance.amax(dim=-2)
        low, high = torch.aminmax(distance, dim=-2)
        return (low + high) / 2

    def _features(self, query: Tensor) -> Tensor:
        if self.shape == "cuboid":
            return torch.cat((query, query.abs()), dim=-1)
        if self.shape == "sphere":
            norm = torch.linalg.vector_norm(query, dim=-1, keepdim=True)
            return torch.cat((query, norm), dim=-1)
        return query
