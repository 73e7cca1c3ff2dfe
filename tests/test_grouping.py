"""Pages of similar tokens: which token goes where, and that nothing else notices."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from arkcache import (
    ArkCache,
    CacheConfig,
    ConfigError,
    KVCacheManager,
    SessionError,
    load_config,
)
from arkcache.huggingface.prefixes import PrefixCache
from arkcache.kernels import reference
from arkcache.memory import CacheShape, plan_memory
from arkcache.pages.grouping import each_once, similar_order
from arkcache.saving.managers import _lists_tokens
from arkcache.tracing.recorder import Recorder
from arkcache.tracing.trace import trace_of
from tests.test_huggingface import continued, make_model, prompt
from tests.test_saving import check_saved, filled
from tests.twins import Twins, small_config

GROUPED: dict[str, Any] = {
    "grouping": "similar",
    "segment_tokens": 16,
    "estimate_pages": None,
    "budget_tokens": 48,
}
FORMATS: dict[str, dict[str, Any]] = {
    "raw": {},
    "wide pages": {"page_size": 8, "group_reduction": "raw-mean"},
    "no sinks": {"num_sink_tokens": 0, "estimate_pages": 3},
    "budgets": {"budget_tokens": ((60, 90),)},
    "spare": {"device_pool_factor": 2.0, "estimate_pages": 1},
    "target": {"target_missed_mass": 0.2},
    "quantised": {"key_bits": 4, "value_bits": 4, "group_size": 8},
    "packed": {"key_bits": 8, "value_bits": 4, "group_size": 8, "packed_slots": True},
    "rotated": {"key_bits": 8, "value_bits": 4, "group_size": 8, "rotation": "both"},
    "two": {"key_bits": 8, "coarse_key_bits": 4, "demote_after": 0, "demote_below": 1.0},
}
LEFT_PADDED = torch.arange(130) >= torch.tensor([[0], [25]])
HOLES = torch.rand(2, 130, generator=torch.Generator().manual_seed(5)) < 0.7


def grouped(**settings: Any) -> CacheConfig:
    return small_config(**(GROUPED | settings))


def filled_manager(config: CacheConfig, states: Tensor, **how: Any) -> KVCacheManager:
    """One layer that holds `states` [2, batch, kv_heads, tokens, dim]: keys and values."""
    manager = KVCacheManager(1, states.shape[2], states.shape[4], config, dtype=states.dtype)
    manager.append(0, states[0], states[1], **how)
    return manager


# -- which token goes where -----------------------------------------------------------------------


def test_alternating_keys_are_told_apart() -> None:
    one = torch.eye(4)[0]
    keys = torch.stack([one, -one, one, -one])
    assert similar_order(keys, 2).tolist() in ([0, 2, 1, 3], [1, 3, 0, 2])
    config = small_config(
        page_size=2,
        num_sink_tokens=0,
        num_recent_tokens=1,
        grouping="similar",
        segment_tokens=4,
        estimate_pages=None,
    )
    states = torch.cat((keys, torch.zeros(1, 4))).expand(2, 1, 1, -1, -1)
    (pages,) = filled_manager(config, states).page_tokens(0)[:, 0]  # type: ignore[index]
    assert sorted(pages.tolist()) == [[0, 2], [1, 3]]


def naive_order(keys: Tensor, page_size: int) -> list[list[int]]:
    """The same by recursion and an eigendecomposition: pages as sets."""

    def split(tokens: Tensor) -> list[list[int]]:
        if len(tokens) == page_size:
            return [sorted(tokens.tolist())]
        centred = keys[tokens].double() - keys[tokens].double().mean(dim=0)
        direction = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
        order = tokens[(centred @ direction).argsort()]
        half = len(order) // 2
        return split(order[:half]) + split(order[half:])

    return sorted(split(torch.arange(len(keys))))


@pytest.mark.parametrize(("tokens", "page_size"), [(16, 4), (64, 16), (64, 32), (256, 64)])
def test_segments_are_halved_along_the_principal_direction(tokens: int, page_size: int) -> None:
    # Spectra that fall fast, also of the halves: 16 rounds find the direction to rounding.
    keys = torch.randn(2, 3, tokens, 8) * 8.0 ** -torch.arange(8.0)
    order = similar_order(keys, page_size).unflatten(2, (-1, page_size))
    for sequence in range(2):
        for head in range(3):
            pages = sorted(order[sequence, head].tolist())
            assert pages == naive_order(keys[sequence, head], page_size)


def test_equal_keys_stay_in_order_and_nothing_depends_on_the_batch() -> None:
    assert similar_order(torch.ones(3, 32, 8), 4).tolist() == [list(range(32))] * 3
    keys = torch.randn(5, 64, 8)
    one_by_one = torch.stack([similar_order(one, 4) for one in keys])
    assert torch.equal(similar_order(keys, 4), one_by_one)


@pytest.mark.parametrize("mask", [None, LEFT_PADDED, HOLES], ids=["plain", "left", "holes"])
@pytest.mark.parametrize("sinks", [0, 3, 8])
def test_every_token_is_on_one_page(sinks: int, mask: Tensor | None) -> None:
    config = grouped(num_sink_tokens=sinks, budget_tokens=64)
    manager = filled_manager(config, torch.randn(2, 2, 3, 130, 8), mask=mask)
    numbers = manager.page_tokens(0)
    assert numbers is not None
    first = -(-sinks // 4)
    for sequence in range(2):
        length = 130 if mask is None else int(mask[sequence].sum())
        segments = (length - 4 - 4 * first) // 16
        for head in range(3):
            own = numbers[sequence, head, : first + 4 * segments]
            assert own[:first].flatten().tolist() == list(range(4 * first))
            by_segment = own[first:].reshape(segments, 16)
            assert np.array_equal(
                np.sort(by_segment), 4 * first + np.arange(16 * segments).reshape(-1, 16)
            )
    assert not np.array_equal(numbers[0, 0], numbers[0, 1])  # each head groups by itself
    manager.check_integrity()


def test_a_token_on_two_pages_is_noticed() -> None:
    """Within a segment tokens may lie anywhere; sinks may not, and no token twice."""
    numbers, sealed = np.arange(36).reshape(1, 1, 9, 4), np.array([9])

    def with_tokens(at: list[int], tokens: list[int]) -> np.ndarray:
        changed = numbers.reshape(-1).copy()
        changed[at] = tokens
        return changed.reshape(numbers.shape)

    assert each_once(numbers, sealed, 1, 4)
    assert each_once(with_tokens([5, 19], [19, 5]), sealed, 1, 4)
    for wrong in (([0, 1], [1, 0]), ([5], [6]), ([19, 20], [20, 19])):
        assert not each_once(with_tokens(*wrong), sealed, 1, 4)
    assert each_once(with_tokens([30], [31]), np.array([5]), 1, 4)  # not sealed
    assert each_once(numbers[:, :, :0], np.array([0]), 0, 4)


# -- what is attended -----------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [200, None])
def test_an_unlimited_budget_is_full_attention(budget: int | None) -> None:
    states = torch.randn(2, 2, 2, 150, 16)
    manager = filled_manager(grouped(budget_tokens=budget), states)
    query = 2 * torch.randn(2, 4, 1, 16)
    expected = reference.attention(query, *states, scale=0.25)
    torch.testing.assert_close(manager.attend(0, query), expected, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, manager.gather(0), states))


def test_equal_keys_find_each_other() -> None:
    """Keys of four kinds in turn: each page holds one kind, so that estimates are exact."""
    kinds = 3 * torch.randn(2, 2, 4, 8)
    states = torch.stack((kinds.repeat(1, 1, 40, 1), torch.randn(2, 2, 160, 8)))
    query = 2 * torch.randn(2, 4, 1, 8)
    expected = reference.attention(query, *states, scale=8**-0.5)
    errors = [
        float((filled_manager(config, states).attend(0, query) - expected).norm())
        for config in (grouped(num_sink_tokens=0), grouped(num_sink_tokens=0, grouping=None))
    ]
    assert errors[0] < 1e-5 < 0.1 < errors[1]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("mask", [None, HOLES], ids=["plain", "holes"])
def test_every_step_is_the_oracles(name: str, mask: Tensor | None) -> None:
    """Masks, several new tokens, crops and beams, with every format."""
    twins = Twins(grouped(**FORMATS[name]))
    twins.append(70, None if mask is None else mask[:, :70])
    for column in range(70, 94):
        twins.append(1, None if mask is None else mask[:, column : column + 1])
        twins.attend()
    added = twins.randn(2, 4, 1, 94)
    for given in (added, added > -1, twins.randn(1, 1, 1, 94)):
        twins.attend(mask=given, softcap=2.0, sinks=twins.randn(4))
    twins.append(5)
    twins.attend(5)
    twins.check()
    twins.crop(61)
    twins.attend()
    twins.append(40)
    twins.attend()
    twins.keep_sequences([1, 0, 0])
    twins.append(20)
    twins.attend()
    twins.check()


def test_blocks_smaller_than_a_segment_are_in_order() -> None:
    """Several new tokens, the oldest of which do not see the newest sealed ones."""
    for block in (4, 8, 20, 24, 1024):
        twins = Twins(grouped(stream_block_tokens=block, num_recent_tokens=1))
        twins.append(60)
        for new_tokens in (30, 3):
            twins.append(new_tokens)
            twins.attend(new_tokens)


def test_layers_that_attend_everything_keep_the_order() -> None:
    config = grouped(num_dense_layers=1, key_bits=4, group_size=8)
    twins = Twins(config, num_layers=2)
    twins.append(70)
    for _ in range(20):
        twins.append(1)
        twins.attend()
    twins.crop(50)
    twins.attend()
    twins.check()
    assert twins.manager.page_tokens(0) is None


@pytest.mark.parametrize("left", [*range(0, 100, 7), 20, 24, 25, 40, 41, 99])
def test_cropped_anywhere_is_as_if_nothing_had_come_after(left: int) -> None:
    """To what was never grouped where all is attended, and to what never had more."""
    states, query = torch.randn(2, 2, 2, 100, 8), torch.randn(2, 4, 1, 8)
    for settings, other in (
        ({"budget_tokens": 300}, grouped(budget_tokens=300, grouping=None)),
        ({}, grouped()),
    ):
        manager = filled_manager(grouped(**settings), states)
        manager.crop(left)
        assert all(map(torch.equal, manager.gather(0), states[:, :, :, :left]))
        for stop in range(left, 100, 30):
            manager.append(0, *states[:, :, :, stop : stop + 30])
        new = filled_manager(other, states)
        torch.testing.assert_close(manager.attend(0, query), new.attend(0, query))
        manager.check_integrity()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_lives_its_own_life(duplicate: Any) -> None:
    twins = Twins(grouped())
    twins.append(70)
    clone = duplicate(twins)
    twins.crop(30)
    twins.append(50)
    for one in (twins, clone):
        one.attend()
        one.append(20)
        one.attend()
        one.check()


# -- what looks at pages ---------------------------------------------------------------------------


def share_of(states: Tensor, query: Tensor, scale: float) -> Tensor:
    """Of every token [batch, kv_heads, tokens], the mean over a KV head's two query heads."""
    logits = query.unflatten(1, (-1, 2)).squeeze(3) @ states[0].transpose(-1, -2) * scale
    return logits.softmax(dim=-1).mean(dim=2)


