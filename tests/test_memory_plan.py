"""A plan says what a cache then takes, byte for byte."""

import dataclasses
import math
import mmap
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from arkcache import CacheConfig, ConfigError, InputError, KVCacheManager
from arkcache.formats import PRESETS
from arkcache.memory import CacheShape, MemoryPlan, plan_memory, within_bytes
from arkcache.planning import Planner
from arkcache.tiering import mapped_file
from arkcache.tiering.file_tier import FileTier
from arkcache.tiering.growing import FIRST_ENTRIES, grown_capacity
from arkcache.tiering.mapping import HUGE_PAGE

SMALL: dict[str, Any] = {
    "page_size": 8,
    "group_size": 8,
    "num_sink_tokens": 8,
    "num_recent_tokens": 12,
    "num_dense_layers": 0,
    "stream_block_tokens": 32,
    "budget_tokens": 72,
}
SHAPE = CacheShape(num_layers=3, num_kv_heads=2, head_dim=16, value_dim=24, dtype=torch.bfloat16)


def filled(config: CacheConfig, shape: CacheShape, context: int, batch: int) -> KVCacheManager:
    """A cache that has read `context` tokens and then one more, which it attends."""
    torch.manual_seed(0)
    cache = KVCacheManager(
        shape.num_layers,
        shape.num_kv_heads,
        shape.head_dim,
        config,
        dtype=shape.dtype,
        value_dim=shape.value_dim,
    )
    for new in (context - 1, 1):
        for layer in range(shape.num_layers):
            size = (batch, shape.num_kv_heads, new)
            key, value = (
                torch.randn(*size, dim, dtype=shape.dtype)
                for dim in (shape.head_dim, shape.value_dim)
            )
            cache.append(layer, key, value)
    for layer in range(shape.num_layers):
        query = torch.randn(batch, 2 * shape.num_kv_heads, 1, shape.head_dim, dtype=shape.dtype)
        cache.attend(layer, query)
    return cache


def assert_agrees(config: CacheConfig, shape: CacheShape, context: int, batch: int) -> MemoryPlan:
    """The plan's figures are those of a real cache, growing tensors within what they may waste."""
    plan = plan_memory(config, shape, context, batch, device="cpu")
    stats = filled(config, shape, context, batch).stats()
    assert plan.host_bytes == stats.host_bytes
    dense_layers = sum(config.budget_of(layer) is None for layer in range(shape.num_layers))
    attended = plan.attended_tokens * (shape.num_layers - dense_layers) + context * dense_layers
    assert stats.attended_tokens == pytest.approx(attended * batch, abs=shape.num_layers * batch)
    grows = [(plan.digest_bytes, stats.digest_bytes)]
    if not config.format.is_raw or not dense_layers:
        assert plan.device_bytes == stats.device_bytes
    else:
        grows.append((plan.dense_bytes, stats.device_bytes - plan.tier_bytes))
    assert dense_layers or plan.device_bytes == plan.tier_bytes
    sealed = (context - config.num_recent_tokens) // config.page_size
    waste = max(max(grown_capacity(n), FIRST_ENTRIES) / n for n in (sealed, context))
    for planned, taken in grows:
        assert planned <= taken <= waste * planned + 1
    return plan


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", [*PRESETS, "K8V4+K4V2"])
def test_a_plan_is_what_a_cache_takes(name: str, batch: int) -> None:
    for changes in (
        {},
        {"budget_tokens": None},
        {"num_dense_layers": 1},
        {"budget_tokens": (40, (48, 120), None)},
        {"device_pool_factor": 1.7, "index": "sphere-max"},
        {"index": "tokens", "rotation": "both"},
        {"estimate_pages": None},
    ):
        if "+" in name and changes == {"budget_tokens": None}:  # an error: nothing would demote
            continue
        config = CacheConfig.preset(name, **(SMALL | changes))
        for context in (30, 333):
            assert_agrees(config, SHAPE, context, batch)


@pytest.mark.parametrize("packed_slots", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_a_byte_budget_is_used_up(name: str, packed_slots: bool) -> None:
    limit = 60_000
    changes = {"budget_tokens": "auto", "device_bytes": limit, "packed_slots": packed_slots}
    config = CacheConfig.preset(name, **(SMALL | changes))
    plan = assert_agrees(config, SHAPE, 1000, batch=2)
    one_more = plan.page_bytes if packed_slots else 2 * 8 * (16 + 24)
    assert limit - 64 - one_more * 3 * 2 * 2 < plan.tier_bytes <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["K16V16", "K4V4"])
