"""A manager and its dense oracle, driven together and compared after every step."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arkcache import CacheConfig, KVCacheManager
from arkcache.engines.capture import CapturableSteps
from arkcache.formats import PageFormat, PageLayout
from arkcache.layers.paged import PagedLayer
from tests.oracle import Oracle

SMALL = {
    "page_size": 4,
    "budget_tokens": 32,
    "num_sink_tokens": 4,
    "num_recent_tokens": 4,
    "num_dense_layers": 0,
    "stream_block_tokens": 16,
}
"""Sinks of one page, five selected pages and a window of at most seven tokens."""


def small_config(**settings: object) -> CacheConfig:
    return CacheConfig(**(SMALL | settings))  # type: ignore[arg-type]


def follow_demotions(manager: KVCacheManager, oracle: Oracle) -> None:
    """Tell the oracle which pages are coarse; what they hold then is for it to work out."""
    for number, layer in enumerate(manager._layers):
        if manager.config.coarse_format is None or not isinstance(layer, PagedLayer):
            continue
        if layer.tokens.sealed.any():
            coarse = ~layer.parts.store.is_fine(int(layer.tokens.sealed.max()))
            row, page = np.nonzero(coarse)
            pages = zip(*np.divmod(row, manager.num_kv_heads), page, strict=True)
            sealed = oracle.quantised[number]
            oracle.demote(number, {(s, h, p) for s, h, p in pages if p < sealed[s]})


def follow_groups(manager: KVCacheManager, oracle: Oracle, layer: int) -> None:
    """Tell the oracle which tokens share a page, before it seals them itself."""
    numbers = manager.page_tokens(layer) if manager.config.grouping is not None else None
    if numbers is not None:
        oracle.group(layer, torch.from_numpy(numbers))


def check_references(managers: Sequence[KVCacheManager]) -> None:
    """Fail unless these hold all there is in their host tiers, and no piece's free place is lost.

    managers: with every other that shares a tier with one of them.
    """
    for host in {id(one._host): one._host for one in managers}.values():
        if host is not None:
            sharing = [one for one in managers if one._host is host]
            host.check([layer.held_pieces() for one in sharing for layer in one._layers])


def attend_latents(config: CacheConfig, group: int = 1) -> KVCacheManager:
    """A cache of latents after three steps over them, each compared with the oracle."""
    into_key, into_value = torch.randn(9, 8), torch.randn(9, 5)
    manager = KVCacheManager(1, 1, 6, config, value_dim=3, latent=True)
    oracle = Oracle(1, 1, config, latent=True)

    def expand(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        latent = torch.cat((key, value), dim=-1)
        return latent @ into_key, latent @ into_value

    key, value = torch.randn(2, 1, 100, 6), torch.randn(2, 1, 100, 3)
    for one in (manager, oracle):
        one.append(0, key, value)
    for _ in range(3):
        query = torch.randn(2, group, 1, 8)
        how: dict[str, Any] = {"expand": expand, "index_query": query @ into_key.T, "scale": 0.3}
        oracle.attend_one(0, query, **how).check(manager.attend(0, query, **how))
    return manager


class Twins:
    """A `KVCacheManager` on random data beside its `Oracle`.

    Every random tensor follows from `seed` and the number of tensors drawn before it, so that two
    twins of one seed which draw the same tensors hold the same cache. The manager is on `device`;
    the oracle and all random tensors are on the CPU.
    """

    def __init__(
        self,
        config: CacheConfig,
        *,
        num_layers: int = 1,
        num_kv_heads: int = 2,
        head_dim: int = 8,
        value_dim: int | None = None,
        batch: int = 2,
        group: int = 2,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.manager = KVCacheManager(
            num_layers,
            num_kv_heads,
            head_dim,
            config,
            device=device,
            value_dim=value_dim,
            dtype=dtype,
        )
        backend = self.manager.planner.backend
        self.oracle = Oracle(num_layers, num_kv_heads, config, backend=backend)
        self.config, self.num_layers, self.num_kv_heads = config, num_layers, num_kv_heads
        self.head_dim, self.value_dim = head_dim, value_dim or head_dim
        self.start_batch, self.group, self.seed, self.dtype = batch, group, seed, dtype

    @property
    def batch(self) -> int:
        return self.oracle.batch or self.start_batch

    def randn(self, *shape: int) -> Tensor:
        self.seed += 1
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))
        return numbers.to(self.dtype)

    def on_device(self, *values: Any) -> list[Any]:
        """The tensors among them where the manager is."""
        return [x.to(self.device) if isinstance(x, Tensor) else x for x in values]

    def query(self, new_tokens: int = 1, size: float = 1.0) -> Tensor:
        heads = self.num_kv_heads * self.group
        return self.randn(self.batch, heads, new_tokens, self.head_dim) * size

    def append(self, new_tokens: int, mask: Tensor | None = None) -> None:
        """The same number of random tokens to every layer."""
        for layer in range(self.num_layers):
            self.append_layer(layer, new_tokens, mask)

    def append_layer(self, layer: int, new_tokens: int, mask: Tensor | None = None) -> None:
        shape = (self.batch, self.num_kv_heads, new_tokens)
        key, value = self.randn(*shape, self.head_dim), self.randn(*shape, self.value_dim)
        self.manager.append(layer, *self.on_device(key, value, mask))
        follow_groups(self.manager, self.oracle, layer)
        self.oracle.append(layer, key, value, mask)
        follow_demotions(self.manager, self.oracle)

    def attend(self, new_tokens: int = 1, *, size: float = 1.0, **how: object) -> list[Tensor]:
        """Attend in every layer with random queries; fails where manager and oracle differ."""
        # The rounding of the logits grows with them, and the dtype's with its epsilon.
        tolerance = 3e-5 * max(1.0, size) * max(1.0, torch.finfo(self.dtype).eps / 1e-6)
        return [
            self.attend_layer(layer, self.query(new_tokens, size), tolerance=tolerance, **how)
            for layer in range(self.num_layers)
        ]

    def attend_layer(
        self, layer: int, query: Tensor, *, tolerance: float = 3e-5, **how: object
    ) -> Tensor:
        given = dict(zip(how, self.on_device(*how.values()), strict=True))
        output = self.manager.attend(layer, *self.on_device(query), **given).cpu()
        assert output.shape == (*query.shape[:3], self.value_dim)
        assert output.dtype == self.dtype
        if query.shape[2] == 1:
            self.oracle.attend_one(layer, query, **how).check(output, tolerance)
        else:
            expected = self.oracle.attend_many(layer, query, **how)
            assert float((output - expected).abs().max()) <= tolerance * max(
                1.0, float(expected.abs().max())
            )
        return output

    @property
    def steps(self) -> CapturableSteps:
        """The steps of the manager, which runs on kernels."""
        assert self.manager.steps is not None
        return self.manager.steps

    def crop(self, num_columns: int) -> None:
        self.manager.crop(num_columns)
        self.oracle.crop(num_columns)

    def keep_sequences(self, index: list[int]) -> None:
        self.manager.keep_sequences(torch.tensor(index))
        self.oracle.keep_sequences(torch.tensor(index))
        for layer in range(self.num_layers):
            follow_groups(self.manager, self.oracle, layer)

    def reset(self) -> None:
        self.manager.reset()
        self.oracle.reset()

    def check(self) -> None:
        """The manager's metadata agrees, nothing held differs by a bit, sizes are what they are."""
        self.manager.check_integrity()
        assert self.manager.batch == self.oracle.batch
        assert self.manager.num_columns == self.oracle.num_columns
        stats = self.manager.stats()
        if self.oracle.real is None:
            assert (stats.device_bytes, stats.host_bytes, stats.total_tokens) == (0, 0, 0)
            return
        for layer in range(self.num_layers):
            self.check_gathered(layer)
        assert stats.total_tokens == sum(
            len(self.oracle.columns(layer, sequence))
            for layer in range(self.num_layers)
            for sequence in range(self.batch)
        )
        assert stats.host_bytes == self.held_bytes
        assert self.num_held * self.heads_per_piece <= self.oracle.host_pages() * self.num_kv_heads
        assert stats.device_bytes == self.pool_bytes + self.dense_bytes

    def check_gathered(self, layer: int) -> None:
        """All tokens come back: to the bit, but for the rounding where they are rotated."""
        held, expected = self.manager.gather(layer), self.oracle.gather(layer)
        config = self.config
        rotates = (config.rotates_keys, config.rotates_values)
        for mine, other, rotated in zip(held, expected, rotates, strict=True):
            if not rotated:
                assert torch.equal(mine.cpu(), other)
            elif mine.numel():
                bound = 4 * torch.finfo(self.dtype).eps * float(other.abs().max())
                assert float((mine.cpu() - other).abs().max()) <= bound

    @property
    def held(self) -> list[np.ndarray]:
        """Per format, the host pieces that the layers refer to; a shared one is listed once."""
        host = self.manager._host
        pieces = [state.held_pieces() for state in self.manager._layers]
        if host is None:
            return []
        handles = np.unique(np.concatenate(pieces))
        kinds = host.kinds(handles)
        return [handles[kinds == kind] for kind in range(len(host.piece_bytes))]

    @property
    def num_held(self) -> int:
        """Host pieces that the layers refer to; one that sequences share counts once."""
        return sum(map(len, self.held))

    @property
    def held_bytes(self) -> int:
        """What the host pieces that the layers refer to must take."""
        formats = (self.config.format, self.config.coarse_format)
        numbers = 0  # int32, of every token that is grouped
        if self.config.grouping is not None:
            numbers = 4 * self.oracle.host_pages() * self.num_kv_heads * self.config.page_size
        return numbers + sum(
            len(pieces) * self.heads_per_piece * self.page_bytes(page_format)
            for pieces, page_format in zip(self.held, formats, strict=False)
            if page_format is not None
        )

    @property
    def heads_per_piece(self) -> int:
        """Of two formats, each KV head has its own."""
        return self.num_kv_heads if self.config.coarse_format is None else 1

    def page_bytes(self, page_format: PageFormat | None = None) -> int:
        """A sealed page of one KV head, by default in the first format."""
        sizes = (self.config.page_size, self.head_dim, self.value_dim, self.dtype.itemsize)
        return PageLayout(page_format or self.config.format, *sizes).nbytes

    @property
    def whole_page_bytes(self) -> int:
        """A sealed page of all KV heads in the first format."""
        return self.num_kv_heads * self.page_bytes()

    @property
    def pool_bytes(self) -> int:
        """What the configuration implies for slots, windows and the streaming block."""
        config = self.config
        waiting = config.page_size if config.grouping is None else config.segment_tokens
        page_size, window = config.page_size, config.num_recent_tokens + waiting
        window = math.ceil(window / page_size) * page_size
        total, paged = 0, 0
        for layer in range(self.num_layers):
            if config.budget_of(layer) is None:
                continue
            paged += 1
            most = max(self.oracle.num_selected(layer, h) for h in range(self.num_kv_heads))
            slots = math.ceil(config.num_sink_tokens / page_size)
            slots += math.ceil(most * (config.device_pool_factor or 1))
            slots = 0 if self.manager.planner.backend == "numba" else slots
            packed = config.packed_slots and not config.format.is_raw
            packed = packed and self.manager.planner.backend != "numba"
            if packed or config.backend == "triton":
                slots_bytes = self.batch * self.num_kv_heads * slots * self.page_bytes()
                total += _aligned(slots_bytes) + self.states_bytes(window)
            else:
                total += self.states_bytes(slots * page_size + window)
        block = config.stream_block_tokens // page_size * page_size
        return total + (self.states_bytes(block) if paged else 0)

    def states_bytes(self, tokens: int) -> int:
        """A plane of keys and one of values, of so many tokens of every sequence and KV head."""
        rows = self.batch * self.num_kv_heads
        dims = (self.head_dim, self.value_dim)
        return sum(_aligned(rows * tokens * dim * self.dtype.itemsize) for dim in dims)

    @property
    def dense_bytes(self) -> int:
        """What the layers that attend everything have allocated."""
        return sum(
            state.stats().device_bytes
            for layer, state in enumerate(self.manager._layers)
            if self.config.budget_of(layer) is None
        )


def _aligned(size: int) -> int:
    """Planes of the device tier start at multiples of 64 bytes."""
    return math.ceil(size / 64) * 64
