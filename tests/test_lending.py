"""`resize` and `lend`: a device tier that changes in size while tokens are held."""

import copy
import pickle
import random
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

import arkcache.manager
from arkcache import ArkCache, CacheConfig, ConfigError, InputError, KVCacheManager
from arkcache.tiering.device import DeviceTier, TierPlan
from tests.marks import needs_interpreter
from tests.quantised import bits_of
from tests.test_huggingface import make_model, prompt
from tests.test_huggingface_quantised import LIMITED, mixed_shapes
from tests.twins import small_config

ON_SLOTS: dict[str, Any] = {"backend": "torch", "budget_tokens": "auto"}

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "boxes": {"index": "cuboid-mean"},
    "budgets": {"budget_tokens": ((100, 24), None, 60)},
    "dense": {"num_dense_layers": 1},
    "packed": {**bits_of("K4V2"), "group_size": 4, "packed_slots": True},
    "unpacked": {**bits_of("K8V4"), "group_size": 4, "packed_slots": False, "rotation": "both"},
    "spare": {"device_pool_factor": 1.75},
    "estimates": {"estimate_pages": None},
    "target": {"target_missed_mass": 0.1},
}


class Conversation:
    """A manager beside all that it was told, so that another can be told the same at once."""

    def __init__(self, seed: int, batch: int = 2, num_layers: int = 3, **settings: Any) -> None:
        self.settings, self.num_layers = ON_SLOTS | settings, num_layers
        self.manager = self.fresh()
        self.random = random.Random(seed)
        self.batch = batch
        self.states = torch.zeros(num_layers, 2, batch, 2, 0, 8)
        self.real = torch.zeros(batch, 0, dtype=torch.bool)

    def fresh(self, **settings: Any) -> KVCacheManager:
        return KVCacheManager(self.num_layers, 2, 8, small_config(**self.settings | settings))

    def append(self, new_tokens: int, *, padded: bool = False) -> None:
        new = torch.randn(self.num_layers, 2, self.batch, 2, new_tokens, 8)
        real = torch.ones(self.batch, new_tokens, dtype=torch.bool)
        if padded:
            real[0, : new_tokens // 2] = False
        for layer, (key, value) in enumerate(new):
            self.manager.append(layer, key, value, real if padded else None)
        self.states = torch.cat((self.states, new), dim=4)
        self.real = torch.cat((self.real, real), dim=1)

    def reorder(self, order: list[int]) -> None:
        self.manager.keep_sequences(torch.tensor(order))
        self.states, self.real, self.batch = self.states[:, :, order], self.real[order], len(order)

    def crop(self, columns: int) -> None:
        self.manager.crop(columns)
        self.states, self.real = self.states[..., :columns, :], self.real[:, :columns]

    def born(self, device_bytes: int | None) -> KVCacheManager:
        """One that had this limit from the beginning."""
        other = self.fresh(device_bytes=device_bytes)
        for layer, (key, value) in enumerate(self.states):
            other.append(layer, key, value, self.real)
        return other

    def compare(self, device_bytes: int | None) -> None:
        """Fail unless the next step is that of a cache born at this size."""
        other = self.born(device_bytes)
        query = torch.randn(self.batch, 4, 1, 8)
        for layer in range(self.num_layers):
            mine, theirs = (one.attend(layer, query) for one in (self.manager, other))
            torch.testing.assert_close(mine, theirs)
        assert self.manager.stats().attended_tokens == other.stats().attended_tokens
        assert self.manager.tier_bytes == other.tier_bytes
        self.manager.check_integrity()


def tier_bytes(manager: KVCacheManager) -> int:
    assert manager.tier_bytes is not None
    return manager.tier_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_a_cache_born_at_that_size(kind: str) -> None:
    """Whatever comes between; a size is refused just where such a cache could not be."""
    one = Conversation(1, **KINDS[kind], device_bytes=90_000)
    limit, refused, quantised = 90_000, 0, "key_bits" in KINDS[kind]
    one.append(90, padded=True)
    for step in range(14):
        wanted = one.random.randrange(10_000, 90_000)
        before = tier_bytes(one.manager)
        try:
            one.manager.resize(wanted)
        except ConfigError:
            refused += 1
            with pytest.raises(ConfigError, match=f"device_bytes={wanted}"):
                one.born(wanted)
            assert tier_bytes(one.manager) == before
        else:
            limit = wanted
        assert tier_bytes(one.manager) <= limit == one.manager.config.device_bytes
        one.compare(limit)
        one.append(one.random.choice([1, 1, 1, 9]))
        if step == 7 and not quantised:  # what is unsealed keeps what quantising took
            one.crop(one.real.shape[1] - 30)
        if step in (4, 10):
            one.reorder([1, 0] if step == 4 else [1])
    assert refused < 12
    for layer in range(one.num_layers):
        key, _ = one.manager.gather(layer)
        if not quantised:
            assert torch.equal(key, one.states[layer, 0] * one.real[:, None, :, None])


def test_a_step_attends_what_it_did_once_the_size_is_back() -> None:
    """But for the order of pages, and so the rounding: also what was in the window alone."""
    one = Conversation(2, device_bytes=80_000)
    one.append(120)
    query = torch.randn(2, 4, 1, 8)
    before = one.manager.attend(0, query)
    for device_bytes in (40_000, None, 50_000, 80_000):
        one.manager.resize(device_bytes)
        one.manager.check_integrity()
    torch.testing.assert_close(one.manager.attend(0, query), before)


def test_nothing_is_copied_but_what_steps_recall() -> None:
    """Layers that attend everything and digests stay where they are; sinks come back."""
    one = Conversation(3, num_dense_layers=1, device_bytes=80_000)
    one.append(120)
    dense = one.manager._layers[0]._key.data  # type: ignore[attr-defined]
    digests = one.manager._layers[1].engine._ratings.digests.data  # type: ignore[attr-defined]
    before = one.manager.stats()
    one.manager.resize(40_000)
    after = one.manager.stats()
    assert one.manager._layers[0]._key.data is dense  # type: ignore[attr-defined]
    assert one.manager._layers[1].engine._ratings.digests.data is digests  # type: ignore[attr-defined]
    assert after.bytes_backed_up == before.bytes_backed_up
    sinks = 2 * 2 * 2 * one.manager.planner.packers[0].layout.nbytes  # layers, sequences, heads
    assert after.bytes_recalled - before.bytes_recalled == 2 * sinks


def test_a_size_that_is_there_moves_nothing() -> None:
    one = Conversation(4, budget_tokens=40)
    one.append(120)
    tier, before = one.manager._device_tier, one.manager.stats()
    one.manager.resize(10**6)
    assert one.manager._device_tier is tier
    assert one.manager.stats() == before
    one.compare(10**6)


def test_two_tiers_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Conversation(5, device_bytes=80_000)
    one.append(120)
    alive: list[tuple[int, Any]] = []
    sizes: list[int] = []

    class Counted(DeviceTier):
        def __init__(self, plan: TierPlan) -> None:
            held = sum(nbytes for nbytes, other in alive if other() is not None)
            sizes.append(held + plan.nbytes)
            super().__init__(plan)
            alive.append((plan.nbytes, ref(self)))

    monkeypatch.setattr(arkcache.manager, "DeviceTier", Counted)
    one.manager.resize(50_000)
    sizes.clear()
    one.manager.resize(60_000)
    windows, _ = alive[2]
    assert sizes[0] <= 50_000 + windows
    assert sizes[1] <= 60_000 + windows < 2 * 50_000
    assert len(alive) == 4
    assert len([other for _, other in alive if other() is not None]) == 1


@pytest.mark.parametrize("fails", [1, 2])
def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
    """The cache is what it was; the next attempt may succeed."""
    one = Conversation(6, device_bytes=40_000)
    one.append(120)
    calls = 0

    def make(plan: TierPlan) -> DeviceTier:
        nonlocal calls
        calls += 1
        if calls == fails:
            raise torch.OutOfMemoryError("no memory")
        return DeviceTier(plan)

    monkeypatch.setattr(arkcache.manager, "DeviceTier", make)
    with pytest.raises(torch.OutOfMemoryError):
        one.manager.resize(80_000)
    assert one.manager.config.device_bytes == 40_000
    one.compare(40_000)
    one.manager.resize(80_000)
    one.compare(80_000)


# -- lend -----------------------------------------------------------------------------------------


def test_lend_and_have_it_back() -> None:
    one = Conversation(7)
    one.settings["budget_tokens"] = 100
    one.manager = one.fresh()
    one.append(150)
    whole = tier_bytes(one.manager)
    with one.manager.lend(whole // 4):
        lent = tier_bytes(one.manager)
        assert lent <= whole - whole // 4
        one.compare(whole - whole // 4)
        one.append(1)
        with one.manager.lend(1000):
            assert tier_bytes(one.manager) <= lent - 1000
            one.append(1)
            one.compare(lent - 1000)
        assert tier_bytes(one.manager) == lent
        with pytest.raises(InputError, match=r"resize\(5000\) while \d+ bytes .* are lent"):
            one.manager.resize(5000)
        with pytest.raises(RuntimeError, match="broken"), one.manager.lend(2000):
            raise RuntimeError("broken")
        assert tier_bytes(one.manager) == lent
    assert tier_bytes(one.manager) == whole
    assert one.manager.config.device_bytes is None
    one.compare(None)


def test_loans_that_end_in_any_order() -> None:
    one = Conversation(8, device_bytes=100_000)
    one.append(150)
    whole = tier_bytes(one.manager)
    first, second = ExitStack(), ExitStack()
    first.enter_context(one.manager.lend(20_000))
    second.enter_context(one.manager.lend(10_000))
    first.close()
    assert whole - 16_000 < tier_bytes(one.manager) <= whole - 10_000
    first.enter_context(one.manager.lend(5_000))
    assert tier_bytes(one.manager) <= whole - 15_000
    second.close()
    first.close()
    assert tier_bytes(one.manager) == whole
    one.manager.resize(90_000)
    one.compare(90_000)


@pytest.mark.parametrize(
    ("num_bytes", "message"),
    [
        (0, "of at least 1"),
        (True, "of at least 1"),
        (1.5, "of at least 1"),
        (10**9, r"the device tier of pages has \d+ bytes"),
        (None, r"the device tier of \d+ bytes cannot spare so many .* needs \d+"),
    ],
)
def test_more_than_can_be_spared(num_bytes: Any, message: str) -> None:
    one = Conversation(9, device_bytes=80_000)
    one.append(100)
    before, tier = one.manager.stats(), one.manager._device_tier
    wanted = tier_bytes(one.manager) if num_bytes is None else num_bytes
    with pytest.raises(InputError, match=message), one.manager.lend(wanted):
        pass
    assert one.manager._device_tier is tier
    assert one.manager.stats() == before
    one.manager.resize(70_000)  # nothing is lent


def test_a_cache_that_holds_nothing() -> None:
    one = Conversation(10)
    with pytest.raises(InputError, match="nothing is held"), one.manager.lend(10):
        pass
    with pytest.raises(ConfigError, match="device_bytes=100: the device tier of 1 sequences"):
        one.manager.resize(100)
    one.manager.resize(90_000)
    with one.manager.lend(30_000):
        with pytest.raises(InputError, match="other settings while 30000 bytes"):
            one.manager.config = small_config()
        one.append(150)
        one.compare(60_000)
        one.manager.reset()
        one.states, one.real = one.states[..., :0, :], one.real[:, :0]
        one.append(40)
    one.compare(90_000)


def test_copies_made_in_between_keep_their_size(tmp_path: Path) -> None:
    one = Conversation(11, device_bytes=80_000)
    one.append(150)
    query = torch.randn(2, 4, 1, 8)
    with one.manager.lend(30_000):
        size, expected = tier_bytes(one.manager), one.manager.attend(0, query)
        one.manager.save(tmp_path / "saved")
        copies = [copy.deepcopy(one.manager), pickle.loads(pickle.dumps(one.manager))]
        copies.append(KVCacheManager.load(tmp_path / "saved"))
    for other in copies:
        assert tier_bytes(other) == size
        torch.testing.assert_close(other.attend(0, query), expected)
        other.resize(80_000)  # nothing is lent there
        torch.testing.assert_close(other.attend(0, query), one.manager.attend(0, query))
        other.check_integrity()


# -- other engines --------------------------------------------------------------------------------


def test_numba_changes_budgets_only() -> None:
    """A step attends what it would in a device tier of that size, and there is nothing to lend."""
    pytest.importorskip("numba")
    one = Conversation(12, backend="auto", budget_tokens=120)
    one.append(150)
    assert one.manager.planner.backend == "numba"
    whole = one.manager.stats().device_bytes
    one.settings["backend"] = "torch"
    for device_bytes in (70_000, 50_000, None, 60_000):
        one.manager.resize(device_bytes)
        assert one.manager.planner.backend == "numba"
        assert one.manager.stats().device_bytes == whole
        query, other = torch.randn(2, 4, 1, 8), one.born(device_bytes)
        for layer in range(3):
            mine, theirs = (each.attend(layer, query) for each in (one.manager, other))
            torch.testing.assert_close(mine, theirs)
        assert one.manager.stats().attended_tokens == other.stats().attended_tokens
        one.append(1)
    with pytest.raises(InputError, match="has 0 bytes; kernels"), one.manager.lend(1):
        pass


@needs_interpreter
@pytest.mark.slow
def test_kernels_go_on_in_another_size() -> None:
    """Nothing that was recorded is replayed: it would read what is gone."""
    settings: dict[str, Any] = {
        "index": "cuboid-mean",
        "backend": "triton",
        "device_pool_factor": 1.5,
    }
    one = Conversation(13, batch=1, num_layers=1, **settings, device_bytes=20_000)
    one.append(60)
    assert one.manager.steps is not None
    for device_bytes in (9_000, 16_000):
        one.compare(one.manager.config.device_bytes)
        addresses = one.manager.steps.addresses
        one.manager.resize(device_bytes)
        assert tier_bytes(one.manager) <= device_bytes
        assert not set(addresses[:1]) & set(one.manager.steps.addresses[:1])
        one.append(1)
    one.compare(16_000)


# -- transformers ---------------------------------------------------------------------------------

SIZES: dict[str, Any] = {**LIMITED, "backend": "torch", "budget_tokens": "auto"}


class Resizing:
    """A logits processor that gives a cache another size between two steps."""

    def __init__(self, cache: ArkCache, sizes: dict[int, int | None]) -> None:
        self.cache, self.sizes, self.steps = cache, sizes, 0

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        self.steps += 1
        if self.steps in self.sizes:
            self.cache.resize(self.sizes[self.steps])
        limit = self.cache.config.device_bytes
        assert limit is None or self.cache.stats().device_bytes <= limit
        return scores


def answer(model: Any, cache: Any, ids: Tensor, tokens: int, **settings: Any) -> Tensor:
    given = {"max_new_tokens": tokens, "do_sample": False} | settings
    return model.generate(ids, past_key_values=cache, **given)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"prefill_chunk_size": 32}], ids=str)
