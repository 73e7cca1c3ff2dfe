"""Masks over what a decode step attends: a view of a layer's places and window, or its pages.

A view lists tokens as they lie in the device tier: places from the last to the first, sinks being
the first, then the window. Rows are (sequence, KV head) pairs.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.engines.step import Step, additive
from arkcache.pages.bookkeeping import Ids
from arkcache.pages.grouping import PageTokens, tokens_of
from arkcache.tiering.device import Geometry

Held = NDArray[np.bool_]
"""Which places hold pages that are attended [rows, places]; places of sinks are not listed."""


def view_mask(
    config: CacheConfig,
    geometry: Geometry,
    held: Held,
    sink_pages: Ids,
    recent: Ids,
    num_pages: int,
) -> Tensor:
    """The additive mask of a view whose rows differ: [batch, kv_heads, 1, tokens].

    sink_pages, recent: how many of each a sequence has, recent in tokens; the view has `num_pages`
    pages.
    """
    batch, heads = geometry.batch, geometry.num_kv_heads
    num_sink_pages = config.num_sink_pages
    places = np.zeros((batch, heads, num_sink_pages + held.shape[1]), dtype=np.bool_)
    places[:, :, :num_sink_pages] = (np.arange(num_sink_pages) < sink_pages[:, None])[:, None]
    places[:, :, num_sink_pages:] = held.reshape(batch, heads, -1)
    pages = places[:, :, :num_pages][:, :, ::-1].repeat(config.page_size, axis=2)
    window = np.arange(int(recent.max())) < recent[:, None]
    window = np.broadcast_to(window[:, None], (batch, heads, window.shape[1]))
    return additive(np.concatenate((pages, window), axis=2), geometry.device)


def view_tokens(
    config: CacheConfig,
    geometry: Geometry,
    page_of: Ids,
    sealed: Ids,
    recent: Ids,
    num_pages: int,
    listed: PageTokens | None = None,
) -> Ids:
    """Token numbers of a view [batch, kv_heads, tokens]; those of page 0 for empty places.

    page_of: the page in each place [rows, places]; sealed: sealed pages of each sequence; listed:
    the tokens of grouped pages.
    """
    batch, heads, page_size = geometry.batch, geometry.num_kv_heads, config.page_size
    num_sink_pages = config.num_sink_pages
    pages = np.zeros((batch, heads, num_sink_pages + page_of.shape[1]), dtype=np.int64)
    pages[:, :, :num_sink_pages] = np.arange(num_sink_pages)
    pages[:, :, num_sink_pages:] = np.maximum(page_of, 0).reshape(batch, heads, -1)
    tokens = tokens_of(pages[:, :, :num_pages][:, :, ::-1], page_size, listed)
    window = sealed[:, None] * page_size + np.arange(int(recent.max()))
    window = np.broadcast_to(window[:, None], (batch, heads, window.shape[1]))
    return np.concatenate((tokens.reshape(batch, heads, -1), window), axis=2)


def hidden_pages(
    step: Step,
    config: CacheConfig,
    geometry: Geometry,
    max_selectable: int,
    listed: PageTokens | None = None,
) -> Tensor | bool:
    """Which of the first `max_selectable` pages the user's mask hides whole [rows, pages].

    Pages are counted from the first behind the sinks. Returns False for none."""
    if step.bias is None:
        return False
    bias = step.bias(_selectable_tokens(config, geometry, max_selectable, listed))
    # Some models hide with the most negative number rather than with -inf.
    seen = (bias[:, :, :, 0] > torch.finfo(bias.dtype).min / 2).any(dim=2)
    seen = seen.unflatten(2, (max_selectable, config.page_size)).any(dim=3)
    if seen.shape[1] > geometry.num_kv_heads:  # expanded latents share their pages
        seen = seen.any(dim=1, keepdim=True)
    hidden: Tensor = ~seen.expand(-1, geometry.num_kv_heads, -1).flatten(0, 1)
    return hidden


def page_bias(
    step: Step, config: CacheConfig, pages: Ids, listed: PageTokens | None = None
) -> Tensor:
    """The user's mask over pages: the mean over each page's tokens, -inf where it hides any.

    pages: numbers [batch, kv_heads or 1, count]. Returns [batch, kv_heads or 1, group or 1, count].
    """
    assert step.bias is not None
    tokens = tokens_of(pages, config.page_size, listed)
    bias = step.bias(tokens.reshape(*tokens.shape[:2], -1))[:, :, :, 0]
    bias = bias.unflatten(3, (-1, config.page_size))
    # Some models hide with the most negative number rather than with -inf.
    hidden = (bias <= torch.finfo(bias.dtype).min / 2).any(dim=4)
    mean: Tensor = bias.mean(dim=4).masked_fill(hidden, float("-inf"))
    return mean


def token_bias(
    step: Step,
    config: CacheConfig,
    geometry: Geometry,
    max_selectable: int,
    listed: PageTokens | None = None,
) -> Tensor | None:
    """The user's mask over the tokens of the first `max_selectable` pages, for every row.

    Pages are counted from the first behind the sinks. Returns [rows, group or 1, max_selectable,
    page_size]; None for none.
    """
    if step.bias is None:
        return None
    tokens = _selectable_tokens(config, geometry, max_selectable, listed)
    bias = step.bias(tokens)[:, :, :, 0]
    heads = geometry.num_kv_heads
    if bias.shape[1] > heads:  # expanded latents share their pages
        bias = bias.reshape(geometry.batch, heads, -1, tokens.shape[2])
    pages = (max_selectable, config.page_size)
    own: Tensor = bias.expand(-1, heads, -1, -1).flatten(0, 1).unflatten(2, pages)
    return own


def _selectable_tokens(
    config: CacheConfig, geometry: Geometry, max_selectable: int, listed: PageTokens | None
) -> Ids:
    """Token numbers of the first pages behind the sinks [batch, kv_heads or 1, tokens]."""
    pages = config.num_sink_pages + np.arange(max_selectable)
    tokens = tokens_of(
        np.broadcast_to(pages, (geometry.batch, 1, max_selectable)), config.page_size, listed
    )
    return tokens.reshape(*tokens.shape[:2], -1)


def pages_left_out(page_of: Ids, held: Held, selectable: Ids, num_sink_pages: int) -> Held:
    """Which selectable pages exist and are not attended [rows, max_selectable].

    page_of: the page in each place [rows, places]; held: which places are attended; selectable:
    pages of each row that there are to select from.
    """
    max_selectable = int(selectable.max(initial=0))
    attended = np.zeros((len(page_of), max_selectable + 1), dtype=np.bool_)
    np.put_along_axis(
        attended, np.where(held, page_of - num_sink_pages, max_selectable), True, axis=1
    )
    left_out: Held = ~attended[:, :max_selectable] & (
        np.arange(max_selectable) < selectable[:, None]
    )
    return left_out