def test_nothing_is_wasted_where_room_is_just_enough(name: str, dtype: torch.dtype) -> None:
    """128 sealed pages, a multiple of what is sealed at a time: every tensor has just that room."""
    shape = dataclasses.replace(SHAPE, dtype=dtype)
    config = CacheConfig.preset(name, **(SMALL | {"num_dense_layers": 1}))
    context = 128 * 8 + 12 + 1
    plan = plan_memory(config, shape, context, 2, device="cpu")
    cache = filled(config, shape, context, 2)
    stats = cache.stats()
    assert stats.digest_bytes == plan.digest_bytes
    grown = 0
    if config.format.is_raw:  # the last token came alone: more room was made for it
        growing = grown_capacity(context - 1)
        grown = plan.dense_bytes * growing // context - plan.dense_bytes
    assert stats.device_bytes == plan.device_bytes + grown


def test_parts_of_a_page_add_up() -> None:
    shape = CacheShape(2, 2, 10, 15, torch.float32)
    for name in PRESETS:
        config = CacheConfig.preset(name, page_size=5, group_size=5, budget_tokens=512)
        plan = plan_memory(config, shape, 4096)
        assert plan.page_bytes == plan.code_bytes + plan.meta_bytes + plan.padding_bytes
        assert plan.bits_per_element == pytest.approx(8 * plan.page_bytes / (5 * 25))
        quantised = name != "K16V16"
        assert (plan.meta_bytes > 0) == quantised
        # 10 keys of 4 bits are 5 bytes; what does not divide is padded.
        if name == "K4V4":
            assert plan.code_bytes == 5 * (5 + 8)
            assert plan.meta_bytes == 4 * (10 + 5 * 3)
            assert plan.padding_bytes == (80 - 65) + (112 - 100)


def test_fewer_bits_hold_more_tokens_in_the_same_bytes() -> None:
    shape = CacheShape(32, 8, 128, 128, torch.bfloat16)
    plans = [
        plan_memory(CacheConfig.preset(name, device_bytes=1 << 30), shape, 131072)
        for name in PRESETS
    ]
    attended = [plan.attended_tokens for plan in plans]
    assert attended == sorted(attended)
    assert attended[-1] > 3 * attended[0]
    assert all(plan.tier_bytes <= 1 << 30 for plan in plans)
    assert [plan.host_bytes for plan in plans] == sorted(
        (plan.host_bytes for plan in plans), reverse=True
    )
    assert math.isclose(plans[0].host_bytes_per_token, 32 * 8 * 256 * 2)
    assert plans[0].full_bytes == 131072 * 32 * 8 * 256 * 2


def test_a_gpu_keeps_slots_and_the_token_index_packed() -> None:
    config = CacheConfig.preset(
        "K4V4", index="tokens", num_dense_layers=0, stream_block_tokens=1024
    )
    shape = CacheShape(4, 2, 64, 64, torch.bfloat16)
    on_torch = replace(config, backend="torch")
    on_gpu = plan_memory(config, shape, 8192, device="cuda")
    on_cpu = plan_memory(on_torch, shape, 8192, device="cpu")
    assert on_gpu.tier_bytes < on_cpu.tier_bytes
    assert on_gpu.digest_bytes < on_cpu.digest_bytes
    assert on_gpu.host_bytes == on_cpu.host_bytes


def planner(factor: float | None = None, device: str = "cuda", **changes: Any) -> Planner:
    """Of a GPU that need not be there."""
    backend = changes.pop("backend", "triton")
    sizes: dict[str, Any] = {
        "page_size": 32,
        "budget_tokens": 1024,
        "num_dense_layers": 2,
        "stream_block_tokens": 1024,
    }
    config = CacheConfig(**sizes, device_pool_factor=factor, **changes)
    return Planner(config, 4, 2, 64, 64, torch.bfloat16, torch.device(device), backend)


SLOT_BYTES = 32 * (64 + 64) * 2 * 2 * 2
"""A page of two sequences and two KV heads."""