def test_generate_with_everything_attended(settings: dict[str, Any]) -> None:
    """Sizes that hold the whole context: the full cache's tokens."""
    model = make_model()
    cache = ArkCache(model, **SIZES, device_bytes=600_000)
    sizes = Resizing(cache, {3: 400_000, 6: 900_000, 9: 350_000})
    ids = answer(model, cache, prompt(70), 12, logits_processor=[sizes], **settings)
    full = answer(model, DynamicCache(config=model.config), prompt(70), 12, **settings)
    assert torch.equal(ids, full)
    assert sizes.steps == 12
    cache.check_integrity()


@needs_interpreter
@pytest.mark.slow
def test_replayed_steps_are_recorded_anew() -> None:
    model = make_model(num_hidden_layers=1, num_key_value_heads=1, initializer_range=0.08)
    given: dict[str, Any] = {**LIMITED, "index": "cuboid-mean", "budget_tokens": 60}
    answers = []
    for backend in ("torch", "triton"):
        cache = ArkCache(model, **given, backend=backend)
        sizes: dict[int, int | None] = {4: 14_000, 8: 20_000}
        if backend == "triton":
            with cache.graphed(model):
                processor = Resizing(cache, sizes)
                answers.append(answer(model, cache, prompt(70), 12, logits_processor=[processor]))
            (manager,) = cache.managers
            assert manager.steps is not None
            recordings: Any = manager.steps.recordings
            assert recordings._addresses == manager.steps.addresses
        else:
            processor = Resizing(cache, sizes)
            answers.append(answer(model, cache, prompt(70), 12, logits_processor=[processor]))
        cache.check_integrity()
    assert torch.equal(*answers)


