"""ArkCache for Hugging Face transformers: a `DynamicCache` whose full-attention layers are paged.

How a step travels: the model calls `cache.update(key, value, layer)`. The first prompt is stored
and its own keys and values go back, so that the model attends it as it always did. Later steps get
only the new keys and values back, with a tag on both; the model hands them to the attention
function registered as "arkcache", which reads the tag and lets the layer attend its pages.

What belongs to a model (its previous attention, the padding of the step under way) rides on the
name of its attention implementation, `AttachedName`, which lives and is copied with the config.
"""

from __future__ import annotations

import contextlib
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, EncoderDecoderCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from arkcache.config import CacheConfig
from arkcache.errors import ConfigError, InputError, UnconsumedStepError, UnsupportedModelError
from arkcache.manager import KVCacheManager
from arkcache.stats import CacheStats

NAME = "arkcache"
TAG = "_arkcache_layer"
PLAIN = "_arkcache_plain"
"""Marks a mask that says no more than causality and padding, which the cache knows itself."""

_attachments: WeakValueDictionary[str, Attachment] = WeakValueDictionary()
"""Living attachments by their own random name, so that an unpickled cache finds its model again."""


@dataclass(eq=False)
class Attachment:
    """What an attached model needs beside its weights.

    Attributes:
        previous: the attention implementation to restore on detach.
        base: the one that attends what is not paged; "eager" where the previous one would drop
            the softcap.
        reason: why the model runs in compat mode; None when it is paged.
        shapes: of each layer, as seen by the probe; layers of one shape share a manager.
        asking: the cache whose mask is being made.
        padding: the first column and the mask [batch, new] of the step under way, if padded.
        pending: the layer that was updated and not attended yet.
        latent_layers: those that expand their keys between update and attention.
    """

    previous: str
    base: str
    reason: str | None = None
    shapes: dict[int, LayerShape] = field(default_factory=dict)
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    asking: ArkCache | None = None
    padding: tuple[int, Tensor] | None = None
    pending: PagedCacheLayer | None = None
    latent_layers: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        _attachments[self.name] = self

    def copy(self) -> Attachment:
        """An attachment for a copy of the model."""
        return Attachment(self.previous, self.base, self.reason, dict(self.shapes))

    def padding_of(self, start: int, key: Tensor) -> Tensor | None:
        """The padding mask [batch, new] of new keys, if the mask made for this step fits them."""
        if self.padding is None:
            return None
        first, mask = self.padding
        return mask if first == start and mask.shape == (key.shape[0], key.shape[2]) else None


class AttachedName(str):
    """The attention implementation in the config of an attached model, carrying its attachment.

    It reads "arkcache", or in compat mode what it read before. A config keeps this string out of
    what it saves and copies it with itself, which is the lifetime that the attachment needs.
    """

    attachment: Attachment

    def __new__(cls, attachment: Attachment) -> AttachedName:
        text = NAME if attachment.reason is None else attachment.previous
        name = super().__new__(cls, text)
        name.attachment = attachment
        return name

    def __deepcopy__(self, memo: dict[int, Any]) -> AttachedName:
        clone = memo.get(id(self.attachment))
        if clone is None:
            clone = memo[id(self.attachment)] = self.attachment.copy()
        return AttachedName(clone)

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self.attachment.previous,)


@dataclass(frozen=True)
class LayerShape:
    """What layers must share to live in one manager."""

    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    latent: bool

    @classmethod
    def of(cls, key: Tensor, value: Tensor, latent: bool) -> LayerShape:
        """The shape of a layer from its new keys and values [batch, kv_heads, new, dim]."""
        return cls(key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device, latent)


# -- the cache ------------------------------------------------------------------------------------


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
        super().__init__()
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
        self._attachment = _attach(model)
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
        self._attachment = _attachments.get(name)

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
        return f"no layer attends its whole past: all are {', '.join(kinds)}, which stay as they are"

    def _shapes(self, latent_layers: set[int]) -> dict[int, LayerShape]:
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
        budgets = []
        for layer in layers:
            dense = layer < config.num_dense_layers
            given = config.budget_tokens
            budgets.append(None if dense else given[layer] if isinstance(given, tuple) else given)
        return replace(config, num_dense_layers=0, budget_tokens=tuple(budgets))