@pytest.mark.parametrize(
    ("free", "factor"), [(0, 1), (0.2, 1.1), (1, 1.5), (4, 3), (5.99, 3.995), (6, 4), (1000, 4)]
)
def test_spare_slots_are_what_free_memory_has_room_for(
    free: float, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`free`: a sixteenth of the device's free memory, in halves of what a step selects."""
    (selected, *_) = planner().selected(2, 1 << 40)
    half = 2 * SLOT_BYTES * selected // 2  # in both layers that are not dense
    available = int(16 * free * half)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (available, 1 << 40))
    ours = planner()
    plan = ours.plan(2, 1 << 40)
    least = ours.plan(2, 1 << 40, 1.0)
    assert plan.nbytes - least.nbytes <= available / 16
    assert plan.pool_factor <= factor
    assert plan.pool_factor >= min(4, factor - 1 / 8)


def test_spare_slots_respect_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 40, 1 << 40))
    assert planner().plan(2, 9).pool_factor == 4
    assert planner(1.0).plan(2, 9).pool_factor == 1
    assert planner(2.5).plan(2, 9).pool_factor == 2.5
    assert planner(device="cpu").plan(2, 9).pool_factor == 1
    assert planner(backend="torch").plan(2, 9).pool_factor == 1
    limit = planner().plan(2, 1 << 40, 2.0).nbytes
    limited = planner(device_bytes=limit)
    assert limited.plan(2, limited.pages_that_fit(2)).pool_factor == 2
    filled = planner(device_bytes=limit, num_recent_tokens=32)
    assert filled.pages_that_fit(2) >= limited.selected(2, 1 << 40)[0]


def test_a_plan_says_what_spare_slots_may_take() -> None:
    shape = CacheShape(4, 2, 64, 64, torch.bfloat16)
    config = CacheConfig(budget_tokens=1024, stream_block_tokens=1024)
    plan, on_cpu = (plan_memory(config, shape, 8192, 2, device) for device in ("cuda", "cpu"))
    most = plan_memory(replace(config, device_pool_factor=4.0), shape, 8192, 2)
    assert (
        plan.tier_bytes
        == plan_memory(replace(config, device_pool_factor=1), shape, 1, 2).tier_bytes
    )
    assert plan.spare_bytes == most.tier_bytes - plan.tier_bytes > 0
    assert (on_cpu.spare_bytes, most.spare_bytes) == (0, 0)
    assert plan_memory(replace(config, backend="torch"), shape, 8192).spare_bytes == 0
    tight = replace(config, device_bytes=plan.tier_bytes + 100)
    assert plan_memory(tight, shape, 8192, 2).spare_bytes == 0


def test_impossible_plans_are_refused() -> None:
    config = CacheConfig(**SMALL)
    with pytest.raises(InputError, match="context=0: expected at least 1"):
        plan_memory(config, SHAPE, 0)
    with pytest.raises(InputError, match="batch=0: expected at least 1"):
        plan_memory(config, SHAPE, 10, 0)
    with pytest.raises(InputError, match="device 'abacus': expected cpu or cuda"):
        plan_memory(config, SHAPE, 10, device="abacus")
    tight = CacheConfig(**(SMALL | {"budget_tokens": "auto", "device_bytes": 100}))
    with pytest.raises(ConfigError, match="device_bytes=100"):
        plan_memory(tight, SHAPE, 10)
    with pytest.raises(ConfigError, match="group_size=7 does not divide"):
        plan_memory(CacheConfig.preset("K4V4", **(SMALL | {"group_size": 7})), SHAPE, 10)


def test_planning_allocates_nothing() -> None:
    """A plan for terabytes of cache on any machine."""
    shape = CacheShape(126, 8, 128, 128, torch.bfloat16)
    plan = plan_memory(CacheConfig.preset("K2V2"), shape, 1 << 24, batch=64)
    assert plan.host_bytes > 1 << 40


