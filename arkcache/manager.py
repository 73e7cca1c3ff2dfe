"""The cache of one decoder: `append` keys and values, `attend` queries, layer by layer.

Knows nothing of any model library. Start reading at `KVCacheManager.attend`, then
`PagedLayer.attend_one` in `layers.py`, which is the decode step.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arkcache.config import CacheConfig
from arkcache.errors import InputError
from arkcache.kernels.torch_attention import block_attention
from arkcache.layers import DenseLayer, Expand, PagedLayer, Step, causal_blocks
from arkcache.pages import Ids, TokenLog
from arkcache.stats import CacheStats
from arkcache.tiering.device import DeviceTier, Geometry
from arkcache.tiering.host import HostTier


class KVCacheManager:
    """Keeps the whole KV cache in the host tier and a working set in the device tier.

    Two calls serve any decoder: `append` a layer's new keys and values, then `attend` with its
    queries. One new token attends sinks, the pages selected for it and the recent window; several
    attend everything before them exactly, streamed through the device tier in blocks.

    Args:
        num_layers: attention layers, numbered from 0.
        num_kv_heads, head_dim: of the keys.
        config: settings; None is `CacheConfig()`.
        device: where attention runs.
        dtype: of keys and values.
        value_dim: head dim of the values where it differs from the keys'.
        latent: keys and values are latents that `attend(expand=...)` expands (multi-head latent
            attention); pages are rated by both side by side.

    Raises `ConfigError` for budgets that do not fit the layers, `InputError` for sizes below 1.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        config: CacheConfig | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        value_dim: int | None = None,
        latent: bool = False,
    ) -> None:
        sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name}={size}: expected at least 1")
        if not dtype.is_floating_point:
            raise InputError(f"dtype={dtype}: expected a floating-point type")
        self.config = CacheConfig() if config is None else config
        self.config.check_layers(num_layers, num_kv_heads)
        self.num_layers, self.num_kv_heads, self.head_dim = num_layers, num_kv_heads, head_dim
        self.value_dim = head_dim if value_dim is None else value_dim
        self.device, self.dtype, self.latent = torch.device(device), dtype, latent
        self._clear()

    def _clear(self) -> None:
        self._log = TokenLog(0)
        self._layers: list[DenseLayer | PagedLayer] = []
        self._device_tier: DeviceTier | None = None
        self._host: HostTier | None = None

    # -- the two calls ----------------------------------------------------------------------------

    def append(self, layer: int, key: Tensor, value: Tensor, mask: Tensor | None = None) -> None:
        """Append new tokens to a layer.

        Args:
            key: [batch, num_kv_heads, new_tokens, head_dim].
            value: [batch, num_kv_heads, new_tokens, value_dim].
            mask: [batch, new_tokens], False where a column is padding; padding is not stored.
                Only the first layer that receives a column decides.

        Raises `InputError` for what does not fit and `HostTierFullError` when the host tier may
        not grow by the pages that this step seals in all layers, both before anything has changed.
        """
        self._check_append(layer, key, value, mask)
        if not self._layers:
            self._allocate(key.shape[0])
        state, new_tokens = self._layers[layer], key.shape[2]
        stop = state.columns + new_tokens
        if stop > self._log.num_columns:
            self._extend(stop - self._log.num_columns, mask)
        real = self._log.real(state.columns, stop)
        if real is None:
            for rows in state.lengths.groups():
                state.append(rows, key[rows], value[rows])
        else:
            for sequence in range(key.shape[0]):
                rows = slice(sequence, sequence + 1)
                own = torch.from_numpy(np.flatnonzero(real[sequence])).to(key.device)
                if len(own):
                    state.append(rows, key[rows].index_select(2, own), value[rows].index_select(2, own))
            state.lengths.__post_init__()
        state.columns = stop

    def attend(
        self,
        layer: int,
        query: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        mask: Tensor | None = None,
        expand: Expand | None = None,
        index_query: Tensor | None = None,
    ) -> Tensor:
        """Attend the newest tokens of a layer, causally.

        Args:
            query: [batch, num_heads, new_tokens, head_dim], the queries of the newest columns.
            scale: of the logits; None is head_dim ** -0.5.
            softcap: logits become softcap * tanh(logits / softcap).
            sinks: [num_heads], extra logits that take probability and give nothing (gpt-oss).
            mask: broadcast to [batch, num_heads, new_tokens, columns], True where attention is
                allowed or added to the logits, on top of causality and padding.
            expand: turns stored (key, value) [batch, num_kv_heads, tokens, dim] into those to
                attend; queries have the expanded head dim then.
            index_query: what pages are rated by, where it is not the query itself
                [batch, num_heads, new_tokens, stored key dim (+ value dim if latent)].

        Returns [batch, num_heads, new_tokens, value_dim] in the query's dtype. Raises `InputError`
        for what does not fit.
        """
        self._check_attend(layer, query, expand)
        state = self._layers[layer]
        new_tokens = query.shape[2]
        step = Step(
            query=query,
            scale=query.shape[3] ** -0.5 if scale is None else scale,
            index_query=query if index_query is None else index_query,
            softcap=softcap,
            sinks=sinks,
            expand=expand,
            bias=None if mask is None else self._bias(mask, query),
        )
        if new_tokens == 1:
            return state.attend_one(step)
        return self._attend_many(state, step)

    def _attend_many(self, state: DenseLayer | PagedLayer, step: Step) -> Tensor:
        last_visible = self._log.last_visible(state.columns, step.query.shape[2])
        blocks = causal_blocks(state, step, last_visible)
        num_heads = step.query.shape[1]
        # With latents every query head has expanded keys of its own.
        num_kv_heads = self.num_kv_heads if step.expand is None else num_heads
        query = step.query.unflatten(1, (num_kv_heads, -1))
        sinks = None if step.sinks is None else step.sinks.reshape(num_kv_heads, -1)
        output = block_attention(query, blocks, scale=step.scale, softcap=step.softcap, sinks=sinks)
        return output.flatten(1, 2)

    def _bias(self, mask: Tensor, query: Tensor) -> Any:
        """The user's mask as a function of token numbers; see `Step.bias`."""
        batch, num_heads, new_tokens, _ = query.shape
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))
        per_head = mask.shape[1] > 1
        heads = (self.num_kv_heads, num_heads // self.num_kv_heads) if per_head else (1, 1)
        mask = mask.expand(batch, -1, new_tokens, -1).unflatten(1, heads)

        def bias(tokens: Ids) -> Tensor:
            columns = torch.from_numpy(self._log.columns_of(tokens)).to(mask.device)
            wide = mask.expand(-1, max(mask.shape[1], columns.shape[1]), -1, -1, -1)
            columns = columns[:, :, None, None].expand(*wide.shape[:4], -1)
            return wide.gather(4, columns)

        return bias

    def gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer [batch, num_kv_heads, columns, dim], zeros for padding."""
        state = self._layers[layer]
        shape = (self.batch, self.num_kv_heads, state.columns)
        key = torch.zeros((*shape, self.head_dim), dtype=self.dtype, device=self.device)
        value = torch.zeros((*shape, self.value_dim), dtype=self.dtype, device=self.device)
        for key_block, value_block, numbers in state.blocks():
            columns = self._log.columns_of(np.maximum(numbers, 0))
            for sequence, held in enumerate(numbers >= 0):
                source = torch.from_numpy(np.flatnonzero(held)).to(self.device)
                target = torch.from_numpy(columns[sequence, held]).to(self.device)
                key[sequence][:, target] = key_block[sequence][:, source]
                value[sequence][:, target] = value_block[sequence][:, source]
        return key, value

    # -- the state of a conversation --------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Sequences held; 0 before the first append and after `reset()`."""
        return self._log.batch

    @property
    def num_columns(self) -> int:
        """Columns (tokens and padding) that the first layer has received."""
        return self._layers[0].columns if self._layers else 0

    def columns_of(self, layer: int) -> int:
        """Columns (tokens and padding) that this layer has received."""
        return self._layers[layer].columns if self._layers else 0

    def crop(self, num_columns: int) -> None:
        """Forget all columns from `num_columns` on, in every layer (rejected drafts, a retry)."""
        if not 0 <= num_columns <= self._log.num_columns:
            raise InputError(
                f"crop({num_columns}): the cache holds {self._log.num_columns} columns"
            )
        for state in self._layers:
            if state.columns > num_columns:
                state.crop(self._log.lengths(num_columns))
                state.columns = num_columns
        self._log.crop(num_columns)

    def keep_sequences(self, index: Tensor | Ids) -> None:
        """Make sequence i what sequence `index[i]` was (beams, repeats, finished sequences)."""
        if not self._layers:
            return
        order = np.asarray(index.cpu() if isinstance(index, Tensor) else index, dtype=np.int64)
        batch = self._geometry.batch
        if order.ndim != 1 or len(order) == 0 or order.min() < -batch or order.max() >= batch:
            raise InputError(f"sequences {order.tolist()}: the cache holds sequences 0..{batch - 1}")
        order = order % batch
        if np.array_equal(order, np.arange(batch)):
            return
        old = self._device_tier
        assert old is not None
        self._make_device_tier(len(order))
        tier, on_device = self._device_tier, torch.from_numpy(order).to(self.device)
        assert tier is not None
        sets = iter(zip(tier.working_sets, old.working_sets, strict=True))
        for state in self._layers:
            if isinstance(state, DenseLayer):
                state.keep_sequences(order, self._geometry)
                continue
            new_set, old_set = next(sets)
            new_set.copy_sequences(old_set, on_device)
            state.keep_sequences(
                order, self._geometry, new_set, (tier.stream_key, tier.stream_value)
            )
        self._log.keep_sequences(order)

    def reset(self) -> None:
        """Forget everything and free what it took."""
        for state in self._layers:
            state.release()
        self._clear()

    def stats(self) -> CacheStats:
        """Counters and sizes, summed over layers. See `CacheStats`."""
        total = CacheStats(
            device_bytes=0 if self._device_tier is None else self._device_tier.nbytes,
            host_bytes=sum(state.held_blocks().size for state in self._layers) * self._block_bytes,
        )
        for state in self._layers:
            total += state.stats()
        return total

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless the books agree with each other and the tiers.

        Every page of a sequence is sealed once and backed up once; no place holds two pages and no
        page two places; what is resident is bit-equal to its backup.
        """
        for state in self._layers:
            state.check()

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCacheManager:
        """A copy that shares the sealed pages (they are immutable) and owns everything else."""
        host = self._host
        clone = copy.copy(self)
        memo[id(self)] = clone
        if host is not None:
            memo[id(host)] = host
            for state in self._layers:
                host.retain(state.held_blocks())
        for name, value in vars(self).items():
            setattr(clone, name, copy.deepcopy(value, memo))
        return clone

    def __del__(self) -> None:
        # A copy may live on and share the host tier: give back this one's references.
        for state in getattr(self, "_layers", ()):
            state.release()

    # -- allocation and checks --------------------------------------------------------------------

    def _allocate(self, batch: int) -> None:
        config = self.config
        paged = [i for i in range(self.num_layers) if config.budget_of(i) is not None]
        if paged and self._host is None:
            width = config.page_size * (self.head_dim + self.value_dim)
            self._host = HostTier((self.num_kv_heads, width), self.dtype, config.host_bytes)
        self._make_device_tier(batch)
        tier = self._device_tier
        assert tier is not None
        self._log = TokenLog(batch)
        sets = iter(tier.working_sets)
        for layer in range(self.num_layers):
            if layer not in paged:
                self._layers.append(DenseLayer(self._geometry))
                continue
            assert self._host is not None
            self._layers.append(
                PagedLayer(
                    config,
                    self._num_selected(layer),
                    self._geometry,
                    next(sets),
                    self._host,
                    (tier.stream_key, tier.stream_value),
                    self.latent,
                )
            )

    def _make_device_tier(self, batch: int) -> None:
        config = self.config
        self._geometry = Geometry(
            batch, self.num_kv_heads, self.head_dim, self.value_dim, self.dtype, self.device
        )
        slots = [
            config.num_sink_pages
            + int(np.ceil(self._num_selected(layer).max() * config.device_pool_factor))
            for layer in range(self.num_layers)
            if config.budget_of(layer) is not None
        ]
        self._device_tier = DeviceTier(
            self._geometry, slots, config.page_size, config.window_tokens,
            config.stream_block_tokens // config.page_size * config.page_size,
        )

    def _num_selected(self, layer: int) -> Ids:
        pages = [self.config.selected_pages(layer, head) for head in range(self.num_kv_heads)]
        return np.array(pages, dtype=np.int64)

    @property
    def _block_bytes(self) -> int:
        return 0 if self._host is None else self._host.block_bytes

    def _extend(self, num_columns: int, mask: Tensor | None) -> None:
        """Record new columns, after making sure that all layers will be able to store them."""
        log = copy.copy(self._log)
        log.extend(num_columns, None if mask is None else mask.cpu().numpy().astype(np.bool_))
        if self._host is not None:
            lengths = log.lengths(log.num_columns)
            self._host.check_room(sum(state.blocks_needed(lengths) for state in self._layers))
        self._log = log

    def _check_append(self, layer: int, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        if not 0 <= layer < self.num_layers:
            raise InputError(f"layer {layer}: this cache has layers 0..{self.num_layers - 1}")
        batch = self._geometry.batch if self._layers else (key.shape[0] if key.ndim == 4 else -1)
        new_tokens = key.shape[2] if key.ndim == 4 else -1
        for name, tensor, dim in (("key", key, self.head_dim), ("value", value, self.value_dim)):
            expected = (batch, self.num_kv_heads, new_tokens, dim)
            if tuple(tensor.shape) != expected or new_tokens == 0 or batch < 1:
                raise InputError(
                    f"{name} of shape {tuple(tensor.shape)}: expected [batch"
                    f"{f'={batch}' if self._layers else ''}, num_kv_heads={self.num_kv_heads}, "
                    f"new_tokens >= 1, {dim}], the same new_tokens for key and value"
                )
            if tensor.dtype != self.dtype or tensor.device != self.device:
                raise InputError(
                    f"{name} is {tensor.dtype} on {tensor.device}: this cache holds {self.dtype} "
                    f"on {self.device}; convert it or build the cache with its dtype and device"
                )
        if mask is not None and tuple(mask.shape) != (batch, new_tokens):
            raise InputError(
                f"mask of shape {tuple(mask.shape)}: expected [batch, new_tokens] = "
                f"{[batch, new_tokens]}, False where a column is padding"
            )

    def _check_attend(self, layer: int, query: Tensor, expand: Expand | None) -> None:
        if not 0 <= layer < self.num_layers:
            raise InputError(f"layer {layer}: this cache has layers 0..{self.num_layers - 1}")
        if not self._layers or self._layers[layer].columns == 0:
            raise InputError(f"layer {layer} holds no tokens yet: append before attend")
        fits = query.ndim == 4 and query.shape[0] == self._geometry.batch
        fits = fits and query.shape[1] % self.num_kv_heads == 0
        fits = fits and (expand is not None or query.shape[3] == self.head_dim)
        fits = fits and 1 <= query.shape[2] <= self._layers[layer].columns
        if not fits:
            raise InputError(
                f"query of shape {tuple(query.shape)}: expected [batch={self._geometry.batch}, "
                f"a multiple of {self.num_kv_heads} heads, 1 to {self._layers[layer].columns} new "
                f"tokens, head_dim={self.head_dim}]"
            )
        if query.device != self.device:
            raise InputError(f"query is on {query.device}: this cache is on {self.device}")