# -- attention and mask ---------------------------------------------------------------------------


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function "arkcache": pages for tagged keys, the base implementation otherwise.

    query [batch, heads, new, head_dim]; returns [batch, new, heads, value_dim] and no weights.
    """
    attachment = _attachment_of(module)
    layer = getattr(key, TAG, None)
    expand = None
    if layer is None and attachment.pending is not None and hasattr(module, "expand_kv"):
        # Latent attention expands its keys between update and attention, which drops the tag.
        layer, expand = attachment.pending, module.expand_kv
        attachment.latent_layers.add(layer.layer)
    if layer is None:
        base = _base_attention(module, attachment.base)
        return base(module, query, key, value, attention_mask, **kwargs)
    attachment.pending = None
    output = layer.manager.attend(
        layer.index,
        query,
        scale=kwargs.get("scaling"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        mask=_own_mask(attention_mask, kwargs.get("position_bias")),
        expand=expand,
        index_query=None if expand is None else _latent_query(module, query),
    )
    return output.transpose(1, 2).contiguous(), None


def mask_function(**kwargs: Any) -> Tensor | None:
    """The mask function "arkcache": notes the padding, and makes a mask only if someone reads it."""
    attachment = _attachment_in(kwargs["config"])
    cache, attachment.asking = attachment.asking, None
    base = ALL_MASK_ATTENTION_FUNCTIONS[attachment.base]
    causal = "allow_is_causal_skip" in kwargs and kwargs.get("local_size") is None
    if not causal or cache is None or cache.mode == "compat":
        return base(**kwargs)  # type: ignore[no-any-return]
    start, new_tokens = kwargs["q_offset"], kwargs["q_length"]
    mask = kwargs.get("attention_mask")
    attachment.padding = None
    if mask is not None and mask.shape[1] >= start + new_tokens:
        attachment.padding = (start, mask[:, start : start + new_tokens])
    plain = kwargs["mask_function"] is causal_mask_function
    if start > 0 and plain and not cache._has_unpaged_attention():
        return None
    result: Tensor | None = base(**kwargs)
    if plain and result is not None:
        setattr(result, PLAIN, True)
    return result


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, mask_function)


def _own_mask(mask: Tensor | None, position_bias: Tensor | None) -> Tensor | None:
    """What of a mask and a position bias the cache does not know itself, as an additive mask."""
    if mask is not None and getattr(mask, PLAIN, False):
        mask = None
    if position_bias is None or mask is None:
        return mask if position_bias is None else position_bias
    if mask.dtype == torch.bool:
        return position_bias.masked_fill(~mask, float("-inf"))
    return mask + position_bias


def _latent_query(module: Any, query: Tensor) -> Tensor:
    """Map queries into the latent space: q.(W c) = (W^T q).c, with the rotary part beside it.

    query [batch, heads, new, nope + rope]; returns [batch, heads, new, latent + rope]. DeepSeek-V2,
    section 2.1: the up-projection of the keys is absorbed into the query.
    """
    nope = module.qk_nope_head_dim
    weight = module.kv_b_proj.weight.unflatten(0, (query.shape[1], -1))[:, :nope]
    absorbed = torch.einsum("bhnd,hdr->bhnr", query[..., :nope], weight.to(query.dtype))
    return torch.cat((absorbed, query[..., nope:]), dim=-1)


def _base_attention(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that the model would use under its base implementation."""
    for cls in type(module).__mro__:
        eager = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if eager is not None:
            break
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # type: ignore[no-any-return]


# -- attach, probe, detach ------------------------------------------------------------------------


def detach(model: PreTrainedModel) -> None:
    """Give a model back the attention implementation that it had before `ArkCache(model)`."""
    for config in _attention_configs(model):
        name = config._attn_implementation
        if isinstance(name, AttachedName):
            config._attn_implementation_internal = name.attachment.previous


