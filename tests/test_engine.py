"""The GPU engine in Triton's interpreter: the same tokens as plain torch and the dense oracle."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch

from arkcache import (
    CacheConfig,
    ConfigError,
    HostTierFullError,
    InputError,
    KVCacheManager,
    backend,
)
from arkcache.backend import SERVED, choose_backend
from arkcache.engines.device import DeviceEngine
from arkcache.errors import IntegrityError
from arkcache.kernels import triton_attention
from arkcache.layers.device_dense import DeviceDenseLayer, DevicePackedDenseLayer
from arkcache.pages.store import PageStore
from arkcache.planning import Planner
from tests.marks import needs_interpreter
from tests.twins import Twins, small_config

pytestmark = needs_interpreter

TARGET: dict[str, Any] = {"index": "tokens", "target_missed_mass": 0.1}
LEFT_PADDED = torch.arange(43) >= torch.tensor([[0], [17]])


def on_kernels(**settings: Any) -> CacheConfig:
    """By boxes: the interpreter takes three times as long for the token index and for shares."""
    return small_config(backend="triton", **({"index": "cuboid-mean"} | settings))


def make(config: CacheConfig, **sizes: Any) -> Twins:
    """One sequence by default: the interpreter takes its time for every row."""
    return Twins(config, **({"batch": 1} | sizes))


def stepped(twins: Twins, steps: int, **how: Any) -> Twins:
    """Decode some tokens, every step against the oracle."""
    for _ in range(steps):
        for layer in range(twins.num_layers):
            twins.append_layer(layer, 1)
            tolerance = 3e-5 * max(1.0, torch.finfo(twins.dtype).eps / 1e-6)
            twins.attend_layer(layer, twins.query(), tolerance=tolerance, **how)
    twins.check()
    return twins


# -- against the dense oracle -------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_dense_layers": 1},
        {"device_pool_factor": 2.0},
        {"device_pool_factor": 2.0, "speculative_recall": False},
        {"budget_tokens": ((16, 40),)},
        {"budget_tokens": 12},
        {"budget_tokens": None},
        {"index": "tokens"},
        {"index": "sphere-max", "group_reduction": "raw-mean"},
        {"index": "centroid", "num_sink_tokens": 0},
        {"key_bits": 4, "value_bits": 2, "group_size": 8},
        {"key_bits": 8, "value_bits": 4, "group_size": 4, "rotation": "both"},
        {"key_bits": 4, "value_bits": 4, "group_size": 8, "budget_tokens": None},
        {"key_bits": 4, "group_size": 8, "num_dense_layers": 1},
        {"estimate_pages": None},
        {"estimate_pages": None, "budget_tokens": 12, "num_sink_tokens": 0},
        {"estimate_pages": 2, "group_reduction": "raw-mean", "device_pool_factor": 2.0},
        {"estimate_pages": None, "index": "tokens", "key_bits": 4, "group_size": 8},
        {
            "estimate_pages": None,
            "key_bits": 4,
            "value_bits": 2,
            "group_size": 8,
            "rotation": "both",
        },
        TARGET,
        TARGET | {"target_missed_mass": 0.3, "estimate_pages": None, "device_pool_factor": 2.0},
        TARGET | {"key_bits": 8, "value_bits": 4, "group_size": 4, "num_sink_tokens": 0},
        TARGET | {"budget_tokens": ((16, 40),)},
        {"page_size": 1, "stream_block_tokens": 8},
        {"page_size": 5, "budget_tokens": 40, "stream_block_tokens": 10},
    ],
    ids=str,
)
def test_decoding(settings: dict[str, Any]) -> None:
    layers = 2 if "num_dense_layers" in settings else 1
    twins = make(on_kernels(**settings), num_layers=layers)
    twins.append(40)
    stepped(twins, 5)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimate_pages", [0, None])
def test_half_precision(estimate_pages: int | None, dtype: torch.dtype, group: int) -> None:
    twins = make(on_kernels(estimate_pages=estimate_pages), dtype=dtype, group=group)
    twins.append(40)
    stepped(twins, 2)


@pytest.mark.parametrize(
    "settings",
    [{}, {"estimate_pages": None}, pytest.param(TARGET, marks=pytest.mark.slow)],
    ids=str,
)
def test_left_padding(settings: dict[str, Any]) -> None:
    twins = Twins(on_kernels(num_dense_layers=1, **settings), num_layers=2)
    twins.append(43, LEFT_PADDED)
    stepped(twins, 4)


def test_a_prompt_of_one_token_after_another() -> None:
    stepped(make(on_kernels(), num_kv_heads=1), 30)


@pytest.mark.parametrize("num_sink_tokens", [8, 4 * 66])
def test_many_sinks(num_sink_tokens: int) -> None:
    """A prompt that ends within the sinks; more sinks than the page directory starts with."""
    budget = num_sink_tokens + 28
    twins = make(on_kernels(num_sink_tokens=num_sink_tokens, budget_tokens=budget), num_kv_heads=1)
    twins.append(9)
    stepped(twins, 1)
    twins.append(num_sink_tokens + 20)
    stepped(twins, 2)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"estimate_pages": None},
        {"estimate_pages": 2},
        TARGET,
        pytest.param(TARGET | {"estimate_pages": None}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_softcap_sinks_and_masks(settings: dict[str, Any]) -> None:
    """Of the pages that are left out some are hidden, in part or for one query head."""
    twins = Twins(on_kernels(num_dense_layers=1, **settings), num_layers=2)
    twins.append(50)
    mask = twins.randn(2, 4, 1, 50)
    hides = mask > -1.0
    hides[:, :, :, 20:24] = False
    most_negative = mask.masked_fill(~hides, torch.finfo(mask.dtype).min)
    hows = ({"softcap": 2.0, "sinks": twins.randn(4)}, {"mask": mask}, {"mask": hides})
    for how in (*hows, {"mask": most_negative}):
        twins.attend(**how)


def test_a_mask_before_any_page_is_sealed() -> None:
    twins = make(on_kernels(estimate_pages=None))
    twins.append(5)
    twins.attend(mask=(torch.arange(5) != 2)[None, None, None])
    assert int(twins.manager._layers[0].tokens.sealed.max()) == 0


def test_several_tokens_attend_everything() -> None:
    twins = Twins(on_kernels(num_dense_layers=1), num_layers=2)
    for new_tokens in (40, 7, 12):
        twins.append(new_tokens)
        twins.attend(new_tokens)
    twins.check()


@pytest.mark.parametrize("estimate_pages", [0, None])
def test_crop_and_continue(estimate_pages: int | None) -> None:
    config = on_kernels(device_pool_factor=1.5, estimate_pages=estimate_pages)
    twins = make(config, num_kv_heads=1)
    twins.append(70)
    stepped(twins, 2)
    for columns in (66, 33, 9):
        twins.crop(columns)
        twins.check()
        stepped(twins, 5)


@pytest.mark.parametrize("estimate_pages", [0, None])
@pytest.mark.parametrize("index", [[1, 1, 0], [1]])
def test_keep_sequences(index: list[int], estimate_pages: int | None) -> None:
    how = {"key_bits": 4, "group_size": 8, "estimate_pages": estimate_pages}
    config = on_kernels(num_dense_layers=1, **how)
    twins = Twins(config, num_layers=2, num_kv_heads=1)
    twins.append(40)
    stepped(twins, 1)
    twins.keep_sequences(index)
    twins.check()
    stepped(twins, 3)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_lives_its_own_life(duplicate: Any) -> None:
    twins = make(on_kernels(device_pool_factor=2.0, estimate_pages=None))
    twins.append(40)
    stepped(twins, 2)
    clone = duplicate(twins)
    stepped(twins, 4)
    twins.reset()
    stepped(clone, 4)


def test_the_pool_factor_lasts_and_changes_no_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory is another whenever it is asked for; beams are reordered at every step."""
    factors = iter((3.0, 1.0))
    monkeypatch.setattr(Planner, "pool_factor", lambda *_: next(factors))
    ours, theirs = (
        Twins(on_kernels(device_pool_factor=factor), num_kv_heads=1) for factor in (None, 1.0)
    )
    ours.append(40)
    monkeypatch.setattr(Planner, "pool_factor", lambda *_: 1.0)
    theirs.append(40)
    for change in (lambda x: x, lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy):
        ours = change(ours)
        for twins in (ours, theirs):
            twins.keep_sequences([1, 0])
        outputs = []
        for twins in (ours, theirs):
            twins.append(1)
            outputs.append(twins.attend()[0])
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        ours.manager.check_integrity()
        tier = ours.manager._device_tier
        assert tier is not None
        assert tier.plan.pool_factor == 3
    ours.manager.keep_sequences(torch.tensor([0]))
    assert ours.manager._device_tier is not None
    assert ours.manager._device_tier.plan.pool_factor == 1


