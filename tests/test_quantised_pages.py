"""The bytes of quantised pages, where they go and what they take; settings that are refused."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arkcache import ConfigError, InputError, KVCacheManager
from arkcache.formats import PageFormat, PageLayout
from arkcache.kernels import reference
from arkcache.layers.packed_dense import PackedDenseLayer
from arkcache.tiering import host as host_module
from tests.quantised import FORMATS, config_of, converse
from tests.twins import Twins


def sealed_bytes(manager: KVCacheManager) -> list[Tensor]:
    """The bytes of all sealed pages of the first layer, row by row: `gather` unpacks them."""
    layer: Any = manager._layers[0]
    heads, rows = layer.geometry.num_kv_heads, range(layer.geometry.num_rows)
    if isinstance(layer, PackedDenseLayer):
        return [
            layer._pages.read(page, page + 1).flatten(0, 1)[row, 0]
            for row in rows
            for page in range(layer.tokens.sealed[row // heads])
        ]
    return [
        next(layer.parts.store.read(np.array([row]), np.array([page]))).packed[0]
        for row in rows
        for page in range(layer.tokens.sealed[row // heads])
    ]


@pytest.mark.parametrize("chunks", [[60], [1] * 60, [33, 27], [7, 1, 1, 40, 11]])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("num_dense_layers", [0, 1])
def test_the_bytes_are_the_same_however_tokens_arrive(
    num_dense_layers: int, name: str, chunks: list[int]
) -> None:
    """And those that the reference packs, page by page."""
    config = config_of(name, num_dense_layers=num_dense_layers)
    manager = KVCacheManager(1, 2, 8, config)
    key, value = torch.randn(2, 2, 60, 8), torch.randn(2, 2, 60, 8)
    for parts in zip(key.split(chunks, dim=2), value.split(chunks, dim=2), strict=True):
        manager.append(0, *parts)
    held = sealed_bytes(manager)
    assert len(held) == 2 * 2 * 14
    layout = PageLayout(config.format, 4, 8, 8, 4)
    pages = [(row, page) for row in range(4) for page in range(14)]
    for number in range(0, len(held), 11 if len(chunks) > 1 else 5):
        row, page = pages[number]
        states = (plane[row // 2, row % 2, page * 4 : page * 4 + 4] for plane in (key, value))
        packed = reference.pack_page(*states, layout, torch.float32)
        assert bytes(held[number].tolist()) == packed
    whole = KVCacheManager(1, 2, 8, config)
    whole.append(0, key, value)
    assert all(map(torch.equal, held, sealed_bytes(whole)))


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("name", FORMATS)
def test_recalled_pages_are_the_sealed_bytes(name: str, factor: float) -> None:
    twins = Twins(config_of(name, packed_slots=True, device_pool_factor=factor))
    twins.append(100)
    sealed = [page.clone() for page in sealed_bytes(twins.manager)]
    for _ in range(40):
        twins.attend(size=3.0)
    twins.check()  # what is resident is bit-equal to what the host tier has
    assert all(map(torch.equal, sealed_bytes(twins.manager), sealed))
    assert twins.manager.stats().pages_recalled > 100


@pytest.mark.parametrize("packed_slots", [None, True])
@pytest.mark.parametrize("name", FORMATS)
def test_a_recall_moves_packed_bytes_only(name: str, packed_slots: bool | None) -> None:
    twins = Twins(config_of(name, packed_slots=packed_slots))
    twins.append(100)
    for _ in range(10):
        twins.append(1)
        twins.attend(size=3.0)
    stats, nbytes = twins.manager.stats(), twins.page_bytes()
    assert stats.pages_recalled > 10
    assert stats.bytes_recalled == stats.pages_recalled * nbytes
    sealed = 2 * ((110 - 4) // 4)
    assert stats.host_bytes == stats.bytes_backed_up == sealed * 2 * nbytes
    assert nbytes < PageLayout(PageFormat(), 4, 8, 8, 4).nbytes
    twins.attend(5)
    assert twins.manager.stats().bytes_streamed == sealed * 2 * nbytes


def test_the_device_tier_shrinks_with_its_slots() -> None:
    sizes = {"page_size": 16, "budget_tokens": 320, "num_sink_tokens": 16, "group_size": 32}
    packed, plain, raw = (
        Twins(config_of(name, packed_slots=slots, backend="torch", **sizes), head_dim=64)
        for name, slots in (("K4V2", True), ("K4V2", None), ("K16V16", True))
    )
    for twins in (packed, plain, raw):
        twins.append(20)
        twins.check()  # and they are of the size that the settings imply
    sizes_of = [twins.manager.stats().device_bytes for twins in (packed, plain, raw)]
    assert 3 * sizes_of[0] < sizes_of[1] == sizes_of[2]


def test_two_formats_map_no_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit may be all of the memory: a byte more of address space may be refused."""
    sizes, map_anonymous = [], host_module.map_anonymous

    def mapped(size: int) -> Any:
        sizes.append(size)
        return map_anonymous(size)

    monkeypatch.setattr(host_module, "map_anonymous", mapped)
    for limit in range(10_000, 10_064):
        config = config_of("K16V16+K16V2", page_size=1, group_size=5, host_bytes=limit)
        manager = KVCacheManager(1, 1, 5, config)
        manager.append(0, torch.randn(1, 1, 20, 5), torch.randn(1, 1, 20, 5))
        assert sizes.pop() <= limit