def test_generate_goes_on_as_a_cache_loaded_at_that_size(tmp_path: Path) -> None:
    """Two groups of layers, each with its share; one cache is resized while it generates."""
    model: LlamaForCausalLM = mixed_shapes(make_model())
    cache = ArkCache(model, **SIZES, device_bytes=300_000)
    sizes = Resizing(cache, {6: 130_000})
    ids = answer(model, cache, prompt(90), 20, logits_processor=[sizes])
    other = ArkCache(model, **SIZES, device_bytes=300_000)
    first = answer(model, other, prompt(90), 6)
    other.save(tmp_path / "saved")
    loaded = ArkCache.load(model, tmp_path / "saved", device_bytes=130_000)
    assert torch.equal(answer(model, loaded, first, 14), ids)
    assert cache.stats().device_bytes == loaded.stats().device_bytes <= 130_000
    assert cache.stats().attended_tokens == loaded.stats().attended_tokens


def test_a_cache_lends_of_all_its_tiers() -> None:
    model = mixed_shapes(make_model())
    cache = ArkCache(model, **SIZES | {"budget_tokens": 60})
    with pytest.raises(InputError, match="nothing is held"), cache.lend(10):
        pass
    ids = answer(model, cache, prompt(90), 4)
    whole = cache.stats().device_bytes
    with cache.lend(20_000):
        assert cache.stats().device_bytes <= whole - 20_000
        held = [manager.tier_bytes for manager in cache.managers]
        with pytest.raises(InputError, match="cannot spare so many"), cache.lend(whole - 40_000):
            pass
        with pytest.raises(InputError, match=r"while \d+ bytes"):
            cache.resize(None)
        assert held == [manager.tier_bytes for manager in cache.managers]
        twin = copy.deepcopy(cache)
        ids = answer(model, cache, ids, 4)
    assert cache.stats().device_bytes == whole
    assert cache.config.device_bytes is None
    twin.resize(None)
    assert twin.stats().device_bytes == whole
    cache.check_integrity()
    with cache.lend(20_000):
        cache.reset()
        answer(model, cache, prompt(90), 2)
        assert cache.stats().device_bytes <= whole - 20_000
    assert cache.stats().device_bytes == whole


