"""Without `host_bytes` a long context ends in `HostTierFullError`, however many caches grow."""

import weakref

import pytest
import torch

from arkcache import ArkCache, CacheConfig, HostTierFullError, KVCacheManager
from arkcache.tiering import allowance
from tests.test_huggingface import make_model, prompt
from tests.test_huggingface_quantised import LIMITED, managers, mixed_shapes
from tests.twins import Twins, small_config

SPARE = 1 << 20


@pytest.fixture(autouse=True)
def _small_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system with a megabyte to spare, of which it takes what tiers have touched."""
    monkeypatch.setattr(allowance, "_all", weakref.WeakValueDictionary())
    monkeypatch.setattr(allowance, "MIN_GRANT_BYTES", 4096)

    def available() -> int:
        return SPARE - sum(one._touched for one in allowance._all.values())

    monkeypatch.setattr(allowance, "available_memory_bytes", available)


def tier_bytes(*every: KVCacheManager) -> int:
    return sum(manager.stats().host_bytes for manager in every)


def test_a_long_context_ends_in_an_error_that_changes_nothing() -> None:
    twins = Twins(small_config())
    with pytest.raises(HostTierFullError, match="to spare"):
        _ = [twins.append(100) for _ in range(1000)]
    assert SPARE // 2 < tier_bytes(twins.manager) <= SPARE
    twins.check()
    twins.attend()


def test_several_caches_share_what_there_is() -> None:
    every = [Twins(small_config(), seed=seed) for seed in range(3)]
    for _ in range(5):
        for twins in every:
            twins.append(100)
    for twins in every:
        with pytest.raises(HostTierFullError):
            _ = [twins.append(100) for _ in range(1000)]
    assert SPARE // 2 < tier_bytes(*(twins.manager for twins in every)) <= SPARE
    every.pop().reset()
    every[0].append(100)  # what another gave back
    for twins in every:
        twins.check()


def test_a_limit_is_taken_at_its_word() -> None:
    twins = Twins(small_config(host_bytes=4 * SPARE))
    while tier_bytes(twins.manager) <= SPARE:
        twins.append(400)


def test_groups_of_layers_share_what_there_is() -> None:
    model = mixed_shapes(make_model())
    cache = ArkCache(model, **LIMITED)
    tokens = prompt(90).repeat(1, 4)
    with torch.no_grad(), pytest.raises(HostTierFullError):
        _ = [model(tokens, past_key_values=cache) for _ in range(200)]
    groups = managers(cache)
    assert len(groups) == 2
    assert all(manager.config.host_bytes is None for manager in groups)
    assert SPARE // 2 < tier_bytes(*groups) <= SPARE
    for manager in groups:
        manager.check_integrity()


def test_few_steps_ask_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(allowance, "MIN_GRANT_BYTES", 64 << 10)
    monkeypatch.setattr(allowance, "available_memory_bytes", lambda: asked.append(0) or (1 << 30))
    manager = KVCacheManager(2, 2, 8, CacheConfig(page_size=32, budget_tokens=512))
    for _ in range(600):
        for layer in range(2):
            manager.append(layer, *torch.randn(2, 1, 2, 1, 8))
    assert 0 < len(asked) <= 2