# -- against plain torch --------------------------------------------------------------------------


def test_it_counts_what_plain_torch_counts() -> None:
    """Selections, hits and recalls of both backends are the same, step for step."""
    configs = [small_config(backend=backend, index_bits=2) for backend in ("triton", "torch")]
    ours, theirs = (make(config, seed=7) for config in configs)
    for twins in (ours, theirs):
        twins.append(60)
    for _ in range(5):
        for twins in (ours, theirs):
            twins.append(1)
        query = ours.query()
        theirs.seed = ours.seed
        outputs = [twins.manager.attend(0, query) for twins in (ours, theirs)]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
        mine, other = ours.manager.stats(), theirs.manager.stats()
        for name in ("attended_tokens", "pages_hit", "pages_recalled", "pages_evicted"):
            assert getattr(mine, name) == getattr(other, name), name
        assert mine.host_bytes == other.host_bytes
        assert mine.bytes_backed_up == other.bytes_backed_up


@pytest.mark.parametrize("columns", [4, 30])
def test_all_selected_is_bit_equal_to_no_estimates(columns: int) -> None:
    """Whatever programs have nothing to estimate."""
    outputs = []
    for estimate_pages in (0, None, 2):
        twins = make(on_kernels(estimate_pages=estimate_pages), seed=5)
        twins.append(columns)
        twins.steps.reserve(4000)
        outputs.append(twins.manager.attend(0, twins.query()))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_estimating_changes_nothing_but_outputs() -> None:
    """What is selected and recalled stays; means count as digests."""
    plain, estimating = (
        make(on_kernels(estimate_pages=n, device_pool_factor=2.0), seed=7) for n in (0, None)
    )
    for twins in (plain, estimating):
        twins.append(60)
        stepped(twins, 3)
    mine, other = estimating.manager.stats(), plain.manager.stats()
    means = 2 * 64 * (8 + 8) * 4  # KV heads, pages that there is room for, dims, bytes
    assert mine.digest_bytes == other.digest_bytes + means
    assert dataclasses.replace(mine, digest_bytes=other.digest_bytes) == other


