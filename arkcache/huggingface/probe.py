"""A model is paged only after a short run of the paged path gave the logits of `DynamicCache`."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache

from arkcache.config import CacheConfig
from arkcache.errors import UnsupportedModelError
from arkcache.huggingface.attachment import (
    AttachedName,
    Attachment,
    LayerShape,
    attention_configs,
    detach,
    device_of,
    set_attachment,
)
from arkcache.huggingface.attention import latent_query_fits

if TYPE_CHECKING:
    from arkcache.huggingface.cache import ArkCache

PROBE_CONFIG = CacheConfig(
    page_size=2,
    budget_tokens=64,
    num_sink_tokens=2,
    num_recent_tokens=2,
    num_dense_layers=0,
    backend="torch",
)
"""Budget for everything, so that the paged path must be exact, and pages that seal at once. On
plain torch, because it is not known yet which layers keep latents, which no kernel expands."""

PROBE_TOLERANCE = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 5e-2,
    torch.bfloat16: 1e-1,
}

FOLLOWS = 1e-3
"""A token that is moved changes its logits by this share of the largest one at least: the least
seen is 6e-3 (one layer of 64 channels, initialised and not trained), in bf16 as in fp32."""

MakeCache = Callable[[PreTrainedModel, Attachment], "ArkCache"]


def attach_and_probe(model: PreTrainedModel, make_cache: MakeCache) -> Attachment:
    """Attach to a model, probing it the first time. In compat mode its implementation stays.

    make_cache: builds the probe's cache, with `PROBE_CONFIG`.
    """
    configs = attention_configs(model)
    name = configs[0]._attn_implementation
    if isinstance(name, AttachedName):
        return name.attachment
    attachment = Attachment(base=_base_of(configs[0]))
    try:
        attachment.reason = _probe(model, configs, attachment, make_cache)
    except BaseException:
        detach(model)
        raise
    set_attachment(configs, attachment)
    if attachment.reason is not None:
        warnings.warn(f"ArkCache in compat mode: {attachment.reason}", stacklevel=4)
    return attachment


def _base_of(config: Any) -> str:
    """What attends unpaged layers; sdpa cannot do softcap, and some releases drop it silently."""
    name = str(config._attn_implementation)
    softcap = getattr(config, "attn_logit_softcapping", None)
    return "eager" if softcap is not None and name == "sdpa" else name


def _probe(
    model: PreTrainedModel, configs: list[Any], attachment: Attachment, make_cache: MakeCache
) -> str | None:
    """Compare a paged run of 12 tokens with `DynamicCache`; returns why they differ, or None."""
    if not model._can_set_attn_implementation():
        return (
            f"{type(model).__name__} computes its attention itself, not through the attention "
            "interface of transformers"
        )
    try:
        plain = DynamicCache(config=model.config)
        with _implementation(configs, attachment.base):
            expected = _probe_logits(model, plain)
        attachment.shapes = {
            number: LayerShape.of(layer.keys, layer.values, latent=False)
            for number, layer in enumerate(plain.layers)
            if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None
        }
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run with a DynamicCache, which ArkCache extends "
            f"({type(error).__name__}: {error})"
        ) from error
    set_attachment(configs, attachment)
    cache = make_cache(model, attachment)
    try:
        given = _probe_logits(model, cache)
        latents_fit = all(latent_query_fits(module) for module in model.modules())
    except Exception as error:  # whatever a model's code does with half a cache, compat mode serves
        return f"a probe of the paged path raised {type(error).__name__}: {error}"
    finally:
        attachment.pending = attachment.padding = attachment.asking = None
    attachment.shapes = cache.shapes(attachment.latent_layers)
    if not latents_fit:
        return "its latent attention does not rate keys by the weight of kv_b_proj alone"
    difference = (given - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    tolerance = PROBE_TOLERANCE[expected.dtype]
    if not difference <= tolerance:
        return (
            f"a probe of the paged path differs from DynamicCache by {difference:.1e} of the "
            f"largest logit, more than {tolerance:.0e}"
        )
    return None


def _probe_logits(model: PreTrainedModel, cache: DynamicCache) -> Tensor:
    """Logits (or hidden states of an encoder-decoder) of the last prompt token and 3 more."""
    device = device_of(model)
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
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                use_cache=True,
                **inputs,
            )
            outputs.append(result[0][:, -1])
    return torch.stack(outputs)


def follows_positions(model: PreTrainedModel, forward: Callable[..., Any]) -> bool:
    """Whether a token's logits follow the `position_ids` that come with it.

    Some decoders count what their cache holds instead. `forward` is the model's own.
    """
    if "position_ids" not in inspect.signature(forward).parameters:
        return False
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    # Distinct: between equal tokens attention gives the same, however it weighs them.
    ids = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))[:8]
    ids = ids[None].to(device_of(model))
    with _evaluating(model), torch.no_grad():
        here, again, *moved = (_logits_at(forward, model, ids, away) for away in (0, 0, 1, 3, 8))
    noise, effect = (here - again).abs().max(), (torch.cat(moved) - here).abs().max()
    return bool(effect > max(FOLLOWS * float(here.abs().max()), 4 * float(noise)))


def _logits_at(
    forward: Callable[..., Any], model: PreTrainedModel, ids: Tensor, away: int
) -> Tensor:
    """Logits [1, vocabulary] of the last token, in fp32, `away` from where it follows the rest."""
    cache, prompt = DynamicCache(config=model.config), ids.shape[1] - 1
    for first, last in ((0, prompt), (prompt, prompt + 1)):
        positions = torch.arange(first, last, device=ids.device)[None]
        result = forward(
            input_ids=ids[:, first:last],
            position_ids=positions + (away if first else 0),
            past_key_values=cache,
            use_cache=True,
        )
    logits: Tensor = result[0][:, -1].float()
    return logits


@contextlib.contextmanager
def _implementation(configs: list[Any], name: str) -> Iterator[None]:
    previous = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, old in zip(configs, previous, strict=True):
            config._attn_implementation_internal = old


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
