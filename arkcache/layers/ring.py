"""Layers of the GPU engine: a token is stored by a kernel, and the host only counts it.

What happens at a step is split in two. The token is counted on the host, for this layer
(`count_token`) or for all layers at once (`capture.py`): whether a page seals follows from
token counts alone. `launch_append` and `launch_attend` queue kernels whose shapes and addresses
depend on no token count, so that a CUDA graph can replay them while the counts go on. Nothing in
either waits for the device.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arkcache.engines.capture import Bools, Rule, attended_tokens
from arkcache.engines.step import Step
from arkcache.kernels.arguments import Counts, Window
from arkcache.kernels.torch_hadamard import rotate
from arkcache.kernels.triton_append import append
from arkcache.layers.sealing import SealingLayer
from arkcache.pages.bookkeeping import Ids
from arkcache.pages.windows import RingWindow
from arkcache.tiering.device import Geometry
from arkcache.tiering.transfer import upload

_numbers = count()


class DeviceMetadata:
    """What the kernels know of a layer's rows, int32 [rows] each: see `SealingLayer`.

    Args:
        geometry: sizes.

    Attributes:
        number: unique in this process. An address is not: new tensors may lie where old ones were,
            and a graph that was recorded with those must not be replayed.
        tickets: how many programs of `paged_attention` are done with a row; 0 between its calls.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.number = next(_numbers)
        self._heads = geometry.num_kv_heads
        with torch.inference_mode(False):  # written to in and out of it
            empty = torch.zeros(geometry.num_rows, dtype=torch.int32, device=geometry.device)
            self.lengths, self.sealed, self.tickets = empty, empty.clone(), empty.clone()

    def set(self, seqs: slice, lengths: Ids, sealed: Ids) -> None:
        """What sequences `seqs` hold from now on: tokens and sealed pages of each."""
        where = slice(seqs.start * self._heads, seqs.stop * self._heads)
        both = np.stack((lengths, sealed)).astype(np.int32).repeat(self._heads, axis=1)
        on_device = upload(both, self.lengths.device)
        self.lengths[where], self.sealed[where] = on_device[0], on_device[1]