@pytest.mark.parametrize("mask", [None, LEFT_PADDED], ids=["plain", "left"])
def test_audits_count_the_tokens_of_pages(mask: Tensor | None) -> None:
    states, query = torch.randn(2, 2, 2, 130, 8), torch.randn(2, 4, 1, 8)
    manager = filled_manager(grouped(audit_every=1), states, mask=mask)
    manager.attend(0, query)
    expected = []
    numbers, layer = manager.page_tokens(0), manager._layers[0]
    assert numbers is not None
    for row, places in enumerate(layer.engine.places.page_of):  # type: ignore[attr-defined]
        sequence, head = divmod(row, 2)
        real = slice(None) if mask is None else mask[sequence]
        share = share_of(
            states[:, sequence : sequence + 1, :, real], query[sequence, None], 8**-0.5
        )
        out = sorted(set(range(1, int(layer.tokens.sealed[sequence]))) - set(places.tolist()))
        expected.append(float(share[0, head, numbers[sequence, head, out].flatten()].sum()))
    assert manager.stats().missed.true_sum == pytest.approx(sum(expected), rel=1e-4)


def test_a_trace_says_what_pages_received_under_a_mask() -> None:
    states, query = torch.randn(2, 1, 1, 100, 8), torch.randn(1, 2, 1, 8)
    manager, recorder = filled_manager(grouped(budget_tokens=300), states), Recorder(mass_every=1)
    seen = torch.arange(100) % 3 > 0
    with manager.trace(recorder):
        manager.attend(0, query, mask=seen[None, None, None])
    numbers, share = manager.page_tokens(0), torch.zeros(100)
    assert numbers is not None
    share[seen] = share_of(states[:, :, :, seen], query, 8**-0.5)[0, 0]
    pages = [share[page].sum() for page in numbers[0, 0]]
    window = share[numbers.size :].sum()
    expected = torch.stack([pages[0], window, *pages[1:]])
    torch.testing.assert_close(torch.from_numpy(trace_of(recorder).mass), expected)