@pytest.mark.parametrize("target", [0.02, pytest.param(0.3, marks=pytest.mark.slow)])
def test_what_is_missed_is_what_plain_torch_misses(target: float) -> None:
    """Of each KV head, and how much a step attends, whatever is done in between."""
    settings = {"index_bits": 2, "target_missed_mass": target, "budget_tokens": 40}
    ours, theirs = (
        Twins(small_config(backend=backend, **settings), seed=7) for backend in ("triton", "torch")
    )
    changes = (
        lambda twins: twins.append(60),
        lambda twins: twins.append(1),
        lambda twins: twins.keep_sequences([1, 1, 0]),
        lambda twins: twins.crop(50),
        lambda twins: twins.append(1),
    )
    for change in changes:
        for twins in (ours, theirs):
            change(twins)
        query = 2 * ours.query()
        theirs.seed = ours.seed
        outputs = [twins.manager.attend(0, query) for twins in (ours, theirs)]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        mine, other = ours.manager.stats(), theirs.manager.stats()
        assert mine.attended_tokens == other.attended_tokens
        assert len(mine.missed_by_layer) == len(other.missed_by_layer) == 1
        heads = zip(mine.missed_by_layer[0], other.missed_by_layer[0], strict=True)
        for own, expected in heads:
            assert dataclasses.asdict(own) == pytest.approx(dataclasses.asdict(expected), rel=1e-4)
    for twins in (ours, theirs):
        twins.append(3)
        twins.attend(3)
    assert ours.manager.stats().attended_tokens == theirs.manager.stats().attended_tokens
    ours.check()


