"""`ArkCache`, and its layers as transformers sees them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from arkcache.config import CacheConfig
from arkcache.errors import ConfigError, InputError, UnconsumedStepError, UnsupportedModelError
from arkcache.huggingface.attachment import Attachment, LayerShape, find_attachment
from arkcache.huggingface.attention import TAG
from arkcache.huggingface.probe import PROBE_CONFIG, attach_and_probe
from arkcache.manager import KVCacheManager
from arkcache.stats import CacheStats


class PagedCacheLayer(CacheLayerMixin):
    """One layer of an `ArkCache`, as transformers sees it.

    Args:
        cache: the cache it belongs to.
        layer: its number in the model.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False
    _layer_type = None

    def __init__(self, cache: ArkCache, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache, self.layer = cache, layer
        self.manager: KVCacheManager | None = None
        self.index = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Find or build the manager that holds layers of this shape."""
        self.manager, self.index = self.cache._manager_of(self.layer, key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new tokens; see the module docstring for what is returned."""
        attachment = self.cache._attachment_of_step()
        if attachment.pending is not None:
            self._complain(attachment.pending)
        if self.manager is None:
            self.lazy_initialization(key_states, value_states)
        assert self.manager is not None
        past = self.manager.columns_of(self.index)
        with torch.no_grad():
            self.manager.append(
                self.index, key_states, value_states, attachment.padding_of(past, key_states)
            )
            if past == 0:
                return key_states, value_states
            if self.cache.reason is not None:
                return self.manager.gather(self.index)
        for tensor in (key_states, value_states):
            setattr(tensor, TAG, self)
        attachment.pending = self
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Columns (tokens and padding) that the layer has received."""
        return 0 if self.manager is None else self.manager.columns_of(self.index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what a query of this length may attend."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything; see `ArkCache.reset`."""
        self.manager = None
        self.is_initialized = False

    def offload(self) -> None:
        """Nothing: the pages are in the host tier already."""

    def prefetch(self) -> None:
        """Nothing: a step recalls what it selects."""

    def _complain(self, pending: PagedCacheLayer) -> None:
        raise UnconsumedStepError(
            f"layer {pending.layer} was updated but attended without ArkCache: its result was "
            "wrong. Was the model detached, or its attention implementation changed, while the "
            "cache was in use? Build a new ArkCache(model) and start again."
        )


class ArkCache(DynamicCache):
    """A drop-in `past_key_values` that keeps the KV cache in two tiers and attends selected pages.

        cache = ArkCache(model, budget_tokens=2048)
        model.generate(**inputs, past_key_values=cache)

    Building it attaches to the model: its attention implementation becomes "arkcache" until
    `arkcache.detach(model)`; other caches go on working. The first time, a probe of 12 tokens
    compares the model with itself under a plain `DynamicCache`; where they differ the cache runs in
    compat mode (exact, paged storage, nothing sparse) and warns once with the reason.

    Args:
        model: any transformers model with a decoder.
        config: settings; None is `CacheConfig()` with `settings` as its fields.
        settings: fields of `CacheConfig`.

    Attributes:
        mode: "paged" or "compat".
        reason: why the mode is "compat"; None otherwise.

    Raises `ConfigError` for impossible settings and `UnsupportedModelError` for a model without
    any key-value cache, before the model was touched.
    """

    def __init__(
        self, model: PreTrainedModel, config: CacheConfig | None = None, **settings: Any
    ) -> None:
        if config is not None and settings:
            raise ConfigError(
                f"settings {sorted(settings)} beside a CacheConfig: put them into the config"
            )
        if not isinstance(model, PreTrainedModel):
            raise InputError(
                f"model is a {type(model).__name__}: expected a transformers PreTrainedModel; "
                "for other decoders use KVCacheManager (examples/plain_decoder.py)"
            )
        self._build(model, CacheConfig(**settings) if config is None else config)
        self.attach(model)

    def _build(self, model: PreTrainedModel, config: CacheConfig) -> None:
        super().__init__(config=model.config)
        self.config = config
        self._check_layers(model)
        self._managers: dict[LayerShape | int, KVCacheManager] = {}
        self._attachment: Attachment | None = None
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[index] = PagedCacheLayer(self, index)
        self.reason = self._reason_not_paged()

    @property
    def mode(self) -> str:
        """ "paged" or "compat"."""
        return "paged" if self.reason is None else "compat"

    def attach(self, model: PreTrainedModel) -> None:
        """Attach to a model: after loading a pickled cache in another process, or a detach."""
        if self._reason_not_paged() is not None:
            warnings.warn(f"ArkCache in compat mode: {self.reason}", stacklevel=3)
            return
        self._attachment = attach_and_probe(model, ArkCache._for_probe)
        self.reason = self._attachment.reason

    def stats(self) -> CacheStats:
        """Counters and sizes of the paged layers, summed. See `CacheStats`."""
        return sum((manager.stats() for manager in self._managers.values()), CacheStats())

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless the books of every layer agree with its tiers."""
        for manager in self._managers.values():
            manager.check_integrity()

    # -- what transformers calls --------------------------------------------------------------

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of what a query attends; the mask function is told who asks."""
        if self._attachment is not None:
            self._attachment.asking = self
            self._attachment.pending = None
        return super().get_mask_sizes(query_length, layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` columns; a positive number is what is to remain."""
        length = self.get_seq_length()
        target = length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if target < 0:
            raise InputError(f"crop({tokens_to_remove}): the cache holds {length} tokens")
        for layer in self._other_layers():
            layer.crop(min(0, target - length))
        for manager in self._managers.values():
            if target < manager.num_columns:
                manager.crop(target)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sequence i what sequence `beam_idx[i]` was; sealed pages are shared, not copied."""
        for layer in self._other_layers():
            layer.reorder_cache(beam_idx)
        self._keep_sequences(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        for layer in self._other_layers():
            layer.batch_repeat_interleave(repeats)
        for manager in self._managers.values():
            manager.keep_sequences(torch.arange(manager.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` only."""
        for layer in self._other_layers():
            layer.batch_select_indices(indices)
        for manager in self._managers.values():
            manager.keep_sequences(torch.arange(manager.batch)[indices.cpu()])

    def reset(self) -> None:
        """Forget everything and free what it took."""
        for manager in self._managers.values():
            manager.reset()
        self._managers.clear()
        for layer in self.layers:
            layer.reset()

    # -- inside -------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        attachment = state.pop("_attachment")
        state["_attachment_name"] = None if attachment is None else attachment.name
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        name = state.pop("_attachment_name")
        self.__dict__.update(state)
        self._attachment = find_attachment(name)

    @staticmethod
    def _for_probe(model: PreTrainedModel, attachment: Attachment) -> ArkCache:
        cache = ArkCache.__new__(ArkCache)
        cache._build(model, PROBE_CONFIG)
        cache._attachment = attachment
        return cache

    def _attachment_of_step(self) -> Attachment:
        if self._attachment is None:
            raise InputError("this cache was loaded without its model: call cache.attach(model)")
        return self._attachment

    def _other_layers(self) -> Iterator[Any]:
        return (layer for layer in self.layers if not isinstance(layer, PagedCacheLayer))

    def _has_unpaged_attention(self) -> bool:
        """Whether a layer that is not paged attends its whole past and so reads the mask."""
        return any(
            isinstance(layer, DynamicLayer) and not layer.is_sliding
            for layer in self._other_layers()
        )

    def _keep_sequences(self, index: Tensor) -> None:
        for manager in self._managers.values():
            manager.keep_sequences(index)

    def _check_layers(self, model: PreTrainedModel) -> None:
        budget = self.config.budget_tokens
        if isinstance(budget, tuple) and len(budget) != len(self.layers):
            raise ConfigError(
                f"budget_tokens has {len(budget)} entries: this model has {len(self.layers)} layers"
            )
        if not any(isinstance(layer, CacheLayerMixin) for layer in self.layers):
            raise UnsupportedModelError(
                f"{type(model).__name__} keeps no keys and values: there is nothing to page. Use "
                "the cache that the model brings with it"
            )

    def _reason_not_paged(self) -> str | None:
        if any(isinstance(layer, PagedCacheLayer) for layer in self.layers):
            return None
        kinds = sorted({type(layer).__name__ for layer in self.layers})
        return (
            f"no layer attends its whole past: all are {', '.join(kinds)}, which stay as they are"
        )

    def shapes(self, latent_layers: set[int]) -> dict[int, LayerShape]:
        """Shapes of the layers that were used, for `Attachment.shapes`."""
        shapes = {}
        for layer in self.layers:
            if isinstance(layer, PagedCacheLayer) and layer.manager is not None:
                manager = layer.manager
                shapes[layer.layer] = LayerShape(
                    manager.num_kv_heads,
                    manager.head_dim,
                    manager.value_dim,
                    manager.dtype,
                    manager.device,
                    layer.layer in latent_layers,
                )
        return shapes

    def _manager_of(self, layer: int, key: Tensor, value: Tensor) -> tuple[KVCacheManager, int]:
        """The manager for a layer, shared with the layers that the probe saw to be alike."""
        attachment = self._attachment_of_step()
        known = attachment.shapes.get(layer)
        latent = known is not None and known.latent
        shape = LayerShape.of(key, value, latent)
        members = [layer]
        group: LayerShape | int = layer
        if known == shape:
            members = sorted(i for i, other in attachment.shapes.items() if other == shape)
            group = shape
        if group not in self._managers:
            self._managers[group] = KVCacheManager(
                len(members),
                shape.num_kv_heads,
                shape.head_dim,
                self._config_of(members),
                device=shape.device,
                dtype=shape.dtype,
                value_dim=shape.value_dim,
                latent=latent,
            )
        return self._managers[group], members.index(layer)

    def _config_of(self, layers: list[int]) -> CacheConfig:
        """The settings of a manager that holds these layers of the model."""
        config = self.config
        if config.budget_tokens is None:
            return replace(config, num_dense_layers=0)
        budgets: list[Any] = []
        for layer in layers:
            dense = layer < config.num_dense_layers
            given = config.budget_tokens
            budgets.append(None if dense else given[layer] if isinstance(given, tuple) else given)
        return replace(config, num_dense_layers=0, budget_tokens=tuple(budgets))
