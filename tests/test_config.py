"""Settings: what is refused, with which words, and what the sizes work out to."""

import copy
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arkcache import ArkCacheError, CacheConfig, ConfigError
from arkcache.config import GROUP_REDUCTIONS, INDEXES, MASS_INDEXES, SHARE_MEAN
from arkcache.pages.index import make_index

BAD = [
    ("page_size", [0, -1, 2.0, "32", True]),
    ("num_sink_tokens", [-1, 1.5, False, None]),
    ("num_recent_tokens", [0, -5, 1.5, True]),
    ("num_dense_layers", [-1, 0.5, True]),
    ("stream_block_tokens", [0, 3, 1024.0, True]),
    ("host_bytes", [0, -1, 1e9, True, "1GB"]),
    ("host_resident_bytes", [0, -1, 1e9, True, "1GB"]),
    ("device_pool_factor", [0, 0.99, -1, float("nan"), float("inf"), True, "2"]),
    ("key_bits", [0, 1, 3, 8.5, 16.0, True, "16", None, 32]),
    ("value_bits", [0, 1, 3, 16.0, True, None]),
    ("index_bits", [0, 1, 3, 16, 2.0, True, "2"]),
    ("index", ["", "cuboid", "CUBOID-MEAN", None, 3, ["tokens"]]),
    ("estimate_pages", [-1, 1.0, True, "all"]),
    ("audit_every", [0, -1, 2.0, True]),
    ("target_missed_mass", [0, 1, -0.1, 1.5, True, "0.01", float("nan")]),
    ("group_reduction", ["mean", None, 0]),
    ("budget_tokens", [0, -1, 2048.0, True, "all", (), ("a",), (((2048,),),), {2048}]),
]


def test_pages_are_as_small_as_the_scales_that_they_share_allow() -> None:
    for config in (CacheConfig(), CacheConfig(value_bits=2), CacheConfig(budget_tokens=64)):
        assert (config.on("cpu").page_size, config.on("cuda").page_size) == (4, 8)
    for config in (CacheConfig(index_bits=2), CacheConfig(index="cuboid-mean")):
        assert (config.on("cpu").page_size, config.on("cuda").page_size) == (8, 8)
    assert CacheConfig.preset("K4V2").page_size == CacheConfig(coarse_key_bits=4).page_size == 32
    assert CacheConfig.preset("K4V2", page_size=16).page_size == 16
    assert CacheConfig(page_size=16).on("cpu").page_size == 16


def test_sizes_that_depend_on_the_device_say_so() -> None:
    for size in ("num_sink_pages", "window_tokens"):
        with pytest.raises(ConfigError, match="depends on the device"):
            getattr(CacheConfig(), size)
    assert CacheConfig().on("cpu").window_tokens == 36


def test_budgets_are_checked_again_when_the_page_size_is_known() -> None:
    with pytest.raises(ConfigError, match="one page of 4 need 40"):
        CacheConfig(budget_tokens=39)
    config = CacheConfig(budget_tokens=47, stream_block_tokens=4)
    assert config.on("cpu").page_size == 4
    with pytest.raises(ConfigError, match=r"stream_block_tokens=4: .* at least 8"):
        config.on("cuda")
    with pytest.raises(ConfigError, match="one page of 8 need 48"):
        replace(config, stream_block_tokens=None).on("cuda")


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, values in BAD for v in values])
def test_bad_values_are_refused(name: str, value: Any) -> None:
    """The message names the setting, what was given and what is expected."""
    with pytest.raises(ConfigError) as caught:
        CacheConfig(**{name: value})
    message = str(caught.value)
    assert name in message
    assert "expected" in message or "need" in message
    assert repr(value) in message
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, ArkCacheError)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"setting 'budget_token': .*budget_tokens,"):
        CacheConfig(budget_token=2048)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="unknown setting 'pagesize'"):
        replace(CacheConfig(), pagesize=4)  # type: ignore[call-arg]


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("reduction", [SHARE_MEAN, *GROUP_REDUCTIONS])
def test_known_names_are_accepted(index: str, reduction: str) -> None:
    config = CacheConfig(index=index, group_reduction=reduction)
    assert (config.index, config.group_reduction) == (index, reduction)


def test_it_is_frozen_hashable_and_copies() -> None:
    config = CacheConfig(budget_tokens=[[400, 500], 600], page_size=16)  # type: ignore[arg-type]
    assert config.budget_tokens == ((400, 500), 600)
    with pytest.raises(FrozenInstanceError):
        config.page_size = 4  # type: ignore[misc]
    twins = (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config))
    assert {config, *twins} == {config}


