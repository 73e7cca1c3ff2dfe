"""A model whose layers are in several places: what can be seen of it without several devices."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from arkcache import ArkCache

NUM_LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("offloaded", [(1, 2), (0, 1, 2)])
def test_layers_that_wait_on_disk(folder: Path, tmp_path: Path, offloaded: tuple[int, ...]) -> None:
    """Also where the first is among them, so that the model says it is on "meta"."""
    pytest.importorskip("accelerate")
    places = {f"model.layers.{layer}": "cpu" for layer in range(NUM_LAYERS)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu")
    places |= {f"model.layers.{layer}": "disk" for layer in offloaded}
    if 0 in offloaded:
        places["model.embed_tokens"] = "disk"
    model = LlamaForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    assert model.device.type == ("meta" if 0 in offloaded else "cpu")
    prompt = torch.randint(256, (1, 200))
    asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **asked)
    cache = ArkCache(model, budget_tokens=None)
    assert torch.equal(model.generate(prompt, past_key_values=cache, **asked), expected)
    assert cache.mode == "paged"
    (manager,) = cache.managers
    assert (manager.device.type, manager.num_layers) == ("cpu", NUM_LAYERS)
    assert manager.config == replace(cache.config, num_dense_layers=0).on("cpu")


def test_each_device_has_a_manager_for_its_layers(folder: Path) -> None:
    """As the probe would see them: the last three of four layers on another device."""
    model = LlamaForCausalLM.from_pretrained(folder)
    cache = ArkCache(model, device_bytes=8 << 20, num_dense_layers=2, host_bytes=4000)
    shapes = cache._core.attached().shapes
    for layer in (1, 2, 3):
        shapes[layer] = replace(shapes[layer], device=torch.device("meta"))
    managers = {manager.device.type: manager for manager in cache._core._probed_managers()}
    assert {name: manager.num_layers for name, manager in managers.items()} == {"cpu": 1, "meta": 3}
    # Layers are told apart by their numbers in the model: the first two are dense.
    budgets = {name: manager.config.budget_tokens for name, manager in managers.items()}
    assert budgets == {"cpu": (None,), "meta": (None, "auto", "auto")}
    # The bytes are of all devices together, shared by the layers whose pages move.
    assert managers["meta"].config.device_bytes == 8 << 20
    assert managers["meta"].config.host_bytes == 4000
