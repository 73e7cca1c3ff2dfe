"""Conversations that begin alike share what they have read: prefix caching.

A chain of hashes, one for each page of tokens, finds the longest beginning that is known (as vLLM's
automatic prefix caching does); what is found is copied by reference, page by page.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel

from arkcache.config import CacheConfig
from arkcache.errors import InputError
from arkcache.huggingface.cache import ArkCache, PagedCacheLayer


class _Kept(NamedTuple):
    """A conversation as it was when it was kept: its tokens, and a cache that holds them."""

    ids: list[int]
    cache: ArkCache


class PrefixCache:
    """Gives out caches that hold the beginning of a prompt already, as far as it is known.

        prefixes = PrefixCache(model, budget_tokens=2048)
        cache = prefixes.begin(ids)                      # holds ids[:cache.get_seq_length()]
        model(ids[cache.get_seq_length():], past_key_values=cache)   # as tensors
        prefixes.keep(cache, ids)

    Sealed pages are shared, not copied; windows and the page index are copied. Pages of 16 bits
    give the tokens of a cache that has read everything itself. Where pages are quantised, the
    tokens just before the place where two prompts part come back from their pages, quantised.

    Args:
        model: all caches are its.
        config: settings of the caches; None is `CacheConfig()` with `settings` as its fields.
        most: conversations that are kept; with more, the one that was used longest ago goes.

    Raises what `ArkCache` raises, and `InputError` for `most` below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: CacheConfig | None = None,
        *,
        most: int = 16,
        **settings: object,
    ) -> None:
        if most < 1:
            raise InputError(f"most={most}: expected at least 1")
        self._most = most
        self._empty = ArkCache(model, config, **settings)
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._found: dict[bytes, int] = {}
        self._next = 0

    @property
    def config(self) -> CacheConfig:
        """The settings of the caches."""
        return self._empty.config

    def __len__(self) -> int:
        return len(self._kept)

    def begin(self, ids: Sequence[int]) -> ArkCache:
        """A cache of its own for a prompt: it holds the first tokens, whole pages of them, that a
        kept conversation begins with, and never all, so that there is something to go on with."""
        found = None
        for number, link in enumerate(self._chain(ids[:-1]), start=1):
            if link not in self._found:
                break
            found = self._found[link], number * self.config.page_size
        cache = None if found is None else self._copy(*found, ids)
        return copy.deepcopy(self._empty) if cache is None else cache

    def _copy(self, name: int, num_tokens: int, ids: Sequence[int]) -> ArkCache | None:
        """A copy of the beginning of a kept conversation; None where it cannot be had."""
        kept = self._kept[name]
        if kept.ids[:num_tokens] != list(ids[:num_tokens]):  # hashes that collide
            return None
        self._kept.move_to_end(name)
        cache = copy.deepcopy(kept.cache)
        if len(kept.ids) < len(ids) and kept.ids == list(ids[: len(kept.ids)]):
            return cache  # all of it, the last page that is not full as well
        try:
            cache.crop(num_tokens)
        except (InputError, NotImplementedError, RuntimeError, ValueError):
            return None  # a layer that transformers keeps cannot go back
        for layer in cache.layers:
            if isinstance(layer, PagedCacheLayer):
                layer.in_prompt = True  # what comes next is, be it one token
        return cache

    def keep(self, cache: ArkCache, ids: Sequence[int]) -> None:
        """Remember what a cache holds, for prompts that begin like it; it may be used on.

        ids: the tokens that it holds, of one sequence. Raises `InputError` for others.
        """
        if cache.get_seq_length() != len(ids):
            raise InputError(f"{len(ids)} ids for a cache of {cache.get_seq_length()} tokens")
        if any(manager.batch != 1 for manager in cache.managers):
            raise InputError("a cache of several sequences: expected one")
        name, self._next = self._next, self._next + 1
        self._kept[name] = _Kept(list(ids), copy.deepcopy(cache))
        for link in self._chain(ids):
            self._found[link] = name  # of several that begin alike, the newest
        while len(self._kept) > self._most:
            self._forget(next(iter(self._kept)))

    def _forget(self, name: int) -> None:
        del self._kept[name]
        self._found.clear()
        for other, kept in self._kept.items():
            self._found |= dict.fromkeys(self._chain(kept.ids), other)

    def clear(self) -> None:
        """Forget all conversations, and give back what only they hold."""
        self._kept.clear()
        self._found.clear()

    def _chain(self, ids: Sequence[int]) -> Iterator[bytes]:
        """The hash of every whole page of tokens with all before it."""
        size, link = self.config.page_size, b""
        tokens = np.asarray(ids, dtype=np.int64)
        for first in range(0, len(tokens) - size + 1, size):
            page = tokens[first : first + size].tobytes()
            link = hashlib.blake2b(link + page, digest_size=16).digest()
            yield link
