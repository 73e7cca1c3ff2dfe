"""Quantised pages in the hands of a transformers user: every way to generate, every limit."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

import arkcache
from arkcache import ArkCache, CacheConfig, ConfigError, InputError
from arkcache.formats import PageLayout
from arkcache.kernels.torch_hadamard import rotate
from arkcache.kernels.torch_pages import PagePacker
from tests.test_huggingface import SMALL, continued, make_model, prompt

LIMITED: dict[str, Any] = {**SMALL, "stream_block_tokens": 16}

FORMATS: list[dict[str, Any]] = [
    {"key_bits": 4, "value_bits": 2},
    {"key_bits": 4, "value_bits": 4, "rotation": "both"},
    {"key_bits": 8, "value_bits": 4, "packed_slots": True},
    {"key_bits": 4, "value_bits": 4, "num_dense_layers": 1},
    {"key_bits": 2, "value_bits": 2, "budget_tokens": None},
]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "chunks": {"prefill_chunk_size": 32},
    "beams": {"num_beams": 3},
    "several": {"num_beams": 4, "num_return_sequences": 2},
    "look-up": {"prompt_lookup_num_tokens": 3},
    "assisted": {},
}


@pytest.fixture
def model() -> LlamaForCausalLM:
    return make_model()


def settings_of(page_format: dict[str, Any], **settings: Any) -> CacheConfig:
    return CacheConfig(
        **(SMALL | {"group_size": 16, "budget_tokens": 256} | page_format | settings)
    )


class QuantisedLayer(DynamicLayer):
    """The oracle: a full layer that quantises every page, where it lies, once it is sealed."""

    def __init__(self, config: CacheConfig) -> None:
        super().__init__()
        self.config, self.sealed = config, 0
        layout = PageLayout(config.format, config.page_size, 16, 16, 4)
        self.packer = PagePacker(layout, torch.float32)

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        past = self.get_seq_length()
        keys, values = super().update(key.clone(), value.clone(), *args, **kwargs)
        self.seal()
        return (key, value) if past == 0 else (keys, values)

    def seal(self) -> None:
        size, length = self.config.page_size, self.get_seq_length()
        first, self.sealed = self.sealed, (length - self.config.num_recent_tokens) // size
        tokens = slice(first * size, self.sealed * size)
        if tokens.start < tokens.stop:
            states = (self.keys[:, :, tokens], self.values[:, :, tokens])
            turn = rotate if self.config.rotation == "both" else torch.clone
            pages = (turn(part).unflatten(2, (-1, size)) for part in states)
            for part, page in zip(
                states, self.packer.unpack(self.packer.pack(*pages)), strict=True
            ):
                part.copy_(turn(page.flatten(2, 3)))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        left = (self.get_seq_length() - self.config.num_recent_tokens) // self.config.page_size
        self.sealed = min(self.sealed, left)


def oracle(model: LlamaForCausalLM, config: CacheConfig) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [QuantisedLayer(config) for _ in cache.layers]
    return cache


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("page_format", FORMATS, ids=range(len(FORMATS)))
def test_tokens_are_those_of_a_full_cache_that_quantises(
    model: LlamaForCausalLM, page_format: dict[str, Any], mode: str
) -> None:
    ids = prompt(90, batch=1 if mode in ("look-up", "assisted") else 2)
    config = settings_of(page_format)
    how = {**MODES[mode]} | ({"assistant_model": make_model(seed=5)} if mode == "assisted" else {})
    expected = continued(model, oracle(model, config), ids, **how)
    cache = ArkCache(model, config)
    assert torch.equal(continued(model, cache, ids, **how), expected)
    cache.check_integrity()
    assert not torch.equal(
        expected, continued(model, DynamicCache(config=model.config), ids, **how)
    )


@pytest.mark.parametrize("mode", MODES)
def test_two_formats_go_through_every_mode(model: LlamaForCausalLM, mode: str) -> None:
    config = settings_of({"coarse_value_bits": 2, "demote_after": 2}, budget_tokens=40)
    ids = prompt(90, batch=1 if mode in ("look-up", "assisted") else 2)
    how = {**MODES[mode]} | ({"assistant_model": make_model(seed=5)} if mode == "assisted" else {})
    cache = ArkCache(model, config)
    output = continued(model, cache, ids, **how)
    cache.check_integrity()
    assert cache.stats().pages_demoted > 0 or mode == "assisted"  # which takes no steps of one
    cache.reset()
    assert torch.equal(continued(model, cache, ids, **how), output)


def test_a_next_turn_selected_sequences_and_a_crop(model: LlamaForCausalLM) -> None:
    ids = prompt(60, batch=3)
    cache = ArkCache(model, settings_of({"key_bits": 4, "value_bits": 2}, budget_tokens=40))
    output = continued(model, cache, ids)
    cache.batch_select_indices(torch.tensor([2, 0]))
    output = continued(model, cache, torch.cat((output[[2, 0]], prompt(9, batch=2)), dim=1))
    cache.check_integrity()
    cache.crop(50)
    again = continued(model, cache, torch.cat((output[:, :50], prompt(9, batch=2)), dim=1))
    cache.check_integrity()
    assert again.shape == (2, 50 + 9 + 24)


# -- limits -------------------------------------------------------------------------------------


def mixed_shapes(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The last layer has twice the KV heads of the others."""
    wide = make_model(num_key_value_heads=4)
    model.model.layers[2].self_attn = wide.model.layers[2].self_attn
    return model


