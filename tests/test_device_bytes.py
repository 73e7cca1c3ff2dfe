"""`device_bytes`: as many pages as fit, for as many sequences as there are."""

from typing import Any

import pytest
import torch

from arkcache import CacheConfig, ConfigError, KVCacheManager
from tests.quantised import config_of
from tests.twins import Twins

DEVICE = {"budget_tokens": "auto", "packed_slots": True}


def held_by(config: CacheConfig, batch: int = 1, columns: int = 1000, head_dim: int = 8) -> Any:
    """The stats of a step over so many tokens."""
    twins = Twins(config, batch=batch, head_dim=head_dim)
    twins.append(columns)
    twins.manager.attend(0, twins.query())
    twins.manager.check_integrity()
    return twins.manager.stats()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("packed_slots", [True, False])
@pytest.mark.parametrize("device_bytes", [12_000, 20_000, 33_333])
@pytest.mark.parametrize("name", ["K16V16", "K8V4", "K2V2"])
def test_as_many_pages_as_fit(name: str, device_bytes: int, packed_slots: bool, batch: int) -> None:
    """The size is that of a budget of as many tokens; one page more would not fit."""
    settings = {"packed_slots": packed_slots, "stream_block_tokens": 4}
    config = config_of(name, **settings, budget_tokens="auto", device_bytes=device_bytes)
    stats = held_by(config, batch)
    assert stats.device_bytes <= device_bytes
    selected = stats.attended_tokens // batch - 4 - 4  # sinks; 1000 tokens leave 4 in the window
    least = 4 + 4 + 4 - 1
    exact = held_by(config_of(name, **settings, budget_tokens=selected + least), batch)
    assert (exact.device_bytes, exact.attended_tokens) == (
        stats.device_bytes,
        stats.attended_tokens,
    )
    more = held_by(config_of(name, **settings, budget_tokens=selected + least + 4), batch)
    assert more.device_bytes > device_bytes


def test_more_tokens_fit_at_fewer_bits() -> None:
    sizes = {"page_size": 16, "num_sink_tokens": 16, "num_recent_tokens": 16, "group_size": 32}
    attended = [
        held_by(
            config_of(name, **DEVICE, **sizes, device_bytes=200_000), columns=2500, head_dim=64
        ).attended_tokens
        for name in ("K16V16", "K8V8", "K8V4", "K4V4", "K2V2")
    ]
    assert attended == sorted(set(attended))
    assert attended[-1] > 6 * attended[0]


def test_budgets_are_caps() -> None:
    """What fits is attended; a budget that does not is cut to as much as all heads may have."""
    free = held_by(config_of("K4V4", budget_tokens=32, backend="torch"))
    assert held_by(config_of("K4V4", budget_tokens=32, device_bytes=10**6)) == free
    auto = held_by(config_of("K4V4", **DEVICE, device_bytes=20_000))
    cut = held_by(config_of("K4V4", packed_slots=True, budget_tokens=900, device_bytes=20_000))
    assert cut == auto
    uneven = held_by(
        config_of("K4V4", packed_slots=True, budget_tokens=((32, 900),), device_bytes=20_000)
    )
    assert uneven.device_bytes == auto.device_bytes
    assert uneven.attended_tokens == (28 + auto.attended_tokens) // 2  # sinks, 5 pages and 4 recent


def test_device_bytes_of_less_than_a_page() -> None:
    twins = Twins(config_of("K4V4", **DEVICE, device_bytes=9_000), batch=8)
    with pytest.raises(ConfigError, match=r"device_bytes=9000.* 8 sequences needs \d+"):
        twins.manager.append(0, torch.randn(8, 2, 60, 8), torch.randn(8, 2, 60, 8))
    assert twins.manager.batch == twins.manager.num_columns == 0
    twins.check()
    twins.manager.append(0, torch.randn(1, 2, 60, 8), torch.randn(1, 2, 60, 8))
    assert twins.manager.stats().device_bytes <= 9_000


def test_device_bytes_beside_an_unlimited_budget() -> None:
    with pytest.raises(ConfigError, match="budget_tokens=None beside device_bytes=1000"):
        config_of("K4V4", budget_tokens=None, device_bytes=1000)


@pytest.mark.parametrize("packed_slots", [None, True])
def test_budgets_follow_the_number_of_sequences(packed_slots: bool | None) -> None:
    """What beams attend within `device_bytes` is what as many sequences from the start would."""
    config = config_of("K4V4", budget_tokens="auto", device_bytes=20_000, packed_slots=packed_slots)
    key, query = torch.randn(2, 2, 300, 8), torch.randn(4, 4, 1, 8)
    manager = KVCacheManager(1, 2, 8, config)
    manager.append(0, key, key)
    manager.attend(0, query[:2])
    for order in ([0, 1, 1], [2, 0, 0, 1], [3, 1], [0]):
        key = key[order]
        manager.keep_sequences(torch.tensor(order))
        fresh = KVCacheManager(1, 2, 8, config)
        fresh.append(0, key, key)
        own = query[: len(order)]
        for _ in range(2):
            torch.testing.assert_close(manager.attend(0, own), fresh.attend(0, own))
            own = own.flip(3)
        manager.check_integrity()
        stats, other = manager.stats(), fresh.stats()
        assert stats.device_bytes == other.device_bytes <= 20_000
        assert stats.attended_tokens == other.attended_tokens
        new = torch.randn(len(order), 2, 40, 8)
        manager.append(0, new, new)
        key = torch.cat((key, new), dim=2)


def test_beams_beyond_device_bytes() -> None:
    """Refused, and nothing has changed; fewer sequences may follow."""
    config = config_of("K4V4", **DEVICE, device_bytes=20_000)
    manager = KVCacheManager(1, 2, 8, config)
    key, query = torch.randn(2, 2, 300, 8), torch.randn(2, 4, 1, 8)
    manager.append(0, key, key)
    before, stats = manager.attend(0, query), manager.stats()
    with pytest.raises(ConfigError, match="device_bytes=20000: the device tier of 64 sequences"):
        manager.keep_sequences(torch.arange(64) % 2)
    assert (manager.batch, manager.stats()) == (2, stats)
    manager.check_integrity()
    assert torch.equal(manager.attend(0, query), before)
    manager.keep_sequences(torch.tensor([1]))
    manager.check_integrity()
    manager.attend(0, query[1:])
