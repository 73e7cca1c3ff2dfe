"""Dense layers of the GPU engine, which attend everything: all tokens stay on the device.

Their like on a CPU: `dense.py` in the model's own dtype, `packed_dense.py` quantised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from arkcache.config import NO_LIMIT, CacheConfig
from arkcache.engines.capture import Bools, Rule
from arkcache.engines.step import Lengths, Step
from arkcache.errors import IntegrityError
from arkcache.formats import PageFormat, PageLayout
from arkcache.kernels.arguments import Counts, PageSet, Window
from arkcache.kernels.torch_pages import PagePacker
from arkcache.kernels.triton_append import append
from arkcache.kernels.triton_attention import paged_attention
from arkcache.kernels.triton_seal import seal_newest, seal_pages
from arkcache.layers.dense import DenseLayer
from arkcache.layers.ring import DeviceMetadata, RingLayer, sink_logits_by_row, user_bias
from arkcache.pages.bookkeeping import Ids
from arkcache.pages.windows import RingWindow
from arkcache.stats import CacheStats
from arkcache.tiering.device import DeviceTier, Geometry, unpacked_pages
from arkcache.tiering.growing import GrowingTensor
from arkcache.tiering.transfer import upload

NEVER = 1 << 30
"""A number of recent tokens that no sequence reaches, so that no page is ever sealed."""

FIRST_PAGES = 32


def everything(geometry: Geometry) -> Ids:
    """A number of selected pages that no sequence reaches, so that all are attended
    [batch, kv_heads]."""
    return np.full((geometry.batch, geometry.num_kv_heads), NO_LIMIT, dtype=np.int64)


class DeviceDenseLayer(DenseLayer):
    """A layer that attends everything in the model's own dtype: a window of the whole context."""

    takes_ragged = True

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._metadata = DeviceMetadata(geometry)
        self.sealed: Ids = np.zeros(geometry.batch, dtype=np.int64)
        sizes = (geometry.head_dim, geometry.value_dim, geometry.dtype.itemsize)
        self._layout = PageLayout(PageFormat(), 1, *sizes)

    def append(self, seqs: slice, key: Tensor, value: Tensor) -> None:
        """Append tokens [seqs, kv_heads, new, dim]; several to sequences of equal length."""
        if key.shape[2] == 1:
            self.launch_append(seqs, key, value, self.count_token(seqs))
            return
        super().append(seqs, key, value)
        self._metadata.set(seqs, self.lengths.of[seqs], self.sealed[seqs])

    def count_token(self, seqs: slice) -> bool:
        """Count one more token of these sequences; no page ever seals."""
        self.reserve(int(self.lengths.of[seqs].max()) + 1)
        self.lengths.of[seqs] += 1
        return False

    @property
    def rule(self) -> Rule:
        """No page is ever sealed: all tokens are recent ones."""
        return Rule(NEVER, 1, 0, everything(self.geometry), 0)

    @staticmethod
    def make_ready(layers: Sequence[DeviceDenseLayer], _seals: Bools, tokens: int) -> None:
        """Make room for sequences of up to so many tokens."""
        for layer in layers:
            layer.reserve(tokens)

    def undo(self, lengths: Ids, _sealed: Ids) -> None:
        """Go back to these counts, from before a step that did not come to its end."""
        self.lengths.of[:] = lengths
        self._set_metadata()

    def launch_append(self, seqs: slice, key: Tensor, value: Tensor, _seals: bool) -> None:
        """Queue the storing of one token of each sequence."""
        heads = self.geometry.num_kv_heads
        rows = slice(seqs.start * heads, seqs.stop * heads)
        append(
            key[:, :, 0],
            value[:, :, 0],
            Window(self._key.data.flatten(0, 1)[rows], self._value.data.flatten(0, 1)[rows]),
            Counts(self._metadata.lengths[rows], self._metadata.sealed[rows]),
            recent=NEVER,
            page_size=1,
        )

    def attend_one(self, step: Step) -> Tensor:
        """Attend one new token over all tokens."""
        if step.expand is not None:  # latents: the model's own code expands them
            return super().attend_one(step)
        self.count_attended()
        return self.launch_attend(step)

    def count_attended(self) -> None:
        """Note how many tokens the step under way attends."""
        self.counters.attended_tokens = int(self.lengths.of.sum())

    def join(self) -> None:
        """Nothing to wait for: only the main stream touches this layer."""

    def abandon(self) -> None:
        """Nothing to forget: only the main stream touches this layer."""

    def launch_attend(self, step: Step) -> Tensor:
        """Queue the attention of one new token over all tokens."""
        geometry, metadata = self.geometry, self._metadata
        output = paged_attention(
            step.query.reshape(geometry.num_rows, -1, step.query.shape[3]),
            None,
            Window(self._key.data.flatten(0, 1), self._value.data.flatten(0, 1)),
            Counts(metadata.lengths, metadata.sealed),
            layout=self._layout,
            num_sink_pages=0,
            scale=step.scale,
            softcap=step.softcap,
            sink_logits=sink_logits_by_row(step, geometry),
            bias=user_bias(step, geometry, int(self.lengths.of.max())),
            tickets=metadata.tickets,
        )
        return output.view(geometry.batch, -1, 1, output.shape[-1])

    def reserve(self, tokens: int) -> None:
        """Make room for sequences of so many tokens, so that no address changes until then."""
        self._key.reserve(tokens)
        self._value.reserve(tokens)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the tensors that grow are now."""
        key, value = self._key.data, self._value.data
        return self._metadata.number, key.shape[2], key.data_ptr(), value.data_ptr()

    def crop(self, lengths: Ids) -> None:
        """Shorten every sequence to `lengths`."""
        super().crop(lengths)
        self._set_metadata()

    def keep_sequences(self, index: Ids, device_tier: DeviceTier) -> None:
        """Make sequence i what sequence `index[i]` was."""
        super().keep_sequences(index, device_tier)
        self._metadata = DeviceMetadata(self.geometry)
        self.sealed = self.sealed[index]
        self._set_metadata()

    def _set_metadata(self) -> None:
        self._metadata.set(slice(0, self.geometry.batch), self.lengths.of, self.sealed)


class DevicePackedDenseLayer(RingLayer):
    """A layer that attends everything, its sealed pages packed (KIVI).

    Args:
        config: the cache's settings.
        geometry: sizes.
        packer: of its pages.
    """

    def __init__(self, config: CacheConfig, geometry: Geometry, packer: PagePacker) -> None:
        super().__init__(config, geometry)
        self._packer = packer
        self._make_metadata()
        shape = (geometry.batch, geometry.num_kv_heads, FIRST_PAGES, packer.layout.nbytes)
        self._pages = GrowingTensor(shape, 2, torch.uint8, geometry.device)
        tokens = -(-config.window_tokens // config.page_size) * config.page_size
        rows = (geometry.batch, geometry.num_kv_heads, tokens)
        with torch.inference_mode(False):  # written to in and out of it
            like = torch.empty(0, dtype=geometry.dtype, device=geometry.device)
            self._window = RingWindow(
                like.new_zeros((*rows, geometry.head_dim)),
                like.new_zeros((*rows, geometry.value_dim)),
            )
            newest = (geometry.num_rows, packer.layout.nbytes)
            self._newest = torch.zeros(newest, dtype=torch.uint8, device=geometry.device)

    @property
    def window(self) -> RingWindow:
        """The recent window."""
        return self._window

    def launch_attend(self, step: Step) -> Tensor:
        """Queue the attention of one new token over all pages and the window."""
        geometry, metadata = self.geometry, self._metadata
        output = paged_attention(
            self.grouped(step.query),
            PageSet(self._pages.data.flatten(0, 1)),
            Window(*self.by_row(self._window)),
            Counts(metadata.lengths, metadata.sealed),
            layout=self._packer.layout,
            num_sink_pages=0,
            scale=step.scale,
            softcap=step.softcap,
            sink_logits=sink_logits_by_row(step, geometry),
            bias=user_bias(step, geometry, int(self.lengths.of.max())),
            tickets=metadata.tickets,
        )
        return output.view(geometry.batch, -1, 1, output.shape[-1])

    @property
    def rule(self) -> Rule:
        """When it seals a page; all pages are attended."""
        config = self.config
        selected = everything(self.geometry)
        return Rule(config.num_recent_tokens, config.page_size, 0, selected, 0)

    def reserve(self, tokens: int) -> None:
        """Make room for sequences of so many tokens, so that no address changes until then."""
        self._pages.reserve(max(tokens - self.config.num_recent_tokens, 0) // self.config.page_size)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the tensors that grow are now."""
        pages = self._pages.data  # all else is new when the metadata is
        return self._metadata.number, pages.shape[2], pages.data_ptr()

    @staticmethod
    def make_ready(layers: Sequence[DevicePackedDenseLayer], seals: Bools, _tokens: int) -> None:
        """Make room for the pages that seal: of which layer and sequence [layers, batch]."""
        for layer, own in zip(layers, seals, strict=True):
            if own.any():
                layer._pages.reserve(int(layer.sealed[own].max()) + 1)

    def _launch_seal(self, rows: slice, digest_window: Tensor) -> None:
        key, value = self.by_row(self._window)
        seal_newest(
            Window(key[rows], value[rows]),
            digest_window,
            Counts(self._metadata.lengths[rows], self._metadata.sealed[rows]),
            self._pages.data.flatten(0, 1)[rows],
            self._newest[rows],
            recent=self.config.num_recent_tokens,
            num_sink_pages=0,
            layout=self._packer.layout,
            index=self.config.index,
        )

    def _seal(self, seqs: slice, first: int, key: Tensor, value: Tensor) -> None:
        self._pages.reserve(first + key.shape[2])
        for number, sequence in enumerate(range(seqs.start, seqs.stop)):
            seal_pages(
                key[number],
                value[number],
                key[number],
                self._pages.data[sequence, :, first : first + key.shape[2]],
                first=first,
                layout=self._packer.layout,
                index=self.config.index,
            )

    def _read(self, sequence: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        key, value = self._packer.unpack(self._pages.data[sequence, :, first:last])
        return key.flatten(1, 2), value.flatten(1, 2)

    def _unseal(self, _sequence: int, _first: int, _last: int) -> None:
        """Nothing: `sealed` says what counts."""

    def _page_blocks(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        total = int(self.sealed.max())
        per_block = unpacked_pages(self.geometry, self.config.page_size)
        for first in range(0, total, per_block):
            last = min(first + per_block, total)
            key, value = self._packer.unpack(self._pages.data[:, :, first:last])
            yield first, last, key.flatten(2, 3), value.flatten(2, 3)

    def keep_sequences(self, index: Ids, device_tier: DeviceTier) -> None:
        """Make sequence i what sequence `index[i]` was."""
        self.geometry = device_tier.geometry
        on_device = upload(index, self.geometry.device)
        self._pages.keep_sequences(on_device)
        with torch.inference_mode(False):
            self._window = RingWindow(*(plane[on_device] for plane in self._window))
            self._newest = self._newest.new_zeros((self.geometry.num_rows, self._newest.shape[1]))
        self.sealed, self.lengths = self.sealed[index], Lengths(self.lengths.of[index])
        self._make_metadata()
        self._metadata.set(slice(0, len(index)), self.lengths.of, self.sealed)

    def check(self) -> None:
        """Raise `IntegrityError` if the metadata contradicts itself."""
        self._check_sealed(self.sealed)
        if int(self.sealed.max()) > self._pages.data.shape[2]:
            raise IntegrityError("a packed layer counts more pages than it has room for")

    def stats(self) -> CacheStats:
        """Counters and sizes."""
        size = self._pages.nbytes + sum(plane.nbytes for plane in self._window)
        return self.counters.stats(int(self.lengths.of.sum())) + CacheStats(device_bytes=size)
