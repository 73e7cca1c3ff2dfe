"""Dense layers of the GPU engine, which attend everything: all tokens stay on the device.

They are `DenseLayer` and `PackedDenseLayer` whose tokens are stored and attended by kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from arkcache.config import NO_LIMIT, CacheConfig
from arkcache.engines.capture import Bools, Capturable, CountingRule
from arkcache.engines.device_tokens import DeviceTokens
from arkcache.engines.step import Step
from arkcache.formats import PageFormat, PageLayout
from arkcache.kernels.arguments import PageSet, Window
from arkcache.kernels.torch_pages import PagePacker
from arkcache.kernels.triton_seal import seal_newest, seal_pages
from arkcache.layers.dense import DenseLayer
from arkcache.layers.packed_dense import PackedDenseLayer, window_planes
from arkcache.pages.bookkeeping import Ids, sealed_pages
from arkcache.pages.windows import RingWindow
from arkcache.tiering.device import DeviceTier, Geometry
from arkcache.tiering.growing import GrowingTensor

NEVER = 1 << 30
"""A number of recent tokens that no sequence reaches, so that no page is ever sealed."""

FIRST_PAGES = 32


def everything(geometry: Geometry) -> Ids:
    """A number of selected pages that no sequence reaches, so that all are attended
    [batch, kv_heads]."""
    return np.full((geometry.batch, geometry.num_kv_heads), NO_LIMIT, dtype=np.int64)


class DeviceDenseLayer(DenseLayer, Capturable):
    """A layer that attends everything in the model's own dtype: a window of the whole context."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._tokens = DeviceTokens(geometry, self.tokens, NEVER, 1)
        sizes = (geometry.head_dim, geometry.value_dim, geometry.dtype.itemsize)
        self._layout = PageLayout(PageFormat(), 1, *sizes)

    @property
    def capturable(self) -> Capturable:
        """See `Layer`."""
        return self

    @property
    def _window(self) -> RingWindow:
        return RingWindow(self._key.data, self._value.data)

    def attend_one(self, step: Step) -> Tensor:
        """See `Layer`."""
        if step.expand is not None:  # latents: the model's own code expands them
            return super().attend_one(step)
        return self.attend_token(step)

    @property
    def rule(self) -> CountingRule:
        """No page is ever sealed: all tokens are recent ones."""
        return CountingRule(NEVER, 1, 0, everything(self.geometry), 0)

    @staticmethod
    def make_ready(layers: Sequence[DeviceDenseLayer], _seals: Bools, tokens: int) -> None:
        """See `Capturable`."""
        for layer in layers:
            layer.reserve(tokens)

    def launch_append(self, seqs: slice, key: Tensor, value: Tensor, _seals: bool) -> None:
        """See `Capturable`."""
        self._tokens.append(seqs, key, value, self._window)

    def launch_attend(self, step: Step) -> Tensor:
        """See `Capturable`."""
        return self._tokens.attend(step, self._window, self._layout, bias=self._tokens.bias(step))

    def reserve(self, tokens: int) -> None:
        """See `Capturable`."""
        self._key.reserve(tokens)
        self._value.reserve(tokens)

    @property
    def addresses(self) -> tuple[int, ...]:
        """See `Capturable`."""
        key, value = self._window
        return self._tokens.number, key.shape[2], key.data_ptr(), value.data_ptr()

    def counted(self, seqs: slice) -> None:
        """See `Capturable`."""
        self._tokens.counted(seqs)

    def keep_sequences(self, index: Ids, device_tier: DeviceTier, num_selected: Ids) -> None:
        """See `Layer`."""
        super().keep_sequences(index, device_tier, num_selected)
        self._tokens.renew(self.geometry)


class DevicePackedDenseLayer(PackedDenseLayer, Capturable):
    """A layer that attends everything, its sealed pages packed (KIVI).

    Args:
        config: the cache's settings.
        geometry: sizes.
        packer: of its pages.
    """

    _pages: GrowingTensor
    _window: RingWindow

    def __init__(self, config: CacheConfig, geometry: Geometry, packer: PagePacker) -> None:
        shape = (geometry.batch, geometry.num_kv_heads, FIRST_PAGES, packer.layout.nbytes)
        pages = GrowingTensor(shape, 2, torch.uint8, geometry.device)
        whole_pages = -(-config.window_tokens // config.page_size) * config.page_size
        window = RingWindow(*window_planes(geometry, whole_pages))
        super().__init__(config, geometry, packer, pages, window)
        self._tokens = DeviceTokens(
            geometry, self.tokens, config.num_recent_tokens, config.page_size
        )
        self._newest = self._make_newest()

    def _make_newest(self) -> Tensor:
        """The buffer that a page which a step seals passes through."""
        shape = (self.geometry.num_rows, self._packer.layout.nbytes)
        with torch.inference_mode(False):  # written to in and out of it
            return torch.zeros(shape, dtype=torch.uint8, device=self.geometry.device)

    @property
    def capturable(self) -> Capturable:
        """See `Layer`."""
        return self

    def attend_one(self, step: Step) -> Tensor:
        """See `Layer`."""
        return self.attend_token(step)

    @property
    def rule(self) -> CountingRule:
        """When it seals a page; all pages are attended."""
        config = self.config
        selected = everything(self.geometry)
        return CountingRule(config.num_recent_tokens, config.page_size, 0, selected, 0)

    @staticmethod
    def make_ready(layers: Sequence[DevicePackedDenseLayer], seals: Bools, _tokens: int) -> None:
        """See `Capturable`."""
        for layer, own in zip(layers, seals, strict=True):
            if own.any():
                layer._pages.reserve(int(layer.tokens.sealed[own].max()) + 1)

    def launch_append(self, seqs: slice, key: Tensor, value: Tensor, seals: bool) -> None:
        """See `Capturable`."""
        self._tokens.append(seqs, key, value, self._window)
        if seals:
            self._launch_seal(self.geometry.rows_of(seqs))

    def _launch_seal(self, rows: slice) -> None:
        """Queue the sealing of the newest page of those rows whose last token completed one."""
        key, value = (plane[rows] for plane in self._window.by_row())
        seal_newest(
            Window(key, value),
            key,
            self._tokens.counts_of(rows),
            self._pages.data.flatten(0, 1)[rows],
            self._newest[rows],
            recent=self.config.num_recent_tokens,
            num_sink_pages=0,
            layout=self._packer.layout,
            index=self.config.index,
        )

    def launch_attend(self, step: Step) -> Tensor:
        """See `Capturable`."""
        pages, bias = PageSet(self._pages.data.flatten(0, 1)), self._tokens.bias(step)
        return self._tokens.attend(step, self._window, self._packer.layout, pages, bias=bias)

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

    def reserve(self, tokens: int) -> None:
        """See `Capturable`."""
        config = self.config
        self._pages.reserve(sealed_pages(tokens, config.num_recent_tokens, config.page_size))

    @property
    def addresses(self) -> tuple[int, ...]:
        """See `Capturable`; all else is new when the tokens are."""
        pages = self._pages.data
        return self._tokens.number, pages.shape[2], pages.data_ptr()

    def counted(self, seqs: slice) -> None:
        """See `Capturable`."""
        self._tokens.counted(seqs)

    def keep_sequences(self, index: Ids, device_tier: DeviceTier, num_selected: Ids) -> None:
        """See `Layer`."""
        super().keep_sequences(index, device_tier, num_selected)
        self._newest = self._make_newest()
        self._tokens.renew(self.geometry)
