"""Layers that attend the keys and values of an earlier one (`CacheConfig.layer_sources`).

Cross-Layer Attention trains models so; KVSharer has others do it. The model still works out keys
and values for such a layer, and this drops them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from arkcache.errors import InputError
from arkcache.huggingface.attention import TAG
from arkcache.huggingface.cache import PagedCacheLayer
from arkcache.huggingface.core import CacheCore
from arkcache.manager import KVCacheManager


class SharingCacheLayer(PagedCacheLayer):
    """One layer of an `ArkCache` that stores nothing.

    Args:
        core: what it shares with the other layers of its cache.
        layer: its number in the model.
        source: the layer that it attends.
    """

    def __init__(self, core: CacheCore, layer: int, source: PagedCacheLayer) -> None:
        self.source = source
        super().__init__(core, layer)

    @property
    def manager(self) -> KVCacheManager | None:
        """The source's."""
        return self.source.manager

    @manager.setter
    def manager(self, _manager: KVCacheManager | None) -> None:
        """Ignored: it is the source's."""

    @property
    def index(self) -> int:
        """The source's."""
        return self.source.index

    @index.setter
    def index(self, _index: int) -> None:
        """Ignored, like `manager`."""

    @property
    def in_prompt(self) -> bool:
        """The source's."""
        return self.source.in_prompt

    @in_prompt.setter
    def in_prompt(self, in_prompt: bool) -> None:
        """Ignored, like `manager`."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Drop the new tokens; returns what the source's `update` returned in this step."""
        core, source = self.core, self.source
        attachment = core.attached()
        if attachment.pending is not None:
            attachment.pending.complain()
        handed = core.handed.get(source.layer)
        if handed is None:
            raise InputError(
                f"layer {self.layer} attends layer {source.layer}, which got no tokens in this "
                "step: expected the model to run its layers in their order"
            )
        if core.last_readers[source.layer] == self.layer:
            del core.handed[source.layer]
        if not self.is_initialized:
            self.follow()
        if hasattr(handed[0], TAG):
            attachment.pending = source
        return handed

    def follow(self) -> None:
        """Hold what the source holds, if anything."""
        if self.source.manager is not None:
            self.take_up(self.source.manager, self.source.index)
