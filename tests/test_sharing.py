"""Layers that attend another's keys and values: against a dense model whose layers do so."""

import copy
import dataclasses
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import arkcache
from arkcache import (
    ArkCache,
    CacheConfig,
    ConfigError,
    InputError,
    KVCacheManager,
    PrefixCache,
    SessionError,
    cli,
)
from arkcache.memory import CacheShape, plan_memory
from arkcache.tracing.recorder import Recorder
from tests.architectures import ARCHITECTURES
from tests.marks import needs_interpreter
from tests.test_huggingface import EVERYTHING, SMALL, SPARSE, continued, make_model, prompt

SOURCES = (0, 0, 2, 0)
SHARED = EVERYTHING | {"layer_sources": SOURCES}
BACKENDS = ["torch", "numba"]


@pytest.fixture
def model() -> LlamaForCausalLM:
    return make_model(num_hidden_layers=4)


@contextmanager
def dense(model: PreTrainedModel, sources: tuple[int, ...] = SOURCES) -> Iterator[PreTrainedModel]:
    """The model without ArkCache, whose layers take the projected keys and values of others."""
    twin = copy.deepcopy(model)
    arkcache.detach(twin)
    made: dict[tuple[int, str], Tensor] = {}
    for number, layer in enumerate(twin.model.layers):
        for name in ("k_proj", "v_proj"):

            def take(
                _module: nn.Module, _given: Any, output: Tensor, at: Any = (number, name)
            ) -> Tensor:
                made[at] = output
                return made[sources[at[0]], at[1]]

            getattr(layer.self_attn, name).register_forward_hook(take)
    yield twin


def logits_of(model: PreTrainedModel, cache: Any, ids: Tensor, cuts: list[int]) -> Tensor:
    """Logits of all tokens [batch, tokens, vocabulary], given in parts."""
    parts = [
        model(ids[:, first:last], past_key_values=cache).logits
        for first, last in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True)
    ]
    return torch.cat(parts, dim=1)


# -- what is attended -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", [EVERYTHING, SMALL | {"budget_tokens": None}])
def test_equals_a_dense_model(
    model: LlamaForCausalLM, settings: dict[str, Any], backend: str
) -> None:
    """A prompt, chunks of it, and decode steps through sealed pages."""
    ids, cuts = prompt(90, batch=2), [30, 50, 51, *range(52, 90)]
    with torch.no_grad():
        cache = ArkCache(model, **settings, layer_sources=SOURCES, backend=backend)
        given = logits_of(model, cache, ids, cuts)
        plain = logits_of(model, ArkCache(model, **settings, backend=backend), ids, cuts)
        with dense(model) as twin:
            expected = logits_of(twin, DynamicCache(), ids, cuts)
    torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-3)
    assert (plain - expected).abs().max() > 1
    cache.check_integrity()


@pytest.mark.parametrize("settings", [SPARSE, SPARSE | {"backend": "torch"}])
def test_sources_of_their_own_change_nothing(
    model: LlamaForCausalLM, settings: dict[str, Any]
) -> None:
    outputs = [
        continued(
            model,
            ArkCache(model, **settings, layer_sources=sources),
            prompt(100),
            return_dict_in_generate=True,
            output_logits=True,
        )
        for sources in (None, (0, 1, 2, 3))
    ]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert torch.equal(torch.stack(outputs[0].logits), torch.stack(outputs[1].logits))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", [{}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generating_padded_batches(
    model: LlamaForCausalLM, how: dict[str, Any], backend: str
) -> None:
    ids = prompt(40, batch=2)
    ids[0, :13] = 0
    given = {"attention_mask": (ids != 0).long(), **how}
    cache = ArkCache(model, **SHARED, backend=backend)
    output = continued(model, cache, ids, **given)
    with dense(model) as twin:
        assert torch.equal(output, continued(twin, None, ids, **given))
    cache.check_integrity()


