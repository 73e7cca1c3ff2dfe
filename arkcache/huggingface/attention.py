"""The attention and mask functions that transformers calls under the name "arkcache"."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from arkcache.huggingface.attachment import NAME, attachment_in

TAG = "_arkcache_layer"
WATCHED = "_arkcache_watched"
"""On the keys of a prompt that the base implementation attends: the layer that is to see it."""
PLAIN = "_arkcache_plain"
"""Marks a mask that says no more than causality and padding, which the cache knows itself."""


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
    attachment = attachment_in(module.config)
    layer = getattr(key, TAG, None)
    expand = None
    if layer is None and attachment.pending is not None and hasattr(module, "expand_kv"):
        # Latent attention expands its keys between update and attention, which drops the tag.
        layer, expand = attachment.pending, module.expand_kv
        attachment.latent_layers.add(layer.layer)
    if layer is None:
        watching = getattr(key, WATCHED, None)
        if watching is not None:
            watching.manager.observe_prompt(
                watching.index,
                query,
                scale=kwargs.get("scaling"),
                softcap=kwargs.get("softcap"),
                sinks=kwargs.get("s_aux"),
            )
        base = _base_attention(module, attachment.base)
        return base(module, query, key, value, attention_mask, **kwargs)
    attachment.pending = None
    # The probe's own manager rates nothing, and does not know yet that its keys are latents.
    rates_latents = expand is not None and layer.manager.latent
    output = layer.manager.attend(
        layer.index,
        query,
        scale=kwargs.get("scaling"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        mask=_own_mask(attention_mask, kwargs.get("position_bias")),
        expand=expand,
        index_query=_latent_query(module, query) if rates_latents else None,
        exact=layer.exact,
    )
    return output.transpose(1, 2).contiguous(), None


def mask_function(**kwargs: Any) -> Tensor | None:
    """The mask function "arkcache": notes the padding; makes a mask only where someone reads it.

    Called as `transformers.masking_utils` calls every mask function, with keywords only. Returns
    what the base implementation returns, or None where the cache knows as much itself.
    """
    attachment = attachment_in(kwargs["config"])
    asking, attachment.asking = attachment.asking, None
    core = None if asking is None else asking()
    base = ALL_MASK_ATTENTION_FUNCTIONS[attachment.base]
    causal = "allow_is_causal_skip" in kwargs and kwargs.get("local_size") is None
    if not causal or core is None or core.reason is not None:
        return base(**kwargs)  # type: ignore[no-any-return]
    start, new_tokens = kwargs["q_offset"], kwargs["q_length"]
    mask = kwargs.get("attention_mask")
    attachment.padding = None
    if mask is not None and mask.shape[1] >= start + new_tokens:
        attachment.padding = (ref(core), start, mask[:, start : start + new_tokens])
    plain = kwargs["mask_function"] is causal_mask_function
    plain = plain and (mask is None or core.knows(mask[:, :start]))
    if start > 0 and plain and not core.mask_is_read:
        return None
    result: Tensor | None = base(**kwargs)
    if plain and result is not None:
        setattr(result, PLAIN, True)
    return result


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
    weight = _of_this_rank(module.kv_b_proj.weight)
    weight = weight.unflatten(0, (query.shape[1], -1))[:, :nope]
    absorbed = torch.einsum("bhnd,hdr->bhnr", query[..., :nope], weight.to(query.dtype))
    return torch.cat((absorbed, query[..., nope:]), dim=-1)


def _of_this_rank(weight: Tensor) -> Tensor:
    """The part of a weight whose heads this process attends, under tensor parallelism."""
    local: Callable[[], Tensor] | None = getattr(weight, "to_local", None)  # a DTensor's
    return weight if local is None else local()


def latent_query_fits(module: Any) -> bool:
    """Whether `_latent_query` rates latents as the module's expanded keys would.

    It does not where the weight of `kv_b_proj` is not the whole projection: scaled low-bit weights,
    adapters.
    """
    if not hasattr(module, "expand_kv"):
        return True
    weight = module.kv_b_proj.weight
    rank, rope = module.kv_lora_rank, module.qk_rope_head_dim
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 1, 4, rank, generator=generator).to(weight.device, weight.dtype)
    rotary = torch.randn(1, 1, 4, rope, generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        key, _ = module.expand_kv(latent, rotary)
        query = torch.randn(1, key.shape[1], 1, key.shape[3], generator=generator).to(key)
        expected = (query @ key.transpose(-1, -2)).float()
        given = _latent_query(module, query) @ torch.cat((latent, rotary), -1).transpose(-1, -2)
    return bool((given.float() - expected).abs().max() <= 0.05 * expected.abs().max())


def _base_attention(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that the model would use under its base implementation."""
    eager: Any = None
    for cls in type(module).__mro__:
        eager = eager or getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
    function: Callable[..., tuple[Tensor, Tensor | None]]
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return function


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, mask_function)