# -- with transformers, on disk, in bytes ---------------------------------------------------------

SPARSE = {**GROUPED, "page_size": 4, "num_sink_tokens": 4, "num_recent_tokens": 8}


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}])
def test_generation_with_everything_attended_is_the_full_caches(how: dict[str, Any]) -> None:
    """A batch with left padding, and beams."""
    model, ids = make_model(), prompt(70, batch=2)
    padded = ids.clone()
    padded[1, :20] = 0
    given = {"attention_mask": (padded > 0).long(), **how}
    expected = continued(model, DynamicCache(), padded, **given)
    cache = ArkCache(model, CacheConfig(**(SPARSE | {"budget_tokens": 4096})))
    assert torch.equal(continued(model, cache, padded, **given), expected)
    assert cache.mode == "paged"
    assert cache.managers[0].page_tokens(0).shape[2] > 1 + 4  # type: ignore[union-attr]


def test_generation_with_a_budget_goes_on_after_a_crop() -> None:
    model, ids = make_model(), prompt(90)
    cache = ArkCache(model, CacheConfig(**SPARSE))
    first = continued(model, cache, ids)
    cache.crop(90)
    again = continued(model, cache, torch.cat((ids, first[:, 90:91]), dim=1))
    assert torch.equal(first[:, :91], again[:, :91])
    assert cache.stats().attended_tokens < cache.stats().total_tokens
    for manager in cache.managers:
        manager.check_integrity()