def _attach(model: PreTrainedModel) -> Attachment:
    configs = _attention_configs(model)
    name = configs[0]._attn_implementation
    if isinstance(name, AttachedName):
        return name.attachment
    attachment = Attachment(previous=name, base=_base_of(configs[0]))
    try:
        attachment.reason = _probe(model, configs, attachment)
    except BaseException:
        _set_implementation(configs, name)
        raise
    _set_implementation(configs, AttachedName(attachment))
    if attachment.reason is not None:
        warnings.warn(f"ArkCache in compat mode: {attachment.reason}", stacklevel=5)
    return attachment


def _attention_configs(model: PreTrainedModel) -> list[Any]:
    """The configs that the decoder's attention modules read their implementation from."""
    configs: list[Any] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(module, "layer_idx", None) is None or not hasattr(config, "_attn_implementation"):
            continue
        if not any(config is known for known in configs):
            configs.append(config)
    return configs or [model.config.get_text_config(decoder=True)]


def _set_implementation(configs: list[Any], name: str) -> None:
    for config in configs:
        config._attn_implementation_internal = name


def _base_of(config: Any) -> str:
    """What attends unpaged layers; sdpa cannot do softcap, and some releases drop it silently."""
    name = str(config._attn_implementation)
    softcap = getattr(config, "attn_logit_softcapping", None)
    return "eager" if softcap is not None and name == "sdpa" else name


def _attachment_in(config: Any) -> Attachment:
    name = config._attn_implementation
    if not isinstance(name, AttachedName):
        raise InputError(
            f'attention implementation {name!r} was set by hand: build an ArkCache(model) instead'
        )
    return name.attachment


def _attachment_of(module: nn.Module) -> Attachment:
    return _attachment_in(module.config)


def _probe(model: PreTrainedModel, configs: list[Any], attachment: Attachment) -> str | None:
    """Compare a paged run of 12 tokens with `DynamicCache`; returns why they differ, or None."""
    if not model._can_set_attn_implementation():
        return (
            f"{type(model).__name__} computes its attention itself, not through the attention "
            "interface of transformers"
        )
    _set_implementation(configs, attachment.base)
    expected = _probe_logits(model, DynamicCache(config=model.config))
    _set_implementation(configs, AttachedName(attachment))
    cache = ArkCache.__new__(ArkCache)
    cache._build(model, PROBE_CONFIG)
    cache._attachment = attachment
    try:
        given = _probe_logits(model, cache)
    except Exception as error:  # whatever a model's code does with half a cache, compat mode serves
        return f"a probe of the paged path raised {type(error).__name__}: {error}"
    finally:
        attachment.pending = attachment.padding = attachment.asking = None
    attachment.shapes = cache._shapes(attachment.latent_layers)
    difference = (given - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    tolerance = PROBE_TOLERANCE[expected.dtype]
    if not difference <= tolerance:
        return (
            f"a probe of the paged path differs from DynamicCache by {difference:.1e} of the "
            f"largest logit, more than {tolerance:.0e}"
        )
    return None


PROBE_CONFIG = CacheConfig(
    page_size=2, budget_tokens=64, num_sink_tokens=2, num_recent_tokens=2, num_dense_layers=0
)
"""Budget for everything, so that the paged path must be exact, and pages that seal at once."""

PROBE_TOLERANCE = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 5e-2,
    torch.bfloat16: 1e-1,
}


def _probe_logits(model: PreTrainedModel, cache: DynamicCache) -> Tensor:
    """Logits (or hidden states of an encoder-decoder) of the last prompt token and 3 more."""
    device = model.get_input_embeddings().weight.device
    config = model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2, 12), generator=generator).to(device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    decoder: Any = model
    inputs: dict[str, Any] = {"past_key_values": cache}
    if model.config.is_encoder_decoder:
        decoder = model.get_decoder()
        states = torch.randn(2, 4, config.hidden_size, generator=generator)
        inputs["encoder_hidden_states"] = states.to(device, model.dtype)
        inputs["past_key_values"] = EncoderDecoderCache(cache, DynamicCache())
    outputs = []
    with _evaluating(model), torch.no_grad():
        for start, stop in ((0, 9), (9, 10), (10, 11), (11, 12)):
            result = decoder(
                input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], use_cache=True, **inputs
            )
            outputs.append(result[0][:, -1])
    return torch.stack(outputs)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