@needs_interpreter
@pytest.mark.slow
def test_kernels_of_a_gpu(model: LlamaForCausalLM) -> None:
    ids = prompt(30)
    settings = SHARED | {"backend": "triton", "index": "cuboid-mean", "num_recent_tokens": 4}
    with torch.no_grad():
        given = logits_of(model, ArkCache(model, **settings), ids, [26, 27, 28, 29])
        with dense(model) as twin:
            expected = twin(ids).logits
    torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-3)


@needs_interpreter
@pytest.mark.slow
def test_steps_that_are_counted_before_they_are_launched(model: LlamaForCausalLM) -> None:
    """As graphs replay them."""
    settings = SHARED | {"backend": "triton", "index": "cuboid-mean", "num_recent_tokens": 4}
    ids, cache = prompt(20), ArkCache(model, **settings)
    with cache.graphed(model):
        given = continued(model, cache, ids, max_new_tokens=6)
    with dense(model) as twin:
        assert torch.equal(given, continued(twin, None, ids, max_new_tokens=6))
    assert cache.managers[0].steps is not None
    assert cache.managers[0].steps.recordings is not None
    cache.check_integrity()


def test_models_that_share_by_themselves() -> None:
    """Gemma 3n hands on the keys of a layer that stores, tag and all: nothing needs to be set."""
    model = ARCHITECTURES["gemma3n"].build()
    cache = ArkCache(model, **EVERYTHING)
    assert cache._core.num_paged_layers == 1
    ids = prompt(60)
    assert torch.equal(continued(model, cache, ids), continued(model, DynamicCache(), ids))
    # The one that stores, and one that attends it as well.
    assert cache.stats().decode_steps == 2 * (24 - 2)


# -- what a cache does ----------------------------------------------------------------------------


def test_bytes_are_those_of_the_layers_that_store(model: LlamaForCausalLM) -> None:
    shape, ids = CacheShape(4, 2, 16, 16, torch.float32), prompt(300)
    plain, shared = (
        ArkCache(model, **SPARSE, layer_sources=sources) for sources in (None, SOURCES)
    )
    for cache in (plain, shared):
        continued(model, cache, ids)
        plan = plan_memory(cache.config, shape, 323, device="cpu")
        stats = cache.stats()
        assert stats.host_bytes == plan.host_bytes
        assert stats.device_bytes == pytest.approx(plan.device_bytes, rel=0.05)
    assert shared.stats().host_bytes * 2 == plain.stats().host_bytes
    assert shared.stats().decode_steps == plain.stats().decode_steps == 4 * 22


def test_evidence_of_all_that_attend_adds_up(model: LlamaForCausalLM) -> None:
    """Pages of two formats are demoted by what they receive from every layer."""
    settings = SPARSE | {"coarse_key_bits": 4, "demote_after": 8, "backend": "torch"}
    settings |= {"key_bits": 8, "value_bits": 8, "group_size": 8}
    for sources, layers in (((0, 1, 2, 3), 1), ((0, 0, 0, 0), 4)):
        cache = ArkCache(model, **settings, layer_sources=sources)
        continued(model, cache, prompt(60))
        (manager,) = cache.managers
        steps = manager.layer_state(0)["importance_steps"]
        assert int(steps) == layers * 22


