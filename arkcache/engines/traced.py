"""What engines tell of a traced step beside what they count: which attention its pages received."""

from __future__ import annotations

import numpy as np
import torch

from arkcache.engines.engine import PagedParts
from arkcache.engines.step import Step, additive, page_mass
from arkcache.pages.grouping import tokens_of
from arkcache.pages.windows import Window
from arkcache.tracing.recorder import Counted, Floats, Ids, LayerTrace, Told


def note(
    trace: LayerTrace,
    parts: PagedParts,
    attended_tokens: int,
    moved: tuple[int, int, int, int],
    told: tuple[Ids, Ids, Floats | None],
    *,
    has_phases: bool = True,
) -> None:
    """Tell what a step did. moved: hits, pages recalled and evicted, bytes recalled; told: pages,
    what was at hand before, and masses, as in `Told`."""
    tokens, heads, (pages, before, mass) = parts.tokens, parts.geometry.num_kv_heads, told
    sinks = int(np.minimum(tokens.sealed, parts.config.num_sink_pages).sum())
    counted = Counted(
        attended_tokens,
        tokens.total,
        int(np.count_nonzero(pages >= 0)) + sinks * heads,
        int(tokens.sealed.sum()) * heads,
        *moved,
    )
    step = Told(counted, pages, before, mass)
    nbytes = pages.nbytes + before.nbytes + (0 if mass is None else mass.nbytes)
    trace.note(lambda: step, nbytes, has_phases=has_phases)


def attended_mass(parts: PagedParts, window: Window, step: Step, pages: Ids) -> Floats | None:
    """Which share of a step's attention sinks, window and selected pages received.

    pages: [rows, any], -1 for none. Returns [rows, sinks + 1 + any]: each sink page, the whole
    window, each entry of `pages`; the mean over a KV head's query heads, of what is attended. None
    for latents, whose keys only the model can expand.
    """
    if step.expand is not None:
        return None
    config, geometry, tokens = parts.config, parts.geometry, parts.tokens
    rows, size, num_sink_pages = geometry.num_rows, config.page_size, config.num_sink_pages
    heads = geometry.num_kv_heads
    sealed = np.repeat(tokens.sealed, heads)[:, None]
    sinks = np.broadcast_to(np.arange(num_sink_pages), (rows, num_sink_pages))
    listed = np.concatenate((np.where(sinks < sealed, sinks, -1), pages), axis=1)
    width = listed.shape[1]
    first = tokens.sealed * size
    longest = int((tokens.lengths - first).max())
    room = width + -(-longest // size)  # the window in parts of the size of a page
    key = torch.zeros(
        (rows, room * size, geometry.head_dim), dtype=geometry.dtype, device=geometry.device
    )
    row, at = np.nonzero(listed >= 0)
    for part in parts.store.read(row, listed[row, at]):
        own, _ = part.packer.unpack(part.packed.to(geometry.device))
        where = torch.from_numpy(row[part.which]), torch.from_numpy(at[part.which])
        key.unflatten(1, (room, size))[*(index.to(geometry.device) for index in where)] = own
    numbers = np.full((rows, room * size), -1, np.int64)
    by_head = np.maximum(listed, 0).reshape(geometry.batch, heads, width)
    of_pages = tokens_of(by_head, size, parts.page_tokens).reshape(rows, width, size)
    numbers[:, : width * size] = np.where(listed[:, :, None] >= 0, of_pages, -1).reshape(rows, -1)
    recent = np.repeat(first, heads)[:, None] + np.arange(longest)
    is_token = recent < np.repeat(tokens.lengths, heads)[:, None]
    numbers[:, width * size : width * size + longest] = np.where(is_token, recent, -1)
    newest, _ = window.recent(torch.from_numpy(first), longest)
    held = torch.from_numpy(is_token).to(geometry.device)[:, :, None]
    key[:, width * size : width * size + longest] = newest.flatten(0, 1).masked_fill(~held, 0)
    numbers = numbers.reshape(geometry.batch, heads, -1)
    mask = additive(numbers >= 0, geometry.device)
    if step.bias is not None:
        mask = mask + step.bias(np.maximum(numbers, 0))[:, :, :, 0]
    states = key.unflatten(0, (geometry.batch, heads))
    share = page_mass(step, states, states, mask, room * size, size).flatten(0, 1)
    fixed, own = share[:, :num_sink_pages], share[:, num_sink_pages:width]
    newest = share[:, width:].sum(dim=1, keepdim=True)
    result: Floats = torch.cat((fixed, newest, own), dim=1).cpu().numpy()
    return result