def test_speculation_spares_recalls_and_changes_no_output() -> None:
    """A query that drifts wants next what it rated next before."""
    settings = {"device_pool_factor": 2.0, "budget_tokens": 32}
    outputs, stats = [], []
    for speculative in (True, False):
        config = on_kernels(**settings, speculative_recall=speculative)
        twins = make(config, num_kv_heads=1, seed=3)
        twins.append(160)
        query, drift = twins.query(size=2.0), twins.query(size=2.0)
        steps = [query + 0.15 * number * drift for number in range(8)]
        outputs.append([twins.manager.attend(0, step) for step in steps])
        twins.check()
        stats.append(twins.manager.stats())
    for mine, other in zip(*outputs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    guessed, plain = stats
    assert guessed.speculative_hits > 0
    assert guessed.pages_speculated >= guessed.speculative_hits
    assert guessed.pages_recalled < plain.pages_recalled
    assert plain.pages_speculated == plain.speculative_hits == 0


# -- a step in two halves -------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 4])
def test_a_step_is_merged_by_its_last_program(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """In every kind of layer: nothing is launched for it, and no ticket is left."""
    monkeypatch.setattr(triton_attention, "merge_kernel", None)
    settings = {"num_dense_layers": 1, "key_bits": bits, "value_bits": bits, "group_size": 8}
    twins = Twins(on_kernels(**settings), num_layers=2)
    twins.append(43, LEFT_PADDED)
    stepped(twins, 3)
    for layer in twins.steps.layers:
        assert not layer._tokens.tickets.any()


def test_counting_and_launches_apart_are_a_step() -> None:
    """What is launched after a token was counted is what `append` and `attend` do at once."""
    twins = Twins(on_kernels(num_dense_layers=1, device_pool_factor=2.0), num_layers=2)
    twins.append(43, LEFT_PADDED)
    manager, steps = twins.manager, twins.steps
    steps.reserve(64)
    addresses, kinds = steps.addresses, set()
    for _ in range(4):
        expected = steps.seals_next()
        planned = steps.plan()
        assert planned.seals == expected
        kinds.add(planned.seals)
        with planned.run():
            for layer in range(2):
                shape = (2, 2, 1, 8)
                key, value = twins.randn(*shape), twins.randn(*shape)
                manager.append(layer, key, value)
                twins.oracle.append(layer, key, value, None)
                query = twins.query()
                output = manager.attend(layer, query)
                twins.oracle.attend_one(layer, query).check(output, 3e-5)
    twins.check()
    assert kinds == {True, False}
    assert steps.addresses == addresses


def planned_step(twins: Twins) -> None:
    """A step in two halves, every layer against the oracle."""
    with twins.steps.plan().run():
        for layer in range(twins.num_layers):
            twins.append_layer(layer, 1)
            twins.attend_layer(layer, twins.query())


CHANGES: dict[str, Callable[[Twins], None]] = {
    "nothing": lambda twins: None,
    "a step by hand": lambda twins: stepped(twins, 1) and None,
    "several tokens": lambda twins: twins.append(6),
    "crop": lambda twins: twins.crop(34),
    "sequences": lambda twins: twins.keep_sequences([1]),
}


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 4])
def test_counts_kept_together_are_those_of_each_layer(bits: int) -> None:
    """Steps in two halves between all that gives layers counts of their own."""
    settings = {"key_bits": bits, "value_bits": bits, "group_size": 8}
    config = on_kernels(num_dense_layers=1, budget_tokens=(None, 28), **settings)
    ours, theirs = (Twins(config, num_layers=2, num_kv_heads=1) for _ in range(2))
    for twins in (ours, theirs):
        twins.append(37, LEFT_PADDED[:, :37])
    for name, change in CHANGES.items():
        change(ours)
        change(theirs)
        ours = copy.deepcopy(ours)
        for _ in range(2):
            planned_step(ours)
            stepped(theirs, 1)
            ours.check()
            for mine, other in zip(ours.manager._layers, theirs.manager._layers, strict=True):
                assert np.array_equal(mine.tokens.lengths, other.tokens.lengths), name
                assert mine.tokens.columns == other.tokens.columns
                assert mine.counters == other.counters
            assert ours.manager.stats() == theirs.manager.stats(), name


def test_addresses_say_what_moved() -> None:
    config = on_kernels(num_dense_layers=1, estimate_pages=None)
    twins = Twins(config, num_layers=2, num_kv_heads=1)
    twins.append(20)
    manager = twins.manager

    def addresses() -> tuple[int, ...]:
        return twins.steps.addresses

    seen = [addresses()]
    manager.crop(18)
    twins.append(1)
    assert addresses() == seen[0]
    for change in (
        lambda: twins.steps.reserve(200),  # the dense layer grows
        lambda: twins.steps.reserve(800),  # and the page directory
        lambda: manager.keep_sequences(np.array([1, 0])),
        lambda: manager.keep_sequences(np.array([1, 0])),
    ):
        change()
        seen.append(addresses())
    assert len(set(seen)) == 5


