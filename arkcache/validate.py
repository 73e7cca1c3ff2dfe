"""Checks of what callers pass to a `KVCacheManager`; each raises before anything has changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.errors import ConfigError, InputError
from arkcache.kernels.torch_hadamard import block_dim
from arkcache.pages.bookkeeping import Ids

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What keys and values may be stored in: narrower floats have too little arithmetic in torch."""


def check_sizes(dtype: Any, **sizes: Any) -> None:
    """Raise unless all sizes are positive integers, and dtype what it should be."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"{name}={size!r}: expected an integer of at least 1")
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r}: expected one of {', '.join(map(str, DTYPES))}")


def check_config(config: Any) -> None:
    """Raise unless it is a `CacheConfig`."""
    if not isinstance(config, CacheConfig):
        raise ConfigError(f"config is a {type(config).__name__}: expected a CacheConfig")


def check_no_sources(config: CacheConfig) -> None:
    """Raise where layers are to share: a manager keeps layers that store, and numbers them."""
    if config.layer_sources is not None:
        raise ConfigError(
            f"layer_sources={config.layer_sources!r}: a KVCacheManager keeps the layers that store "
            "and no others; make it with as many, and have the others call attend() with the "
            "number of the one they share with (docs/sharing.md)"
        )


def check_rotation(config: CacheConfig, head_dim: int, value_dim: int) -> None:
    """Raise unless there is something to rotate where the settings ask for it."""
    for name, rotates, dim in (
        ("keys", config.rotates_keys, head_dim),
        ("values", config.rotates_values, value_dim),
    ):
        if rotates and block_dim(dim) == 1:
            raise ConfigError(
                f"rotation={config.rotation!r} of {name} of {dim} elements: expected an even "
                "number, because blocks of a power of two are rotated"
            )


def check_latent(config: CacheConfig, latent: bool) -> None:
    """Raise for settings that latents cannot have."""
    if latent and config.grouping is not None:
        raise ConfigError(
            f"grouping={config.grouping!r} of latents, which one KV head stands for all query "
            "heads of: not supported; leave it at None"
        )
    if latent and config.retention is not None:
        raise ConfigError(
            f"retention={config.retention!r} of a latent cache (multi-head latent attention): "
            "what latents received cannot be told head by head; leave it at None"
        )


def check_layer(layer: int, num_layers: int) -> None:
    """Raise unless the layer exists."""
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < num_layers:
        raise InputError(f"layer {layer!r}: this cache has layers 0..{num_layers - 1}")


def check_new_tokens(name: str, tensor: Tensor, expected: tuple[int, ...], like: Tensor) -> None:
    """Raise unless new keys or values have the expected shape, and the dtype and device of `like`.

    expected: [batch, num_kv_heads, new_tokens, dim]; batch and new_tokens are those of the key.
    """
    if tensor.shape != expected or 0 in expected:
        raise InputError(
            f"{name} of shape {list(tensor.shape)}: expected [batch, num_kv_heads, new_tokens, "
            f"dim] = {list(expected)}, with at least one sequence and one new token"
        )
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise InputError(
            f"{name} is {tensor.dtype} on {tensor.device}: this cache holds {like.dtype} on "
            f"{like.device}; convert it, or build the cache with its dtype and device"
        )


def check_padding(mask: Tensor, batch: int, new_tokens: int) -> None:
    """Raise unless a padding mask is [batch, new_tokens]."""
    if tuple(mask.shape) != (batch, new_tokens):
        raise InputError(
            f"mask of shape {list(mask.shape)}: expected [batch, new_tokens] = "
            f"{[batch, new_tokens]}, False where a column is padding"
        )
    if mask.is_floating_point():
        raise InputError(
            f"mask is {mask.dtype}: expected booleans, False where a column is padding"
        )


def check_query(query: Tensor, expected: tuple[int, int, int, int | None], like: Tensor) -> None:
    """Raise unless queries fit: expected is [batch, num_kv_heads, columns held, head_dim]."""
    batch, num_kv_heads, columns, head_dim = expected
    fits = query.ndim == 4 and query.shape[0] == batch and query.shape[1] > 0
    fits = fits and query.shape[1] % num_kv_heads == 0 and 1 <= query.shape[2] <= columns
    if not (fits and head_dim in (None, query.shape[3])):
        raise InputError(
            f"query of shape {list(query.shape)}: expected [batch={batch}, a multiple of "
            f"{num_kv_heads} heads, 1 to {columns} new tokens, head_dim={head_dim}]"
        )
    if query.dtype != like.dtype or query.device != like.device:
        raise InputError(
            f"query is {query.dtype} on {query.device}: this cache holds {like.dtype} on "
            f"{like.device}; convert it"
        )


def check_mask(mask: Tensor, expected: tuple[int, int, int, int], like: Tensor) -> None:
    """Raise unless a mask broadcasts to [batch, num_heads, new_tokens, columns]."""
    fits = mask.ndim == 4 and mask.shape[3] == expected[3]
    fits = fits and all(
        given in (1, full) for given, full in zip(mask.shape, expected, strict=True)
    )
    if not fits:
        raise InputError(
            f"mask of shape {list(mask.shape)}: expected [batch, num_heads, new_tokens, columns] "
            f"= {list(expected)}, where each but the last may be 1"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InputError(
            f"mask is {mask.dtype}: expected booleans (True may be attended) or a floating-point "
            "mask that is added to the logits"
        )
    _check_device("mask", mask, like)


def check_sink_logits(sink_logits: Tensor, num_heads: int, like: Tensor) -> None:
    """Raise unless there is one sink logit per head."""
    if sink_logits.numel() != num_heads:
        raise InputError(
            f"sinks of shape {list(sink_logits.shape)}: expected [num_heads={num_heads}]"
        )
    _check_device("sinks", sink_logits, like)


def check_index_query(index_query: Tensor, query: Tensor, dim: int) -> None:
    """Raise unless there is an index query of `dim` for each query."""
    expected = (*query.shape[:3], dim)
    if tuple(index_query.shape) != expected:
        raise InputError(
            f"index_query of shape {list(index_query.shape)}: expected {list(expected)}, one for "
            "each query, as wide as what the cache stores"
        )
    _check_device("index_query", index_query, query)


def empty_on(device: Any, dtype: torch.dtype) -> Tensor:
    """An empty tensor on a device (its number included); raises unless the device exists."""
    try:
        return torch.empty(0, dtype=dtype, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise InputError(f"device={device!r}: torch cannot use it ({error})") from error


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise InputError(f"{name} is on {tensor.device}: this cache is on {like.device}")


def sequence_order(index: Any, batch: int) -> Ids:
    """The sequences that an index names, as numbers 0..batch-1; raises unless it names some."""
    given = index.cpu().numpy() if isinstance(index, Tensor) else np.array(index, dtype=object)
    try:
        order = np.array([_sequence_number(item) for item in given.reshape(-1)], dtype=np.int64)
    except TypeError:
        order = np.empty(0, dtype=np.int64)
    if given.ndim != 1 or not len(order) or order.min() < -batch or order.max() >= batch:
        raise InputError(
            f"sequences {index!r}: expected a list of integers; the cache holds 0..{batch - 1}"
        )
    return order % batch


def _sequence_number(item: Any) -> int:
    if isinstance(item, bool | np.bool_) or not isinstance(item, int | np.integer):
        raise TypeError
    return int(item)