class RingLayer(SealingLayer):
    """A layer whose window is a ring on the device; subclasses call `_make_metadata` when built."""

    takes_ragged = True

    def _make_metadata(self) -> None:
        self._metadata = DeviceMetadata(self.geometry)

    @property
    @abstractmethod
    def window(self) -> RingWindow:
        """The recent window."""

    @property
    @abstractmethod
    def rule(self) -> Rule:
        """When it seals a page and how much it attends."""

    @staticmethod
    @abstractmethod
    def make_ready(layers: Sequence[Any], seals: Bools, tokens: int) -> None:
        """Make room in layers of this class for sequences of up to so many tokens, and for the
        pages that seal: of which layer and sequence [layers, batch]."""

    @abstractmethod
    def _launch_seal(self, rows: slice, digest_window: Tensor) -> None:
        """Seal the newest page of those rows whose last token completed one."""

    @abstractmethod
    def launch_attend(self, step: Step) -> Tensor:
        """Queue the attention of one new token."""

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Make room for sequences of so many tokens, so that no address changes until then."""

    def join(self) -> None:
        """Have the next kernel wait for what other streams do for this layer."""

    def abandon(self) -> None:
        """Forget work that was queued on other streams: recording it failed, so it never runs."""

    def append(self, seqs: slice, key: Tensor, value: Tensor) -> None:
        """Append tokens [seqs, kv_heads, new, dim]; several to sequences of equal length."""
        self.join()  # before anything moves that other streams read
        if key.shape[2] == 1:
            self.launch_append(seqs, key, value, self.count_token(seqs))
            return
        super().append(seqs, key, value)
        self._metadata.set(seqs, self.lengths.of[seqs], self.sealed[seqs])

    def count_token(self, seqs: slice) -> bool:
        """Enter one more token of these sequences; returns whether any seals a page with it."""
        config, lengths = self.config, self.lengths.of[seqs] + 1
        sealed = np.maximum((lengths - config.num_recent_tokens) // config.page_size, 0)
        seals = np.zeros((1, self.geometry.batch), dtype=np.bool_)
        seals[0, seqs] = sealed > self.sealed[seqs]
        self.make_ready([self], seals, int(lengths.max()))
        self.lengths.of[seqs], self.sealed[seqs] = lengths, sealed
        return bool(seals.any())

    def launch_append(self, seqs: slice, key: Tensor, value: Tensor, seals: bool) -> None:
        """Queue the storing of one token of each sequence; `seals` is what counting it said."""
        config, metadata, rows = self.config, self._metadata, self.rows_of(seqs)
        key_window, value_window = (plane[rows] for plane in self.by_row(self.window))
        append(
            key[:, :, 0],
            value[:, :, 0],
            Window(key_window, value_window),
            Counts(metadata.lengths[rows], metadata.sealed[rows]),
            recent=config.num_recent_tokens,
            page_size=config.page_size,
        )
        if seals:
            # Boxes fit keys better as the model made them: see `PagedLayer`.
            digest_window = rotate(key_window) if config.rotates_keys else key_window
            self._launch_seal(rows, digest_window)

    def undo(self, lengths: Ids, sealed: Ids) -> None:
        """Go back to these counts, from before a step that did not come to its end."""
        self.join()
        self.lengths.of[:], self.sealed[:] = lengths, sealed
        self._metadata.set(slice(0, self.geometry.batch), lengths, sealed)

    def attend_one(self, step: Step) -> Tensor:
        """Attend one new token."""
        self.count_attended()
        return self.launch_attend(step)

    def count_attended(self) -> None:
        """Note how many tokens the step under way attends."""
        attended = attended_tokens(self.lengths.of, self.sealed, self.rule)
        self.counters.attended_tokens = int(attended)

    def crop(self, lengths: Ids) -> None:
        """Shorten every sequence to `lengths`; see `SealingLayer.crop`."""
        self.join()
        super().crop(lengths)
        self._metadata.set(slice(0, self.geometry.batch), lengths, self.sealed)

    @staticmethod
    def by_row(window: RingWindow) -> tuple[Tensor, Tensor]:
        """Keys and values of a window [rows, tokens, dim]."""
        return window.key.flatten(0, 1), window.value.flatten(0, 1)

    def grouped(self, query: Tensor) -> Tensor:
        """Queries [batch, heads, 1, dim] by KV head: [rows, group, dim]."""
        return query.reshape(self.geometry.num_rows, -1, query.shape[3])


def user_bias(step: Step, geometry: Geometry, num_tokens: int) -> Tensor | None:
    """The user's mask by token number [rows, group, tokens] in fp32; None without one."""
    if step.bias is None:
        return None
    tokens = np.broadcast_to(np.arange(num_tokens), (geometry.batch, 1, num_tokens))
    return by_row_and_head(step.bias(tokens)[:, :, :, 0], step, geometry)


def by_row_and_head(bias: Tensor, step: Step, geometry: Geometry) -> Tensor:
    """[batch, kv_heads or 1, group or 1, count] to [rows, group, count] in fp32."""
    group = step.query.shape[1] // geometry.num_kv_heads
    shape = (geometry.batch, geometry.num_kv_heads, group, bias.shape[3])
    return bias.float().expand(shape).reshape(geometry.num_rows, group, bias.shape[3])


def sink_logits_by_row(step: Step, geometry: Geometry) -> Tensor | None:
    """The sink logits of every row [rows, group] in fp32; None without any."""
    if step.sink_logits is None:
        return None
    return step.sink_logits.float().reshape(geometry.num_kv_heads, -1).repeat(geometry.batch, 1)
