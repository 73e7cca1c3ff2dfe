"""Memory does not grow where it must not, and what is attended stays within the budget."""

import re
import sys
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arkcache import CacheConfig, CacheStats, KVCacheManager
from arkcache.kernels import reference
from arkcache.tiering.growing import grown_capacity
from tests.twins import Twins, small_config

KV_HEADS, DIM, CHUNK = 2, 8, 4096
BUDGET = {
    "page_size": 32,
    "budget_tokens": 512,
    "num_sink_tokens": 32,
    "num_recent_tokens": 64,
    "num_dense_layers": 0,
    "stream_block_tokens": 1024,
}


def context(
    columns: int, num_layers: int = 1, **settings: Any
) -> tuple[KVCacheManager, Tensor, Tensor]:
    """A manager that has read `columns` tokens in chunks, and the keys and values of each layer."""
    config = CacheConfig(**(BUDGET | settings))
    manager = KVCacheManager(num_layers, KV_HEADS, DIM, config)
    key, value = torch.randn(2, num_layers, 1, KV_HEADS, columns, DIM)
    for start in range(0, columns, CHUNK):
        for layer in range(num_layers):
            part = slice(start, start + CHUNK)
            manager.append(layer, key[layer, :, :, part], value[layer, :, :, part])
    return manager, key, value


def decode(manager: KVCacheManager, steps: int, seed: int = 1) -> list[Tensor]:
    """The outputs of some decode steps on random numbers."""
    generator = torch.Generator().manual_seed(seed)
    outputs = []
    for _ in range(steps):
        for layer in range(manager.num_layers):
            key, value = torch.randn(2, 1, KV_HEADS, 1, DIM, generator=generator)
            manager.append(layer, key, value)
            query = torch.randn(1, 4, 1, DIM, generator=generator)
            outputs.append(manager.attend(layer, query))
    return outputs


def test_a_small_budget_attends_fewer_tokens_than_are_held() -> None:
    """Finite, deterministic, within the budget at every step."""
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        manager, _, _ = context(CHUNK, num_layers=2)
        outputs = decode(manager, 40)
        runs.append(torch.stack(outputs))
        stats = manager.stats()
        assert 2 * (512 - 3 * 32) < stats.attended_tokens <= 2 * 512
        assert stats.total_tokens == 2 * (CHUNK + 40)
    assert runs[0].isfinite().all()
    assert torch.equal(runs[0], runs[1])


