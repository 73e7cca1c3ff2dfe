"""What an attached model carries: its previous attention, and the step under way.

Lives on the model's config and nowhere else, so that it is copied and freed with the model.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakValueDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from arkcache.errors import InputError

if TYPE_CHECKING:
    from arkcache.huggingface.cache import PagedCacheLayer
    from arkcache.huggingface.core import CacheCore

NAME = "arkcache"

_attachments: WeakValueDictionary[str, Attachment] = WeakValueDictionary()
"""Living attachments by their own random name: a pickled cache finds its model again by it."""


@dataclass(eq=False)
class Attachment:
    """What an attached model needs beside its weights.

    Attributes:
        base: the attention implementation that attends what is not paged: the model's own, or
            "eager" where that would drop the softcap.
        reason: why the model runs in compat mode; None when it is paged.
        shapes: of each layer, as seen by the probe; layers of one shape share a manager.
        asking: the core of the cache whose mask is being made. Weak: a model keeps no cache alive.
        padding: of the step under way: whose it is, its first column, the mask [batch, new].
        pending: the layer that was updated and not attended yet.
        latent_layers: those that expand their keys between update and attention.
    """

    base: str
    reason: str | None = None
    shapes: dict[int, LayerShape] = field(default_factory=dict)
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    asking: ReferenceType[CacheCore] | None = None
    padding: tuple[ReferenceType[CacheCore], int, Tensor] | None = None
    pending: PagedCacheLayer | None = None
    latent_layers: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        _attachments[self.name] = self

    def copy(self) -> Attachment:
        """An attachment for a copy of the model."""
        return Attachment(self.base, self.reason, dict(self.shapes))

    def padding_of(self, core: CacheCore, start: int, key: Tensor) -> Tensor | None:
        """The padding mask [batch, new] of new keys, if the mask made for this step fits them."""
        if self.padding is None:
            return None
        owner, first, mask = self.padding
        fits = owner() is core and first == start and mask.shape == (key.shape[0], key.shape[2])
        return mask if fits else None


class AttachedName(str):
    """The attention implementation in the config of an attached model, carrying its attachment.

    It reads "arkcache", or in compat mode what it read before. A config keeps this string out of
    what it saves and copies it with itself, which is the lifetime that the attachment needs.
    """

    attachment: Attachment
    previous: str

    def __new__(cls, attachment: Attachment, previous: str) -> AttachedName:
        """The name to set on a config whose implementation was `previous`."""
        name = super().__new__(cls, NAME if attachment.reason is None else previous)
        name.attachment, name.previous = attachment, previous
        return name

    def __deepcopy__(self, memo: dict[int, Any]) -> AttachedName:
        clone = memo.get(id(self.attachment))
        if clone is None:
            clone = memo[id(self.attachment)] = self.attachment.copy()
        return AttachedName(clone, self.previous)

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (self.previous,)


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


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model's inputs belong.

    Weights that accelerate offloads are on "meta" between steps; its hook says where they run.
    """
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None) if model.device.type == "meta" else None
    return model.device if device is None else torch.device(device)


def detach(model: PreTrainedModel) -> None:
    """Give a model back the attention implementation that it had before `ArkCache(model)`."""
    for config in attention_configs(model):
        name = config._attn_implementation
        if isinstance(name, AttachedName):
            config._attn_implementation_internal = name.previous


def attention_configs(model: PreTrainedModel) -> list[Any]:
    """The configs that the decoder's attention modules read their implementation from."""
    configs: list[Any] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(module, "layer_idx", None) is None or not hasattr(
            config, "_attn_implementation"
        ):
            continue
        if not any(config is known for known in configs):
            configs.append(config)
    return configs or [model.config.get_text_config(decoder=True)]


def set_attachment(configs: list[Any], attachment: Attachment) -> None:
    """Attach these configs, and no other part of the model."""
    for config in configs:
        previous = config._attn_implementation
        if isinstance(previous, AttachedName):
            previous = previous.previous
        config._attn_implementation_internal = AttachedName(attachment, previous)


def attachment_in(config: Any) -> Attachment:
    """The attachment of the model that a config belongs to."""
    name = config._attn_implementation
    if not isinstance(name, AttachedName):
        raise InputError(
            f"attention implementation {name!r} was set by hand: build an ArkCache(model) instead"
        )
    return name.attachment


def find_attachment(name: str | None) -> Attachment | None:
    """The living attachment of this name, if its model is in this process."""
    return None if name is None else _attachments.get(name)
