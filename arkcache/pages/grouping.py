"""Which tokens share a page, where it is not those that came one after another.

Per KV head, and within segments of tokens that did come one after another, so that a page's tokens
differ from head to head. Rows are (sequence, KV head) pairs.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from arkcache.pages.bookkeeping import Ids

ROUNDS = 16
"""Of power iteration. The direction need not be exact: any along which keys spread will do."""

NUMBER_BYTES = 4
"""Of a token's number (int32)."""

FIRST_PAGES = 64
"""What there is room for at first."""


def similar_order(key: Tensor, page_size: int) -> Tensor:
    """Order the tokens of segments so that each run of `page_size` has similar keys.

    A segment is halved at the median of the top principal direction of its keys, and so are the
    halves, until they are pages: a way to the equal clusters that ClusterKV and RetroInfer find by
    k-means, without seeds and in as many sorts as there are halvings, of all segments at once. The
    direction is power iteration's, begun at the key farthest from the mean. Where keys tie, those
    that came first are taken first.

    key: [..., tokens, dim], page_size * 2^n tokens. Returns a permutation [..., tokens] (int64), in
    which the tokens of a page are in the order in which they came.
    """
    rows, (tokens, dim) = key.shape[:-2], key.shape[-2:]
    # In fp64, what rounding makes of a key does not depend on how many segments come at once.
    part = key.double().reshape(-1, tokens, dim)
    order = torch.arange(tokens, device=key.device).expand(part.shape[:2])
    while part.shape[1] > page_size:
        best = _spread(part).argsort(dim=1, descending=True, stable=True)
        halves = (-1, part.shape[1] // 2)
        order = order.gather(1, best).reshape(halves)
        part = part.gather(1, best[:, :, None].expand_as(part)).reshape(*halves, dim)
    return order.sort(dim=1).values.reshape(*rows, tokens)


def _spread(part: Tensor) -> Tensor:
    """Where the keys of parts [parts, tokens, dim] lie along their top principal direction."""
    centred = part - part.mean(dim=1, keepdim=True)
    farthest = centred.square().sum(dim=2).argmax(dim=1)
    direction = centred[torch.arange(len(part), device=part.device), farthest][:, :, None]
    for _ in range(ROUNDS):
        direction = normalize(centred.mT @ (centred @ direction), dim=1)
    return (centred @ direction)[:, :, 0]


def grouped_order(key: Tensor, sink_tokens: int, segment_tokens: int, page_size: int) -> Tensor:
    """`similar_order` of whole segments behind `sink_tokens` tokens that stay as they are.

    key: [seqs, kv_heads, tokens, dim]. Returns a permutation [seqs, kv_heads, tokens] (int64).
    """
    seqs, heads, tokens, dim = key.shape
    starts = torch.arange(sink_tokens, tokens, segment_tokens, device=key.device)
    segments = key[:, :, sink_tokens:].reshape(seqs, heads, len(starts), segment_tokens, dim)
    order = similar_order(segments, page_size) + starts[:, None]
    sinks = torch.arange(sink_tokens, device=key.device).expand(seqs, heads, -1)
    return torch.cat((sinks, order.flatten(2)), dim=2)


class PageTokens:
    """The numbers of the tokens in each sealed page of a layer, by row, on the host.

    Args:
        batch, num_kv_heads: rows.
        page_size: tokens of a page.
    """

    def __init__(self, batch: int, num_kv_heads: int, page_size: int) -> None:
        shape = (batch, num_kv_heads, FIRST_PAGES, page_size)
        self._numbers: NDArray[np.int32] = np.zeros(shape, dtype=np.int32)

    @property
    def page_bytes(self) -> int:
        """Bytes of the numbers of a page of all KV heads."""
        _, heads, _, page_size = self._numbers.shape
        return int(heads * page_size * NUMBER_BYTES)

    def write(self, seqs: slice, first: int, numbers: NDArray[np.integer]) -> None:
        """Note the tokens of pages [seqs, kv_heads, pages, page_size] from number `first` on."""
        last, room = first + numbers.shape[2], self._numbers.shape[2]
        if last > room:
            more = max(last, 2 * room) - room
            self._numbers = np.pad(self._numbers, ((0, 0), (0, 0), (0, more), (0, 0)))
        self._numbers[seqs, :, first:last] = numbers

    def first(self, num_pages: int) -> NDArray[np.int32]:
        """Those of the first pages [batch, kv_heads, num_pages, page_size]; undefined beyond a
        sequence's last sealed page."""
        return self._numbers[:, :, :num_pages]

    def of(self, pages: Ids) -> Ids:
        """Those of pages [batch, kv_heads or 1, count]: [batch, kv_heads, count, page_size]."""
        batch, heads = self._numbers.shape[:2]
        rows = np.arange(batch)[:, None, None], np.arange(heads)[:, None]
        numbers: Ids = self._numbers[*rows, pages].astype(np.int64)
        return numbers

    def pages_of(self, tokens: Ids, sealed: Ids) -> Ids:
        """The page of each token [batch, count], by row: [batch, kv_heads, count].

        sealed: pages of each sequence [batch]; what lies behind them gets a number beyond these.
        """
        batch, heads, _, page_size = self._numbers.shape
        num_pages = int(sealed.max())
        pages = np.repeat(np.arange(num_pages + 1), page_size)
        page_of = np.broadcast_to(pages, (batch, heads, len(pages))).copy()
        for sequence, count in enumerate(sealed.tolist()):
            numbers = self._numbers[sequence, :, :count].reshape(heads, -1)
            own = page_of[sequence, :, : count * page_size]
            np.put_along_axis(own, numbers.astype(np.int64), pages[: count * page_size], axis=1)
        beyond = np.minimum(tokens, num_pages * page_size)[:, None]
        return np.take_along_axis(
            page_of, np.broadcast_to(beyond, (batch, heads, tokens.shape[1])), 2
        )

    def in_order(self, sequence: int, first: int, last: int) -> Ids:
        """Where the tokens of pages first..last, whole segments, lie in these pages, the first
        token first [kv_heads, tokens]."""
        numbers = self._numbers[sequence, :, first:last]
        order: Ids = numbers.reshape(len(numbers), -1).argsort(axis=1)
        return order

    def keep_sequences(self, index: Ids) -> None:
        """Make sequence i what sequence `index[i]` was."""
        self._numbers = self._numbers[index]


def each_once(
    numbers: NDArray[np.integer], sealed: Ids, sink_pages: int, segment_pages: int
) -> bool:
    """Whether pages hold every token of their segment once, and those of the sinks in order.

    numbers: of the tokens [batch, kv_heads, pages, page_size]; sealed: pages of each sequence that
    count [batch].
    """
    page_size = numbers.shape[3]
    for own, count in zip(numbers, sealed.tolist(), strict=True):
        fixed = min(count, sink_pages)
        expected = np.arange(count * page_size)
        segments = ((count - fixed) // segment_pages, segment_pages * page_size)
        grouped = np.sort(own[:, fixed:count].reshape(len(own), *segments), axis=2)
        if (grouped != expected[fixed * page_size :].reshape(segments)).any():
            return False
        if (own[:, :fixed] != expected[: fixed * page_size].reshape(fixed, page_size)).any():
            return False
    return True


def tokens_of(pages: Ids, page_size: int, listed: PageTokens | None) -> Ids:
    """The token numbers of pages [batch, kv_heads or 1, count]: [..., count, page_size].

    listed: None is for pages of tokens that came one after another, the same for all KV heads.
    """
    if listed is not None:
        return listed.of(pages)
    tokens: Ids = pages[..., None] * page_size + np.arange(page_size)
    return tokens