@pytest.mark.parametrize("index", ["cuboid-mean", "tokens"])
def test_the_device_tier_does_not_grow_with_the_context(index: str) -> None:
    """4k and 64k tokens take the same slots, and a step attends the same number of tokens."""
    sizes, attended, host = [], [], []
    for columns in (CHUNK, 16 * CHUNK):
        manager, _, _ = context(columns, index=index)
        decode(manager, 3)
        stats = manager.stats()
        tier: Any = manager._device_tier
        assert stats.device_bytes == tier.pool.untyped_storage().nbytes()
        sizes.append(stats.device_bytes)
        attended.append(stats.attended_tokens)
        host.append(stats.host_bytes)
    assert sizes[0] == sizes[1]
    assert attended[0] == attended[1]
    page_bytes = 32 * KV_HEADS * 2 * DIM * 4
    assert host == [(n - 64) // 32 * page_bytes for n in (CHUNK + 3, 16 * CHUNK + 3)]


def test_the_device_tier_is_what_the_configuration_implies() -> None:
    """Sinks, selected pages, window and streaming block, in tokens."""
    manager, _, _ = context(CHUNK, num_layers=3, device_pool_factor=1.5, num_dense_layers=1)
    selected = (512 - 32 - (64 + 32 - 1)) // 32
    slots = 1 + -(-selected * 3 // 2) + 3
    token_bytes = KV_HEADS * 2 * DIM * 4
    dense = manager.stats().device_bytes - (2 * slots * 32 + 1024) * token_bytes
    assert CHUNK * token_bytes <= dense <= grown_capacity(CHUNK) * token_bytes


@pytest.mark.parametrize("new_tokens", [2, pytest.param(300, marks=pytest.mark.slow)])
def test_a_long_past_is_streamed_in_blocks_and_attended_whole(
    new_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64k tokens through a block of 1024: equal to full attention."""
    columns = 16 * CHUNK
    manager, key, value = context(columns)
    before = manager.stats()
    layer: Any = manager._layers[0]
    blocks = spy(layer, monkeypatch)
    query = torch.randn(1, 4, new_tokens, DIM)
    output = manager.attend(0, query)
    position = torch.arange(columns)
    causal = position <= position[columns - new_tokens :, None]
    expected = reference.attention(query, key[0], value[0], scale=DIM**-0.5, mask=causal)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    stats = manager.stats()
    sealed = (columns - 64) // 32 * 32
    assert blocks == [1024] * (sealed // 1024) + [sealed % 1024, columns - sealed]
    assert stats.bytes_streamed == sealed * KV_HEADS * 2 * DIM * 4 == stats.host_bytes
    assert stats.device_bytes == before.device_bytes
    assert stats.bytes_recalled == before.bytes_recalled
    assert stats.attended_tokens == columns


def spy(layer: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the blocks that a layer hands out, each a view of the device tier."""
    sizes: list[int] = []
    blocks, pool = layer.blocks, layer.parts.device_tier.pool.untyped_storage().data_ptr()

    def watched() -> Any:
        for key, value, numbers in blocks():
            sizes.append(key.shape[2])
            assert key.untyped_storage().data_ptr() == pool
            assert value.untyped_storage().data_ptr() == pool
            yield key, value, numbers

    monkeypatch.setattr(layer, "blocks", watched)
    return sizes


@pytest.mark.parametrize("stream_block_tokens", [32, 33, 500, 100_000])
def test_any_size_of_streaming_block(stream_block_tokens: int) -> None:
    manager, key, value = context(2000, stream_block_tokens=stream_block_tokens)
    query = torch.randn(1, 4, 5, DIM)
    position = torch.arange(2000)
    causal = position <= position[-5:, None]
    expected = reference.attention(query, key[0], value[0], scale=DIM**-0.5, mask=causal)
    torch.testing.assert_close(manager.attend(0, query), expected, rtol=1e-5, atol=1e-5)


def test_python_objects_do_not_pile_up_while_decoding() -> None:
    """A long answer leaves pages, not garbage."""
    manager, _, _ = context(CHUNK)
    decode(manager, 40)
    tracemalloc.start()
    start, _ = tracemalloc.get_traced_memory()
    decode(manager, 200)
    grown = tracemalloc.get_traced_memory()[0] - start
    tracemalloc.stop()
    assert grown < 100_000


def test_reset_and_deletion_free_everything() -> None:
    twins = Twins(small_config())
    twins.append(100)
    twins.attend()
    tier, host = weakref.ref(twins.manager._device_tier), weakref.ref(twins.manager._host)
    twins.reset()
    assert twins.manager.stats() == CacheStats()
    assert tier() is None
    assert host() is None
    twins.append(100)
    manager = weakref.ref(twins.manager)
    host = weakref.ref(twins.manager._host)
    del twins
    assert manager() is None
    assert host() is None


@pytest.mark.slow
def test_a_million_tokens() -> None:
    """Everything is held bit for bit after every table has grown many times."""
    columns = 1 << 20
    manager, key, value = context(columns, num_layers=1, stream_block_tokens=8192)
    decode(manager, 20)
    manager.check_integrity()
    held = manager.gather(0)
    assert torch.equal(held[0][:, :, :columns], key[0])
    assert torch.equal(held[1][:, :, :columns], value[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "name",
    ["K4V4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("K2V2", "K8V4+K4V2"))],
)
def test_host_bytes_are_the_memory_that_the_process_really_holds(name: str) -> None:
    """At 64k tokens, to 5 %: the kernel counts whole (huge) pages."""
    config = CacheConfig.preset(name, budget_tokens=512, num_dense_layers=0)
    manager = KVCacheManager(4, 4, 64, config, dtype=torch.bfloat16)
    for _ in range(16):
        for layer in range(4):
            manager.append(layer, *torch.randn(2, 1, 4, 4096, 64).bfloat16())
    assert manager.num_columns == 65536
    assert manager._host is not None
    held = resident_bytes(manager._host.pieces().data_ptr())
    assert held == pytest.approx(manager.stats().host_bytes, rel=0.05)


def resident_bytes(address: int) -> int:
    """Resident bytes of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the address is not mapped")