def test_prefixes_are_shared() -> None:
    model, ids = make_model(), prompt(80)[0].tolist()
    prefixes = PrefixCache(model, CacheConfig(**(SPARSE | {"budget_tokens": 4096})))
    first = prefixes.begin(ids)
    model(torch.tensor([ids]), past_key_values=first)
    prefixes.keep(first, ids)
    other = ids[:50] + prompt(30, seed=7)[0].tolist()
    second = prefixes.begin(other)
    assert second.get_seq_length() == 48
    logits = model(torch.tensor([other[48:]]), past_key_values=second).logits
    expected = model(torch.tensor([other])).logits[0, 48:]
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", [None, LEFT_PADDED[:, :90]], ids=["plain", "left"])
def test_what_is_loaded_is_what_was_saved(mask: Tensor | None, tmp_path: Path) -> None:
    check_saved(filled(grouped(), mask), tmp_path / "saved")


@pytest.mark.parametrize(
    "settings", [{"grouping": None}, {"segment_tokens": 8}, {"num_sink_tokens": 8}]
)
def test_pages_are_not_read_by_other_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    filled(grouped()).manager.save(tmp_path / "saved")
    (name,) = settings
    with pytest.raises(SessionError, match=f"was saved with {name}="):
        KVCacheManager.load(tmp_path / "saved", **settings)


