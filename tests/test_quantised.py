"""Pages that are quantised when they are sealed: beside the dense oracle, and among themselves."""

import copy
import pickle
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from arkcache import CacheConfig, ConfigError, HostTierFullError, InputError, KVCacheManager
from arkcache.formats import PageFormat, PageLayout
from arkcache.kernels import reference
from arkcache.layers.packed_dense import PackedDenseLayer
from arkcache.layers.paged import PagedLayer
from arkcache.pages.importance import Importance, demotable
from arkcache.tiering import host as host_module
from arkcache.tiering.device import PackedWorkingSet
from tests.oracle import Oracle
from tests.twins import SMALL, Twins, follow_demotions, small_config

FORMATS = ["K8V4", "K4V4", "K4V2", "K2V2", "K4V16", "K16V4"]
MIXED = ["K8V4+K4V2", "K16V16+K2V2", "K8V8+K8V2"]
ROTATIONS = ["none", "keys", "values", "both"]
LEFT_PADDED = torch.arange(60) >= torch.tensor([[0], [25]])


def bits_of(name: str) -> dict[str, int]:
    """The settings that "K4V2" or "K8V4+K4V2" stands for."""
    settings = {}
    for prefix, part in zip(("", "coarse_"), name.split("+"), strict=False):
        key_bits, value_bits = part[1:].split("V")
        settings |= {f"{prefix}key_bits": int(key_bits), f"{prefix}value_bits": int(value_bits)}
    return settings


def config_of(name: str, **settings: Any) -> CacheConfig:
    """Small sizes, and demotions that a dozen steps bring about."""
    mixed = {"demote_after": 4, "demote_below": 0.9} if "+" in name else {}
    return CacheConfig(**(SMALL | {"group_size": 4} | bits_of(name) | mixed | settings))


def paged(twins: Twins, layer: int = 0) -> PagedLayer:
    return cast("PagedLayer", twins.manager._layers[layer])


def converse(twins: Twins, mask: Tensor | None = None, **how: Any) -> list[Tensor]:
    """A prompt in chunks, steps of one and of several tokens, retries, beams; all outputs."""
    outputs = []
    for new_tokens in (23, 14, *[1] * 9, 5, 1, 1):
        columns = twins.oracle.num_columns
        twins.append(new_tokens, None if mask is None else mask[:, columns : columns + new_tokens])
        outputs += twins.attend(min(new_tokens, 6), **how)
    twins.check()
    for columns in (twins.oracle.num_columns - 2, 30):  # the second gives pages back
        twins.crop(columns)
        outputs += twins.attend(**how)
        twins.check()
        twins.append(7)
        outputs += twins.attend(**how)
    for order in ([1, 0], [0, 1, 1], [2]):
        twins.keep_sequences(order)
        for _ in range(3):
            twins.append(1)
            outputs += twins.attend(**how)
        twins.check()
    return outputs


# -- beside the oracle ----------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("name", FORMATS + MIXED)
def test_conversations(name: str, rotation: str) -> None:
    """One dense layer, whose pages are quantised too, and one paged."""
    twins = Twins(config_of(name, rotation=rotation, num_dense_layers=1), num_layers=2)
    converse(twins)
    assert isinstance(twins.manager._layers[0], PackedDenseLayer) or name.startswith("K16V16")


@pytest.mark.parametrize("name", ["K4V2", "K8V4+K4V2"])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("budget", [32, ((12, 40),), None])
def test_budgets_and_pool_sizes(budget: Any, factor: float, group: int, name: str) -> None:
    settings = {"budget_tokens": budget, "device_pool_factor": factor}
    if budget is None and "+" in name:
        with pytest.raises(ConfigError, match="layers that attend everything demote no page"):
            config_of(name, **settings)
        return
    twins = Twins(config_of(name, rotation="keys", **settings), group=group)
    converse(twins, LEFT_PADDED)