def test_pages_of_all_layers_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = make(on_kernels(), num_layers=3)
    twins.append(50)
    host = twins.manager._host
    assert host is not None
    counts: list[int] = []
    allocate = host.allocate
    monkeypatch.setattr(host, "allocate", lambda n, *kind: counts.append(n) or allocate(n, *kind))
    sealed = 0
    for _ in range(8):
        sealed += twins.steps.plan().seals
    assert sealed == 2
    assert counts == [3, 3]


def test_an_interrupted_booking_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step that seals, when some layers hold their new pages and others do not."""
    twins = make(on_kernels(), num_layers=3)
    twins.append(51)
    host = twins.manager._host
    assert host is not None
    held, enter, calls = host.num_pieces, PageStore.enter, []

    def interrupted(self: PageStore, *args: Any) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        enter(self, *args)

    assert twins.steps.seals_next()
    monkeypatch.setattr(PageStore, "enter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        twins.steps.plan()
    assert host.num_pieces == held
    twins.check()
    monkeypatch.setattr(PageStore, "enter", enter)
    planned_step(twins)
    twins.check()


def test_steps_go_with_their_manager_into_copies_and_pickles() -> None:
    """They count on its log, and ask its own host tier for room."""
    twins = make(on_kernels())
    twins.append(50)
    copied = copy.deepcopy(twins.manager)
    pickled = [pickle.loads(pickle.dumps(manager)) for manager in (twins.manager, copied)]
    for manager in (copied, *pickled):
        assert manager.steps is not None
        assert manager.steps.host is manager._host
        assert manager.steps._log is manager._log
        manager.steps.plan().undo()
        manager.check_integrity()


def test_a_step_that_is_undone_was_never_counted() -> None:
    """Not even what it would have backed up and attended."""
    twins = make(on_kernels(num_dense_layers=1), num_layers=2)
    twins.append(51)
    twins.attend()
    before = twins.manager.stats()
    planned = twins.steps.plan()
    assert planned.seals
    planned.undo()
    assert twins.manager.stats() == before
    twins.check()


def test_the_launches_of_a_step_read_nothing_of_the_hosts_metadata() -> None:
    """Recorded once and replayed, they must not depend on what the host counts."""
    twins = make(on_kernels(estimate_pages=None, **TARGET))
    twins.append(50)
    (layer,) = twins.manager._layers
    planned = twins.steps.plan()
    lengths, sealed = layer.tokens.lengths.copy(), layer.tokens.sealed.copy()
    layer.tokens.lengths[:], layer.tokens.sealed[:] = 3, 0
    shape = (1, 2, 1, 8)
    key, value, query = twins.randn(*shape), twins.randn(*shape), twins.query()
    with planned.run():
        twins.manager.append(0, key, value)
        output = twins.manager.attend(0, query)
    layer.tokens.lengths[:], layer.tokens.sealed[:] = lengths, sealed
    twins.oracle.append(0, key, value, None)
    twins.oracle.attend_one(0, query).check(output, 3e-5)
    twins.check()


def test_a_launch_that_fails_leaves_nothing_pending() -> None:
    twins = make(on_kernels(device_pool_factor=2.0))
    twins.append(50)
    planned = twins.steps.plan()
    with pytest.raises(RuntimeError, match="capture"), planned.run():
        raise RuntimeError("capture failed")
    assert twins.steps.running is None
    planned.undo()
    stepped(twins, 2)


# -- errors and choices ----------------------------------------------------------------------------


def test_a_full_host_tier_changes_nothing() -> None:
    twins = Twins(on_kernels())
    room = 9 * twins.whole_page_bytes * 2
    twins = Twins(on_kernels(host_bytes=room))
    twins.append(38)
    with pytest.raises(HostTierFullError, match="host_bytes"):
        twins.manager.append(0, twins.randn(2, 2, 40, 8), twins.randn(2, 2, 40, 8))
    stepped(twins, 1)


@pytest.mark.parametrize("damage", ["page_of", "slot", "located", "lengths"])
def test_check_integrity_finds(damage: str) -> None:
    twins = Twins(on_kernels())
    twins.append(50)
    twins.attend()
    (layer,) = twins.manager._layers
    engine = cast("Any", layer).engine
    if damage == "page_of":
        page_of = engine.pages.page_table.page_of
        page_of[0, 0] = page_of[0, 1]
    elif damage == "slot":
        engine.pages.slots[1, 3] += 1
    elif damage == "located":
        engine.pages.directory.located[0, 2] += 1
    else:
        engine._tokens.counts.lengths[1] += 1
    with pytest.raises(IntegrityError):
        twins.manager.check_integrity()


def test_layers_are_what_their_budgets_and_formats_say() -> None:
    def kinds(**settings: Any) -> list[type]:
        twins = Twins(on_kernels(num_dense_layers=1, **settings), num_layers=2)
        twins.append(3)
        return [type(one) for one in twins.steps.layers]

    assert kinds() == [DeviceDenseLayer, DeviceEngine]
    assert kinds(key_bits=4, group_size=8) == [DevicePackedDenseLayer, DeviceEngine]


def test_what_the_kernels_do_not_serve_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(device: str = "cpu", latent: bool = False, **settings: Any) -> str:
        config = small_config(backend="triton", **settings)
        with pytest.raises(ConfigError, match="backend='auto'") as error:
            choose_backend(config, torch.device(device), torch.float32, latent=latent)
        return str(error.value)

    assert "latents" in reason(latent=True)
    with pytest.raises(ConfigError, match="float64"):
        KVCacheManager(1, 2, 8, on_kernels(), dtype=torch.float64)
    assert "two formats" in reason(coarse_value_bits=4)
    assert "audit_every" in reason(audit_every=5)
    assert "packed_slots" in reason(value_bits=4, packed_slots=False)
    for name, choice in (("index", "centroid"), ("group_reduction", "raw-mean")):
        left = tuple(other for other in SERVED[name] if other != choice)
        monkeypatch.setitem(SERVED, name, left)
        assert f"no kernel for {name}={choice!r}" in reason(**{name: choice})
        config = small_config(**{name: choice})
        assert choose_backend(config, torch.device("cuda"), torch.half, latent=False) == "torch"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "TRITON_INTERPRET" in reason()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed" in reason(device="cuda")


def test_expanding_needs_latents() -> None:
    """Pages would be attended as they are stored, and the answer be wrong without a word."""
    twins = make(on_kernels())
    twins.append(50)
    with pytest.raises(InputError, match="latent=True"):
        twins.manager.attend(0, twins.query(), expand=lambda key, value: (key, value))
    stepped(twins, 1)


def test_without_triton_a_gpu_runs_plain_torch_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert (
            choose_backend(CacheConfig(), torch.device("cuda"), torch.half, latent=False) == "torch"
        )
    assert choose_backend(CacheConfig(), torch.device("cuda"), torch.half, latent=False) == "torch"


def test_a_cpu_runs_its_own_kernels_by_default() -> None:
    pytest.importorskip("numba")
    manager = KVCacheManager(1, 2, 8, small_config())
    assert manager.planner.backend == "numba"
    assert manager.steps is None
    with pytest.raises(ConfigError, match=r"numba compiles for a CPU, and the device is meta"):
        KVCacheManager(1, 2, 8, small_config(backend="numba"), device="meta")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_missed_mass": 0.1, "index": "tokens"},
        {"estimate_pages": None},
        {"audit_every": 3},
        {"device_bytes": 10**6},
        {"device_pool_factor": 2.0},
        {"packed_slots": True, "key_bits": 8},
        {"coarse_key_bits": 4},
    ],
    ids=str,
)
def test_what_the_kernels_of_a_cpu_do_not_serve(settings: dict[str, Any]) -> None:
    """Runs on plain torch, or is refused where the kernels were asked for."""
    assert KVCacheManager(1, 2, 8, small_config(**settings)).planner.backend == "torch"
    with pytest.raises(ConfigError, match=r"backend='numba': .*use backend='auto'"):
        KVCacheManager(1, 2, 8, small_config(**settings, backend="numba"))


def test_without_numba_a_cpu_runs_plain_torch_and_says_what_it_would_bring(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    backend._log_once.cache_clear()
    for _ in range(2):
        cpu = torch.device("cpu")
        assert choose_backend(CacheConfig(), cpu, torch.float32, latent=False) == "torch"
    (record,) = caplog.records
    assert "half as long" in record.message
    assert "pip install 'arkcache[cpu]'" in record.message


def test_the_host_counts_no_token_twice() -> None:
    twins = make(on_kernels())
    twins.append(50)
    (layer,) = twins.manager._layers
    assert np.array_equal(layer.tokens.lengths, [50])
    assert twins.steps.seals_next() == ((50 + 1 - 4) // 4 > (50 - 4) // 4)
