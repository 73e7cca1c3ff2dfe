"""A dense cache that says what `KVCacheManager` must answer, from the promises alone.

It keeps every key and value of every column, padding included, and derives sealed pages, sinks,
window and selection from lengths and from `kernels/reference.py` in fp32. Knows nothing of slots,
tiers or residency, and imports nothing from the manager.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from arkcache import CacheConfig
from arkcache.kernels import reference

MAX_CHOICES = 64
"""Ways to break a tie that are tried; beyond that a row is not compared."""


@dataclass
class Expected:
    """What one step may answer.

    Attributes:
        rows: per (sequence, KV head) the acceptable outputs [group, value_dim], several where
            ratings tie, none where too many tie.
        attended: tokens attended, summed over sequences, the mean over KV heads.
    """

    rows: list[list[list[Tensor]]]
    attended: float

    def check(self, output: Tensor, tolerance: float = 3e-5) -> None:
        """Fail unless `output` [batch, heads, 1, value_dim] is one of the acceptable answers."""
        batch, kv_heads = len(self.rows), len(self.rows[0])
        actual = output.float().reshape(batch, kv_heads, -1, output.shape[-1])
        for sequence, heads in enumerate(self.rows):
            for head, choices in enumerate(heads):
                if not choices:
                    continue
                errors = [float((actual[sequence, head] - one).abs().max()) for one in choices]
                best = min(math.inf if math.isnan(error) else error for error in errors)
                scale = max(1.0, float(choices[0].abs().max()))
                assert best <= tolerance * scale, f"{sequence=} {head=}: off by {errors}"


@dataclass
class Oracle:
    """The dense twin of a manager: call it alongside, compare what both say.

    Attributes:
        real: [batch, columns], which columns hold tokens.
        keys, values: per layer [batch, kv_heads, columns, dim].
        latent: pages are rated by key and value side by side.
    """

    num_layers: int
    num_kv_heads: int
    config: CacheConfig
    latent: bool = False
    real: Tensor | None = None
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    # -- the same verbs as the manager's ------------------------------------------------------

    def append(self, layer: int, key: Tensor, value: Tensor, mask: Tensor | None = None) -> None:
        if self.real is None:
            self.real = torch.ones(key.shape[0], 0, dtype=torch.bool)
            self.keys = [key[:, :, :0]] * self.num_layers
            self.values = [value[:, :, :0]] * self.num_layers
        self.keys[layer] = torch.cat((self.keys[layer], key), dim=2)
        self.values[layer] = torch.cat((self.values[layer], value), dim=2)
        unknown = self.keys[layer].shape[2] - self.real.shape[1]
        if unknown > 0:
            if mask is None:
                mask = torch.ones(key.shape[0], unknown, dtype=torch.bool)
            self.real = torch.cat((self.real, mask[:, -unknown:]), dim=1)

    def crop(self, num_columns: int) -> None:
        if self.real is not None:
            self.real = self.real[:, :num_columns]
            self.keys = [key[:, :, :num_columns] for key in self.keys]
            self.values = [value[:, :, :num_columns] for value in self.values]

    def keep_sequences(self, index: Tensor) -> None:
        if self.real is not None:
            self.real = self.real[index]
            self.keys = [key[index] for key in self.keys]
            self.values = [value[index] for value in self.values]

    def reset(self) -> None:
        self.real, self.keys, self.values = None, [], []

    # -- what must hold -------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return 0 if self.real is None else self.real.shape[0]

    @property
    def num_columns(self) -> int:
        return 0 if self.real is None else self.real.shape[1]

    def columns(self, layer: int, sequence: int) -> Tensor:
        """The columns that hold a sequence's tokens, in order."""
        assert self.real is not None
        return self.real[sequence, : self.keys[layer].shape[2]].nonzero()[:, 0]

    def sealed(self, layer: int, sequence: int) -> int:
        """Pages that are full and older than the recent window."""
        length = len(self.columns(layer, sequence))
        return max(0, (length - self.config.num_recent_tokens) // self.config.page_size)

    def gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and values, zeros for padding."""
        assert self.real is not None
        key, value = self.keys[layer], self.values[layer]
        real = self.real[:, None, : key.shape[2], None]
        return torch.where(real, key, 0), torch.where(real, value, 0)

    def host_pages(self) -> int:
        """Sealed pages of all paged layers and sequences, shared or not."""
        paged = [i for i in range(self.num_layers) if self.config.budget_of(i) is not None]
        return sum(self.sealed(i, s) for i in paged for s in range(self.batch)) if self.keys else 0

    def attend_one(
        self, layer: int, query: Tensor, *, index_query: Tensor | None = None, **how: Any
    ) -> Expected:
        """What one new token attends: sinks, the best pages and the window, per KV head.

        how: scale, softcap, sinks, mask and expand, as `KVCacheManager.attend` takes them.
        """
        scale = how.get("scale") or query.shape[3] ** -0.5
        group = query.shape[1] // self.num_kv_heads
        rating_query = (query if index_query is None else index_query).float() * scale
        rows: list[list[list[Tensor]]] = []
        attended = 0.0
        for sequence in range(self.batch):
            rows.append([])
            for head in range(self.num_kv_heads):
                own = slice(head * group, (head + 1) * group)
                hidden = self._hidden_pages(layer, sequence, own, how.get("mask"))
                choices = self._token_choices(
                    layer, sequence, head, rating_query[sequence, own, 0], hidden
                )
                attended += len(choices[0]) / self.num_kv_heads
                if len(choices) > MAX_CHOICES:
                    choices = []
                outputs = [
                    self._attend_tokens(layer, sequence, head, tokens, query[:, own], how)
                    for tokens in choices
                ]
                rows[-1].append(outputs)
        return Expected(rows, attended)

    def attend_many(self, layer: int, query: Tensor, **how: Any) -> Tensor:
        """What several new tokens attend: everything up to their own column."""
        assert self.real is not None
        key, value = self.keys[layer], self.values[layer]
        if how.get("expand") is not None:
            key, value = how["expand"](key, value)
        columns = key.shape[2]
        position = torch.arange(columns)
        causal = position <= position[columns - query.shape[2] :, None]
        mask = _as_additive(causal & self.real[:, None, None, :columns])
        if how.get("mask") is not None:
            mask = mask + _as_additive(how["mask"])
        return reference.attention(
            query,
            key,
            value,
            scale=how.get("scale") or query.shape[3] ** -0.5,
            softcap=how.get("softcap"),
            sinks=how.get("sinks"),
            mask=mask,
        )

    # -- one row --------------------------------------------------------------------------------

    def num_selected(self, layer: int, head: int) -> int:
        """Whole pages that fit the budget beside the sinks and a window one token short of full."""
        config, budget = self.config, self.config.budget_of(layer, head)
        assert budget is not None
        sinks = math.ceil(config.num_sink_tokens / config.page_size) * config.page_size
        window = config.num_recent_tokens + config.page_size - 1
        return max(0, (budget - sinks - window) // config.page_size)

    def _hidden_pages(
        self, layer: int, sequence: int, heads: slice, mask: Tensor | None
    ) -> list[int]:
        """Selectable pages of which the user's mask lets none of these query heads see a token."""
        if mask is None or self.config.budget_of(layer, 0) is None:
            return []
        page_size = self.config.page_size
        columns = self.columns(layer, sequence)
        sinks = math.ceil(self.config.num_sink_tokens / page_size) * page_size
        columns = columns[sinks : self.sealed(layer, sequence) * page_size]
        own = _as_additive(mask).expand(self.batch, -1, -1, -1)[sequence, :, 0]
        own = own[heads] if own.shape[0] > 1 else own
        seen = (own[:, columns] > -math.inf).any(dim=0).unflatten(0, (-1, page_size)).any(dim=1)
        return torch.nonzero(~seen).flatten().tolist()

    def _token_choices(
        self, layer: int, sequence: int, head: int, query: Tensor, hidden: Sequence[int] = ()
    ) -> list[list[int]]:
        """The acceptable lists of tokens that a row attends; the first is the likeliest."""
        length = len(self.columns(layer, sequence))
        if self.config.budget_of(layer, head) is None:
            return [list(range(length))]
        page_size, sealed = self.config.page_size, self.sealed(layer, sequence)
        first = min(sealed, math.ceil(self.config.num_sink_tokens / page_size))
        fixed = [*range(first * page_size), *range(sealed * page_size, length)]
        wanted = self.num_selected(layer, head)
        if sealed - first <= wanted:
            return [list(range(length))]
        visible = [page for page in range(sealed - first) if page not in hidden]
        if len(visible) <= wanted:  # what else is selected is masked and changes nothing
            options = [list(range(len(visible)))]
            visible += list(hidden)
            options[0] += range(len(options[0]), wanted)
        else:
            rating, noise = self.rate(layer, sequence, head, query, visible)
            options = list(itertools.islice(page_choices(rating, wanted, noise), MAX_CHOICES + 1))
        choices = []
        for pages in options:
            starts = [(first + visible[page]) * page_size for page in pages]
            choices.append(fixed + [s + i for s in starts for i in range(page_size)])
        return choices

    def rate(
        self,
        layer: int,
        sequence: int,
        head: int,
        query: Tensor,
        visible: list[int] | None = None,
    ) -> tuple[Tensor, float]:
        """Ratings [pages] of a row's selectable (and visible) pages for its queries [group, dim].

        The second number is their rounding error. Shares of probability have a relative one only.
        """
        columns = self.columns(layer, sequence)
        page_size = self.config.page_size
        sinks = math.ceil(self.config.num_sink_tokens / page_size) * page_size
        columns = columns[sinks : self.sealed(layer, sequence) * page_size]
        key = self.keys[layer][sequence, head, columns]
        if self.latent:
            key = torch.cat((key, self.values[layer][sequence, head, columns]), dim=-1)
        pages = key.float().unflatten(0, (-1, page_size))[None]
        if self.config.index == "tokens":
            score = reference.token_score(query[None], *stored_codes(pages, self.config.index_bits))
        else:
            digest = reference.bounding_volume(pages, self.config.index)
            score = reference.volume_score(query[None], digest, self.config.index)
        score = score if visible is None else score[:, :, visible]
        noise = 1e-5 * float(score.abs().max())
        if score.shape[1] == 1:  # one query head has nobody to agree with
            return score[0, 0], noise
        rating = reference.aggregate(score, self.config.group_reduction)[0]
        return rating, 1e-30 if self.config.group_reduction == "softmax-mean" else noise

    def _attend_tokens(
        self,
        layer: int,
        sequence: int,
        head: int,
        tokens: list[int],
        query: Tensor,
        how: dict[str, Any],
    ) -> Tensor:
        """Attend a row's tokens densely: query [batch, group, 1, dim]; gives [group, value_dim]."""
        columns = self.columns(layer, sequence)[tokens]
        key = self.keys[layer][sequence : sequence + 1, head : head + 1, columns]
        value = self.values[layer][sequence : sequence + 1, head : head + 1, columns]
        group = query.shape[1]
        own = slice(head * group, (head + 1) * group)
        sinks, mask, expand = how.get("sinks"), how.get("mask"), how.get("expand")
        if expand is not None:
            key, value = expand(key, value)
        if mask is not None:
            shape = (self.batch, -1, -1, -1)
            mask = _as_additive(mask).expand(shape)[sequence : sequence + 1, ..., columns]
            mask = mask[:, own] if mask.shape[1] > 1 else mask
        return reference.attention(
            query[sequence : sequence + 1],
            key,
            value,
            scale=how.get("scale") or query.shape[3] ** -0.5,
            softcap=how.get("softcap"),
            sinks=None if sinks is None else sinks[own],
            mask=mask,
        )[0, :, 0]


def page_choices(rating: Tensor, wanted: int, noise: float) -> Iterator[list[int]]:
    """The sets of `wanted` pages that are best up to rounding; one set where nothing ties.

    noise: the absolute rounding error of a rating, beside a thousandth of its size.
    """
    if wanted == 0:
        return iter([[]])
    edge = rating.sort(descending=True).values[wanted - 1]
    slack = 1e-3 * edge.abs() + noise
    sure = (rating > edge + slack).nonzero()[:, 0].tolist()
    tied = ((rating - edge).abs() <= slack).nonzero()[:, 0].tolist()
    ways = itertools.combinations(tied, wanted - len(sure))
    return (sure + list(way) for way in ways)


def stored_codes(key: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero of pages of keys [..., page_size, dim], with bf16 scales and zeros."""
    low, high = key.amin(dim=-2, keepdim=True), key.amax(dim=-2, keepdim=True)
    zero = low.bfloat16().float()
    scale = ((high - zero) / (2**bits - 1)).bfloat16().float()
    codes = ((key - zero) / torch.where(scale == 0, 1.0, scale)).round().clamp(0, 2**bits - 1)
    return codes, scale, zero


def _as_additive(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
