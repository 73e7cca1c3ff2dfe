"""ArkCache in the hands of a transformers user, beyond what every architecture is tested for."""

import gc
import json
import pickle
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

import arkcache
from arkcache import ArkCache, CacheConfig
from arkcache.huggingface import attention
from arkcache.huggingface.attachment import attachment_in

SMALL = {"page_size": 4, "num_sink_tokens": 4, "num_recent_tokens": 8, "num_dense_layers": 0}
EVERYTHING = {**SMALL, "budget_tokens": 4096}
SPARSE = {**SMALL, "budget_tokens": 40}


def make_model(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | settings))).eval()


def prompt(tokens: int = 60, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(1, 128, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def continued(model: PreTrainedModel, cache: Any, ids: Tensor, **settings: Any) -> Tensor:
    given = {"max_new_tokens": 24, "do_sample": False} | settings
    return model.generate(ids, past_key_values=cache, **given)


@pytest.fixture
def model() -> LlamaForCausalLM:
    return make_model()


# -- a budget ---------------------------------------------------------------------------------


def test_small_budget_attends_less_is_finite_and_deterministic(model: LlamaForCausalLM) -> None:
    outcomes = []
    for _ in range(2):
        cache = ArkCache(model, **SPARSE)
        result = continued(
            model, cache, prompt(300), return_dict_in_generate=True, output_logits=True
        )
        outcomes.append((result.sequences, torch.stack(result.logits)))
        stats = cache.stats()
        assert stats.attended_tokens <= 40 * 3 < stats.total_tokens == 323 * 3
        assert stats.pages_recalled > 0
        assert outcomes[-1][1].isfinite().all()
        cache.check_integrity()
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])


def test_device_bytes_do_not_grow_with_the_context(model: LlamaForCausalLM) -> None:
    sizes = set()
    for tokens in (100, 400, 1600):
        cache = ArkCache(model, **SPARSE)
        continued(model, cache, prompt(tokens), max_new_tokens=3)
        sizes.add(cache.stats().device_bytes)
    assert len(sizes) == 1


def test_a_layer_can_be_dense_and_budgets_differ(model: LlamaForCausalLM) -> None:
    cache = ArkCache(model, **{**SMALL, "num_dense_layers": 1}, budget_tokens=(40, 40, (24, 60)))
    continued(model, cache, prompt(300))
    # Layer 0 attends all; the heads of layer 2 attend 24 and 60 at most.
    assert 323 < cache.stats().attended_tokens <= 323 + 40 + (24 + 60) / 2


def test_chunked_prefill_makes_no_mask_and_bounds_the_device_tier(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = []
    original = attention.mask_function

    def spy(**given: Any) -> Any:
        masks.append(original(**given))
        return masks[-1]

    monkeypatch.setitem(attention.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "arkcache", spy)
    expected = continued(model, DynamicCache(config=model.config), prompt(500))
    cache = ArkCache(model, **EVERYTHING, stream_block_tokens=64)
    masks.clear()
    assert torch.equal(continued(model, cache, prompt(500), prefill_chunk_size=100), expected)
    assert masks
    assert all(mask is None for mask in masks)
    stats = cache.stats()
    block_bytes = 64 * 2 * 2 * 16 * 4
    assert stats.bytes_streamed > block_bytes
    tier = next(iter(cache._core.managers.values()))._device_tier
    assert tier is not None
    assert [key.shape[2] for key, _ in tier.stream_blocks] == [64]


# -- attach and detach --------------------------------------------------------------------------


def test_two_caches_take_turns_on_one_model(model: LlamaForCausalLM) -> None:
    prompts = [prompt(seed=2), prompt(seed=3)]
    expected = [continued(model, DynamicCache(config=model.config), ids) for ids in prompts]
    caches = [ArkCache(model, **EVERYTHING) for _ in prompts]
    texts = list(prompts)
    for _ in range(4):
        for number, cache in enumerate(caches):
            texts[number] = continued(model, cache, texts[number], max_new_tokens=6)
    assert all(torch.equal(text, wanted) for text, wanted in zip(texts, expected, strict=True))


def test_two_models_do_not_meet() -> None:
    models = [make_model(seed=1), make_model(seed=2, num_key_value_heads=4)]
    expected = [continued(one, DynamicCache(config=one.config), prompt()) for one in models]
    caches = [ArkCache(one, **EVERYTHING) for one in models]
    arkcache.detach(models[1])
    assert torch.equal(continued(models[0], caches[0], prompt()), expected[0])
    assert torch.equal(
        continued(models[1], DynamicCache(config=models[1].config), prompt()), expected[1]
    )


def test_attached_model_saves_and_loads_as_if_it_were_not(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "before")
    ArkCache(model, **EVERYTHING)
    model.save_pretrained(tmp_path / "attached")
    before, attached = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("before", "attached")
    )
    assert attached == before
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "attached")
    assert loaded.config._attn_implementation == "sdpa"