def test_the_least_budget_is_sinks_recent_and_one_page() -> None:
    sizes: dict[str, Any] = {"page_size": 16, "num_sink_tokens": 17, "num_recent_tokens": 5}
    least = 32 + 5 + 16
    CacheConfig(budget_tokens=least, **sizes)
    with pytest.raises(ConfigError, match=rf"budget_tokens={least - 1}.*need {least}"):
        CacheConfig(budget_tokens=least - 1, **sizes)
    with pytest.raises(ConfigError, match=f"need {least}"):
        CacheConfig(budget_tokens=(None, (4 * least, least - 1)), **sizes)


def test_sinks_are_whole_pages() -> None:
    pages = [CacheConfig(page_size=16, num_sink_tokens=n).num_sink_pages for n in (0, 1, 16, 17)]
    assert pages == [0, 1, 1, 2]


def test_budgets_per_layer_and_head() -> None:
    config = CacheConfig(budget_tokens=(300, None, (400, 500)), num_dense_layers=1)
    assert config.budget_of(0) is None  # dense, whatever its budget says
    assert config.budget_of(1, 1) is None
    assert (config.budget_of(2, 0), config.budget_of(2, 1)) == (400, 500)
    assert CacheConfig(budget_tokens=None).budget_of(7, 3) is None
    assert CacheConfig(budget_tokens=512, num_dense_layers=2).budget_of(2, 3) == 512


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ((300, 300), r"2 entries.*3 layers"),
        ((300, 300, 300, 300), r"4 entries.*3 layers"),
        ((300, 300, (300, 300, 300)), r"3 entries.*2 KV heads"),
    ],
)
def test_tuple_budgets_must_fit_the_model(budget: Any, words: str) -> None:
    config = CacheConfig(budget_tokens=budget, num_dense_layers=0)
    with pytest.raises(ConfigError, match=words):
        config.check_layers(num_layers=3, num_kv_heads=2)
    CacheConfig(budget_tokens=(300, None, (300, 400))).check_layers(3, 2)


@given(
    page_size=st.integers(1, 64),
    sinks=st.integers(0, 100),
    recent=st.integers(1, 200),
    more=st.integers(0, 3000),
    length=st.integers(0, 5000),
)
def test_a_step_never_attends_more_than_its_budget(
    page_size: int, sinks: int, recent: int, more: int, length: int
) -> None:
    """And no less than a page below it, but for the window that is not always full."""
    least = -(-sinks // page_size) * page_size + recent + page_size
    config = CacheConfig(
        page_size=page_size,
        num_sink_tokens=sinks,
        num_recent_tokens=recent,
        num_dense_layers=0,
        budget_tokens=least + more,
        stream_block_tokens=page_size,
    )
    sealed = max(0, (length - recent) // page_size)
    pages = min(sealed, config.num_sink_pages + config.selected_pages(0))
    attended = pages * page_size + length - sealed * page_size
    assert attended <= least + more
    if attended < length:
        assert attended > least + more - 2 * page_size


def test_a_preset_sets_the_bits() -> None:
    mixed = CacheConfig.preset("K8V4+K4V2", budget_tokens=512)
    assert (mixed.key_bits, mixed.value_bits, mixed.budget_tokens) == (8, 4, 512)
    assert (mixed.coarse_key_bits, mixed.coarse_value_bits) == (4, 2)
    for name, settings in (
        ("K4V2", {"key_bits": 8}),
        ("K8V4+K4V2", {"coarse_value_bits": 4}),
        ("K5V5", {}),
        ("K8V4+K4V4+K2V2", {}),
        (4, {}),
    ):
        with pytest.raises(ConfigError, match="preset"):
            CacheConfig.preset(name, **settings)


def test_a_target_needs_an_index_that_rates_mass_and_a_budget() -> None:
    for index in INDEXES:
        rates = make_index(CacheConfig(index=index), 8, torch.device("cpu")).rates
        assert rates == ("mass" if index in MASS_INDEXES else "bound")
        if rates == "bound":
            with pytest.raises(ConfigError, match=rf"target_missed_mass=0\.1.*{index}.*'tokens'"):
                CacheConfig(target_missed_mass=0.1, index=index)
    with pytest.raises(ConfigError, match="budget_tokens=None"):
        CacheConfig(target_missed_mass=0.1, index="tokens", budget_tokens=None)
    CacheConfig(target_missed_mass=0.1, index="tokens", budget_tokens=(None, 512))