def test_numbers_that_cannot_be_are_refused() -> None:
    state = filled(grouped()).manager.layer_state(0)
    for damage in (None, state["page_tokens"][:, :1], state["page_tokens"].clone().fill_(7)):
        damaged = {name: one for name, one in state.items() if name != "page_tokens"}
        if damage is not None:
            damaged["page_tokens"] = damage
        manager = filled(grouped()).manager
        assert not _lists_tokens(manager, damaged, state["sealed"].numpy())
        assert _lists_tokens(manager, state, state["sealed"].numpy())


@pytest.mark.parametrize("context", [30, 333, 3000])
@pytest.mark.parametrize("settings", [{}, {"num_dense_layers": 1}, {"key_bits": 4}])
def test_a_plan_is_what_a_cache_takes(settings: dict[str, Any], context: int) -> None:
    config = grouped(page_size=8, group_size=8, segment_tokens=64, budget_tokens=200, **settings)
    states = torch.randn(2, 2, 2, context, 16)
    manager = KVCacheManager(2, 2, 16, config)
    for layer in range(2):
        manager.append(layer, *states)
    plan = plan_memory(config, CacheShape(2, 2, 16, 16, torch.float32), context, 2, device="cpu")
    stats = manager.stats()
    assert plan.host_bytes == stats.host_bytes
    # What grows has room for an eighth more, 64 pages or tokens at least.
    room = max(context, 1024) / context * 1.125
    if "num_dense_layers" in settings:
        assert plan.device_bytes <= stats.device_bytes <= plan.device_bytes * room
    else:
        assert plan.device_bytes == stats.device_bytes
    if context == 3000:
        assert stats.digest_bytes == pytest.approx(plan.digest_bytes, rel=0.125)
        assert stats.host_bytes == pytest.approx(plan.host_bytes_per_token * 2 * 3000, rel=0.05)


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grouping": "alike"}, "grouping='alike': expected one of 'similar', None"),
        ({"estimate_pages": 0}, "grouping='similar' beside estimate_pages=0: .* worse"),
        ({"index": "cuboid-mean"}, "beside index='cuboid-mean': .* expected .* 'tokens'"),
        ({"segment_tokens": 0}, "segment_tokens=0: expected an integer of at least 1"),
        ({"segment_tokens": 4}, "segment_tokens=4 beside page_size=4: .* expected .* times 2"),
        ({"segment_tokens": 12}, "segment_tokens=12 beside page_size=4"),
        ({"segment_tokens": 64}, "budget_tokens=48: .* one segment of 64 need 72"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grouped(**settings)


def test_a_segment_is_checked_again_when_the_page_size_is_known() -> None:
    config = CacheConfig(grouping="similar", estimate_pages=None, segment_tokens=12)
    with pytest.raises(ConfigError, match="segment_tokens=12 beside page_size=4"):
        KVCacheManager(1, 2, 8, config)


def test_only_plain_torch_groups() -> None:
    assert KVCacheManager(1, 2, 8, grouped()).planner.backend == "torch"
    for backend in ("triton", "numba"):
        with pytest.raises(ConfigError, match=f"backend='{backend}': .*grouping='similar'"):
            KVCacheManager(1, 2, 8, grouped(backend=backend))
    with pytest.raises(ConfigError, match="grouping='similar' of latents"):
        KVCacheManager(1, 1, 8, grouped(), latent=True)


def test_settings_from_a_file_and_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('grouping = "similar"\nestimate_pages = "none"\nsegment_tokens = 128\n')
    config = load_config(path, environ={"ARKCACHE_SEGMENT_TOKENS": "64"})
    assert (config.grouping, config.estimate_pages, config.segment_tokens) == ("similar", None, 64)
    assert load_config(path, environ={"ARKCACHE_GROUPING": "none"}).grouping is None
