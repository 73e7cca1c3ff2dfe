"""A dense cache that says what `KVCacheManager` must answer, from the promises alone.

It keeps every key and value of every column, padding included, and derives sealed pages, sinks,
window and selection from lengths and from `kernels/reference.py` in fp32. Knows nothing of slots,
tiers or page tables, and imports nothing from the manager.

Where tokens are grouped it is told which token is in which page (`group`), for each KV head; which
those should be is for the tests of `pages/grouping.py`.

With `estimate_pages`, pages that are not attended are one pseudo token each: the means of what was
sealed, ln(page_size) added to its logit.

Where pages are quantised, a token is from its sealing on what packing and unpacking its page gives,
and pages are rated by the keys that were sealed. The kernels that rotate and pack are the library's
own: their tests compare them with `kernels/reference.py`, and an element that two computations of
one rotation round to either side of a step would differ by all of the step.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arkcache import CacheConfig
from arkcache.formats import PageFormat, PageLayout
from arkcache.kernels import reference
from arkcache.kernels.torch_hadamard import rotate
from arkcache.kernels.torch_pages import PagePacker

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


class Choice(NamedTuple):
    """Tokens that a row attends, and pages that it estimates."""

    tokens: list[int]
    estimated: list[int]


@dataclass
class Oracle:
    """The dense twin of a manager: call it alongside, compare what both say.

    Attributes:
        real: [batch, columns], which columns hold tokens.
        keys, values: per layer [batch, kv_heads, columns, dim], rotated where the settings say so,
            and quantised where they are sealed.
        stored: per layer, key and value side by side as they were sealed, before quantising
            [batch, kv_heads, columns, dim + dim]: what pages are rated and estimated by.
        quantised: per layer, pages of each sequence that went through `_seal`.
        coarse: per layer, the pages (sequence, KV head, number) that were demoted.
        groups: per layer the tokens of sealed pages [batch, kv_heads, pages, page_size], if told.
        latent: pages are rated by key and value side by side.
        backend: of the manager: numba's kernels keep boxes in bf16.
    """

    num_layers: int
    num_kv_heads: int
    config: CacheConfig
    latent: bool = False
    backend: str = "torch"
    real: Tensor | None = None
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    stored: list[Tensor] = field(default_factory=list)
    quantised: list[list[int]] = field(default_factory=list)
    coarse: list[set[tuple[int, int, int]]] = field(default_factory=list)
    groups: dict[int, Tensor] = field(default_factory=dict)

    # -- the same verbs as the manager's ------------------------------------------------------

    def append(self, layer: int, key: Tensor, value: Tensor, mask: Tensor | None = None) -> None:
        key = rotate(key) if self.config.rotates_keys else key
        value = rotate(value) if self.config.rotates_values else value
        if self.real is None:
            self.real = torch.ones(key.shape[0], 0, dtype=torch.bool)
            self.keys = [key[:, :, :0]] * self.num_layers
            self.values = [value[:, :, :0]] * self.num_layers
            self.stored = [torch.cat((key, value), dim=3)[:, :, :0]] * self.num_layers
            self.quantised = [[0] * key.shape[0] for _ in range(self.num_layers)]
            self.coarse = [set() for _ in range(self.num_layers)]
        self.keys[layer] = torch.cat((self.keys[layer], key), dim=2)
        self.values[layer] = torch.cat((self.values[layer], value), dim=2)
        unknown = torch.full_like(torch.cat((key, value), dim=3), math.nan)  # until it is sealed
        self.stored[layer] = torch.cat((self.stored[layer], unknown), dim=2)
        new = self.keys[layer].shape[2] - self.real.shape[1]
        if new > 0:
            if mask is None:
                mask = torch.ones(key.shape[0], new, dtype=torch.bool)
            self.real = torch.cat((self.real, mask[:, -new:]), dim=1)
        for sequence in range(self.batch):
            self._seal(layer, sequence)

    def group(self, layer: int, numbers: Tensor) -> None:
        """The tokens of pages [batch, kv_heads, pages, page_size]: before they are sealed here."""
        self.groups[layer] = numbers

    def demote(self, layer: int, pages: set[tuple[int, int, int]]) -> None:
        """These pages (sequence, KV head, number) are coarse now; those that were stay so."""
        assert self.coarse[layer] <= pages, "a page was promoted"
        coarse = self.config.coarse_format
        new: dict[tuple[int, int], list[int]] = {}
        for sequence, head, page in pages - self.coarse[layer]:
            assert page < self.quantised[layer][sequence], "a page was demoted before it was sealed"
            new.setdefault((sequence, head), []).append(page)
        for (sequence, head), own in new.items():
            assert coarse is not None
            tokens = torch.tensor(own)[:, None] * self.config.page_size
            tokens = (tokens + torch.arange(self.config.page_size)).flatten()
            columns = self.row_columns(layer, sequence, head)[tokens]
            self._quantise(layer, sequence, slice(head, head + 1), columns, coarse)
        self.coarse[layer] = set(pages)

    def crop(self, num_columns: int) -> None:
        if self.real is None:
            return
        self.real = self.real[:, :num_columns]
        self.keys = [key[:, :, :num_columns] for key in self.keys]
        self.values = [value[:, :, :num_columns] for value in self.values]
        self.stored = [stored[:, :, :num_columns] for stored in self.stored]
        for layer, counts in enumerate(self.quantised):
            counts[:] = [min(n, self.sealed(layer, i)) for i, n in enumerate(counts)]
            self.coarse[layer] = {page for page in self.coarse[layer] if page[2] < counts[page[0]]}

    def keep_sequences(self, index: Tensor) -> None:
        if self.real is None:
            return
        self.real = self.real[index]
        self.keys = [key[index] for key in self.keys]
        self.values = [value[index] for value in self.values]
        self.stored = [stored[index] for stored in self.stored]
        order = index.tolist()
        self.quantised = [[counts[i] for i in order] for counts in self.quantised]
        self.coarse = [
            {(new, *page[1:]) for new, old in enumerate(order) for page in pages if page[0] == old}
            for pages in self.coarse
        ]

    def reset(self) -> None:
        self.real, self.keys, self.values, self.stored = None, [], [], []
        self.quantised, self.coarse, self.groups = [], [], {}

    # -- what sealing does ----------------------------------------------------------------------

    def _seal(self, layer: int, sequence: int) -> None:
        """Quantise the pages that have filled since, after noting what they were."""
        first, last = self.quantised[layer][sequence], self.sealed(layer, sequence)
        self.quantised[layer][sequence] = last
        page_size = self.config.page_size
        columns = self.columns(layer, sequence)[first * page_size : last * page_size]
        if len(columns):
            states = [plane[layer][sequence, :, columns] for plane in (self.keys, self.values)]
            self.stored[layer][sequence, :, columns] = torch.cat(states, dim=-1)
            for head in range(self.num_kv_heads):
                own = self.row_columns(layer, sequence, head)[first * page_size : last * page_size]
                only = slice(head, head + 1)
                self._quantise(layer, sequence, only, own, self.config.format)

    def _quantise(
        self, layer: int, sequence: int, heads: slice, columns: Tensor, page_format: PageFormat
    ) -> None:
        """Let whole pages of these heads be what packing and unpacking them gives."""
        if page_format.is_raw:
            return
        planes = [plane[layer] for plane in (self.keys, self.values)]
        page_size, dtype = self.config.page_size, planes[0].dtype
        dims = (planes[0].shape[3], planes[1].shape[3])
        packer = PagePacker(PageLayout(page_format, page_size, *dims, dtype.itemsize), dtype)
        pages = [
            plane[sequence, heads][:, columns].unflatten(1, (-1, page_size)) for plane in planes
        ]
        for plane, kept in zip(planes, packer.unpack(packer.pack(*pages)), strict=True):
            plane[sequence, heads, columns] = kept.flatten(1, 2)

    @property
    def _dims(self) -> list[int]:
        """Of keys and of values."""
        return [plane[0].shape[3] for plane in (self.keys, self.values)]

    def _as_made(self, key: Tensor, value: Tensor) -> Tensor:
        """What pages are rated by: the keys (and the values of latents) as the model made them."""
        key = rotate(key) if self.config.rotates_keys else key.clone()
        value = rotate(value) if self.config.rotates_values and self.latent else value
        return torch.cat((key, value), dim=-1) if self.latent else key

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

    def row_columns(self, layer: int, sequence: int, head: int) -> Tensor:
        """The same, page by page as this KV head has them."""
        columns, end = self.columns(layer, sequence), self.sealed(layer, sequence)
        if layer not in self.groups:
            return columns
        tokens = self.groups[layer][sequence, head, :end].flatten()
        return torch.cat((columns[tokens], columns[len(tokens) :]))

    def sealed(self, layer: int, sequence: int) -> int:
        """Pages that are full and older than the recent window; grouped ones by whole segments,
        which begin behind the sinks."""
        config, length = self.config, len(self.columns(layer, sequence))
        pages = max(0, (length - config.num_recent_tokens) // config.page_size)
        sinks = math.ceil(config.num_sink_tokens / config.page_size)
        if config.grouping is None or pages < sinks:
            return pages
        segment = config.segment_tokens // config.page_size
        return pages - (pages - sinks) % segment

    def gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and values, zeros for padding."""
        assert self.real is not None
        real = self.real[:, None, : self.keys[layer].shape[2], None]
        return self._unrotated(
            torch.where(real, self.keys[layer], 0), torch.where(real, self.values[layer], 0)
        )

    def attended(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all columns as they are attended, in fp32."""
        return self._unrotated(self.keys[layer].float(), self.values[layer].float())

    def _unrotated(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        key = rotate(key) if self.config.rotates_keys else key
        return key, rotate(value) if self.config.rotates_values else value

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
        states, attended = self.attended(layer), 0.0
        for sequence in range(self.batch):
            rows.append([])
            for head in range(self.num_kv_heads):
                own = slice(head * group, (head + 1) * group)
                hidden = self._hidden_pages(layer, sequence, own, how.get("mask"))
                rated, row = rating_query[sequence, own, 0], (layer, sequence, head)
                dense = self.config.budget_of(layer, head) is None
                shares = None
                if self.config.orders_by_share(group) and not dense:
                    shares = self.shares(states, row, rated, query[sequence, own, 0], how)
                if self.config.target_missed_mass is None or dense:
                    choices = self.choices(*row, rated, hidden, shares)
                else:
                    assert shares is not None
                    choices = self._covering_choices(row, shares)
                attended += len(choices[0].tokens) / self.num_kv_heads
                if len(choices) > MAX_CHOICES:
                    choices = []
                outputs = [
                    self._attend_choice(states, (layer, sequence, head), choice, query[:, own], how)
                    for choice in choices
                ]
                rows[-1].append(outputs)
        return Expected(rows, attended)

    def attend_many(self, layer: int, query: Tensor, **how: Any) -> Tensor:
        """What several new tokens attend: everything up to their own column."""
        assert self.real is not None
        key, value = self.attended(layer)
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
            sink_logits=how.get("sinks"),
            mask=mask,
        )

    # -- one row --------------------------------------------------------------------------------

    def num_selected(self, layer: int, head: int) -> int:
        """Whole pages that fit the budget beside the sinks and a window one token short of full."""
        config, budget = self.config, self.config.budget_of(layer, head)
        assert budget is not None
        sinks = math.ceil(config.num_sink_tokens / config.page_size) * config.page_size
        waiting = config.page_size if config.grouping is None else config.segment_tokens
        window = config.num_recent_tokens + waiting - 1
        return max(0, (budget - sinks - window) // config.page_size)

    def _hidden_pages(
        self, layer: int, sequence: int, heads: slice, mask: Tensor | None
    ) -> list[int]:
        """Selectable pages of which the user's mask lets none of these query heads see a token."""
        if mask is None or self.config.budget_of(layer, 0) is None:
            return []
        page_size = self.config.page_size
        columns = self.row_columns(layer, sequence, heads.start // (heads.stop - heads.start))
        sinks = math.ceil(self.config.num_sink_tokens / page_size) * page_size
        columns = columns[sinks : self.sealed(layer, sequence) * page_size]
        own = _as_additive(mask).expand(self.batch, -1, -1, -1)[sequence, :, 0]
        own = own[heads] if own.shape[0] > 1 else own
        hides = torch.finfo(own.dtype).min / 2  # some models hide with the most negative number
        seen = (own[:, columns] > hides).any(dim=0).unflatten(0, (-1, page_size)).any(dim=1)
        return torch.nonzero(~seen).flatten().tolist()

    def choices(
        self,
        layer: int,
        sequence: int,
        head: int,
        query: Tensor,
        hidden: Sequence[int] = (),
        shares: Tensor | None = None,
    ) -> list[Choice]:
        """What a row may attend and estimate; the first is the likeliest.

        shares: of attention, by which pages are chosen; None is for their ratings.
        """
        length = len(self.columns(layer, sequence))
        everything = [Choice(list(range(length)), [])]
        if self.config.budget_of(layer, head) is None:
            return everything
        sealed = self.sealed(layer, sequence)
        first = min(sealed, math.ceil(self.config.num_sink_tokens / self.config.page_size))
        wanted = self.num_selected(layer, head)
        if sealed - first <= wanted:
            return everything
        visible = [page for page in range(sealed - first) if page not in hidden]
        if len(visible) <= wanted:  # what else is selected is masked and changes nothing
            pages = visible + list(hidden)[: wanted - len(visible)]
            options = iter([(pages, [])])
        else:
            if shares is None:
                rating, noise = self.rate(layer, sequence, head, query, visible)
            else:
                rating, noise = shares[visible], 1e-30
            options = (
                ([visible[page] for page in pages], [visible[page] for page in others])
                for pages, others in self._page_choices(rating, wanted, noise)
            )
        return self._as_tokens((layer, sequence), options)

    def _covering_choices(self, row: tuple[int, int, int], shares: Tensor) -> list[Choice]:
        """`choices` where a row takes the fewest pages that miss no more than the target."""
        target, most = self.config.target_missed_mass, len(shares)
        assert target is not None
        ordered = shares.double().sort(descending=True).values
        missed = torch.cat((ordered, torch.zeros(1))).flip(0).cumsum(0).flip(0)
        noise = 1e-4 * target + 1e-6
        least, enough = (int((missed > target + by).sum()) for by in (noise, -noise))
        cap = min(most, self.num_selected(row[0], row[2]))
        counts = range(min(least, cap), min(enough, cap) + 1)
        options = (self._page_choices(shares, count, 1e-30) for count in counts)
        return self._as_tokens(row[:2], itertools.chain.from_iterable(options))

    def _as_tokens(
        self, row: tuple[int, int], options: Iterator[tuple[list[int], list[int]]]
    ) -> list[Choice]:
        """Selectable pages that a row may attend and estimate, as tokens and pages."""
        page_size, sealed = self.config.page_size, self.sealed(*row)
        first = min(sealed, math.ceil(self.config.num_sink_tokens / page_size))
        fixed = [*range(first * page_size), *range(sealed * page_size, len(self.columns(*row)))]
        choices = []
        for pages, others in itertools.islice(options, MAX_CHOICES + 1):
            starts = [(first + page) * page_size for page in pages]
            tokens = fixed + [s + i for s in starts for i in range(page_size)]
            choices.append(Choice(tokens, [first + page for page in others]))
        return choices

    def shares(
        self,
        states: tuple[Tensor, Tensor],
        row: tuple[int, int, int],
        rated: Tensor,
        query: Tensor,
        how: dict[str, Any],
    ) -> Tensor:
        """Which share of a row's attention each selectable page holds, by the token index [pages].

        states: keys and values of all columns; rated, query [group, dim]: what pages are rated by,
        scaled, and what attends.
        """
        layer, sequence, head = row
        page_size, group = self.config.page_size, query.shape[0]
        columns = self.row_columns(layer, sequence, head)
        end = self.sealed(layer, sequence) * page_size
        start = min(end, math.ceil(self.config.num_sink_tokens / page_size) * page_size)
        stored = self.stored[layer][sequence, head, columns[start:end]]
        pages = self._as_made(*stored.split(self._dims, dim=-1)).float()
        pages = pages.unflatten(0, ((end - start) // page_size, page_size))
        codes, scale, zero = self._stored_codes(pages)
        key, value = (plane[sequence, head, columns][None, None] for plane in states)
        if how.get("expand") is not None:
            key, value = how["expand"](key, value)
        # Expanded latents have keys of their own for every query head.
        logits = (query.float()[:, None] @ key[0].transpose(-1, -2))[:, 0]
        logits = logits * (how.get("scale") or query.shape[1] ** -0.5)
        logits[:, start:end] = rated @ (codes * scale + zero).flatten(0, 1).T
        if how.get("softcap") is not None:
            logits = how["softcap"] * torch.tanh(logits / how["softcap"])
        own = slice(head * group, (head + 1) * group)
        if how.get("mask") is not None:
            bias = _as_additive(how["mask"]).expand(self.batch, -1, -1, -1)[sequence, :, 0]
            logits = logits + (bias[own] if bias.shape[0] > 1 else bias)[:, columns]
        if how.get("sinks") is not None:
            logits = torch.cat((logits, how["sinks"][own].float()[:, None]), dim=1)
        share = logits.softmax(dim=1)[:, start:end].nan_to_num()
        return share.unflatten(1, ((end - start) // page_size, page_size)).sum(dim=2).mean(dim=0)

    def _stored_codes(self, pages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the token index holds of pages of keys, see `stored_codes`."""
        if self.config.index_bits is None and self.config.backend != "triton":
            return stored_rows(pages)
        return stored_codes(pages, self.config.packed_index_bits)

    def _page_choices(
        self, rating: Tensor, wanted: int, noise: float
    ) -> Iterator[tuple[list[int], list[int]]]:
        """The pages that a row may attend, and those that it may estimate beside them."""
        limit = self.config.estimate_pages
        for pages in page_choices(rating, wanted, noise):
            rest = [page for page in range(len(rating)) if page not in pages]
            count = len(rest) if limit is None else min(limit, len(rest))
            for others in page_choices(rating[rest], count, noise):
                yield pages, [rest[page] for page in others]

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
        columns = self.row_columns(layer, sequence, head)
        page_size = self.config.page_size
        sinks = math.ceil(self.config.num_sink_tokens / page_size) * page_size
        columns = columns[sinks : self.sealed(layer, sequence) * page_size]
        stored = self.stored[layer][sequence, head, columns]
        key = self._as_made(*stored.split(self._dims, dim=-1))
        pages = key.float().unflatten(0, (-1, page_size))[None]
        if self.config.index == "tokens":
            score = reference.token_score(query[None], *self._stored_codes(pages))
        else:
            digest = reference.bounding_volume(pages, self.config.index)
            digest = digest.bfloat16().float() if self.backend == "numba" else digest
            score = reference.volume_score(query[None], digest, self.config.index)
        score = score if visible is None else score[:, :, visible]
        noise = 1e-5 * float(score.abs().max())
        if score.shape[1] == 1:  # one query head has nobody to agree with
            return score[0, 0], noise
        rating = reference.aggregate(score, self.config.score_reduction)[0]
        return rating, 1e-30 if self.config.score_reduction == "softmax-mean" else noise

    def _summaries(
        self, layer: int, sequence: int, head: int, pages: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Mean key and mean value [pages, dim] of sealed pages, as they are attended."""
        page_size = self.config.page_size
        columns = self.row_columns(layer, sequence, head)
        tokens = torch.tensor(pages, dtype=torch.long)[:, None] * page_size
        columns = columns[tokens + torch.arange(page_size)]
        stored = self.stored[layer][sequence, head][columns]
        means = stored.float().mean(dim=1).to(stored.dtype).float()
        key, value = means.split(self._dims, dim=-1)
        return self._unrotated(key, value)

    def _attend_choice(
        self,
        states: tuple[Tensor, Tensor],
        row: tuple[int, int, int],
        choice: Choice,
        query: Tensor,
        how: dict[str, Any],
    ) -> Tensor:
        """Attend what a row (layer, sequence, KV head) chose, densely: [group, value_dim].

        states: keys and values of all columns; query [batch, group, 1, dim].
        """
        layer, sequence, head = row
        columns = self.row_columns(layer, sequence, head)
        means = self._summaries(layer, sequence, head, choice.estimated)
        key, value = (
            torch.cat((plane[sequence, head, columns[choice.tokens]], mean))[None, None]
            for plane, mean in zip(states, means, strict=True)
        )
        group = query.shape[1]
        own = slice(head * group, (head + 1) * group)
        sinks, mask, expand = how.get("sinks"), how.get("mask"), how.get("expand")
        if expand is not None:
            key, value = expand(key, value)
        bias = torch.zeros(1, len(columns))
        if mask is not None:
            bias = _as_additive(mask).expand(self.batch, -1, -1, -1)[sequence, :, 0][:, columns]
            bias = bias[own] if bias.shape[0] > 1 else bias
        page_size = self.config.page_size
        whole = len(columns) // page_size
        # A page that the mask hides in part has a mean of -inf.
        weight = bias[:, : whole * page_size].unflatten(1, (whole, page_size)).mean(dim=2)
        weight = weight[:, choice.estimated] + math.log(page_size)
        return reference.attention(
            query[sequence : sequence + 1],
            key,
            value,
            scale=how.get("scale") or query.shape[3] ** -0.5,
            softcap=how.get("softcap"),
            sink_logits=None if sinks is None else sinks[own],
            mask=torch.cat((bias[:, choice.tokens], weight), dim=1)[None, :, None],
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


def stored_rows(key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same as a CPU holds it: rotated, in 4 bits with a scale for each token, rotated back."""
    rotated = rotate(key.float())
    scale = rotated.abs().amax(dim=-1, keepdim=True) / 7
    codes = (rotated / torch.where(scale == 0, 1.0, scale)).round()
    return rotate(codes * scale), torch.ones(()), torch.zeros(())


def _as_additive(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
