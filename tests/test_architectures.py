"""Every architecture generates with an `ArkCache` what it generates with a `DynamicCache`.

Invariant 1: with an unlimited budget, or one larger than the context, tokens are equal and logits
agree to rounding, whatever the page size. The bound on rounding is measured, family by family: it
is a small multiple of what another attention implementation does to the same logits.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

import arkcache
from tests import exactness
from tests.architectures import ARCHITECTURES
from tests.exactness import (
    CONFIGS,
    MODES,
    REFERENCE_MODE,
    SMALL,
    MakeCache,
    Outcome,
    ark_cache,
    decoder_cache,
)

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers", "ignore::Warning:torch")

MATRIX = {
    f"page_size={page_size}-budget={budget}": {
        "budget_tokens": budget,
        "page_size": page_size,
        **SMALL,
        "num_recent_tokens": max(8, page_size),
    }
    for page_size in (1, 2, 16, 32)
    for budget in (None, 256)
}
# One each of: plain grouped heads; soft cap and half sliding; all sliding; learned positions and as
# many KV heads as heads; compressed latents.
REPRESENTATIVE = ("llama", "gemma2", "gemma3", "mistral-window", "gpt2", "deepseek_v3")
# Nothing but the error can be tested: they have no reference, or no keys and values.
REFUSED = [name for name, architecture in ARCHITECTURES.items() if architecture.mode == "none"]
ACCEPTED = [name for name in ARCHITECTURES if name not in REFUSED]
PAGED = [name for name in REPRESENTATIVE if ARCHITECTURES[name].mode == "paged"]
# Rounding of one float32 forward here, where a family has no other implementation to measure it by.
ROUNDING = 1e-6
# Beyond this two implementations differ in what they compute (falcon's alibi), not in rounding.
DISAGREEMENT = 1e-4
FACTOR = 10


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads only cost at this size, and their sums may differ from run to run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def reference(name: str, mode: str, attention: str | None = None) -> list[Outcome] | Exception:
    """The outcomes with a `DynamicCache`, or why there are none."""
    architecture = ARCHITECTURES[name]
    try:
        model = architecture.build(attention=attention)
        return MODES[mode](model, exactness.full_cache, architecture.prompt())
    except Exception as error:  # whatever the family raises, it is not ours to fix
        return error


def first_step(outcome: Outcome) -> Outcome:
    """What the prefill alone decides; later steps also depend on the tokens chosen."""
    return Outcome(outcome.tokens, outcome.logits[:, :1])


@cache
def tolerance(name: str) -> float:
    """What counts as rounding: a multiple of the difference between two implementations."""
    # A family that has a preference has it because the other one computes something else.
    preferred = ARCHITECTURES[name].attention
    outcomes = [reference(name, "greedy", preferred or other) for other in ("eager", "sdpa")]
    if any(isinstance(outcome, Exception) for outcome in outcomes):
        return FACTOR * ROUNDING
    eager, sdpa = (first_step(outcome) for [outcome] in outcomes)
    noise = exactness.distance(sdpa, eager)
    return FACTOR * (noise if ROUNDING < noise < DISAGREEMENT else ROUNDING)


def check(name: str, mode: str, make_cache: MakeCache, attention: str | None = None) -> None:
    """`mode` with this cache gives what it gives with a full cache."""
    expected = reference(name, REFERENCE_MODE.get(mode, mode), attention)
    if isinstance(expected, Exception):
        reason = str(expected).splitlines()[-1][:200]  # some hold a whole model
        message = f"{name} cannot do {mode}: {type(expected).__name__}: {reason}"
        # Before 5.23 a drafting model with a sliding window fails inside transformers.
        if name in REPRESENTATIVE and not transformers.__version__.startswith("5.17"):
            pytest.fail(message)
        pytest.skip(message)
    architecture = ARCHITECTURES[name]
    model = architecture.build(attention=attention)
    outcomes = MODES[mode](model, make_cache, architecture.prompt())
    assert len(outcomes) == len(expected)
    for outcome, wanted in zip(outcomes, expected, strict=True):
        assert outcome.tokens.tolist() == wanted.tokens.tolist()
        assert exactness.distance(outcome, wanted) <= tolerance(name)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ACCEPTED)
def test_greedy(name: str, config: str) -> None:
    check(name, "greedy", ark_cache(**CONFIGS[config]))


@pytest.mark.slow
@pytest.mark.parametrize("settings", MATRIX)
@pytest.mark.parametrize("name", ACCEPTED)
def test_greedy_page_sizes(name: str, settings: str) -> None:
    check(name, "greedy", ark_cache(**MATRIX[settings]))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "greedy"])
@pytest.mark.parametrize(
    "name",
    [
        name if name in REPRESENTATIVE else pytest.param(name, marks=pytest.mark.slow)
        for name in ACCEPTED
    ],
)
def test_modes(name: str, mode: str, config: str) -> None:
    check(name, mode, ark_cache(**CONFIGS[config]))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "deepseek_v3", "qwen3_next"])
def test_on_top_of_either_implementation(name: str, attention: str) -> None:
    check(name, "greedy", ark_cache(**CONFIGS["pages"]), attention)


@pytest.mark.parametrize("name", PAGED)
def test_decoding_attends_pages(name: str) -> None:
    """The equality above is that of pages, not of a window that happens to hold everything."""
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    cache = ark_cache(**CONFIGS["pages"])(model)
    exactness.generate(model, architecture.prompt(), cache)
    stats = decoder_cache(cache).stats()
    assert stats.attended_tokens == stats.total_tokens
    assert stats.pages_hit > 0


@pytest.mark.parametrize("name", PAGED)
def test_chunked_prefill_is_exact_in_a_small_budget(name: str) -> None:
    """Several new tokens attend everything, what left the device included."""
    tiny = ark_cache(budget_tokens=16, page_size=4, **SMALL)
    architecture = ARCHITECTURES[name]
    outcomes = MODES["chunked_prefill"](architecture.build(), tiny, architecture.prompt())
    for outcome, wanted in zip(outcomes, reference(name, "chunked_prefill"), strict=True):
        assert exactness.distance(first_step(outcome), first_step(wanted)) <= tolerance(name)


@pytest.mark.parametrize("name", ACCEPTED)
def test_mode(name: str) -> None:
    """A family does not fall back to compat mode, or out of it, unnoticed."""
    ark = decoder_cache(ark_cache(**CONFIGS["pages"])(ARCHITECTURES[name].build()))
    assert ark.mode == ARCHITECTURES[name].mode
    assert bool(ark.reason) == (ark.mode == "compat")


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """A family that takes no such cache says so, and is left as it was."""
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    before = state_of(model)
    with pytest.raises(arkcache.UnsupportedModelError):
        arkcache.ArkCache(model)
    assert state_of(model) == before


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_detach_restores(name: str) -> None:
    """After `detach` the model is as it was: settings, hooks and every bit of its logits."""
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    before = state_of(model)
    [expected] = MODES["greedy"](model, exactness.full_cache, architecture.prompt())
    MODES["greedy"](model, ark_cache(**CONFIGS["pages"]), architecture.prompt())
    arkcache.detach(model)
    assert state_of(model) == before
    [outcome] = MODES["greedy"](model, exactness.full_cache, architecture.prompt())
    assert torch.equal(outcome.logits, expected.logits)


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that attaching could have left behind on a model."""
    return {
        "config": {key: repr(value) for key, value in vars(model.config).items()},
        "hooks": [
            (name, len(module._forward_pre_hooks), len(module._forward_hooks))
            for name, module in model.named_modules()
        ],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_prompt_tells(name: str) -> None:
    """Distant tokens matter to the reference: a cache that lost them could not pass unnoticed."""
    expected = reference(name, "greedy")
    assert not isinstance(expected, Exception)
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    layers = decoder_cache(exactness.full_cache(model)).layers
    if not any(isinstance(layer, DynamicLayer) and not layer.is_sliding for layer in layers):
        pytest.skip(f"{name} forgets distant tokens by design")
    inputs = architecture.prompt()
    tokens = inputs[[key for key in inputs if key.endswith("input_ids")][-1]]
    tokens[:, 13:26] = tokens[:, 13:26].flip(1)
    [outcome] = MODES["greedy"](model, exactness.full_cache, inputs)
    difference = exactness.distance(first_step(outcome), first_step(expected[0]))
    assert difference > 100 * tolerance(name)
