"""`ArkCache`, and its layers as transformers sees them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from arkcache.config import CacheConfig
from arkcache.errors import ConfigError, InputError, UnconsumedStepError, UnsupportedModelError
from arkcache.huggingface.attachment import (
    AttachedName,
    Attachment,
    LayerShape,
    attention_configs,
    detach,
    device_of,
)
from arkcache.huggingface.attention import TAG, WATCHED
from arkcache.huggingface.core import CacheCore, last_readers
from arkcache.huggingface.probe import PROBE_CONFIG, attach_and_probe
from arkcache.manager import KVCacheManager
from arkcache.saving.pages import Progress
from arkcache.stats import CacheStats
from arkcache.tracing.recorder import Recorder


class PagedCacheLayer(CacheLayerMixin):
    """One layer of an `ArkCache`, as transformers sees it.

    Args:
        core: what it shares with the other layers of its cache.
        layer: its number in the model.

    Attributes:
        in_prompt: whether the last step was part of a prompt as far as one can tell: it had several
            tokens. One token more may be what chunks left over of the prompt, or the first that was
            generated, and so attends everything.
        exact: whether the step under way attends everything.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False
    _layer_type = None

    def __init__(self, core: CacheCore, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.core, self.layer = core, layer
        self.manager: KVCacheManager | None = None
        self.index = 0
        self.in_prompt = self.exact = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Find or build the manager that holds layers of this shape."""
        self.take_up(*self.core.manager_of(self.layer, key_states, value_states))

    def take_up(self, manager: KVCacheManager, index: int) -> None:
        """Be the layer `index` of a manager."""
        self.manager, self.index = manager, index
        self.dtype, self.device = manager.dtype, manager.device
        self.is_initialized = True

    @property
    def keys(self) -> Tensor | None:
        """All keys [batch, kv_heads, columns, head_dim], gathered from the tiers; None if empty."""
        return (
            self.manager.gather(self.index)[0] if self.manager and self.get_seq_length() else None
        )

    @keys.setter
    def keys(self, _value: Tensor | None) -> None:
        """Ignored: transformers sets it to None when the layer is built."""

    @property
    def values(self) -> Tensor | None:
        """All values, like `keys`."""
        return (
            self.manager.gather(self.index)[1] if self.manager and self.get_seq_length() else None
        )

    @values.setter
    def values(self, _value: Tensor | None) -> None:
        """Ignored, like `keys`."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new tokens; see the module docstring for what is returned."""
        attachment = self.core.attached()
        if attachment.pending is not None:
            attachment.pending.complain()
        if self.manager is None:
            self.lazy_initialization(key_states, value_states)
        assert self.manager is not None
        past = self.manager.columns_of(self.index)
        padding = attachment.padding_of(self.core, past, key_states)
        self.manager.append(self.index, key_states, value_states, padding)
        self.exact = self.core.exact or self.in_prompt
        self.in_prompt = key_states.shape[2] > 1
        if self.layer in self.core.last_readers:
            self.core.handed[self.layer] = key_states, value_states
        if past == 0:
            if self.manager.observes_prompts:
                setattr(key_states, WATCHED, self)
            return key_states, value_states
        if self.core.reason is not None:
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
        self.is_initialized = self.in_prompt = False

    def offload(self) -> None:
        """Nothing: the pages are in the host tier already."""

    def prefetch(self) -> None:
        """Nothing: a step recalls what it selects."""

    def complain(self) -> None:
        """Raise `UnconsumedStepError`: the layer was updated and nobody attended it."""
        raise UnconsumedStepError(
            f"layer {self.layer} was updated but attended without ArkCache: its result was "
            "wrong. Was the model detached, or its attention implementation changed, while the "
            "cache was in use? Start again with reset(), or with a new ArkCache(model)."
        )


class ArkCache(DynamicCache):
    """A drop-in `past_key_values` that keeps the KV cache in two tiers and attends selected pages.

        cache = ArkCache(model, budget_tokens=2048)
        model.generate(**inputs, past_key_values=cache)

    A prompt is attended exactly, however it is cut: so is every step of several tokens, and the one
    token after it, which may be what chunks left over. Every further token is a decode step and
    attends the pages selected for it. Where a prompt is read one token at a time, say so:
    `with cache.exact()`.

    Building it attaches to the model: its attention implementation becomes "arkcache" until
    `arkcache.detach(model)`; other caches go on working. The first time, a probe of 12 tokens
    compares the model with itself under a plain `DynamicCache`; where they differ the cache runs in
    compat mode (paged storage, nothing sparse, exact with pages of 16 bits) and warns once with the
    reason.

    Args:
        model: any transformers model with a decoder.
        config: settings; None is `CacheConfig()` with `settings` as its fields.
        settings: fields of `CacheConfig`.

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
        if config is not None and not isinstance(config, CacheConfig):
            raise ConfigError(
                f"config is a {type(config).__name__}: expected a CacheConfig, or its fields as "
                "keywords, as in ArkCache(model, budget_tokens=2048)"
            )
        self._build(model, CacheConfig(**settings) if config is None else config)
        self.attach(model)

    def _build(self, model: PreTrainedModel, config: CacheConfig) -> None:
        super().__init__(config=model.config)
        self._check_layers(model, config)
        device_type = device_of(model).type
        config = config.on(device_type).for_layers(len(self.layers))
        self._core = CacheCore(config, model.config, device_type)
        self._make_layers()
        self._core.reason = self._reason_not_paged()
        self._core.mask_is_read = any(
            isinstance(layer, DynamicLayer) and not layer.is_sliding
            for layer in self._other_layers()
        )

    def _make_layers(self) -> None:
        """Have layers that attend their whole past be paged, or attend another that is."""
        from arkcache.huggingface.sharing import SharingCacheLayer  # it imports this module

        core = self._core
        for index, layer in enumerate(self.layers):
            if type(layer) is not DynamicLayer and not isinstance(layer, PagedCacheLayer):
                continue
            self.layers[index] = PagedCacheLayer(core, index)
            if not core.config.stores(index):
                assert core.config.layer_sources is not None
                source = self.layers[core.config.layer_sources[index]]
                assert isinstance(source, PagedCacheLayer)
                self.layers[index] = SharingCacheLayer(core, index, source)
        core.last_readers = last_readers(core.config.layer_sources)
        core.num_paged_layers = sum(
            isinstance(layer, PagedCacheLayer) and core.config.stores(index)
            for index, layer in enumerate(self.layers)
        )

    @property
    def config(self) -> CacheConfig:
        """The settings. Raises `InputError` when they are set while tokens are held."""
        return self._core.config

    @config.setter
    def config(self, config: CacheConfig) -> None:
        core = self._core
        if self.get_seq_length():
            raise InputError(
                f"this cache holds {self.get_seq_length()} tokens in {core.config.format.name}: "
                "other settings need reset() first, or a cache of their own"
            )
        if not isinstance(config, CacheConfig):
            raise ConfigError(f"config is a {type(config).__name__}: expected a CacheConfig")
        core.loans.check_none("other settings")
        config = config.on(core.device_type).for_layers(len(self.layers))
        self._check_budgets(config)
        self._check_sources(config)
        if core.attachment is not None:
            readers = last_readers(config.layer_sources)
            replace(core, config=config, managers={}, last_readers=readers).check()
        core.config = config
        core.managers.clear()
        self._make_layers()

    @property
    def reason(self) -> str | None:
        """Why the mode is "compat"; None when it is "paged"."""
        return self._core.reason

    @property
    def managers(self) -> list[KVCacheManager]:
        """What keeps the layers, one for all layers of a shape; none while the cache is empty."""
        return list(self._core.managers.values())

    def add_manager(self, shape: LayerShape, layers: list[int]) -> KVCacheManager:
        """A new manager, empty, for these layers of the model; see `CacheCore.add_manager`."""
        return self._core.add_manager(shape, layers)

    def shape_of(self, layer: int) -> LayerShape | None:
        """The shape of a layer as the probe saw it; None where it did not."""
        attachment = self._core.attachment
        return None if attachment is None else attachment.shapes.get(layer)

    @property
    def mode(self) -> str:
        """ "paged" or "compat"."""
        return "paged" if self.reason is None else "compat"

    def attach(self, model: PreTrainedModel) -> None:
        """Attach to a model: after loading a pickled cache in another process, or a detach."""
        self._core.model = ref(model)
        if self._reason_not_paged() is not None:
            warnings.warn(f"ArkCache in compat mode: {self.reason}", stacklevel=3)
            return
        attached = any(
            isinstance(config._attn_implementation, AttachedName)
            for config in attention_configs(model)
        )
        self._core.attachment = attach_and_probe(model, ArkCache._for_probe)
        self._core.reason = self._core.attachment.reason
        try:
            self._core.check()
        except ConfigError:
            if not attached:
                detach(model)
            raise

    def graphed(
        self, model: PreTrainedModel, new_tokens: int = 1024
    ) -> AbstractContextManager[None]:
        """Within it, decode steps of `model` with this cache are replayed as CUDA graphs.

            with cache.graphed(model):
                output = model.generate(**inputs, past_key_values=cache)

        So it is for a loop of your own under `torch.no_grad()`. In a step that is replayed the
        model's Python code does not run, hooks included; leave the block to change the model. Steps
        that cannot be replayed run as ever, with one warning that says why. What is recorded lasts
        until the cache is reset or goes.

        Args:
            model: the model that this cache is attached to.
            new_tokens: of each sequence to make room for after every prompt; with more, what is
                recorded may have to be recorded anew.
        """
        from arkcache.huggingface.graphed import replayed  # it imports this module

        return replayed(model, self, new_tokens)

    @contextmanager
    def trace(self, recorder: Recorder) -> Iterator[None]:
        """Within it, tell a recorder what decode steps do; see docs/trace.md.

            with cache.trace(recorder):
                model.generate(**inputs, past_key_values=cache)
            save(trace_of(recorder), "generation.trace")

        Layers are numbered as in the model. Steps are not replayed as graphs within it. Raises
        `InputError` inside another trace.
        """
        with self._core.trace(recorder):
            yield

    @property
    def is_traced(self) -> bool:
        """Whether a recorder is told what decode steps do."""
        return self._core.recorder is not None

    def time_copies(self, on: bool) -> None:
        """Count from now on how long copies between the tiers take, or cease to: see
        `KVCacheManager.time_copies`."""
        self._core.time_copies(on)

    def set_budget(self, budget_tokens: int | tuple[Any, ...]) -> None:
        """Attend so many tokens per step from now on, as in `CacheConfig`; what is held stays.

        Raises `ConfigError`, before anything has changed, for an impossible budget and where a
        layer that holds tokens would begin or cease to attend everything.
        """
        config = replace(self._core.config, budget_tokens=budget_tokens)
        config = config.for_layers(len(self.layers))
        self._check_budgets(config)
        self._core.set_budget(config.budget_tokens)

    def resize(self, device_bytes: int | None) -> None:
        """Have device tiers of at most so many bytes from now on (docs/lending.md).

            cache.resize(2 << 30)

        What is held stays: budgets are cut to what fits, as if the cache had had the limit from the
        beginning, and pages come back from the host tier when steps select them. On a CPU with
        numba there is no tier of pages, and only budgets change.

        device_bytes: as in `CacheConfig`. Raises `ConfigError`, before anything has changed, where
        sinks, windows and one page do not fit, and `InputError` within `lend`.
        """
        self._core.loans.check_none(f"resize({device_bytes!r})")
        self._core.change_size(device_bytes)

    def lend(self, num_bytes: int) -> AbstractContextManager[None]:
        """Within it, the device tiers are at least so many bytes smaller than they are now.

            with cache.lend(1 << 30):
                other_model.generate(...)       # this cache's steps may go on in what is left

        Blocks may be nested. Raises `InputError`, before anything has changed, where the tiers
        cannot spare so much. If the memory is not there when the block ends, the cache goes on in
        what it has: the error says so, and `resize` has the rest back later.
        """
        return self._core.loans.lend(self._core, num_bytes)

    def forget_step(self) -> None:
        """Forget a step that was interrupted between its layers."""
        self._core.forget_step()

    @contextmanager
    def atomic(self) -> Iterator[None]:
        """Within it steps happen all or not at all: after an error the cache is what it was before.

        For what comes between the model's calls, and for errors which they raise by themselves. A
        signal that interrupts a call may leave a layer half written: have it wait.
        """
        length = self.get_seq_length()
        others = [_as_it_is(layer) for layer in self.layers]
        prompts = [isinstance(layer, PagedCacheLayer) and layer.in_prompt for layer in self.layers]
        try:
            yield
        except BaseException:
            self.forget_step()
            for manager in self._core.managers.values():
                manager.crop(min(length, manager.num_columns))
            for index, layer in enumerate(self.layers):
                if isinstance(layer, PagedCacheLayer):
                    layer.in_prompt = prompts[index]
                else:
                    self.layers[index] = others[index]
            raise

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Within it every step attends everything: for a prompt that is read token by token."""
        core, before = self._core, self._core.exact
        core.exact = True
        try:
            yield
        finally:
            core.exact = before

    @property
    def next_is_exact(self) -> bool:
        """Whether a step of one token would attend everything."""
        paged = (layer for layer in self.layers if isinstance(layer, PagedCacheLayer))
        return self._core.exact or any(layer.in_prompt for layer in paged)

    def end_prompt(self) -> None:
        """Say that the next token is no part of a prompt: it is attended as a decode step.

        Spares one exact step, which reads the whole past, where the caller knows.
        """
        for layer in self.layers:
            if isinstance(layer, PagedCacheLayer):
                layer.in_prompt = False

    def stats(self) -> CacheStats:
        """Counters and sizes of the paged layers, summed. See `CacheStats`."""
        managers = tuple(self._core.managers.values())  # another thread may ask, while one is made
        return sum((manager.stats() for manager in managers), CacheStats())

    @property
    def lossless(self) -> bool:
        """Whether all that was read is there: no page was given up by a `retention`."""
        return self.stats().pages_lost == 0

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless the metadata of every layer agrees with its tiers, and
        `SessionError` unless all pages of a tier in a file are what was written."""
        for manager in self._core.managers.values():
            manager.check_integrity()

    # -- as a folder ----------------------------------------------------------------------------

    def save(
        self, folder: str | Path, *, note: Any = None, progress: Progress = lambda *_: None
    ) -> None:
        """Save what the cache holds, so that `load` has it again without reading the text.

        Whatever interrupts it, the folder holds either this or what was saved there before.

        Args:
            folder: new, or that of an earlier save, which is replaced.
            note: anything that JSON can say, given back by `load_cache` (saving.py).
            progress: told how many bytes of a group of layers are written, and of how many.

        Raises `SessionError` where it cannot be written, `InputError` where the model is gone.
        """
        from arkcache.huggingface.saving import save_cache  # it imports this module

        model = None if self._core.model is None else self._core.model()
        if model is None:
            raise InputError("this cache has lost its model: call cache.attach(model) before save")
        save_cache(self, model, Path(folder), note, progress)

    @classmethod
    def load(
        cls,
        model: PreTrainedModel,
        folder: str | Path,
        *,
        progress: Progress = lambda *_: None,
        **settings: Any,
    ) -> ArkCache:
        """A cache that holds what `save` wrote: the next token is that which would have come.

        Digests are loaded too, where the steps run on the same kernels with the same index, and
        made anew from the pages elsewhere. With a `host_path` on the same disk pages are mapped
        where they lie, and each is compared with its checksum when it is first read: a step that
        needs a damaged one raises `SessionError`, and other sequences go on.

        Args:
            model: the one that was saved with: its config and weights are compared.
            folder: where `save` wrote.
            progress: told how many bytes of a group of layers are read, and of how many.
            settings: fields of `CacheConfig` to replace: a budget, an index, a limit; not those
                that say how tokens are kept.

        Raises `SessionError` for a folder that is damaged or of another model, version or format,
        `ConfigError` for impossible settings, and `HostTierFullError`.
        """
        from arkcache.huggingface.saving import load_cache  # it imports this module

        return load_cache(model, Path(folder), progress, **settings)[0]

    # -- what transformers calls --------------------------------------------------------------

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of what a query attends; the mask function is told who asks."""
        attachment = self._core.attachment
        if attachment is not None:
            if attachment.pending is not None and attachment.pending.core is self._core:
                attachment.pending.complain()
            attachment.asking, attachment.pending = ref(self._core), None
        return super().get_mask_sizes(query_length, layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` columns; a positive number is what is to remain."""
        self._core.forget_step()
        # Some releases pass a 0-dim tensor.
        tokens_to_remove = int(tokens_to_remove)
        length = self.get_seq_length()
        target = length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        if target < 0:
            raise InputError(f"crop({tokens_to_remove}): the cache holds {length} tokens")
        self.end_prompt()  # rejected drafts, a retry: what comes next is generated
        for layer in self._other_layers():
            layer.crop(min(0, target - length))
        for manager in self._core.managers.values():
            if target < manager.num_columns:
                manager.crop(target)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make sequence i what sequence `beam_idx[i]` was; sealed pages are shared, not copied."""
        for layer in self._other_layers():
            layer.reorder_cache(beam_idx)
        self._keep_sequences(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        for manager in self._core.managers.values():
            manager.check_batch(manager.batch * repeats)
        for layer in self._other_layers():
            layer.batch_repeat_interleave(repeats)
        for manager in self._core.managers.values():
            manager.keep_sequences(torch.arange(manager.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` only."""
        for layer in self._other_layers():
            layer.batch_select_indices(indices)
        for manager in self._core.managers.values():
            manager.keep_sequences(torch.arange(manager.batch)[indices.cpu()])

    def reset(self) -> None:
        """Forget everything and free what it took."""
        self._core.forget_step()
        for manager in self._core.managers.values():
            manager.reset()
        self._core.managers.clear()
        for layer in self.layers:
            layer.reset()
        # Some releases zero a sliding layer and keep its length.
        fresh = DynamicCache(config=self._core.model_config).layers
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, PagedCacheLayer):
                self.layers[index] = fresh[index]

    # -- inside -------------------------------------------------------------------------------

    @staticmethod
    def _for_probe(model: PreTrainedModel, attachment: Attachment) -> ArkCache:
        cache = ArkCache.__new__(ArkCache)
        cache._build(model, PROBE_CONFIG)
        cache._core.attachment = attachment
        return cache

    def _other_layers(self) -> Iterator[Any]:
        return (layer for layer in self.layers if not isinstance(layer, PagedCacheLayer))

    def _keep_sequences(self, index: Tensor) -> None:
        for manager in self._core.managers.values():
            manager.keep_sequences(index)

    def _check_layers(self, model: PreTrainedModel, config: CacheConfig) -> None:
        self._check_budgets(config)
        self._check_sources(config)
        if not any(isinstance(layer, CacheLayerMixin) for layer in self.layers):
            raise UnsupportedModelError(
                f"{type(model).__name__} keeps no keys and values: there is nothing to page. Use "
                "the cache that the model brings with it"
            )

    def _check_budgets(self, config: CacheConfig) -> None:
        budget = config.budget_tokens
        if isinstance(budget, tuple) and len(budget) != len(self.layers):
            raise ConfigError(
                f"budget_tokens has {len(budget)} entries: this model has {len(self.layers)} layers"
            )

    def _check_sources(self, config: CacheConfig) -> None:
        """Raise `ConfigError` where layers cannot share, as far as their kinds say."""
        config.check_sources(len(self.layers))
        for layer, source in enumerate(config.layer_sources or ()):
            for one in (layer, source):
                kind = type(self.layers[one])
                if (
                    layer != source
                    and kind is not DynamicLayer
                    and not issubclass(kind, PagedCacheLayer)
                ):
                    raise ConfigError(
                        f"layer_sources: layer {layer} cannot attend layer {source}, because layer "
                        f"{one} does not attend its whole past (a {kind.__name__}); expected "
                        f"{layer} in its place"
                    )

    def _reason_not_paged(self) -> str | None:
        if any(isinstance(layer, PagedCacheLayer) for layer in self.layers):
            return None
        kinds = sorted({type(layer).__name__ for layer in self.layers})
        return (
            f"no layer attends its whole past: all are {', '.join(kinds)}, which stay as they are"
        )

    def shapes(self, latent_layers: set[int]) -> dict[int, LayerShape]:
        """Shapes of the layers that were used: what the probe learns for `Attachment.shapes`."""
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


def _as_it_is(layer: Any) -> Any:
    """A layer that is not ours, to be put back: what a step writes into is copied, what it replaces
    is not."""
    if isinstance(layer, PagedCacheLayer):
        return layer
    return copy.deepcopy(layer) if hasattr(layer, "recurrent_states") else copy.copy(layer)
