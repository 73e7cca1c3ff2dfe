"""A layer's tokens as the kernels of the GPU engine see them, and how they are attended.

The window is a ring on the device, and what is counted of every row lies beside it, so that a
kernel that stores a token or attends one reads no count from the host.
"""

from __future__ import annotations

from itertools import count

import numpy as np
import torch
from torch import Tensor

from arkcache.engines.step import Step
from arkcache.errors import IntegrityError
from arkcache.formats import PageLayout
from arkcache.kernels.arguments import Counts, Estimates, PageSet, Window
from arkcache.kernels.triton_append import append
from arkcache.kernels.triton_attention import paged_attention
from arkcache.pages.bookkeeping import Ids
from arkcache.pages.counts import LayerTokens
from arkcache.pages.windows import RingWindow
from arkcache.tiering.device import Geometry
from arkcache.tiering.transfer import upload

_numbers = count()


class DeviceTokens:
    """Tokens and sealed pages of every row on the device, int32 [rows] each; see `LayerTokens`.

    Args:
        geometry: sizes.
        tokens: of the layer; copied to the device when told so (`counted`), and counted on there by
            `append`.
        recent, page_size: when a page is sealed.

    Attributes:
        number: unique in this process. An address is not: new tensors may lie where old ones were,
            and a graph that was recorded with those must not be replayed.
        counts: of every row.
        tickets: how many programs of `paged_attention` are done with a row; 0 between its calls.
    """

    def __init__(
        self, geometry: Geometry, tokens: LayerTokens, recent: int, page_size: int
    ) -> None:
        self._tokens, self._recent, self._page_size = tokens, recent, page_size
        self.renew(geometry)

    def renew(self, geometry: Geometry) -> None:
        """Hold the tokens of a layer of another size, in tensors that no graph knows."""
        self.number, self.geometry = next(_numbers), geometry
        with torch.inference_mode(False):  # written to in and out of it
            empty = torch.zeros(geometry.num_rows, dtype=torch.int32, device=geometry.device)

            self.counts, self.tickets = Counts(empty, empty.clone()), empty.clone()
        self.counted(slice(0, geometry.batch))

    def counted(self, seqs: slice) -> None:
        """Copy what is counted of these sequences to the device."""
        both = np.stack((self._tokens.lengths[seqs], self._tokens.sealed[seqs]))
        rows = both.astype(np.int32).repeat(self.geometry.num_kv_heads, axis=1)
        held = self.counts_of(self.geometry.rows_of(seqs))
        for mine, counted in zip(held, upload(rows, self.geometry.device), strict=True):
            mine.copy_(counted)

    def counts_of(self, rows: slice) -> Counts:
        """Of some rows."""
        return Counts(self.counts.lengths[rows], self.counts.sealed[rows])

    def append(self, seqs: slice, key: Tensor, value: Tensor, window: RingWindow) -> None:
        """Queue the storing of one token [seqs, kv_heads, 1, dim] of each sequence."""
        rows = self.geometry.rows_of(seqs)
        append(
            key[:, :, 0],
            value[:, :, 0],
            Window(*(plane[rows] for plane in window.by_row())),
            self.counts_of(rows),
            recent=self._recent,
            page_size=self._page_size,
        )

    def attend(
        self,
        step: Step,
        window: RingWindow,
        layout: PageLayout,
        pages: PageSet | None = None,
        *,
        num_sink_pages: int = 0,
        bias: Tensor | None = None,
        estimates: Estimates | None = None,
        log_mass: Tensor | None = None,
    ) -> Tensor:
        """Queue the attention of one new token; all else as in `paged_attention`.

        Returns [batch, heads, 1, value_dim].
        """
        output = paged_attention(
            self.grouped(step.query),
            pages,
            Window(*window.by_row()),
            self.counts,
            layout=layout,
            num_sink_pages=num_sink_pages,
            scale=step.scale,
            softcap=step.softcap,
            sink_logits=self._sink_logits(step),
            bias=bias,
            estimates=estimates,
            log_mass=log_mass,
            tickets=self.tickets,
        )
        return output.view(self.geometry.batch, -1, 1, output.shape[-1])

    def grouped(self, query: Tensor) -> Tensor:
        """Queries [batch, heads, 1, dim] by KV head: [rows, group, dim]."""
        return query.reshape(self.geometry.num_rows, -1, query.shape[3])

    def bias(self, step: Step) -> Tensor | None:
        """The user's mask by token number [rows, group, tokens] in fp32; None without one."""
        if step.bias is None:
            return None
        shape = (self.geometry.batch, 1, self._tokens.longest)
        tokens = np.broadcast_to(np.arange(shape[2]), shape)
        return self.by_row_and_head(step.bias(tokens)[:, :, :, 0], step)

    def by_row_and_head(self, bias: Tensor, step: Step) -> Tensor:
        """[batch, kv_heads or 1, group or 1, count] to [rows, group, count] in fp32."""
        geometry = self.geometry
        group = step.query.shape[1] // geometry.num_kv_heads
        shape = (geometry.batch, geometry.num_kv_heads, group, bias.shape[3])
        return bias.float().expand(shape).reshape(geometry.num_rows, group, bias.shape[3])

    def _sink_logits(self, step: Step) -> Tensor | None:
        """The sink logits of every row [rows, group] in fp32; None without any."""
        if step.sink_logits is None:
            return None
        heads, batch = self.geometry.num_kv_heads, self.geometry.batch
        return step.sink_logits.float().reshape(heads, -1).repeat(batch, 1)

    def check(self) -> None:
        """Raise `IntegrityError` unless the device counts what the host does."""
        for name, mine, on_device in (
            ("tokens", self._tokens.lengths, self.counts.lengths),
            ("sealed pages", self._tokens.sealed, self.counts.sealed),
        ):
            theirs: Ids = on_device.cpu().numpy()
            if not np.array_equal(theirs, mine.repeat(self.geometry.num_kv_heads)):
                raise IntegrityError(f"the device counts {theirs} {name}, the host {mine} each")