@pytest.mark.parametrize(
    ("device", "batch", "settings", "tokens", "blocks"),
    [
        ("cpu", 1, {}, 1024, 1),
        ("cpu", 16, {}, 1024, 1),
        ("cpu", 1, {"stream_block_tokens": 502}, 500, 1),
        ("meta", 1, {}, 8192, 2),
        ("meta", 3, {}, 2728, 2),
        ("meta", 16, {}, 1024, 2),
        ("meta", 16, {"stream_block_tokens": 8192}, 8192, 2),
        # An eighth of 8 MiB for two blocks, 512 bytes to a token.
        ("meta", 1, {"device_bytes": 8 << 20}, 1024, 2),
        ("meta", 1, {"device_bytes": 50_000}, 8, 2),
    ],
)
def test_streaming_blocks(
    device: str, batch: int, settings: dict[str, Any], tokens: int, blocks: int
) -> None:
    """ "meta" is what every GPU is to a plan."""
    manager = KVCacheManager(2, 2, 64, CacheConfig(**settings), device=device, dtype=torch.bfloat16)
    plan = manager.planner.plan(batch, 1)
    assert (plan.stream_block_tokens, plan.num_stream_blocks) == (tokens, blocks)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_dense_layers": 1},
        {"index": "tokens"},
        {"estimate_pages": None},
        {"key_bits": 4, "value_bits": 4, "num_dense_layers": 1},
    ],
    ids=str,
)
def test_a_budget_of_bytes_counts_everything(changes: dict[str, Any]) -> None:
    """A cache of it that goes on growing takes no more, and not much less."""
    context, shape = 8192, replace(SHAPE, dtype=torch.float32)
    config = CacheConfig(**(SMALL | changes))
    limit = context * shape.token_bytes * 9 // 10
    fitted = within_bytes(config, shape, context, limit, "cpu")
    stats = filled(fitted, shape, context + 2 * config.page_size, 1).stats()
    plan = plan_memory(fitted, shape, context, device="cpu")
    taken = stats.device_bytes + stats.digest_bytes
    room = (plan.digest_bytes + plan.dense_bytes) // 8
    page = config.page_size * shape.token_bytes
    assert limit - room - page < taken <= limit


def test_bytes_that_hold_nothing_are_refused() -> None:
    config, shape = CacheConfig(**SMALL | {"num_dense_layers": 2}), SHAPE
    everything = 4096 * shape.token_bytes
    with pytest.raises(
        ConfigError, match=r"dense layers take \d+ and the index \d+ at 4096 tokens"
    ):
        within_bytes(config, shape, 4096, everything // 2, "cpu")
    with pytest.raises(ConfigError, match="the device tier of 1 sequences needs"):
        within_bytes(replace(config, num_dense_layers=0), shape, 4096, 350_000, "cpu")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says what is resident")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"key_bits": 4, "value_bits": 2, "page_size": 32},
        {"index": "cuboid-mean", "page_size": 32},
        {"index": "tokens", "index_bits": 2},
        {"backend": "torch"},
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["memory", "disk", "bounded"])
def test_what_is_described_is_what_is_measured(
    where: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 5 % for each tier, in RAM to a huge page: by what the system says, not by counters."""
    monkeypatch.setattr(mapped_file, "STEP_BYTES", mmap.PAGESIZE)  # no room ahead
    path = None if where == "memory" else str(tmp_path)
    resident = 1 << 20 if where == "bounded" else None
    config = CacheConfig(host_path=path, host_resident_bytes=resident, **changes)
    shape, context = CacheShape(2, 2, 64, 64, torch.float32), 8192
    plan = plan_memory(config, shape, context, device="cpu")
    manager = KVCacheManager(2, 2, 64, config)
    for layer in range(2):
        states = torch.randn(1, 2, context, 64)
        manager.append(layer, states, states)
    tier, host = manager._device_tier, manager.host
    assert tier is not None
    assert host is not None
    assert tier.pool.untyped_storage().nbytes() == pytest.approx(plan.device_bytes, rel=0.05)
    digests = sum(manager.layer_state(layer)["digests"].nbytes for layer in range(2))
    assert digests == pytest.approx(plan.digest_bytes, rel=0.05)
    in_ram = mapped_in_ram(host.pieces())
    if where == "bounded":
        # Some pages are written at a time, and the bound is looked at in between.
        assert plan.host_resident_bytes == resident
        assert in_ram <= plan.host_resident_bytes * 1.05 + (1 << 20)
    else:
        assert in_ram == pytest.approx(plan.host_resident_bytes, rel=0.05, abs=HUGE_PAGE)
    on_disk = 0
    if isinstance(host, FileTier) and host._file is not None:
        on_disk = 512 * os.fstat(host._file._descriptor).st_blocks
    assert on_disk == pytest.approx(plan.disk_bytes, rel=0.05)


def mapped_in_ram(pieces: torch.Tensor) -> int:
    """Bytes in RAM of the mapping that a tensor lies in."""
    address, found = pieces.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)) is not None:
            found = int(span[1], 16) <= address < int(span[2], 16)
        elif found and line.startswith("Rss:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the tensor lies in no mapping")