def test_a_copy_of_an_attached_model_is_attached_on_its_own(model: LlamaForCausalLM) -> None:
    expected = continued(model, DynamicCache(config=model.config), prompt())
    ArkCache(model, **EVERYTHING)
    import copy

    clone = copy.deepcopy(model)
    assert attachment_in(clone.config) is not attachment_in(model.config)
    arkcache.detach(model)
    assert torch.equal(continued(clone, ArkCache(clone, **EVERYTHING), prompt()), expected)


def test_a_pickled_cache_goes_on_in_another_process(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    cache = ArkCache(model, **EVERYTHING)
    text = continued(model, cache, prompt(), max_new_tokens=5)
    expected = continued(model, DynamicCache(config=model.config), prompt(), max_new_tokens=12)
    arkcache.detach(model)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "cache").write_bytes(pickle.dumps((cache, text)))
    code = """
import pickle, sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/model")
cache, text = pickle.load(open(sys.argv[1] + "/cache", "rb"))
try:
    model(text[:, -1:], past_key_values=cache)
except ValueError as error:
    assert "cache.attach(model)" in str(error)
else:
    raise SystemExit("a cache without its model was accepted")
cache.attach(model)
print(model.generate(text, past_key_values=cache, max_new_tokens=7, do_sample=False).tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected.tolist()


def test_memory_goes_with_the_last_reference(model: LlamaForCausalLM) -> None:
    cache = ArkCache(model, **SPARSE)
    continued(model, cache, prompt(200))
    host = weakref.ref(next(iter(cache._core.managers.values()))._host)
    gc.disable()
    try:
        del cache
        assert host() is None
    finally:
        gc.enable()


def test_no_gradient_history_is_kept(model: LlamaForCausalLM) -> None:
    cache = ArkCache(model, **SPARSE)
    for ids in (prompt(30), prompt(1), prompt(1)):
        model(ids, past_key_values=cache)
    tier = next(iter(cache._core.managers.values()))._device_tier
    assert tier is not None
    assert not tier.pool.requires_grad


# -- never silently wrong -------------------------------------------------------------------------


def test_a_step_that_nobody_attended_is_an_error(model: LlamaForCausalLM) -> None:
    cache = ArkCache(model, **EVERYTHING)
    model(prompt(20), past_key_values=cache)
    arkcache.detach(model)
    with pytest.raises(arkcache.UnconsumedStepError, match="layer 0 was updated"):
        model(prompt(1), past_key_values=cache)


def test_an_interrupted_step_does_not_poison_the_next_conversation(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = continued(model, DynamicCache(config=model.config), prompt())
    cache = ArkCache(model, **EVERYTHING)
    model(prompt(20), past_key_values=cache)

    def interrupt(*_args: Any, **_given: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1].self_attn.o_proj, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(prompt(1), past_key_values=cache)
    cache.reset()
    assert torch.equal(continued(model, cache, prompt()), expected)


def test_a_mask_of_the_user_is_honoured(model: LlamaForCausalLM) -> None:
    """A 4D mask that hides some of the past gives the same logits as with the full cache."""
    ids, step = prompt(30), prompt(3, seed=9)
    hidden = torch.ones(1, 1, 3, 33, dtype=torch.bool).tril(30)
    hidden[..., 5:17] = False
    logits = []
    for cache in (DynamicCache(config=model.config), ArkCache(model, **EVERYTHING)):
        model(ids, past_key_values=cache)
        logits.append(model(step, attention_mask=hidden, past_key_values=cache).logits)
        one = torch.cat((hidden[:, :, -1:], torch.ones(1, 1, 1, 1, dtype=torch.bool)), dim=3)
        logits.append(model(step[:, :1], attention_mask=one, past_key_values=cache).logits)
    torch.testing.assert_close(logits[2:], logits[:2], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(logits[0], model(torch.cat((ids, step), 1)).logits[:, -3:], atol=1e-3)


def test_compat_mode_is_exact_says_why_and_warns_once() -> None:
    config = GPTJConfig(
        vocab_size=128, n_positions=256, n_embd=32, n_layer=2, n_head=2, rotary_dim=8
    )
    torch.manual_seed(0)
    model = GPTJForCausalLM(config).eval()
    expected = continued(model, DynamicCache(config=model.config), prompt(), pad_token_id=0)
    with pytest.warns(UserWarning, match="compat mode: GPTJForCausalLM computes its attention"):
        cache = ArkCache(model, **SPARSE)
    assert (cache.mode, "attention interface" in str(cache.reason)) == ("compat", True)
    assert torch.equal(continued(model, cache, prompt(), pad_token_id=0), expected)
    cache.check_integrity()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ArkCache(model, **SPARSE).mode == "compat"


# -- bad input ------------------------------------------------------------------------------------


def test_bad_input_leaves_the_model_alone(model: LlamaForCausalLM) -> None:
    calls: list[tuple[Any, type[Exception], str]] = [
        (lambda: ArkCache(model, page_sise=4), arkcache.ConfigError, "page_sise"),
        (lambda: ArkCache(model, budget_tokens=8), arkcache.ConfigError, "budget_tokens=8"),
        (lambda: ArkCache(model, CacheConfig(), page_size=4), arkcache.ConfigError, "page_size"),
        (lambda: ArkCache(model, budget_tokens=(400, 400)), arkcache.ConfigError, "3 layers"),
        (lambda: ArkCache(torch.nn.Linear(2, 2)), arkcache.InputError, "Linear"),  # type: ignore[arg-type]
    ]
    for call, kind, message in calls:
        with pytest.raises(kind, match=message):
            call()
        assert type(model.config._attn_implementation) is str


def test_a_model_without_keys_is_refused() -> None:
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = MambaForCausalLM(config)
    with pytest.raises(arkcache.UnsupportedModelError, match="nothing to page"):
        ArkCache(model)


def test_a_context_beyond_the_host_tier_is_refused_before_anything_is_lost(
    model: LlamaForCausalLM,
) -> None:
    ids = prompt(64)
    expected = model(ids).logits[:, -1]
    cache = ArkCache(model, **EVERYTHING, host_bytes=16 * 3 * 4 * 2 * 2 * 16 * 4)
    model(ids[:, :63], past_key_values=cache)
    before = cache.stats()
    with pytest.raises(arkcache.HostTierFullError, match="raise host_bytes"):
        model(prompt(40), past_key_values=cache)
    assert cache.stats() == before
    assert cache.get_seq_length() == 63
    given = model(ids[:, 63:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(given, expected, atol=2e-5, rtol=1e-4)


def test_wrong_crop_is_refused(model: LlamaForCausalLM) -> None:
    cache = ArkCache(model, **EVERYTHING)
    model(prompt(20), past_key_values=cache)
    with pytest.raises(arkcache.InputError, match="holds 20 tokens"):
        cache.crop(-21)
    assert cache.get_seq_length() == 20


# -- modes of torch --------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [SPARSE, EVERYTHING])
def test_inference_mode_may_come_and_go(model: LlamaForCausalLM, budget: dict[str, Any]) -> None:
    """A prompt read in inference mode, steps with and without gradients: all the same cache."""
    ids = prompt(200)
    caches = [ArkCache(model, **budget) for _ in range(2)]
    with torch.inference_mode():
        model(ids[:, :150], past_key_values=caches[0])
    model(ids[:, :150], past_key_values=caches[1])
    for start in range(150, 200):
        step = ids[:, start : start + 1]
        given = model(step, past_key_values=caches[0]).logits
        with torch.no_grad():
            wanted = model(step, past_key_values=caches[1]).logits
        torch.testing.assert_close(given.detach(), wanted)
    for cache in caches:
        cache.check_integrity()


def test_padding_of_another_cache_is_not_taken_over(model: LlamaForCausalLM) -> None:
    ids = prompt(40, batch=2)
    padded = torch.ones(2, 40, dtype=torch.long)
    padded[0, :6] = 0
    model(ids, attention_mask=padded, past_key_values=ArkCache(model, **EVERYTHING))
    cache = ArkCache(model, **EVERYTHING)
    causal = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    model(ids, attention_mask=causal, past_key_values=cache)
    assert cache.stats().total_tokens == 3 * 80


def test_a_later_mask_that_hides_the_past_is_honoured(model: LlamaForCausalLM) -> None:
    ids = prompt(40)
    hiding = torch.ones(1, 41, dtype=torch.long)
    hiding[0, 3:20] = 0
    logits = []
    for cache in (DynamicCache(config=model.config), ArkCache(model, **EVERYTHING)):
        model(ids, past_key_values=cache)
        logits.append(model(ids[:, :1], attention_mask=hiding, past_key_values=cache).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=2e-5, rtol=1e-4)


def test_pages_that_a_mask_hides_are_not_selected(model: LlamaForCausalLM) -> None:
    """The budget goes to what may be attended: enough for it here, so the result is exact."""
    ids = prompt(200)
    visible = torch.zeros(1, 1, 1, 201, dtype=torch.bool)
    visible[..., 40:60] = visible[..., -1] = True
    logits = []
    for cache in (DynamicCache(config=model.config), ArkCache(model, **SPARSE)):
        model(ids, past_key_values=cache)
        logits.append(model(ids[:, :1], attention_mask=visible, past_key_values=cache).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=2e-5, rtol=1e-4)


def test_attaching_leaves_training_flags_alone(model: LlamaForCausalLM) -> None:
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    ArkCache(model, **EVERYTHING)
    assert [module.training for module in model.modules()] == before