# -- settings that are refused --------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [3, 16])
@pytest.mark.parametrize("name", ["K4V4", "K16V16+K16V4"])
def test_groups_that_do_not_divide_the_values(name: str, group_size: int) -> None:
    with pytest.raises(ConfigError, match=rf"group_size={group_size} does not divide .* 8 "):
        KVCacheManager(1, 2, 8, config_of(name, group_size=group_size))
    KVCacheManager(1, 2, 8, config_of("K4V16", group_size=group_size))


@pytest.mark.parametrize("rotation", ["keys", "both"])
def test_a_rotation_of_odd_keys(rotation: str) -> None:
    with pytest.raises(ConfigError, match=r"rotation=.*keys of 45 elements: expected an even"):
        KVCacheManager(1, 2, 45, config_of("K4V4", rotation=rotation, group_size=15))
    KVCacheManager(1, 2, 45, config_of("K4V4", rotation="none", group_size=15))
    KVCacheManager(1, 2, 45, config_of("K16V4", rotation=rotation), value_dim=8)


def test_a_rotation_of_odd_values() -> None:
    with pytest.raises(ConfigError, match="rotation='values' of values of 15 elements"):
        KVCacheManager(1, 2, 8, config_of("K4V4", rotation="values", group_size=5), value_dim=15)


def test_settings_change_in_an_empty_cache_only() -> None:
    twins = Twins(config_of("K4V4"))
    twins.append(60)
    query, stats = twins.query(), twins.manager.stats()
    before = twins.attend_layer(0, query)
    other = config_of("K2V2", rotation="both")
    with pytest.raises(InputError, match=r"60 tokens in K4V4.*reset\(\)"):
        twins.manager.config = other
    assert twins.manager.config == config_of("K4V4")
    assert twins.manager.stats().host_bytes == stats.host_bytes
    assert torch.equal(twins.attend_layer(0, query), before)
    twins.check()
    twins.reset()
    with pytest.raises(ConfigError):
        twins.manager.config = config_of("K4V4", group_size=5)
    assert twins.manager.config == config_of("K4V4")
    twins.manager.config = twins.config = twins.oracle.config = other
    converse(twins)


def test_dtypes_that_torch_hardly_computes_in_are_refused() -> None:
    with pytest.raises(InputError, match=r"expected one of torch.float16"):
        KVCacheManager(1, 1, 8, dtype=torch.float8_e4m3fn)