def managers(cache: ArkCache) -> list[Any]:
    return list(cache._core.managers.values())


def test_limits_are_of_the_whole_cache(model: LlamaForCausalLM) -> None:
    """Groups of layers share them by what they store: two layers of 2 KV heads, one of 4."""
    cache = ArkCache(mixed_shapes(model), **LIMITED, device_bytes=300_000, host_bytes=800_000)
    continued(model, cache, prompt(90))
    assert sorted(one.config.device_bytes for one in managers(cache)) == [150_000, 150_000]
    assert sum(one.config.host_bytes for one in managers(cache)) == 800_000
    assert cache.stats().device_bytes <= 300_000


def test_layers_without_a_budget_take_no_share(model: LlamaForCausalLM) -> None:
    settings = {**LIMITED, "budget_tokens": (None, None, 40), "device_bytes": 300_000}
    cache = ArkCache(mixed_shapes(model), **settings)
    continued(model, cache, prompt(90))
    assert 300_000 in [one.config.device_bytes for one in managers(cache)]


def test_limits_in_compat_mode(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda _self: False)
    with pytest.warns(UserWarning, match="compat mode"):
        cache = ArkCache(model, **LIMITED, device_bytes=120_000)
    continued(model, cache, prompt(90))
    assert cache.stats().device_bytes <= 120_000


def test_a_batch_that_does_not_fit_is_refused_whole(model: LlamaForCausalLM) -> None:
    """Before the first layer stores anything, though only the last group is too large."""
    cache = ArkCache(mixed_shapes(model), **LIMITED, device_bytes=300_000)
    with pytest.raises(ConfigError, match="device_bytes"):
        continued(model, cache, prompt(90, batch=64))
    assert cache.get_seq_length() == 0
    continued(model, cache, prompt(90))
    cache.check_integrity()


def test_beams_that_do_not_fit_change_nothing() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = Gemma3ForCausalLM(config).eval()
    cache = ArkCache(model, **SMALL, stream_block_tokens=16, device_bytes=60_000)
    model(prompt(60), past_key_values=cache)
    with pytest.raises(ConfigError, match="sequences"):
        cache.batch_repeat_interleave(64)
    assert cache.layers[0].keys.shape[0] == 1
    assert managers(cache)[0].batch == 1
    cache.batch_repeat_interleave(2)
    model(prompt(1, batch=2), past_key_values=cache)
    cache.check_integrity()


# -- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"value_bits": 4, "group_size": 12}, "group_size=12 does not divide values of 16"),
        ({"key_bits": 3}, "key_bits=3"),
    ],
)
def test_what_does_not_fit_the_layers_is_refused_at_once(
    model: LlamaForCausalLM, settings: dict[str, Any], message: str
) -> None:
    before = model.config._attn_implementation
    with pytest.raises(ConfigError, match=message):
        ArkCache(model, **SMALL, **settings)
    assert model.config._attn_implementation == before
    assert type(model.config._attn_implementation) is str


def test_an_empty_cache_takes_other_settings(model: LlamaForCausalLM) -> None:
    cache = ArkCache(model, **SMALL)
    cache.config = settings_of({"key_bits": 4, "value_bits": 4})
    model(prompt(60), past_key_values=cache)
    before = cache.config
    for wrong, error in (
        (settings_of({"key_bits": 2}), InputError),
        ({"key_bits": 2}, InputError),
    ):
        with pytest.raises(error, match="holds 60 tokens in K4V4"):
            cache.config = wrong  # type: ignore[assignment]
        assert cache.config is before
    cache.reset()
    for wrong in (
        settings_of({"value_bits": 2}, group_size=12),
        CacheConfig(**SMALL, budget_tokens=(40, 40)),
        {"key_bits": 2},
    ):
        with pytest.raises(ConfigError):
            cache.config = wrong  # type: ignore[assignment]
        assert cache.config is before
    cache.config = settings_of({"key_bits": 2, "value_bits": 2})
    model(prompt(60), past_key_values=cache)
    cache.check_integrity()
    arkcache.detach(model)


def test_compat_mode_gathers_what_the_pages_hold(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotated and quantised in the tiers, the model's own basis outside."""
    ids, config = prompt(60), settings_of(FORMATS[1])
    full = oracle(model, config)
    model(ids, past_key_values=full)
    expected = model(ids[:, :1], past_key_values=full).logits
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda _self: False)
    with pytest.warns(UserWarning, match="compat mode"):
        cache = ArkCache(model, config)
    model(ids, past_key_values=cache)
    given: Tensor = model(ids[:, :1], past_key_values=cache).logits
    torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-3)
