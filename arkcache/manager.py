"""The cache of one decoder: `append` keys and values, `attend` queries, layer by layer.

Knows nothing of any model library. Start reading at `KVCacheManager.attend`, then
`HostEngine.attend` in `engines/host.py`, which is the decode step, or its like on a GPU,
`DeviceEngine.launch_attend` in `engines/device.py`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from arkcache.backend import choose_backend, on_own_device
from arkcache.config import Budget, CacheConfig
from arkcache.engines.capture import CapturableSteps
from arkcache.engines.engine import State
from arkcache.engines.step import Expand, Step, attend_blocks
from arkcache.errors import ConfigError, HostTierFullError, InputError
from arkcache.kernels.torch_hadamard import rotate
from arkcache.layers.making import make_layers
from arkcache.lending import Loans
from arkcache.pages.bookkeeping import Ids, TokenLog, is_in_order
from arkcache.pages.store import PageStore
from arkcache.planning import Planner
from arkcache.stats import CacheStats
from arkcache.tiering.device import DeviceTier, TierPlan
from arkcache.tiering.file_tier import FileTier
from arkcache.tiering.host import HostTier
from arkcache.validate import (
    check_config,
    check_index_query,
    check_latent,
    check_layer,
    check_mask,
    check_new_tokens,
    check_no_sources,
    check_padding,
    check_query,
    check_rotation,
    check_sink_logits,
    check_sizes,
    empty_on,
    sequence_order,
)

if TYPE_CHECKING:
    from arkcache.engines.missed import MissedLog
    from arkcache.layers.layer import Layer
    from arkcache.pages.index import PageIndex
    from arkcache.tracing.recorder import Recorder


class KVCacheManager:
    """Keeps the whole KV cache in the host tier and a working set in the device tier.

    Two calls serve any decoder: `append` a layer's new keys and values, then `attend` with its
    queries. One new token attends sinks, the pages selected for it and the recent window; several
    (or one, if told to be `exact`) attend everything before them, streamed through the device tier
    in blocks.

    Args:
        num_layers: attention layers, numbered from 0.
        num_kv_heads, head_dim: of the keys.
        config: settings; None is `CacheConfig()`.
        device: where attention runs.
        dtype: of keys and values.
        value_dim: head dim of the values where it differs from the keys'.
        latent: keys and values are latents that `attend(expand=...)` expands (multi-head latent
            attention); pages are rated by both side by side.

    Raises `ConfigError` for budgets, groups or rotations that do not fit the layers, `InputError`
    for sizes below 1.
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
        value_dim = head_dim if value_dim is None else value_dim
        check_sizes(
            dtype,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
        )
        self.num_layers, self.num_kv_heads = num_layers, num_kv_heads
        self.head_dim, self.value_dim = head_dim, value_dim
        self._like = empty_on(device, dtype)
        self.device, self.dtype, self.latent = self._like.device, dtype, latent
        self._recorder: Recorder | None = None
        self._traced_as: Sequence[int] = ()
        self._loans = Loans()
        self._times_copies = False
        self._configure(CacheConfig() if config is None else config)
        self._clear()

    def _configure(self, config: CacheConfig) -> None:
        """Take over settings and all that follows from them, if they fit."""
        planner = self._planned(config)
        self._packers = planner.packers
        self.planner, self._config = planner, planner.config

    def _planned(self, config: CacheConfig) -> Planner:
        """What follows from settings; raises `ConfigError` where they do not fit the layers."""
        check_config(config)
        check_no_sources(config)
        config.check_layers(self.num_layers, self.num_kv_heads)
        check_rotation(config, self.head_dim, self.value_dim)
        check_latent(config, self.latent)
        config = config.on(self.device.type).for_layers(self.num_layers)
        return Planner(
            config,
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            self.value_dim,
            self.dtype,
            self.device,
            choose_backend(config, self.device, self.dtype, latent=self.latent),
        )

    def _clear(self) -> None:
        self.steps: CapturableSteps | None = None
        self._log = TokenLog(0)
        self._max_selected = 0
        self._layers: list[Layer] = []
        self._device_tier: DeviceTier | None = None
        self._host: HostTier | None = None

    # -- the two calls ----------------------------------------------------------------------------

    @on_own_device
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
        steps = self.steps
        if steps is not None and steps.running is not None:
            states, seals = self._rotated(key, value), steps.running.seals
            steps.layers[layer].launch_append(slice(0, self.batch), *states, seals)
            return
        new_cache = not self._layers
        if new_cache:
            self._allocate(key.shape[0])
        state, new_tokens = self._layers[layer], key.shape[2]
        stop = state.tokens.columns + new_tokens
        if stop > self._log.num_columns:
            unknown = stop - self._log.num_columns
            try:
                self._grow_log(unknown, None if mask is None else mask[:, -unknown:])
            except HostTierFullError:
                if new_cache:
                    self._clear()
                raise
        if self._host is not None and state.may_seal(new_tokens):
            # Again for this layer alone: a copy that shares the host tier may have filled it.
            self._host.check_room([state.pieces_needed(self._log.lengths(stop))])
        self._store(state, key, value, stop)
        state.tokens.columns = stop
        state.demote()

    def _store(self, state: Layer, key: Tensor, value: Tensor, stop: int) -> None:
        """Hand a layer the real tokens among its new columns, the last of which is `stop` - 1."""
        key, value = self._rotated(key, value)
        real = self._log.real(state.tokens.columns, stop)
        if real is None:
            if key.shape[2] == 1 and state.append_next(key, value):
                return
            alike = key.shape[2] == 1 and state.takes_ragged
            for seqs in [slice(0, self.batch)] if alike else state.tokens.groups():
                state.append(seqs, key[seqs], value[seqs])
            return
        for sequence in range(key.shape[0]):
            seqs = slice(sequence, sequence + 1)
            own = torch.from_numpy(np.flatnonzero(real[sequence])).to(key.device)
            if len(own):
                state.append(seqs, key[seqs].index_select(2, own), value[seqs].index_select(2, own))
        state.tokens.settle()

    @on_own_device
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
        exact: bool = False,
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
            exact: attend everything, even with one new token: the last one of a prompt that is read
                in chunks, which the cache cannot tell from a generated one.

        Returns [batch, num_heads, new_tokens, value_dim] in the query's dtype. Raises `InputError`
        for what does not fit.
        """
        self._check_attend(layer, query, expand is not None)
        if mask is not None:
            check_mask(mask, (*query.shape[:3], self._layers[layer].tokens.columns), self._like)
        if sinks is not None:
            check_sink_logits(sinks, query.shape[1], self._like)
        if softcap is not None and not softcap > 0:
            raise InputError(f"softcap={softcap!r}: expected a positive number, or None for none")
        if index_query is not None:
            check_index_query(index_query, query, self.head_dim + self.latent * self.value_dim)
        if self.steps is not None and query.shape[2] == 1:
            self.steps.saw_mask |= mask is not None
        state = self._layers[layer]
        on_kernels = self.planner.backend != "torch" and not state.attends_everything
        if expand is not None and on_kernels:
            raise InputError(
                "expand: the kernels attend what is stored; make the manager with latent=True, "
                "whose decode steps run on plain torch"
            )
        new_tokens, rotates = query.shape[2], expand is None and self.config.rotates_keys
        step = Step(
            query=rotate(query) if rotates else query,
            scale=query.shape[3] ** -0.5 if scale is None else scale,
            index_query=query if index_query is None else index_query,
            softcap=softcap,
            sink_logits=sinks,
            expand=None if expand is None else lambda *latents: expand(*self._rotated(*latents)),
            bias=None if mask is None else self._bias(mask, query, expand is not None),
        )
        steps = self.steps
        if steps is not None and steps.running is not None:
            assert not exact, "what is attended block by block cannot be recorded"
            output = steps.layers[layer].launch_attend(step)
        elif new_tokens == 1 and (state.attends_everything or not exact):
            output = state.attend_one(step)
            state.counters.decode_steps += 1
        else:
            if self._recorder is not None:
                self._recorder.end_run()
            last_visible = self._log.last_visible(state.tokens.columns, new_tokens)
            step = state.prompt_step(step, self._only_real(last_visible, state.tokens.columns))
            output = attend_blocks(step, state.blocks(), self.num_kv_heads, last_visible)
        # The rotation is its own inverse.
        return rotate(output) if expand is None and self.config.rotates_values else output

    @property
    def observes_prompts(self) -> bool:
        """Whether `observe_prompt` is to be told of queries that are attended elsewhere."""
        keeper = self.config.keeper
        return keeper is not None and keeper.num_queries != 0

    @on_own_device
    def observe_prompt(
        self,
        layer: int,
        query: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """Look at the queries of a prompt that is attended elsewhere; `attend` looks by itself.

        For a `retention` that decides by them. Masks beyond causality and padding are not applied.
        query, scale, softcap, sinks: as in `attend`, the queries of the newest columns, which were
        appended. Raises `InputError` for what does not fit.
        """
        self._check_attend(layer, query, expanded=False)
        step = self._plain_step(query, scale)._replace(softcap=softcap, sink_logits=sinks)
        state = self._layers[layer]
        last_visible = self._log.last_visible(state.tokens.columns, query.shape[2])
        state.prompt_step(step, self._only_real(last_visible, state.tokens.columns))

    def _only_real(self, last_visible: Ids, columns: int) -> Ids:
        """The tokens that the newest columns attend last [batch, new], -1 for padding."""
        real = self._log.real(columns - last_visible.shape[1], columns)
        return last_visible if real is None else np.where(real, last_visible, -1)

    def _rotated(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values into the basis in which they are stored, or back from it."""
        config = self.config
        key = rotate(key) if config.rotates_keys else key
        return key, rotate(value) if config.rotates_values else value

    def _bias(self, mask: Tensor, query: Tensor, expanded: bool) -> Callable[[Ids], Tensor]:
        """The user's mask as a function of token numbers; see `Step.bias`."""
        batch, num_heads, new_tokens, _ = query.shape
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))
        per_head = mask.shape[1] > 1
        # Expanded latents have a KV head for every query head.
        num_kv_heads = num_heads if expanded else self.num_kv_heads
        heads = (num_kv_heads, num_heads // num_kv_heads) if per_head else (1, 1)
        mask = mask.expand(batch, -1, new_tokens, -1).unflatten(1, heads)

        def bias(tokens: Ids) -> Tensor:
            columns = torch.from_numpy(self._log.columns_of(tokens)).to(mask.device)
            wide = mask.expand(-1, max(mask.shape[1], columns.shape[1]), -1, -1, -1)
            columns = columns[:, :, None, None].expand(*wide.shape[:4], -1)
            return wide.gather(4, columns)

        return bias

    @on_own_device
    def gather(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer [batch, num_kv_heads, columns, dim], zeros for padding and
        for what is lost."""
        state = self._layers[layer]
        shape = (self.batch, self.num_kv_heads, state.tokens.columns)
        key = torch.zeros((*shape, self.head_dim), dtype=self.dtype, device=self.device)
        value = torch.zeros((*shape, self.value_dim), dtype=self.dtype, device=self.device)
        for key_block, value_block, numbers in state.blocks():
            columns = self._log.columns_of(np.maximum(numbers, 0))
            for sequence, held in enumerate(numbers >= 0):
                source = torch.from_numpy(np.flatnonzero(held)).to(self.device)
                target = torch.from_numpy(columns[sequence, held]).to(self.device)
                key[sequence][:, target] = key_block[sequence][:, source]
                value[sequence][:, target] = value_block[sequence][:, source]
        return self._rotated(key, value)

    # -- the state of a conversation --------------------------------------------------------------

    @property
    def config(self) -> CacheConfig:
        """The settings. Raises `InputError` when they are set while tokens are held."""
        return self._config

    @config.setter
    def config(self, config: CacheConfig) -> None:
        if self._layers:
            raise InputError(
                f"this cache holds {self.num_columns} tokens in {self._config.format.name}: other "
                "settings need reset() first, or a cache of their own"
            )
        self._loans.check_none("other settings")
        self._configure(config)

    @property
    def batch(self) -> int:
        """Sequences held; 0 before the first append and after `reset()`."""
        return self._log.batch

    def has_padding(self, mask: Tensor) -> bool:
        """Whether a mask [batch, columns] is False just where the cache holds padding."""
        return self._log.has_padding(mask.cpu().numpy())

    @property
    def num_columns(self) -> int:
        """Columns (tokens and padding) that the first layer has received."""
        return self._layers[0].tokens.columns if self._layers else 0

    def columns_of(self, layer: int) -> int:
        """Columns (tokens and padding) that this layer has received."""
        return self._layers[layer].tokens.columns if self._layers else 0

    @on_own_device
    def crop(self, num_columns: int) -> None:
        """Forget all columns from `num_columns` on, in every layer (rejected drafts, a retry).

        Raises `InputError` for another number, and `SessionError` where a page that was loaded and
        is to be read for it is damaged, both before anything has changed.
        """
        held = self._log.num_columns
        whole = isinstance(num_columns, int) and not isinstance(num_columns, bool)
        if not (whole and 0 <= num_columns <= held):
            raise InputError(f"crop({num_columns!r}): expected 0 to the {held} columns held")
        lengths = self._log.lengths(num_columns)
        shortened = [one for one in enumerate(self._layers) if one[1].tokens.columns > num_columns]
        for number, state in shortened:
            lost = state.lost_pages(lengths)
            if len(lost):
                raise InputError(
                    f"crop({num_columns}): tokens of {len(lost)} pages from page {lost[0]} on of "
                    f"layer {number} would be recent ones again, and are lost: "
                    f"retention={self.config.retention!r} gave them up; reset() and read the text "
                    "again, or crop less"
                )
        if self._host is not None and self._host.has_unread:
            for _, state in shortened:
                state.ready_to_crop(lengths)
        for _, state in shortened:
            state.crop(lengths)
            state.tokens.columns = num_columns
        self._log.crop(num_columns)

    @torch.no_grad()
    def keep_sequences(self, index: Tensor | Ids) -> None:
        """Make sequence i what sequence `index[i]` was (beams, repeats, finished sequences).

        Under `device_bytes` budgets are cut to what fits the new number of sequences; raises
        `ConfigError`, before anything has changed, where not even one page does.
        """
        if not self._layers:
            return
        order = sequence_order(index, self.batch)
        if is_in_order(order, self.batch):
            return
        assert self._device_tier is not None
        max_selected, factor = self._max_selected, self._device_tier.plan.pool_factor
        if len(order) != self.batch:  # beams are reordered at every step: fit them once
            max_selected = self.planner.pages_that_fit(len(order))
            factor = self.planner.pool_factor(len(order), max_selected)
        self._move_into(self.planner, order, max_selected, factor)
        self._log.keep_sequences(order)

    def _move_into(self, planner: Planner, order: Ids, max_selected: int, factor: float) -> None:
        """Into a new device tier, in which sequence i is what sequence `order[i]` was."""
        tier = DeviceTier(planner.plan(len(order), max_selected, factor))
        self._enter(tier, planner, order, max_selected)

    def _enter(self, tier: DeviceTier, planner: Planner, order: Ids, max_selected: int) -> None:
        """See `_move_into`."""
        stays = is_in_order(order, self.batch)
        for number, state in enumerate(self._layers):
            if stays and state.attends_everything:  # it has no part in the tier
                continue
            state.keep_sequences(order, tier, planner.selected(number, max_selected))
        self._device_tier, self._max_selected = tier, max_selected

    @on_own_device
    def set_budget(self, budget_tokens: Budget) -> None:
        """Attend as many tokens per step from now on; what is held stays.

        budget_tokens: as in `CacheConfig`. Raises `ConfigError`, before anything has changed, for
        an impossible budget and where a layer that holds tokens would begin to attend everything,
        or cease to: they keep them in different ways.
        """
        before, config = self._config, replace(self._config, budget_tokens=budget_tokens)
        config = config.for_layers(self.num_layers)
        config.check_layers(self.num_layers, self.num_kv_heads)
        planner = replace(self.planner, config=config)
        if self._layers:
            for layer in range(self.num_layers):
                everything = [one.budget_of(layer) is None for one in (before, config)]
                if everything[0] != everything[1]:
                    raise ConfigError(
                        f"budget_tokens={budget_tokens!r}: layer {layer} would "
                        f"{'cease' if everything[0] else 'begin'} to attend everything while it "
                        "holds tokens; reset() first"
                    )
            max_selected = planner.pages_that_fit(self.batch)
            factor = planner.pool_factor(self.batch, max_selected)
            self._move_into(planner, np.arange(self.batch), max_selected, factor)
        self.planner, self._config = planner, config

    @on_own_device
    def resize(self, device_bytes: int | None) -> None:
        """Have a device tier of at most so many bytes from now on (docs/lending.md).

        What is held stays: budgets are cut to what fits, as if the cache had had the limit from the
        beginning, and pages come back from the host tier when steps select them. On the numba
        backend, which has no tier of pages, only budgets change.

        device_bytes: as in `CacheConfig`. Raises `ConfigError`, before anything has changed, where
        sinks, windows and one page do not fit, and `InputError` within `lend`.
        """
        self._loans.check_none(f"resize({device_bytes!r})")
        self.change_size(device_bytes)

    def lend(self, num_bytes: int) -> AbstractContextManager[None]:
        """Within it, the device tier is at least so many bytes smaller than it is now.

            with manager.lend(1 << 30):
                ...     # steps may go on in what is left

        Blocks may be nested. Raises `InputError`, before anything has changed, where the tier
        cannot spare so much. If the memory is not there when the block ends, the cache goes on in
        what it has: the error says so, and `resize` has the rest back later.
        """
        return self._loans.lend(self, num_bytes)

    @property
    def tier_bytes(self) -> int | None:
        """Bytes of the device tier; while nothing is held its limit, None where there is none.

        On the numba backend 0: pages are attended in the host tier.
        """
        if self._device_tier is None:
            return self._config.device_bytes
        return 0 if self.planner.backend == "numba" else self._device_tier.nbytes

    @on_own_device
    def change_size(self, device_bytes: int | None) -> None:
        """See `resize`; also while something is lent."""
        if self._device_tier is None:
            planner = self._planned(replace(self._config, device_bytes=device_bytes))
            planner.pages_that_fit(1)
        else:
            if self.steps is not None and self.steps.running is not None:
                raise InputError(f"resize({device_bytes!r}) in the middle of a step: wait")
            self._planned(replace(self._config, device_bytes=device_bytes))  # refuses what it would
            planner = self.planner.within(device_bytes)
            self._rebuild(planner, self._device_tier.plan, planner.pages_that_fit(self.batch))
        self.planner, self._config = planner, planner.config

    def _rebuild(self, planner: Planner, before: TierPlan, max_selected: int) -> None:
        """Give back the device tier, then make one of another size: both are never there at once.

        Where that fails the tier is what it was `before`, but for pages that steps will recall.
        """
        order, selected = np.arange(self.batch), self._max_selected
        if self._is_same(planner, before, max_selected):
            self._max_selected = max_selected
            return
        aside = DeviceTier(planner.plan(self.batch, 0, 1.0))  # windows and sinks alone
        try:
            self._enter(aside, planner, order, 0)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # else the smaller tier would split the larger one's block
            factor = planner.pool_factor(self.batch, max_selected)
            self._move_into(planner, order, max_selected, factor)
        except BaseException:  # no memory, most likely; or interrupted
            self._move_into(self.planner, order, selected, before.pool_factor)
            raise

    def _is_same(self, planner: Planner, before: TierPlan, max_selected: int) -> bool:
        """Whether a tier of this plan is there already, with the same budgets."""
        if planner.takes_spare:
            return False
        plan = planner.plan(self.batch, max_selected, before.pool_factor)
        budgets = (self.planner.budgets(self._max_selected), planner.budgets(max_selected))
        return replace(plan, packer=before.packer) == before and budgets[0] == budgets[1]

    @torch.no_grad()
    def rate_with(self, make: Callable[[], PageIndex]) -> None:
        """Have the layers that select pages rate them by other indexes, to compare with.

        make: an index, for one layer; what it digests on a layer that is filled it digests anew.
        Raises `InputError` on the Triton backend, which rates by kernels of its own.
        """
        if self.planner.backend != "torch":
            raise InputError('another page index: expected backend="torch"')
        for state in self._layers:
            state.rate_with(make)

    def page_tokens(self, layer: int) -> Ids | None:
        """Which tokens the sealed pages of a layer hold, by number, sinks included.

        Returns int64 [batch, num_kv_heads, pages, page_size], undefined where a sequence has no
        such page; without a grouping, 0, 1, ... for every head. None for a layer that attends
        everything.
        """
        check_layer(layer, self.num_layers)
        return self._layers[layer].page_tokens() if self._layers else None

    @on_own_device
    def ratings(self, layer: int, query: Tensor, *, scale: float | None = None) -> Tensor | None:
        """By what a layer would select pages for one new token: to look at, nothing changes.

        query, scale: as in `attend`. Returns [batch, num_kv_heads, pages] of the sealed pages
        behind those of the sinks, the best the highest, the lowest where a sequence has no such
        page; None for a layer that attends everything, for latents, and on the Triton backend.
        """
        self._check_attend(layer, query, expanded=self.latent)
        if self.latent:
            return None
        ratings = self._layers[layer].ratings(self._plain_step(query, scale))
        if ratings is None:
            return None
        return ratings.view(self.batch, self.num_kv_heads, ratings.shape[1])

    @on_own_device
    def time_parts(
        self, layer: int, query: Tensor, *, scale: float | None = None
    ) -> dict[str, float] | None:
        """Run a layer's step with its parts launched one by one, to see where its time goes.

        query, scale: as in `attend`, one new token. Returns the seconds of each part; None but on
        the numba backend, and for a layer that attends everything.
        """
        self._check_attend(layer, query, expanded=self.latent)
        return self._layers[layer].time_parts(self._plain_step(query, scale))

    def _plain_step(self, query: Tensor, scale: float | None) -> Step:
        """A step without masks or whatever else a model may have."""
        return Step(
            query=rotate(query) if self.config.rotates_keys else query,
            scale=query.shape[3] ** -0.5 if scale is None else scale,
            index_query=query,
        )

    def log_missed(self, layer: int, log: MissedLog) -> None:
        """Note in `log` what the decode steps of a layer miss from now on.

        Nothing is noted by a layer that attends everything, nor on the Triton backend.
        """
        check_layer(layer, self.num_layers)
        if self._layers:
            self._layers[layer].log_missed(log)

    @contextmanager
    def trace(self, recorder: Recorder, numbers: Sequence[int] | None = None) -> Iterator[None]:
        """Within it, tell a recorder what decode steps do; see docs/trace.md.

        numbers: what to call the layers, ascending; None is 0, 1, ... Layers that attend everything
        have nothing to tell, nor have steps that are replayed as graphs. Raises `InputError` inside
        another trace.
        """
        if self._recorder is not None:
            raise InputError("this cache is being traced already: one recorder at a time")
        recorder.about |= {
            "backend": self.planner.backend,
            "page_size": self.config.page_size,
            "num_sink_pages": self.config.num_sink_pages,
            "num_recent_tokens": self.config.num_recent_tokens,
        }
        self._recorder = recorder
        self._traced_as = range(self.num_layers) if numbers is None else numbers
        self._tell_layers()
        try:
            yield
        finally:
            recorder.end_run()
            self._recorder = None
            self._tell_layers()

    def _tell_layers(self) -> None:
        """Have the layers trace their steps, or cease to."""
        for layer, state in enumerate(self._layers):
            if self._recorder is None or state.attends_everything:
                state.trace(None)
                continue
            trace = self._recorder.layer(self._traced_as[layer], self.num_kv_heads)
            state.trace(trace)

    def time_copies(self, on: bool) -> None:
        """Count from now on how long copies between the tiers take, or cease to.

        They are `load_seconds` and `store_seconds` of `stats()`. On a CPU alone: a GPU copies on
        streams of its own, which nobody waits for.
        """
        self._times_copies = on and self.device.type == "cpu"
        for state in self._layers:
            state.counters.times_copies = self._times_copies

    def check_batch(self, batch: int) -> None:
        """Raise `ConfigError` unless a device tier for so many sequences fits `device_bytes`."""
        self.planner.pages_that_fit(batch)

    def reset(self) -> None:
        """Forget everything and free what it took."""
        for state in self._layers:
            state.release()
        self._clear()

    def stats(self) -> CacheStats:
        """Counters and sizes, summed over layers. See `CacheStats`."""
        total = CacheStats(
            device_bytes=0 if self._device_tier is None else self._device_tier.nbytes
        )
        if self._host is not None:
            held = self.held_pieces()
            resident = self._host.resident_bytes(held)
            total += CacheStats(host_bytes=self._host.bytes_of(held), host_resident_bytes=resident)
        for state in self._layers:
            total += state.stats()
        return total

    @property
    def lossless(self) -> bool:
        """Whether all that was appended is there: no page was given up by a `retention`."""
        return self.stats().pages_lost == 0

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless the metadata agrees with itself and with the tiers.

        Every page of a sequence is sealed once and backed up once; no place holds two pages and no
        page two places; what is resident is bit-equal to its backup. Pages of a tier in a file are
        read, all of them, and compared with their checksums: `SessionError` names one that differs.
        """
        for state in self._layers:
            state.check()

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCacheManager:
        """A copy that shares the sealed pages (they are immutable) and owns everything else."""
        if self.steps is not None:
            self.steps.join()  # what other streams still write into the device tier is copied too
        host = self._host
        if host is not None:
            memo[id(host)] = host
        with torch.inference_mode(False):  # the copy is written to in and out of it
            state = {name: copy.deepcopy(value, memo) for name, value in vars(self).items()}
        clone = object.__new__(KVCacheManager)
        memo[id(self)] = clone
        vars(clone).update(state)
        if host is not None:
            for layer in self._layers:
                host.retain(layer.held_pieces())
        return clone

    def __getstate__(self) -> dict[str, Any]:
        """A state that shares nothing: the pages held here, and no other cache's."""
        clone = copy.deepcopy(self)
        if clone._host is not None:
            own = clone._host.extract(clone.held_pieces())
            for layer in clone._layers:
                layer.move_pieces(own)
            clone._host = own
            if clone.steps is not None:
                clone.steps.host = own
        state = dict(vars(clone))
        clone._layers = []
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if torch.is_inference_mode_enabled():
            # What was loaded in it could not be written to outside; a copy made outside can.
            with torch.inference_mode(False):
                state = copy.deepcopy(state)
        vars(self).update(state)

    def __copy__(self) -> KVCacheManager:
        return copy.deepcopy(self)

    def __del__(self) -> None:
        # A copy may live on and share the host tier: give back this one's references.
        if not sys.is_finalizing():
            for state in getattr(self, "_layers", ()):
                state.release()

    # -- what is written down, and read again -----------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Save what is held into a folder, new or that of an earlier save, which is replaced.

        Raises `SessionError` where it cannot be written; what was saved there before still is then.
        """
        from arkcache.saving.managers import save_manager  # it imports this module

        save_manager(self, Path(folder))

    @classmethod
    def load(
        cls, folder: str | Path, *, device: torch.device | str = "cpu", **settings: Any
    ) -> KVCacheManager:
        """A manager that holds what `save` wrote.

        device: where attention runs; settings: fields of `CacheConfig` to replace, but for those
        that say how tokens are kept. With a `host_path` on the same disk pages are mapped where
        they lie, and each is compared with its checksum when it is first read. Raises
        `SessionError` for a folder that is damaged or not of such a manager, `ConfigError` for
        impossible settings, and `HostTierFullError`.
        """
        from arkcache.saving.managers import load_manager  # it imports this module

        return load_manager(Path(folder), device, settings)

    @property
    def sizes(self) -> dict[str, Any]:
        """What the manager was made with, beside config, device and dtype."""
        names = ("num_layers", "num_kv_heads", "head_dim", "value_dim", "latent")
        return {name: getattr(self, name) for name in names}

    @property
    def host(self) -> HostTier | None:
        """The host tier; None where no layer has pages in it, and while nothing is held."""
        return self._host

    def held_pieces(self) -> Ids:
        """Pieces of the host tier that are held here, one entry per sequence and piece."""
        return np.concatenate([layer.held_pieces() for layer in self._layers])

    def name_of(self, handle: int) -> str:
        """What an error calls a piece of the host tier that is held here."""
        names = (layer.name_of(handle) for layer in self._layers)
        return next(filter(None, names), "a page")

    def log_state(self) -> State:
        """Which columns hold tokens; see `refill`."""
        state = self._log.state()
        return {name: torch.from_numpy(array).contiguous() for name, array in state.items()}

    @on_own_device
    def layer_state(self, layer: int) -> State:
        """What a layer holds, on the CPU, beside the bytes of the host tier; see `Layer.state`."""
        if self.steps is not None:
            self.steps.join()
        return self._layers[layer].state()

    def lengths_of(self, num_columns: int) -> Ids:
        """Tokens of each sequence among the first columns [batch]."""
        return self._log.lengths(num_columns)

    def digest_kind(self, layer: int) -> str:
        """Says how a layer's pages are digested: the "digest..." of another kind are no use."""
        config = self.config
        kind = self._layers[layer].digest_kind
        return f"{kind} {config.index} {config.index_bits} {config.estimates}"

    @on_own_device
    def refill(self, log: State) -> None:
        """Make room for the columns of a `log_state`; `restore_layer` has each layer hold them.

        Only while nothing is held. `reset()` where what follows fails.
        """
        assert not self._layers
        self._allocate(int(log["batch"]))
        self._log.restore({name: tensor.numpy() for name, tensor in log.items()})

    @on_own_device
    def restore_layer(self, layer: int, state: State) -> None:
        """Have an empty layer hold what `layer_state` gave, its pieces in this host tier."""
        self._layers[layer].restore(state)

    # -- allocation and checks --------------------------------------------------------------------

    def _allocate(self, batch: int) -> None:
        host = self._make_host()
        max_selected = self.planner.pages_that_fit(batch)
        tier = DeviceTier(self.planner.plan(batch, max_selected))
        self._layers = make_layers(self.planner, tier, host, max_selected, latent=self.latent)
        self._log = TokenLog(batch)
        capturable = [state.capturable for state in self._layers]
        if all(capturable):
            layers = [one for one in capturable if one is not None]
            self.steps = CapturableSteps(layers, self._log, host)
        self._host, self._device_tier, self._max_selected = host, tier, max_selected
        self.time_copies(self._times_copies)
        if self._recorder is not None:
            self._tell_layers()

    def _make_host(self) -> HostTier | None:
        """The host tier, if any layer needs one.

        Kernels read it where it is. Where it cannot be pinned for them, plain torch takes over.
        """
        config, planner = self.config, self.planner
        if all(config.budget_of(layer) is None for layer in range(self.num_layers)):
            return None
        gives_up = config.retention is not None
        sizes = PageStore.piece_bytes(self._packers, self.num_kv_heads, gives_up=gives_up)
        pin_to = self.device if planner.backend == "triton" else None
        if config.host_path is not None:
            folder, most = Path(config.host_path), config.host_resident_bytes
            return FileTier(sizes[0], config.host_bytes, folder, most)
        host = HostTier(sizes, config.host_bytes, pin_to=pin_to)
        if planner.backend == "triton":
            host.check_room([1])  # whether memory can be pinned is known once some is reserved
        if planner.backend == "triton" and self.device.type == "cuda" and not host.pinned:
            if config.backend == "triton":
                raise ConfigError(
                    f"backend='triton': host memory cannot be pinned ({host.why_pageable}); use "
                    "backend='auto'"
                )
            self.planner = replace(planner, backend="torch")
        return host

    def _grow_log(self, num_columns: int, mask: Tensor | None) -> None:
        """Log new columns, if all layers can store them."""
        before, log = self._log.num_columns, self._log
        real = None if mask is None else mask.cpu().numpy().astype(np.bool_)
        try:
            log.extend(num_columns, real)
            if self._host is not None:
                columns = log.num_columns
                filling = [
                    one for one in self._layers if one.may_seal(columns - one.tokens.columns)
                ]
                if filling:
                    lengths = log.lengths(columns)
                    self._host.check_room([sum(one.pieces_needed(lengths) for one in filling)])
        except BaseException:  # interrupted, too
            log.crop(before)
            raise

    def _check_append(self, layer: int, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        check_layer(layer, self.num_layers)
        given = key.shape
        batch, new_tokens = (given[0], given[2]) if len(given) == 4 else (0, 0)
        shape = (self.batch if self._layers else batch, self.num_kv_heads, new_tokens)
        check_new_tokens("key", key, (*shape, self.head_dim), self._like)
        check_new_tokens("value", value, (*shape, self.value_dim), self._like)
        if mask is not None:
            check_padding(mask, batch, new_tokens)

    def _check_attend(self, layer: int, query: Tensor, expanded: bool) -> None:
        check_layer(layer, self.num_layers)
        columns = self.columns_of(layer)
        if columns == 0:
            raise InputError(f"layer {layer} holds no tokens yet: append before attend")
        head_dim = None if expanded else self.head_dim
        check_query(query, (self.batch, self.num_kv_heads, columns, head_dim), self._like)
