"""What launchers take and give: tensors that belong together, under one name.

Plain tuples: making one costs the host less than a microsecond, and a launcher runs in every layer
of every step. What is in them is checked by the launcher (`triton_checked.check`). Rows are
(sequence, KV head) pairs.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Window(NamedTuple):
    """The recent window of every row, a ring: token t lies at t % tokens.

    key [rows, tokens, head_dim] and value [rows, tokens, value_dim], in the dtype of the model.
    """

    key: Tensor
    value: Tensor


class Counts(NamedTuple):
    """What every row holds, int32 [rows] each: tokens, the newest included, and sealed pages."""

    lengths: Tensor
    sealed: Tensor


class PageSet(NamedTuple):
    """The pages that a step attends.

    slots: uint8 [rows, num_slots, nbytes], packed pages. chosen: int32 [rows, max_selected], places
    of pages; place i is slot num_sink_pages + i. num_chosen: int32 [rows], how many entries of
    `chosen` count. page_of: int32 [rows, num_places], the page in each place. Without the last
    three all sealed pages are attended, page p in slot p.
    """

    slots: Tensor
    chosen: Tensor | None = None
    num_chosen: Tensor | None = None
    page_of: Tensor | None = None


class Estimates(NamedTuple):
    """What stands for pages that a step does not attend: one token each.

    means: [rows, capacity, head_dim + value_dim] in the dtype of the model, mean key and mean value
    of every page. estimated: int32 [rows, capacity - num_sink_pages], 1 for each page from
    `num_sink_pages` on that is to be estimated; looked at as far as pages are sealed. bias: fp32
    [rows, group, pages], by page number, added to these tokens' logits after the softcap.
    """

    means: Tensor
    estimated: Tensor
    bias: Tensor | None = None


class Places(NamedTuple):
    """What a row's slots beyond its sinks hold.

    page_of: int32 [rows, places], the page in each place, -1 for none; no page may be there twice.
    num_places: int32 [rows]; a row uses its first `num_places[r]` places only.
    """

    page_of: Tensor
    num_places: Tensor


class Summaries(NamedTuple):
    """What is known of every sealed page without reading it, by page number.

    digests: [rows, capacity, features] in the dtype of the model; uint8 [rows, capacity, bytes] for
    the token index; None for a layer without an index. means: mean key and mean value side by side
    [rows, capacity, head_dim + value_dim] in the dtype of the model; None where none are kept.
    """

    digests: Tensor | None
    means: Tensor | None = None


class HostPages(NamedTuple):
    """The host tier, and where in it pages are.

    pieces: uint8 [lines, nbytes]; pinned if the rest is on a GPU. located: int64 [rows, capacity],
    on the device, the line that holds each page.
    """

    pieces: Tensor
    located: Tensor


class Scores(NamedTuple):
    """What pages are worth to each query head; entry i stands for page `num_sink_pages + i`.

    score fp32 [rows, group, pages]: not written from the last sealed page on. peak and mass fp32
    [rows, group, blocks]: maximum and sum of exp(score - peak) over each
    `triton_score.PAGES_PER_BLOCK` pages, hidden ones left out; -inf and 0 where a block has no
    page.
    """

    score: Tensor
    peak: Tensor
    mass: Tensor


class Selection(NamedTuple):
    """What to recall and what to attend; int32, lists [rows, max_selected] and counts [rows].

    The first `num_missing` entries of `pages` (ascending) go into those of `places` (ascending).
    The first `num_chosen` entries of `chosen` are the places that hold the selection then.
    `estimated`, int32 [rows, pages], is 1 for each page that is not selected and is to be
    estimated; written as far as there are pages to select from; None where none was asked for.
    """

    pages: Tensor
    places: Tensor
    num_missing: Tensor
    chosen: Tensor
    num_chosen: Tensor
    estimated: Tensor | None = None