def test_a_cache_that_refuses_is_unchanged() -> None:
    """One group of layers fits, the other does not: neither has moved."""
    model = mixed_shapes(make_model())
    cache = ArkCache(model, **SIZES, device_bytes=300_000)
    answer(model, cache, prompt(90), 4)
    tiers = [manager._device_tier for manager in cache.managers]
    for device_bytes in (25_000, 0, -1, True, "1GB"):
        with pytest.raises(ConfigError, match="device_bytes"):
            cache.resize(device_bytes)  # type: ignore[arg-type]
    assert tiers == [manager._device_tier for manager in cache.managers]
    assert cache.config.device_bytes == 300_000
    empty = ArkCache(model, **SIZES)
    with pytest.raises(ConfigError, match="device_bytes="):
        empty.resize(25_000)
    assert empty.config.device_bytes is None


def test_what_insists_on_the_kernels_of_a_cpu_has_no_limit_of_a_tier() -> None:
    """Held or empty: a save of it could not be loaded otherwise."""
    pytest.importorskip("numba")
    manager = KVCacheManager(1, 2, 16, CacheConfig(backend="numba", budget_tokens=128))
    for _ in range(2):
        with pytest.raises(ConfigError, match="device_bytes=600000"):
            manager.resize(600_000)
        assert manager.config.device_bytes is None
        manager.append(0, *torch.randn(2, 1, 2, 60, 16))
