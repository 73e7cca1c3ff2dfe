"""Evictors on the path that users run: a model's `generate()` with an `ArkCache`."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from arkcache import ArkCache, ConfigError, InputError, SessionError
from arkcache.layers.paged import PagedLayer
from arkcache.methods import RETENTIONS, PyramidKV, SnapKV
from tests.test_huggingface import continued, make_model, prompt

SMALL: dict[str, Any] = {
    "page_size": 1,
    "num_sink_tokens": 4,
    "num_recent_tokens": 8,
    "budget_tokens": 40,
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model()


def lost(cache: ArkCache) -> list[Tensor]:
    """Which pages each layer has given up [rows, pages]."""
    held = []
    for layer in cache.managers[0]._layers:
        assert isinstance(layer, PagedLayer)
        held.append(torch.from_numpy(layer.parts.store.gone(int(layer.tokens.sealed.max()))))
    return held


@pytest.mark.parametrize("name", RETENTIONS)
def test_a_generation_keeps_the_budget(model: LlamaForCausalLM, name: str) -> None:
    cache = ArkCache(model, retention=name, **SMALL)
    assert cache.lossless
    said = continued(model, cache, prompt(120))
    assert said.shape[1] == 144
    stats = cache.stats()
    assert stats.attended_tokens <= 40 * 3
    assert stats.pages_lost > 3 * 2 * 60
    assert not cache.lossless
    cache.check_integrity()
    if not name.endswith("kv"):  # those keep what is generated
        assert stats.total_tokens <= 40 * 3
    again = ArkCache(model, retention=name, **SMALL)
    assert torch.equal(said, continued(model, again, prompt(120)))


@pytest.mark.parametrize("name", RETENTIONS)
def test_a_budget_that_holds_everything_says_what_the_full_cache_says(
    model: LlamaForCausalLM, name: str
) -> None:
    ids = prompt(60, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    said = []
    for cache in (
        DynamicCache(),
        ArkCache(model, **(SMALL | {"retention": name, "budget_tokens": 400})),
    ):
        said.append(continued(model, cache, ids, attention_mask=mask))
    assert torch.equal(*said)
    assert cache.lossless


def test_a_prompt_is_seen_however_it_is_read(model: LlamaForCausalLM) -> None:
    """By the base implementation, which attends the first part, and by pages, which attend on."""
    ids, after = prompt(100), []
    for cuts in (100, 30):
        cache = ArkCache(model, retention=SnapKV(window=16), **SMALL)
        with torch.no_grad():
            for part in ids.split(cuts, dim=1):
                model(part, past_key_values=cache)
            cache.end_prompt()
            model(prompt(1, seed=2), past_key_values=cache)
        after.append(lost(cache))
    for one, other in zip(*after, strict=True):
        assert torch.equal(one, other)
        assert one.sum() > 0
        assert not one[:, -8:].any()


def test_pyramids_give_the_first_layers_more(model: LlamaForCausalLM) -> None:
    cache = ArkCache(model, retention=PyramidKV(window=8), **SMALL)
    budgets = cache.config.budget_tokens
    assert isinstance(budgets, tuple)
    assert sum(budgets) == 3 * 40
    continued(model, cache, prompt(120), max_new_tokens=3)
    counts = [int(one.sum()) for one in lost(cache)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    cache.set_budget(60)
    assert sum(cache.config.budget_tokens) == 3 * 60  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RETENTIONS)
def test_beams_copies_and_pickles(model: LlamaForCausalLM, name: str) -> None:
    cache = ArkCache(model, retention=name, **SMALL)
    continued(model, cache, prompt(80), num_beams=3, max_new_tokens=8)
    cache.check_integrity()
    cache = ArkCache(model, retention=name, **SMALL)
    said = continued(model, cache, prompt(80), max_new_tokens=4)
    clones = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    ends = [continued(model, one, said, max_new_tokens=6) for one in (cache, *clones)]
    assert all(torch.equal(ends[0], end) for end in ends[1:])


def test_drafts_that_are_rejected_may_be_taken_back(model: LlamaForCausalLM) -> None:
    ids = prompt(40).repeat(1, 3)
    cache = ArkCache(model, retention="snapkv", **SMALL)
    continued(model, cache, ids, prompt_lookup_num_tokens=4)
    cache.check_integrity()


def test_a_crop_into_what_is_lost_says_so(model: LlamaForCausalLM) -> None:
    cache = ArkCache(model, retention="streamingllm", **SMALL)
    said = continued(model, cache, prompt(80))
    with pytest.raises(InputError, match="are lost"):
        cache.crop(50)
    assert cache.get_seq_length() == said.shape[1] - 1
    continued(model, cache, said, max_new_tokens=2)


def test_saving_is_refused(model: LlamaForCausalLM, tmp_path: Any) -> None:
    cache = ArkCache(model, retention="h2o", **SMALL)
    continued(model, cache, prompt(50), max_new_tokens=2)
    with pytest.raises(SessionError, match="retention='h2o'"):
        cache.save(tmp_path / "saved")


def test_a_mistake_leaves_the_model_alone() -> None:
    fresh = make_model()
    before = fresh.config._attn_implementation
    with pytest.raises(ConfigError, match="expected one of 'h2o'"):
        ArkCache(fresh, retention="snap")
    assert fresh.config._attn_implementation == before
