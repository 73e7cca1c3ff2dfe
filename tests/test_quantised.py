"""Caches whose pages are quantised when they are sealed, beside the dense oracle."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from arkcache import ConfigError, KVCacheManager
from tests.oracle import Oracle
from tests.quantised import FORMATS, MIXED, ROTATIONS, config_of, converse
from tests.twins import Twins, follow_demotions, small_config

LEFT_PADDED = torch.arange(60) >= torch.tensor([[0], [25]])


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("name", FORMATS + MIXED)
def test_conversations(name: str, rotation: str) -> None:
    """One dense layer, whose pages are quantised too, and one paged."""
    twins = Twins(config_of(name, rotation=rotation, num_dense_layers=1), num_layers=2)
    converse(twins)
    dense_bytes = [bytes_of_a_dense_layer(bits) for bits in (name, "K16V16")]
    assert dense_bytes[0] < dense_bytes[1] or name.startswith("K16V16")


def bytes_of_a_dense_layer(name: str) -> int:
    """What 1000 tokens take on the device."""
    manager = KVCacheManager(1, 2, 8, config_of(name, num_dense_layers=1))
    manager.append(0, *torch.randn(2, 1, 2, 1000, 8))
    return manager.stats().device_bytes


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
    device_bytes = [one.manager.stats().device_bytes for one in (twins, plain)]
    assert (device_bytes[0] < device_bytes[1]) == bool(packed_slots)


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


def test_packed_slots_and_a_sequence_of_padding_alone() -> None:
    config = small_config(value_bits=4, group_size=8, packed_slots=True)
    twins = Twins(config, batch=1)
    twins.append(1, torch.zeros(1, 1, dtype=torch.bool))
    twins.attend()
    twins.check()