@pytest.mark.parametrize("backend", BACKENDS)
def test_crop_copies_and_pickles(model: LlamaForCausalLM, backend: str) -> None:
    ids = prompt(120)
    cache = ArkCache(model, **SPARSE, layer_sources=SOURCES, backend=backend)
    continued(model, cache, ids[:, :100])
    cache.crop(100 - cache.get_seq_length())
    copies = [cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    fresh = ArkCache(model, **SPARSE, layer_sources=SOURCES, backend=backend)
    with torch.no_grad():
        model(ids[:, :100], past_key_values=fresh)
        fresh.end_prompt()
        outputs = [logits_of(model, one, ids[:, 100:], [1, 5, 6]) for one in (fresh, *copies)]
    for output, one in zip(outputs[1:], copies, strict=True):
        torch.testing.assert_close(output, outputs[0])
        assert [layer.get_seq_length() for layer in one.layers] == [120] * 4
        keys = [layer.keys for layer in one.layers]
        assert torch.equal(keys[1], keys[0])
        assert not torch.equal(keys[2], keys[0])


def test_saved_and_loaded(model: LlamaForCausalLM, tmp_path: Path) -> None:
    cache = ArkCache(model, **SPARSE, layer_sources=SOURCES)
    ids = continued(model, cache, prompt(80))
    cache.save(tmp_path / "saved")
    loaded = ArkCache.load(model, tmp_path / "saved", budget_tokens=40)
    assert loaded.config.layer_sources == SOURCES
    assert torch.equal(continued(model, loaded, ids), continued(model, cache, ids))
    loaded.check_integrity()
    with pytest.raises(SessionError, match=r"saved with layer_sources=\(0, 0, 2, 0\)"):
        ArkCache.load(model, tmp_path / "saved", layer_sources=None)


def test_prefixes(model: LlamaForCausalLM) -> None:
    prefixes = PrefixCache(model, **SPARSE, layer_sources=SOURCES)
    ids = prompt(80)
    first = prefixes.begin(ids[0].tolist())
    with torch.no_grad():
        model(ids, past_key_values=first)
    prefixes.keep(first, ids[0].tolist())
    again = prefixes.begin(ids[0].tolist())
    assert again.get_seq_length() == 76
    assert again.next_is_exact
    whole = ArkCache(model, **SPARSE, layer_sources=SOURCES)
    assert torch.equal(continued(model, again, ids), continued(model, whole, ids))
    assert not again.next_is_exact


def test_other_settings_while_it_is_empty(model: LlamaForCausalLM) -> None:
    cache, ids = ArkCache(model, **EVERYTHING), prompt(40)
    cache.config = CacheConfig(**SHARED)
    shared = continued(model, cache, ids)
    assert cache.stats().total_tokens == 2 * 63
    cache.reset()
    assert torch.equal(continued(model, cache, ids), shared)
    cache.reset()
    cache.config = CacheConfig(**EVERYTHING)
    assert torch.equal(continued(model, cache, ids), continued(model, DynamicCache(), ids))
    assert cache.stats().total_tokens == 4 * 63


def test_what_is_handed_on_is_let_go(model: LlamaForCausalLM) -> None:
    cache = ArkCache(model, **SHARED)
    with torch.no_grad():
        model(prompt(40), past_key_values=cache)
        assert not cache._core.handed
        handle = model.model.layers[1].register_forward_hook(_break)
        with pytest.raises(RuntimeError, match="in the middle"), cache.atomic():
            model(prompt(2), past_key_values=cache)
    handle.remove()
    assert not cache._core.handed
    assert [layer.get_seq_length() for layer in cache.layers] == [40] * 4


def _break(*_: Any) -> None:
    raise RuntimeError("in the middle")


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ((1, 1), "layer 0 cannot attend layer 1"),
        ((0, -1), "layer 1 cannot attend layer -1"),
        ((0, 0, 1), "layer 2 attends layer 1, which stores nothing; expected .* layer 0"),
        ((), "expected the number of a layer"),
        ((0, True), "expected the number of a layer"),
        ((0, 0.0), "expected the number of a layer"),
        ("00", "expected the number of a layer"),
        (2, "expected the number of a layer"),
    ],
)
def test_impossible_sources(sources: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheConfig(layer_sources=sources)


def test_a_list_becomes_a_tuple() -> None:
    assert CacheConfig(layer_sources=[0, 0]).layer_sources == (0, 0)


def test_another_number_of_layers(model: LlamaForCausalLM) -> None:
    with pytest.raises(ConfigError, match="has 2 entries: expected one for each of the 4 layers"):
        ArkCache(model, layer_sources=(0, 0))
    assert model.config._attn_implementation != "arkcache"
    with pytest.raises(ConfigError, match="has 2 entries"):
        plan_memory(CacheConfig(layer_sources=(0, 0)), CacheShape(4, 2, 16, 16, torch.float32), 99)


def test_layers_of_other_kinds() -> None:
    model = ARCHITECTURES["gemma3"].build()
    with pytest.raises(ConfigError, match=r"layer 1 cannot attend layer 0, .*SlidingWindow"):
        ArkCache(model, layer_sources=(0, 0))


def test_layers_of_other_shapes(model: LlamaForCausalLM) -> None:
    """The probe says what layers store."""
    ArkCache(model)
    shapes = ArkCache(model)._core.attached().shapes
    shapes[1] = dataclasses.replace(shapes[1], num_kv_heads=4)
    with pytest.raises(ConfigError, match="layer 1 cannot attend layer 0, which stores something"):
        ArkCache(model, **SHARED)


@pytest.mark.filterwarnings("ignore:ArkCache in compat mode")
def test_compat_mode() -> None:
    model = ARCHITECTURES["doge"].build()
    if ArkCache(model).mode != "compat":
        pytest.skip("this release pages it")
    with pytest.raises(ConfigError, match="runs in compat mode"):
        ArkCache(model, layer_sources=(0, 0))


def test_a_manager_keeps_what_stores() -> None:
    with pytest.raises(ConfigError, match="keeps the layers that store"):
        KVCacheManager(4, 2, 16, CacheConfig(layer_sources=SOURCES))


def test_a_trace(model: LlamaForCausalLM) -> None:
    with (
        pytest.raises(InputError, match="several layers attend the same"),
        ArkCache(model, **SHARED).trace(Recorder()),
    ):
        pass


# -- from outside ---------------------------------------------------------------------------------


def test_sources_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sources.json").write_text('{"layer_sources": [0, 0, 2, 0], "kl": 0.1}')
    Path("arkcache.toml").write_text('layer_sources = "@sources.json"')
    assert arkcache.load_config(environ={}).layer_sources == SOURCES
    Path("arkcache.toml").write_text("layer_sources = [0, 0]")
    assert arkcache.load_config(environ={}).layer_sources == (0, 0)
    variable = {"ARKCACHE_LAYER_SOURCES": "@sources.json"}
    assert arkcache.load_config(environ=variable).layer_sources == SOURCES
    for text, message in (
        ("@nowhere.json", "cannot read nowhere.json"),
        ("@arkcache.toml", "expected what arkcache share wrote"),
        ("many", "expected a list of layers"),
        ("[0, 1.5]", "expected a list of layers"),
    ):
        with pytest.raises(ConfigError, match=message):
            arkcache.load_config(environ={"ARKCACHE_LAYER_SOURCES": text})
    Path("other.json").write_text("[0]")
    with pytest.raises(ConfigError, match="expected a JSON object with layer_sources"):
        arkcache.load_config(environ={"ARKCACHE_LAYER_SOURCES": "@other.json"})


def test_described() -> None:
    sizes = ["--layers", "4", "--kv-heads", "2", "--head-dim", "64", "--format", "K16V16"]
    runner, plans = CliRunner(), []
    for more in ([], ["--set", "layer_sources=[0, 0, 2, 0]"]):
        done = runner.invoke(cli.app, ["describe", *sizes, "--json", *more])
        assert done.exit_code == 0, done.output
        plans.append(json.loads(done.stdout)["formats"]["K16V16"])
    assert plans[1]["host_bytes"] * 2 == plans[0]["host_bytes"]
    assert plans[1]["full_bytes"] == plans[0]["full_bytes"]
    done = runner.invoke(cli.app, ["describe", *sizes, "--set", "layer_sources=[0, 0]"])
    assert done.exit_code == 1
    assert "expected 4 layers" in done.stderr