@pytest.mark.parametrize("packed_slots", [None, True, False])
@pytest.mark.parametrize("mask", [None, LEFT_PADDED], ids=["plain", "left"])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_packed_and_unpacked_slots_answer_alike(
    factor: float, mask: Tensor | None, packed_slots: bool | None
) -> None:
    settings = {"device_pool_factor": factor, "rotation": "both"}
    plain = Twins(config_of("K4V4", **settings, packed_slots=False))
    twins = Twins(config_of("K4V4", **settings, packed_slots=packed_slots))
    for mine, other in zip(converse(twins, mask), converse(plain, mask), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert isinstance(paged(twins).working_set, PackedWorkingSet) == bool(packed_slots)


def options(twins: Twins, columns: int) -> dict[str, dict[str, Any]]:
    """What else `attend` takes, for a single new token."""
    sliding = torch.arange(columns) > columns - 25
    return {
        "softcap": {"softcap": 1.0},
        "sinks": {"sinks": twins.randn(4)},
        "boolean mask": {"mask": sliding[None, None, None]},
        "mask per head": {"mask": twins.randn(2, 4, 1, columns), "scale": 1.0},
    }


@pytest.mark.parametrize("name", ["K4V2", "K8V4+K4V2"])
@pytest.mark.parametrize("packed_slots", [None, True])
@pytest.mark.parametrize("budget", [32, None])
@pytest.mark.parametrize("mask", [None, LEFT_PADDED], ids=["plain", "left"])
@pytest.mark.parametrize("option", list(options(Twins(config_of("K4V2")), 60)))
def test_options(
    option: str, mask: Tensor | None, budget: int | None, packed_slots: bool | None, name: str
) -> None:
    if "+" in name:  # slots of one size, and a budget
        packed_slots, budget = None, 32
    twins = Twins(config_of(name, budget_tokens=budget, packed_slots=packed_slots, rotation="both"))
    twins.append(60, mask)
    twins.attend(**options(twins, 60)[option])
    twins.attend(5, **options(twins, 60)[option])
    for columns in range(61, 70):
        twins.append(1)
        twins.attend(**options(twins, columns)[option])
    twins.check()


@pytest.mark.parametrize(
    ("head_dim", "group_size", "rotation"),
    [(96, 32, "both"), (80, 16, "both"), (45, 15, "none"), (256, 64, "both")],
)
@pytest.mark.parametrize("page_size", [7, 16])
@pytest.mark.parametrize("packed_slots", [None, True])
def test_sizes(
    packed_slots: bool | None, page_size: int, head_dim: int, group_size: int, rotation: str
) -> None:
    config = config_of(
        "K4V2",
        page_size=page_size,
        group_size=group_size,
        rotation=rotation,
        budget_tokens=6 * page_size,
        num_sink_tokens=page_size,
        num_recent_tokens=page_size + 2,
        packed_slots=packed_slots,
    )
    twins = Twins(config, head_dim=head_dim)
    twins.append(9 * page_size)
    for _ in range(page_size + 2):
        twins.append(1)
        twins.attend(size=0.3)
    twins.attend(5)
    assert twins.manager.stats().pages_recalled
    twins.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotation", ["none", "both"])
@pytest.mark.parametrize("budget", [None, 200])
def test_half_precision(budget: int | None, rotation: str, dtype: torch.dtype) -> None:
    """With a budget for all of it: what rounds one way or the other selects the same pages."""
    twins = Twins(config_of("K4V2", rotation=rotation, budget_tokens=budget), dtype=dtype)
    converse(twins, LEFT_PADDED)


@pytest.mark.parametrize("name", ["K8V4", "K8V4+K4V2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_recalls_what_was_sealed(dtype: torch.dtype, name: str) -> None:
    twins = Twins(config_of(name, rotation="keys"), dtype=dtype)
    twins.append(60)
    for _ in range(20):
        twins.append(1)
        twins.manager.attend(0, twins.query(size=3.0))
        twins.check()
    assert twins.manager.stats().pages_recalled > 20


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("num_dense_layers", [0, 1])
@pytest.mark.parametrize("name", ["K4V2", "K8V4+K4V2"])
def test_latents_are_expanded(name: str, num_dense_layers: int, rotation: str) -> None:
    """They are expanded as the model made them, up to what quantising took."""
    config = config_of(name, group_size=2, rotation=rotation, num_dense_layers=num_dense_layers)
    manager = KVCacheManager(1, 1, 6, config, value_dim=4, latent=True)
    oracle = Oracle(1, 1, config, latent=True)
    into_key, into_value = torch.randn(3, 10, 8), torch.randn(3, 10, 5)

    def expand(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        latent = torch.cat((key, value), dim=-1)
        return latent @ into_key, latent @ into_value

    for step in range(60):
        key, value = torch.randn(2, 1, 1, 6), torch.randn(2, 1, 1, 4)
        mask = LEFT_PADDED[:, step : step + 1]
        manager.append(0, key, value, mask)
        oracle.append(0, key, value, mask)
        follow_demotions(manager, oracle)
        query = torch.randn(2, 3, 1, 8)
        # q.(latent @ W) = (q @ W^T).latent
        how = {"expand": expand, "index_query": query @ into_key.transpose(-1, -2), "scale": 0.3}
        oracle.attend_one(0, query, **how).check(manager.attend(0, query, **how), 1e-4)
    query = torch.randn(2, 3, 7, 8)
    expected = oracle.attend_many(0, query, expand=expand, scale=0.3)
    output = manager.attend(0, query, expand=expand, scale=0.3)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    manager.check_integrity()


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["K4V2", "K8V4+K4V2"])
@pytest.mark.parametrize("num_dense_layers", [0, 1])
def test_copies_live_their_own_lives(num_dense_layers: int, name: str, duplicate: str) -> None:
    config = config_of(name, rotation="both", num_dense_layers=num_dense_layers)
    twins = Twins(config, num_layers=2)
    twins.append(60, LEFT_PADDED)
    for _ in range(8):
        twins.append(1)
        twins.attend()
    clone = copy.deepcopy(twins) if duplicate == "deepcopy" else pickle.loads(pickle.dumps(twins))
    clone.seed += 10_000
    for new_tokens in (1, 6, *[1] * 12):
        for one in (twins, clone):
            one.append(new_tokens)
            one.attend()
            one.check()
    twins.crop(30)
    clone.attend(4)
    clone.check()
    twins.reset()
    clone.attend()
    clone.check()


def test_quantising_takes_something_and_less_at_more_bits() -> None:
    """So that what agrees above was not left alone."""
    errors = {}
    for name in ("K2V2", "K4V4", "K8V8"):
        manager, key = KVCacheManager(1, 2, 8, config_of(name)), torch.randn(1, 2, 60, 8)
        manager.append(0, key, key)
        held = manager.gather(0)[0]
        assert torch.equal(held[:, :, 56:], key[:, :, 56:])
        assert not torch.isclose(held[:, :, :56], key[:, :, :56], rtol=1e-6).all(dim=3).any()
        errors[name] = float((held - key).abs().max())
    assert errors["K8V8"] < errors["K4V4"] / 8 < errors["K2V2"] / 16
    assert errors["K8V8"] < 0.02


# -- the bytes ------------------------------------------------------------------------------------


def sealed_bytes(layer: Any) -> list[Tensor]:
    """The bytes of all sealed pages of a layer, row by row."""
    heads, rows = layer.geometry.num_kv_heads, range(layer.geometry.num_rows)
    if isinstance(layer, PackedDenseLayer):
        return [
            layer._pages.read(page, page + 1).flatten(0, 1)[row, 0]
            for row in rows
            for page in range(layer.sealed[row // heads])
        ]
    return [
        next(layer._store.read(np.array([row]), np.array([page]))).packed[0]
        for row in rows
        for page in range(layer.sealed[row // heads])
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
    held = sealed_bytes(manager._layers[0])
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
    assert all(map(torch.equal, held, sealed_bytes(whole._layers[0])))


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("name", FORMATS)
def test_recalled_pages_are_the_sealed_bytes(name: str, factor: float) -> None:
    twins = Twins(config_of(name, packed_slots=True, device_pool_factor=factor))
    twins.append(100)
    layer = paged(twins)
    sealed = {(n // 24, n % 24): page.clone() for n, page in enumerate(sealed_bytes(layer))}
    for _ in range(40):
        twins.attend(size=3.0)
    twins.check()
    working_set = cast("PackedWorkingSet", layer.working_set)
    slots = working_set.slots.flatten(0, 1).flip(1)
    for row, resident in enumerate(layer._page_table.page_of.tolist()):
        assert torch.equal(slots[row, 0], sealed[row, 0])
        for place, page in enumerate(resident, start=1):
            assert page < 0 or torch.equal(slots[row, place], sealed[row, page])
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
        Twins(config_of(name, packed_slots=slots, **sizes), head_dim=64)
        for name, slots in (("K4V2", True), ("K4V2", None), ("K16V16", True))
    )
    for twins in (packed, plain, raw):
        twins.append(20)
        twins.check()  # and they are of the size that the settings imply
    sizes_of = [twins.manager.stats().device_bytes for twins in (packed, plain, raw)]
    assert 3 * sizes_of[0] < sizes_of[1] == sizes_of[2]


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


# -- device_bytes ---------------------------------------------------------------------------------


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
    free = held_by(config_of("K4V4", budget_tokens=32))
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


def test_demotion_does_not_depend_on_the_neighbours() -> None:
    """A short sequence keeps beside a long one what it keeps alone."""
    config = config_of("K8V8+K2V2", demote_below=0.8, demote_after=4)
    keys, queries = torch.randn(24, 2, 2, 1, 8), torch.randn(24, 2, 4, 1, 8)
    past = torch.randn(2, 2, 240, 8)
    mask = torch.ones(2, 240, dtype=torch.bool)
    mask[0, :180] = False
    both, alone = KVCacheManager(1, 2, 8, config), KVCacheManager(1, 2, 8, config)
    both.append(0, past, past, mask)
    alone.append(0, past[:1, :, 180:], past[:1, :, 180:])
    for key, query in zip(keys, queries, strict=True):
        both.append(0, key, key)
        alone.append(0, key[:1], key[:1])
        torch.testing.assert_close(both.attend(0, query)[:1], alone.attend(0, query[:1]))
    fine = [cast(PagedLayer, one._layers[0])._store.is_fine(20)[:2] for one in (both, alone)]
    assert np.array_equal(*fine)
    assert alone.stats().pages_demoted > 0


def test_beams_share_what_they_demote() -> None:
    """A second format never makes the host tier larger, however many share a page."""
    config = config_of("K8V8+K2V2", demote_below=2.0, demote_after=2)
    manager = KVCacheManager(1, 2, 8, config)
    past = torch.randn(1, 2, 100, 8)
    manager.append(0, past, past)
    manager.keep_sequences(torch.zeros(4, dtype=torch.int64))
    sizes = [manager.stats().host_bytes]
    for _ in range(3):
        key, query = torch.randn(1, 2, 1, 8).expand(4, -1, -1, -1), torch.randn(1, 4, 1, 8)
        manager.append(0, key, key)
        manager.attend(0, query.expand(4, -1, -1, -1))
    manager.append(0, *torch.randn(2, 1, 2, 4, 8).expand(2, 4, -1, -1, -1))
    sizes.append(manager.stats().host_bytes)
    assert manager.stats().pages_demoted >= 4
    fresh = 4 * 2 * PageLayout(config.format, 4, 8, 8, 4).nbytes  # one page of four rows, two heads
    assert sizes[1] < sizes[0] + 2 * fresh
    manager.check_integrity()
    assert manager._host is not None
    manager._host.check([manager._held_pieces()])


# -- which pages are demoted ----------------------------------------------------------------------


def judge(
    mass: list[float], steps: list[int], fine: list[bool] | None = None, **settings: Any
) -> list[bool]:
    """`demotable` of one row: below half an even share, after 4 steps, unless told otherwise."""
    below, after = settings.get("below", 0.5), settings.get("after", 4)
    held = np.array([[True] * len(mass) if fine is None else fine], dtype=np.bool_)
    chosen = demotable(np.array([mass], dtype=np.float32), np.array([steps]), held, below, after)
    assert chosen.shape == (1, len(mass))
    return chosen[0].tolist()


def test_pages_below_their_share_are_demoted() -> None:
    """An even share of 2.0 in 10 steps is 0.05 a step and page."""
    assert judge([1.1, 0.5, 0.26, 0.14], [10] * 4) == [False, False, False, True]
    assert judge([1.1, 0.5, 0.26, 0.14], [10] * 4, below=0.6) == [False, False, True, True]
    assert judge([1.1, 0.5, 0.26, 0.14], [10] * 4, below=0.0) == [False] * 4
    assert judge([1.1, 0.5, 0.26, 0.14], [10] * 4, below=1.01) == [False, True, True, True]


def test_the_threshold_itself_is_enough() -> None:
    assert judge([3.0, 1.0], [4, 4], below=0.5) == [False, False]
    assert judge([3.0, 0.99], [4, 4], below=0.5) == [False, True]


def test_young_pages_are_not_judged() -> None:
    """Nor do they count in the share of the others."""
    assert judge([1.0, 0.0, 0.0], [4, 4, 3]) == [False, True, False]
    assert judge([1.0, 0.9, 50.0], [4, 4, 3]) == [False, False, False]
    assert judge([1.0, 0.0], [1, 0], after=0) == [False, False]


def test_pages_are_judged_by_their_rate() -> None:
    """A page of a tenth of the age needs a tenth of the mass."""
    assert judge([10.0, 1.0], [100, 10]) == [False, False]
    assert judge([10.0, 1.0], [100, 100]) == [False, True]


def test_pages_alike_stay() -> None:
    assert judge([0.7] * 5, [9] * 5) == [False] * 5
    assert judge([0.0] * 5, [9] * 5) == [False] * 5
    assert judge([0.7], [9], below=1.0) == [False]
    assert judge([], []) == []


def test_what_is_coarse_is_not_demoted_again() -> None:
    """But counts in the share of the others."""
    assert judge([1.0, 0.0, 0.0], [9] * 3, [True, False, True]) == [False, False, True]
    assert judge([8.0, 1.0, 1.0], [9] * 3, [False, True, True]) == [False, True, True]


def test_rows_are_judged_apart() -> None:
    mass = np.array([[1.0, 0.0], [0.0, 0.001], [0.0, 0.0]], dtype=np.float32)
    chosen = demotable(mass, np.array([9, 9]), np.ones((3, 2), dtype=np.bool_), 0.5, 4)
    assert chosen.tolist() == [[False, True], [True, False], [False, False]]


def observed(importance: Importance, pages: list[list[int]], mass: list[list[float]]) -> None:
    importance.observe(np.array(pages), np.array(mass, dtype=np.float32))


def test_importance_follows_pages_and_rows() -> None:
    importance = Importance(2)
    importance.seal(slice(0, 2), 0, 3)
    for _ in range(4):
        observed(importance, [[2, 1, -1], [1, -1, 2]], [[0.5, 0.25, 9.0], [0.5, 9.0, 0.25]])
    assert importance.mass[:, :4].tolist() == [[0.0, 1.0, 2.0, 0.0], [0.0, 2.0, 1.0, 0.0]]
    fine = np.ones((2, 2), dtype=np.bool_)
    assert importance.demotable(1, fine, 0.7, 4).tolist() == [[True, False], [False, True]]
    assert not importance.demotable(1, fine, 0.7, 5).any()
    importance.keep_rows(np.array([1, 1, 0]))
    fine = np.ones((3, 2), dtype=np.bool_)
    expected = [[False, True], [False, True], [True, False]]
    assert importance.demotable(1, fine, 0.7, 4).tolist() == expected


def test_importance_of_a_page_that_is_sealed_again_starts_anew() -> None:
    importance = Importance(1)
    importance.seal(slice(0, 1), 0, 2)
    for _ in range(6):
        observed(importance, [[0, 1]], [[0.9, 0.1]])
    importance.seal(slice(0, 1), 1, 2)
    fine = np.ones((1, 2), dtype=np.bool_)
    assert not importance.demotable(0, fine, 0.5, 4).any()
    assert importance.mass[0, 1] == 0
    for _ in range(4):
        observed(importance, [[0, 1]], [[0.9, 0.1]])
    assert importance.demotable(0, fine, 0.5, 4).tolist() == [[False, True]]


def test_importance_grows_with_the_pages() -> None:
    importance = Importance(2)
    importance.seal(slice(0, 2), 0, 70)
    observed(importance, [[69], [3]], [[0.5], [0.75]])
    importance.seal(slice(0, 1), 70, 300)
    assert importance.mass.shape[1] >= 300
    assert (importance.mass[0, 69], importance.mass[1, 3]) == (0.5, 0.75)
    assert importance.mass.sum() == 1.25


# -- demotion in a cache --------------------------------------------------------------------------


HOT = [{2, 5, 9}, {3, 7}]
"""Per KV head, the pages that are attended."""

AFTER = 8


class Attended:
    """A cache in which all attention goes to `HOT`: their keys point where queries do."""

    def __init__(
        self, batch: int = 1, name: str = "K8V4+K4V2", num_layers: int = 1, **settings: Any
    ) -> None:
        config = config_of(name, demote_after=AFTER, demote_below=0.5, **settings)
        self.twins = Twins(config, batch=batch, group=1, num_layers=num_layers)
        self.sealed_at: list[int] = []
        self.steps = 0
        key = self.twins.randn(batch, 2, 60, 8) * 0.1
        key[..., 0] = -5.0
        for head, pages in enumerate(HOT):
            for page in pages:
                key[:, head, 4 * page : 4 * page + 4, 0] = 5.0
        self.append(key)

    @property
    def layer(self) -> PagedLayer:
        return paged(self.twins)

    def append(self, key: Tensor) -> None:
        value = self.twins.randn(*key.shape)
        for layer in range(self.twins.num_layers):
            self.twins.manager.append(layer, key, value)
            self.twins.oracle.append(layer, key, value)
        follow_demotions(self.twins.manager, self.twins.oracle)
        new_pages = int(self.layer.sealed[0]) - len(self.sealed_at)
        self.sealed_at += [self.steps] * new_pages

    def step(self) -> None:
        """A token that nobody attends, and the attention of both heads to what is hot."""
        key = self.twins.randn(self.twins.batch, 2, 1, 8) * 0.1
        key[..., 0] = -5.0
        self.append(key)
        query = torch.zeros(self.twins.batch, 2, 1, 8)
        query[..., 0] = 5.0
        for layer in range(self.twins.num_layers):
            self.twins.attend_layer(layer, query, scale=1.0)
        self.steps += 1

    def fine(self) -> list[set[int]]:
        """Per row, the pages in the first format."""
        fine = self.layer._store.is_fine(int(self.layer.sealed.max()))
        return [set(np.flatnonzero(row).tolist()) for row in fine]

    def expected(self, steps: int) -> list[set[int]]:
        """Per KV head: the sinks, what is hot and what is too young to be judged."""
        young = {page for page, at in enumerate(self.sealed_at) if steps - at < AFTER}
        return [{0} | hot | young for hot in HOT]


def demoted(**settings: Any) -> Attended:
    """A cache in which pages have just been demoted."""
    cache = Attended(**settings)
    while not cache.twins.manager.stats().pages_demoted:
        cache.step()
    return cache


def test_pages_that_nobody_attends_are_demoted() -> None:
    """At the first page that is sealed after they have been judged, and only those."""
    cache = Attended(batch=2)
    for _ in range(30):
        before = cache.steps
        num_pages = len(cache.sealed_at)
        cache.step()
        if len(cache.sealed_at) > num_pages:
            assert cache.fine() == cache.expected(before) * 2
    cache.twins.check()
    num_fine = sum(map(len, cache.fine()))
    assert num_fine == 2 * (4 + 3) + 2 * 2 * (len(cache.sealed_at) - 14 - 5)
    num_coarse = 2 * 2 * len(cache.sealed_at) - num_fine
    assert cache.twins.manager.stats().pages_demoted == num_coarse


def test_residents_are_rewritten() -> None:
    """What is attended is the same whether a page stayed or is recalled."""
    cache = Attended()
    while not cache.twins.manager.stats().pages_demoted:
        resident = cache.layer._page_table.page_of.copy()
        cache.step()
    stale = [
        set(row) - fine - {-1} for row, fine in zip(resident.tolist(), cache.fine(), strict=True)
    ]
    assert all(stale)
    cache.twins.check()
    for _ in range(20):
        cache.twins.attend(size=3.0)
    cache.twins.check()


def test_host_bytes_shrink_by_what_was_demoted() -> None:
    cache = Attended()
    twins, coarse_format = cache.twins, cast("PageFormat", cache.twins.config.coarse_format)
    fine_bytes, coarse_bytes = twins.page_bytes(), twins.page_bytes(coarse_format)
    assert coarse_bytes < fine_bytes
    while not twins.manager.stats().pages_demoted:
        assert twins.manager.stats().host_bytes == 2 * len(cache.sealed_at) * fine_bytes
        cache.step()
    num_fine = sum(map(len, cache.fine()))
    num_coarse = 2 * len(cache.sealed_at) - num_fine
    # The prompt's pages, the first that was sealed after it, and not the sinks.
    assert num_coarse == twins.manager.stats().pages_demoted == 2 * (13 + 1) - 5
    expected = num_fine * fine_bytes + num_coarse * coarse_bytes
    assert twins.manager.stats().host_bytes == expected
    host = cast("Any", twins.manager._host)
    assert host.used_bytes == expected


def test_shared_pages_stay_fine_in_the_copy() -> None:
    cache = Attended()
    cache.step()
    clone = copy.deepcopy(cache)
    before = [set(pages) for pages in clone.fine()]
    while not cache.twins.manager.stats().pages_demoted:
        cache.step()
    assert clone.fine() == before == [set(range(14))] * 2
    clone.twins.check()
    clone.twins.attend()
    cache.twins.check()
    host = cast("Any", cache.twins.manager._host)
    assert host.count(1) == cache.twins.manager.stats().pages_demoted
    while not clone.twins.manager.stats().pages_demoted:
        clone.step()
    clone.twins.check()
    cache.twins.reset()
    clone.twins.check()
    clone.twins.attend()


def test_beams_demote_for_themselves() -> None:
    """Sequences that share pages, repeated and then apart."""
    cache = Attended()
    cache.step()
    cache.twins.keep_sequences([0, 0])
    while not cache.twins.manager.stats().pages_demoted:
        cache.step()
    assert cache.fine()[:2] == cache.fine()[2:]
    cache.twins.check()
    cache.twins.keep_sequences([1, 0, 1])
    cache.twins.attend()
    cache.twins.check()


def test_coarse_pages_go_back_to_the_window_and_are_sealed_fine() -> None:
    cache = demoted()
    twins = cache.twins
    twins.crop(30)
    twins.check()
    twins.attend()
    twins.append(30)
    assert all(set(range(6, 14)) <= pages for pages in cache.fine())
    assert not any({1, 4} & pages for pages in cache.fine())
    twins.attend()
    twins.check()


def test_demotion_makes_room() -> None:
    """In a tier with room for a single page more, a conversation goes on for many."""
    name = "K16V16+K2V2"
    host_bytes = 17 * Attended(name=name).twins.whole_page_bytes
    cache = Attended(name=name, host_bytes=host_bytes)
    with pytest.raises(HostTierFullError):
        copy.deepcopy(cache).twins.append(4 * 4)
    for _ in range(6 * 4):
        cache.step()
    assert len(cache.sealed_at) == 20
    cache.twins.check()
    assert cache.twins.manager.stats().host_bytes <= host_bytes


@pytest.mark.parametrize(
    ("num_layers", "room"),
    [
        *[(1, room) for room in (0, 1504, 1600, 2000, 2016, 2300)],
        *[(2, room) for room in (0, 1504, 1600, 2016, 3000, 4032)],
    ],
)
def test_demotion_of_shared_pages_takes_no_room_that_was_promised(
    num_layers: int, room: int
) -> None:
    """A step that is let in seals its pages in all layers, whatever is demoted before.

    When the third page is sealed, 21 shared pages of 96 bytes may be demoted, and 2 of its own that
    give back 160 bytes each; the page itself needs 512.
    """
    name = "K16V16+K2V2"
    host_bytes = num_layers * (14 + 3) * Attended(name=name).twins.whole_page_bytes + room
    cache = Attended(name=name, num_layers=num_layers, host_bytes=host_bytes)
    clone = copy.deepcopy(cache)
    for _ in range(12):
        cache.step()
    assert cache.twins.manager.stats().pages_demoted >= 2
    cache.twins.check()
    clone.twins.check()
    clone.twins.attend()
    cache.twins.attend()


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


@pytest.mark.parametrize("settings", [{}, {"budget_tokens": None}, {"num_dense_layers": 1}])
def test_a_copy_made_in_inference_mode_goes_on_outside(settings: dict[str, Any]) -> None:
    twins = Twins(config_of("K4V4", **settings), num_layers=2)
    twins.append(60)
    twins.attend()
    with torch.inference_mode():
        clone = copy.deepcopy(twins)
        loaded = copy.deepcopy(twins)
        loaded.manager = pickle.loads(pickle.dumps(twins.manager))
    for one in (twins, clone, loaded):
        one.append(9)
        one.attend()
        one.check()


def test_dtypes_that_torch_hardly_computes_in_are_refused() -> None:
    with pytest.raises(InputError, match=r"expected one of torch.float16"):
        KVCacheManager(1, 1, 8, dtype=torch.float8_e4m3fn)


def test_packed_slots_and_a_sequence_of_padding_alone() -> None:
    config = small_config(value_bits=4, group_size=8, packed_slots=True)
    twins = Twins(config, batch=1)
    twins.append(1, torch.zeros(1, 1, dtype=torch.bool))
    twins.attend()
    twins.check()
