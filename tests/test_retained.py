"""Pages that are given up for good: against a dense row, through every change of shape."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arkcache import CacheConfig, ConfigError, InputError, KVCacheManager, SessionError
from arkcache.layers.paged import PagedLayer
from arkcache.methods import (
    H2O,
    RETENTIONS,
    PyramidKV,
    Retention,
    Scissorhands,
    Seen,
    SnapKV,
    StreamingLLM,
)
from arkcache.methods.retention import COARSE, Fates
from tests.retained_rows import HISTORY, NEWEST, SNAP_WINDOW, Row

METHODS: dict[str, Retention] = {
    "streamingllm": StreamingLLM(),
    "h2o": H2O(),
    "scissorhands": Scissorhands(history=HISTORY, newest=NEWEST),
    "snapkv": SnapKV(window=SNAP_WINDOW),
    "pyramidkv": PyramidKV(window=SNAP_WINDOW),
}
SMALL: dict[str, Any] = {
    "budget_tokens": 40,
    "num_sink_tokens": 4,
    "num_recent_tokens": 6,
    "stream_block_tokens": 16,
}
BATCH, HEADS, GROUP, DIM = 2, 2, 2, 8


def settings(name: str, **others: Any) -> CacheConfig:
    return CacheConfig(**(SMALL | {"page_size": 1, "retention": METHODS[name]} | others))


def states(tokens: int, heads: int = HEADS, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, heads, tokens, DIM)


def gone(manager: KVCacheManager, layer: int = 0) -> list[set[int]]:
    """The pages that each row has given up."""
    held = manager._layers[layer]
    assert isinstance(held, PagedLayer)
    lost = held.parts.store.gone(int(held.tokens.sealed.max()))
    return [set(np.flatnonzero(row).tolist()) for row in lost]


@dataclass
class Pair:
    """A manager of one layer, and its rows."""

    manager: KVCacheManager
    rows: list[Row]

    @classmethod
    def of(cls, name: str, **others: Any) -> "Pair":
        manager = KVCacheManager(1, HEADS, DIM, settings(name, **others))
        keep = manager.config.selected_pages(0)
        none = torch.zeros(0, DIM)
        rows = [Row(manager.config, name, keep, none, none) for _ in range(BATCH * HEADS)]
        return cls(manager, rows)

    def read(self, tokens: int) -> None:
        """A prompt, or more of it: everything that is left is attended."""
        key, value, query = states(tokens), states(tokens), states(tokens, HEADS * GROUP)
        self.manager.append(0, key, value)
        output = self.manager.attend(0, query)
        expected = [
            row.read(
                key.flatten(0, 1)[i],
                value.flatten(0, 1)[i],
                query.unflatten(1, (HEADS, -1)).flatten(0, 1)[i],
            )
            for i, row in enumerate(self.rows)
        ]
        close(output, torch.stack(expected))

    def decode(self, *, compare: bool = True) -> None:
        """One token."""
        key, value, query = states(1), states(1), states(1, HEADS * GROUP)
        self.manager.append(0, key, value)
        output = self.manager.attend(0, query)
        expected = [
            row.decode(
                key.flatten(0, 1)[i, 0], value.flatten(0, 1)[i, 0], query.reshape(-1, GROUP, DIM)[i]
            )
            for i, row in enumerate(self.rows)
        ]
        assert gone(self.manager) == [row.gone for row in self.rows]
        if compare and all(len(row.candidates) <= row.keep for row in self.rows):
            close(output, torch.stack(expected)[:, :, None])


def close(output: Tensor, expected: Tensor) -> None:
    expected = expected.reshape(BATCH, HEADS * GROUP, -1, DIM)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


# -- what is kept, and what is answered -----------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("name", METHODS)
def test_every_step_keeps_what_a_dense_row_keeps(name: str, page_size: int) -> None:
    pair = Pair.of(name, page_size=page_size)
    pair.read(90)
    for _ in range(26):
        pair.decode()
    pair.manager.check_integrity()
    stats = pair.manager.stats()
    assert stats.pages_lost == sum(len(row.gone) for row in pair.rows) > 0
    assert stats.attended_tokens <= 40 * BATCH
    assert not pair.manager.lossless


@pytest.mark.parametrize("name", METHODS)
def test_a_second_prompt_attends_what_is_left_and_is_judged_too(name: str) -> None:
    pair = Pair.of(name)
    pair.read(60)
    for _ in range(5):
        pair.decode()
    pair.read(30)
    for _ in range(5):
        pair.decode()


@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_in_chunks_is_a_prompt(name: str) -> None:
    states_of = [states(90), states(90), states(90, HEADS * GROUP)]
    after = []
    for cuts in ([0, 90], [0, 7, 61, 80, 90]):
        manager = KVCacheManager(1, HEADS, DIM, settings(name, page_size=4))
        for first, last in pairwise(cuts):
            key, value, query = (one[:, :, first:last] for one in states_of)
            manager.append(0, key, value)
            manager.attend(0, query)
        torch.manual_seed(7)
        manager.append(0, states(1), states(1))
        manager.attend(0, states(1, HEADS * GROUP))
        after.append(gone(manager))
    assert after[0] == after[1]
    assert after[0][0]


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_that_holds_everything_loses_nothing(name: str) -> None:
    full = KVCacheManager(1, HEADS, DIM, CacheConfig(page_size=4, budget_tokens=None))
    kept = KVCacheManager(1, HEADS, DIM, settings(name, page_size=4, budget_tokens=200))
    for tokens in (80, 1, 1, 5, 1):
        key, value, query = states(tokens), states(tokens), states(tokens, HEADS * GROUP)
        outputs = []
        for one in (full, kept):
            one.append(0, key, value)
            outputs.append(one.attend(0, query))
        torch.testing.assert_close(*outputs)
    assert kept.lossless
    assert kept.stats().pages_lost == 0


@pytest.mark.parametrize("name", METHODS)
def test_padding_is_nobody(name: str) -> None:
    """The shorter of two sequences keeps what it keeps alone."""
    real = torch.arange(90) >= torch.tensor([[0], [25]])
    key, value, query = states(90), states(90), states(90, HEADS * GROUP)
    both = KVCacheManager(1, HEADS, DIM, settings(name))
    alone = KVCacheManager(1, HEADS, DIM, settings(name))
    both.append(0, key, value, real)
    both.attend(0, query)
    alone.append(0, key[1:, :, 25:], value[1:, :, 25:])
    alone.attend(0, query[1:, :, 25:])
    for _ in range(8):
        key, value, query = states(1), states(1), states(1, HEADS * GROUP)
        both.append(0, key, value)
        alone.append(0, key[1:], value[1:])
        output = both.attend(0, query)[1:]
        torch.testing.assert_close(output, alone.attend(0, query[1:]))
        assert gone(both)[HEADS:] == gone(alone)
    assert gone(alone)[0]


def test_heads_with_budgets_of_their_own_keep_as_many_as_each_has() -> None:
    config = settings("streamingllm", budget_tokens=((24, 40),))
    manager = KVCacheManager(1, HEADS, DIM, config)
    manager.append(0, states(90), states(90))
    for _ in range(4):
        manager.append(0, states(1), states(1))
        manager.attend(0, states(1, HEADS * GROUP))
    kept = [94 - 4 - 6 - len(lost) for lost in gone(manager)]
    assert kept == [14, 30, 14, 30]
    manager.check_integrity()


def test_queries_that_are_attended_elsewhere_can_be_shown() -> None:
    key, value, query = states(90), states(90), states(90, HEADS * GROUP)
    after = []
    for shown in (True, False):
        manager = KVCacheManager(1, HEADS, DIM, settings("snapkv"))
        assert manager.observes_prompts
        manager.append(0, key, value)
        if shown:
            manager.observe_prompt(0, query)
        else:
            manager.attend(0, query)
        torch.manual_seed(3)
        manager.append(0, states(1), states(1))
        manager.attend(0, states(1, HEADS * GROUP))
        after.append(gone(manager))
    assert after[0] == after[1]
    assert after[0][0]
    assert not KVCacheManager(1, HEADS, DIM, settings("streamingllm")).observes_prompts
    with pytest.raises(InputError, match="query"):
        manager.observe_prompt(0, query[:, :, :, :3])


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"key_bits": 8, "value_bits": 4, "group_size": 8}])
def test_host_memory_is_what_is_kept(how: dict[str, Any]) -> None:
    manager = KVCacheManager(1, HEADS, DIM, settings("h2o", page_size=4, **how))
    manager.append(0, states(200), states(200))
    manager.attend(0, states(200, HEADS * GROUP))
    before = manager.stats()
    manager.append(0, states(1), states(1))
    manager.attend(0, states(1, HEADS * GROUP))
    after = manager.stats()
    assert before.host_bytes * (HEADS * BATCH * 48 - after.pages_lost) // (HEADS * BATCH * 48) == (
        after.host_bytes
    )
    assert after.host_bytes < before.host_bytes / 4
    assert after.host_tokens < before.host_tokens / 4
    # What was freed is used again.
    for _ in range(40):
        manager.append(0, states(1), states(1))
        manager.attend(0, states(1, HEADS * GROUP))
        assert manager.stats().host_bytes <= after.host_bytes + BATCH * HEADS * 2 * 4 * DIM * 4
    manager.check_integrity()
    assert manager.host is not None
    manager.host.check([manager.held_pieces()])


def test_without_a_retention_nothing_is_kept_apart() -> None:
    manager = KVCacheManager(1, HEADS, DIM, CacheConfig(page_size=4, backend="torch"))
    manager.append(0, states(90), states(90))
    (layer,) = manager._layers
    assert isinstance(layer, PagedLayer)
    assert layer.parts.store.pieces_per_page == 1
    assert manager.lossless
    assert not manager.observes_prompts


# -- changes of shape -----------------------------------------------------------------------------


def after_some(name: str, steps: int = 6, **others: Any) -> KVCacheManager:
    manager = KVCacheManager(2, HEADS, DIM, settings(name, **others))
    for layer in range(2):
        manager.append(layer, states(80), states(80))
        manager.attend(layer, states(80, HEADS * GROUP))
    go_on(manager, steps)
    return manager


def go_on(manager: KVCacheManager, steps: int, batch: int = BATCH) -> list[Tensor]:
    """Decode some tokens drawn from a seed of their own."""
    torch.manual_seed(11)
    outputs = []
    for _ in range(steps):
        for layer in range(2):
            manager.append(layer, states(1, batch=batch), states(1, batch=batch))
            outputs.append(manager.attend(layer, states(1, HEADS * GROUP, batch=batch)))
    return outputs


def copied(manager: KVCacheManager) -> KVCacheManager:
    return copy.deepcopy(manager)


def pickled(manager: KVCacheManager) -> KVCacheManager:
    clone: KVCacheManager = pickle.loads(pickle.dumps(manager))
    return clone


@pytest.mark.parametrize("steps", [0, 6])
@pytest.mark.parametrize("clone_of", [copied, pickled])
@pytest.mark.parametrize("name", METHODS)
def test_a_copy_goes_on_alike_and_by_itself(
    name: str, clone_of: Callable[[KVCacheManager], KVCacheManager], steps: int
) -> None:
    """Also one that was made before anything was decided."""
    manager = after_some(name, steps)
    clone = clone_of(manager)
    before = gone(clone, 1)
    first = go_on(manager, 12)
    assert gone(clone, 1) == before
    for one, other in zip(first, go_on(clone, 12), strict=True):
        assert torch.equal(one, other)
    assert gone(manager, 1) == gone(clone, 1)
    for each in (manager, clone):
        each.check_integrity()


@pytest.mark.parametrize("steps", [0, 6])
@pytest.mark.parametrize("name", METHODS)
def test_beams_take_what_was_lost_with_them(name: str, steps: int) -> None:
    manager = after_some(name, steps)
    twin = copied(manager)
    manager.keep_sequences(torch.tensor([1, 1, 0]))
    assert gone(manager) == [gone(twin)[row] for row in (2, 3, 2, 3, 0, 1)] or steps == 0
    outputs = go_on(manager, 5, batch=3)
    manager.check_integrity()
    assert all(output.isfinite().all() for output in outputs)
    first, second = (gone(manager)[rows] for rows in (slice(0, 2), slice(2, 4)))
    assert [len(one) for one in first] == [len(one) for one in second]
    back = copied(twin)
    back.keep_sequences(torch.tensor([1, 0]))
    back.keep_sequences(torch.tensor([1, 0]))
    for one, other in zip(go_on(back, 5), go_on(twin, 5), strict=True):
        torch.testing.assert_close(one, other)
    assert gone(back) == gone(twin)


@pytest.mark.parametrize("name", ["snapkv", "streamingllm", "h2o"])
def test_crop_takes_back_what_is_still_there(name: str) -> None:
    manager = after_some(name, 1)
    twin = copied(manager)
    first = go_on(manager, 1)
    manager.crop(81)
    for one, other in zip(first, go_on(manager, 1), strict=True):
        torch.testing.assert_close(one, other)
    twin.crop(80)
    assert twin.num_columns == 80


@pytest.mark.parametrize("name", METHODS)
def test_a_step_can_always_be_taken_back(name: str) -> None:
    """Also that which sealed a page, whatever that page received."""
    manager = KVCacheManager(1, HEADS, DIM, settings(name, num_recent_tokens=30))
    for tokens in (80, *[1] * 30):
        manager.append(0, states(tokens), states(tokens))
        manager.attend(0, states(tokens, HEADS * GROUP))
        if tokens == 1:
            manager.crop(manager.num_columns - 1)
            manager.append(0, states(1), states(1))
            manager.attend(0, states(1, HEADS * GROUP))
    assert not manager.lossless
    manager.check_integrity()


def test_crop_into_what_is_lost_is_refused_and_changes_nothing() -> None:
    manager = after_some("streamingllm", 6)
    before, twin = gone(manager), copied(manager)
    with pytest.raises(InputError, match=r"crop\(30\).*are lost.*StreamingLLM"):
        manager.crop(30)
    assert manager.num_columns == 86
    assert gone(manager) == before
    for one, other in zip(go_on(manager, 2), go_on(twin, 2), strict=True):
        assert torch.equal(one, other)
    manager.crop(0)
    assert manager.num_columns == 0


def test_tokens_that_were_cropped_have_decided_nothing() -> None:
    """Rejected drafts leave no queries, and what they received is forgotten."""
    config = settings("snapkv")
    manager, twin = (KVCacheManager(1, HEADS, DIM, config) for _ in range(2))
    key, value, query = states(80), states(80), states(80, HEADS * GROUP)
    for one in (manager, twin):
        one.append(0, key, value)
        one.attend(0, query)
    manager.append(0, states(7), states(7))
    manager.attend(0, states(7, HEADS * GROUP))
    manager.crop(80)
    for one in (manager, twin):
        torch.manual_seed(5)
        one.append(0, states(1), states(1))
        one.attend(0, states(1, HEADS * GROUP))
    # The ring holds as many queries as it may; the last of them are the prompt's own.
    assert len(gone(manager)[0] & gone(twin)[0]) >= 0.8 * len(gone(twin)[0])


def test_reset_begins_anew() -> None:
    manager = after_some("h2o", 6)
    manager.reset()
    assert manager.lossless
    manager.append(0, states(20), states(20))
    assert manager.stats().pages_lost == 0


# -- beside other settings ------------------------------------------------------------------------


class Judge(Retention):
    """Keeps everything, the older half coarse."""

    def fates(self, seen: Seen, fates: Fates) -> Fates:
        older = np.arange(fates.shape[1]) < seen.sealed[:, None] // 2
        return np.where(older, np.int8(COARSE), fates)


def test_a_retention_of_ones_own_may_keep_pages_coarse() -> None:
    how: dict[str, Any] = {"value_bits": 8, "coarse_value_bits": 2, "group_size": 8}
    manager = KVCacheManager(2, HEADS, DIM, settings("h2o", retention=Judge(), **how))
    for layer in range(2):
        manager.append(layer, states(80), states(80))
    go_on(manager, 3)
    (layer, _) = manager._layers
    assert isinstance(layer, PagedLayer)
    fine = layer.parts.store.is_fine(60)
    assert not fine[:, 4:35].any()
    assert manager.lossless
    manager.check_integrity()
    other = KVCacheManager(2, HEADS, DIM, settings("h2o", retention=Judge()))
    other.append(0, states(80), states(80))
    other.append(0, states(1), states(1))
    with pytest.raises(ConfigError, match="coarse_key_bits"):
        other.attend(0, states(1, HEADS * GROUP))


@pytest.mark.parametrize(
    "how",
    [
        {"estimate_pages": None},
        {"estimate_pages": 3},
        {"key_bits": 4, "value_bits": 4, "group_size": 8, "rotation": "both"},
        {"value_bits": 8, "coarse_value_bits": 2, "group_size": 8, "demote_after": 0},
        {"index": "cuboid-mean"},
        {"group_reduction": "raw-mean"},
        {"device_pool_factor": 2.0},
        {"device_bytes": 60_000},
        {"num_dense_layers": 1},
    ],
)
@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_other_settings_go_on_working(name: str, how: dict[str, Any]) -> None:
    manager = after_some(name, 30, page_size=4, **how)
    assert manager.stats().pages_lost > 0
    outputs = go_on(manager, 3)
    assert all(output.isfinite().all() for output in outputs)
    manager.check_integrity()


def test_pages_that_are_lost_are_not_estimated() -> None:
    outputs = []
    for how in ({}, {"estimate_pages": None}):
        torch.manual_seed(2)
        outputs.append(go_on(after_some("streamingllm", 3, page_size=4, **how), 4))
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"budget_tokens": None}, "budget_tokens=None"),
        ({"target_missed_mass": 0.1}, "target_missed_mass"),
        ({"audit_every": 4}, "audit_every"),
        ({"grouping": "similar", "estimate_pages": None}, "grouping"),
        ({"layer_sources": (0, 0)}, "layer_sources"),
        ({"host_path": "."}, "host_path"),
        ({"retention": "pyramidkv", "device_bytes": 1 << 20}, "give budget_tokens"),
        ({"packed_slots": True, "key_bits": 4}, "packed_slots"),
        ({"retention": "snap"}, "'snapkv'"),
        ({"retention": 3}, "arkcache.methods"),
        ({"retention": SnapKV}, "arkcache.methods"),
    ],
)
def test_settings_that_make_no_sense_are_refused(how: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        CacheConfig(**({"retention": "h2o"} | how))


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_kernels_refuse_by_name(backend: str) -> None:
    with pytest.raises(ConfigError, match=r"no kernel for retention='h2o'"):
        KVCacheManager(1, HEADS, DIM, CacheConfig(retention="h2o", backend=backend))
    assert KVCacheManager(1, HEADS, DIM, CacheConfig(retention="h2o")).planner.backend == "torch"


def test_latents_are_refused() -> None:
    with pytest.raises(ConfigError, match="latent"):
        KVCacheManager(1, 1, DIM, CacheConfig(retention="h2o"), latent=True)


def test_saving_is_refused_before_anything_is_written(tmp_path: Any) -> None:
    manager = after_some("h2o", 3)
    with pytest.raises(SessionError, match="retention"):
        manager.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_every_method_is_tested() -> None:
    assert {*METHODS} == {*RETENTIONS}


@pytest.mark.parametrize("name", METHODS)
def test_a_text_without_a_sealed_page_is_kept(name: str) -> None:
    """Steps and crops right after a prompt that fits the window."""
    manager = KVCacheManager(2, HEADS, DIM, settings(name, page_size=4))
    for layer in range(2):
        manager.append(layer, *torch.randn(2, 1, HEADS, 6, DIM))
        manager.attend(layer, torch.randn(1, 2 * HEADS, 6, DIM))
    manager.crop(5)
    for layer in range(2):
        manager.append(layer, *torch.randn(2, 1, HEADS, 1, DIM))
        assert manager.attend(layer, torch.randn(1, 2 * HEADS, 1, DIM)).isfinite().all()
    assert manager.num_columns == 6
    assert manager.lossless


def test_layers_that_attend_everything_take_no_share() -> None:
    config = CacheConfig(retention="pyramidkv", budget_tokens=512, num_dense_layers=1, page_size=4)
    _, *shared = config.for_layers(4).budget_tokens
    assert shared == [
        *CacheConfig(retention="pyramidkv", budget_tokens=512, page_size=4)
        .for_layers(3)
        .budget_tokens
    ]
