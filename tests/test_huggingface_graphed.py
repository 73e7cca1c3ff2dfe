"""`generate_graphed`: decode steps recorded and replayed; without a GPU they are launched anew."""

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForCausalLM,
    DynamicCache,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import arkcache
from arkcache import ArkCache, InputError
from arkcache.engines.capture import PlannedStep
from arkcache.huggingface.probe import follows_positions
from arkcache.huggingface.recordings import MOST, Recording, Recordings, seen_waiting
from arkcache.huggingface.replaying import Replayer
from tests.architectures import ARCHITECTURES
from tests.marks import needs_interpreter
from tests.test_huggingface import SMALL, continued, make_model, prompt

pytestmark = needs_interpreter

BOXES = {**SMALL, "index": "cuboid-mean"}
ON_KERNELS = {**BOXES, "backend": "triton"}
"""By boxes: the interpreter takes three times as long for the token index."""


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Small: the interpreter takes its time for every layer and KV head."""
    return make_model(num_hidden_layers=1, num_key_value_heads=1, initializer_range=0.08)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, ...]]:
    """The kinds of the steps that were launched apart from their counting."""
    kinds: list[tuple[bool, ...]] = []
    original = Replayer._launch

    def spy(self: Replayer, planned: list[PlannedStep], *args: Any) -> Any:
        kinds.append(tuple(step.seals for step in planned))
        return original(self, planned, *args)

    monkeypatch.setattr(Replayer, "_launch", spy)
    return kinds


def graphed(model: LlamaForCausalLM, ids: Tensor, cache: ArkCache, **given: Any) -> Any:
    settings = {"max_new_tokens": 9, "do_sample": False} | given
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return arkcache.generate_graphed(model, ids, past_key_values=cache, **settings)


def padded(tokens: int, margin: int) -> dict[str, Tensor]:
    ids = prompt(tokens, batch=2)
    mask = torch.arange(tokens) >= torch.tensor([[0], [margin]])
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


@pytest.mark.parametrize(
    "settings",
    [{"budget_tokens": None}, pytest.param({"budget_tokens": 64}, marks=pytest.mark.slow)],
    ids=str,
)
def test_everything_attended_gives_the_full_cache(
    model: LlamaForCausalLM, steps: list[tuple[bool, ...]], settings: dict[str, Any]
) -> None:
    inputs = padded(26, 9)
    given = {"max_new_tokens": 9, "do_sample": False}
    full = model.generate(**inputs, past_key_values=DynamicCache(config=model.config), **given)
    cache = ArkCache(model, **ON_KERNELS, **settings)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert torch.equal(graphed(model, ids, cache, attention_mask=mask), full)
    cache.check_integrity()
    assert len(steps) > 4


@pytest.mark.parametrize(
    "index",
    [
        pytest.param({}, id="boxes"),
        pytest.param({"index": "tokens", "index_bits": 2}, id="tokens", marks=pytest.mark.slow),
    ],
)
def test_a_budget_gives_what_plain_torch_gives(
    model: LlamaForCausalLM, steps: list[tuple[bool, ...]], index: dict[str, Any]
) -> None:
    ids = prompt(60)
    plain = ArkCache(model, **BOXES | index, backend="torch", budget_tokens=32)
    expected = continued(model, plain, ids, max_new_tokens=9)
    cache = ArkCache(model, **ON_KERNELS | index, budget_tokens=32)
    assert torch.equal(graphed(model, ids, cache), expected)
    mine, other = cache.stats(), plain.stats()
    assert mine.attended_tokens == other.attended_tokens
    assert mine.pages_recalled == other.pages_recalled > 0
    assert {(False,), (True,)} == set(steps)


def test_plain_generate_runs_on_the_kernels_too(model: LlamaForCausalLM) -> None:
    ids = prompt(50)
    plain = ArkCache(model, **BOXES, budget_tokens=32)
    expected = continued(model, plain, ids, max_new_tokens=6)
    cache = ArkCache(model, **ON_KERNELS, budget_tokens=32)
    assert torch.equal(continued(model, cache, ids, max_new_tokens=6), expected)


@pytest.mark.slow
def test_turns_and_samples(model: LlamaForCausalLM, steps: list[tuple[bool, ...]]) -> None:
    text, full = prompt(40), prompt(40)
    cache = ArkCache(model, **ON_KERNELS, budget_tokens=64)
    reference = DynamicCache(config=model.config)
    for turn in range(2):
        torch.manual_seed(turn)
        text = graphed(model, text, cache, do_sample=True, max_new_tokens=6)
        torch.manual_seed(turn)
        full = continued(model, reference, full, do_sample=True, max_new_tokens=6)
        assert torch.equal(text, full)
        follow_up = prompt(5, seed=turn + 5)
        text, full = torch.cat((text, follow_up), 1), torch.cat((full, follow_up), 1)
    assert steps


def test_beams_run_as_ever(model: LlamaForCausalLM) -> None:
    ids, given = prompt(30), {"num_beams": 2, "max_new_tokens": 5}
    full = continued(model, DynamicCache(config=model.config), ids, **given)
    cache = ArkCache(model, **ON_KERNELS, budget_tokens=64)
    assert torch.equal(graphed(model, ids, cache, **given), full)


@pytest.mark.slow
def test_the_model_is_left_as_it_was(model: LlamaForCausalLM) -> None:
    graphed(model, prompt(20), ArkCache(model, **ON_KERNELS))
    assert "forward" not in vars(model)

    def stop(*_: Any) -> bool:
        raise KeyboardInterrupt

    cache = ArkCache(model, **ON_KERNELS)
    with pytest.raises(KeyboardInterrupt):
        graphed(model, prompt(20), cache, stopping_criteria=[stop])
    assert "forward" not in vars(model)


def test_a_model_with_other_layers_runs_as_ever_and_says_why() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
        eos_token_id=None,
    )
    mistral = MistralForCausalLM(config).eval()
    full = continued(mistral, DynamicCache(config=config), prompt(30), max_new_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = ArkCache(mistral, **ON_KERNELS)
    with pytest.warns(UserWarning, match="not replayed"):
        output = arkcache.generate_graphed(
            mistral, prompt(30), past_key_values=cache, max_new_tokens=4, do_sample=False
        )
    assert torch.equal(output, full)


class CountsItself(LlamaForCausalLM):
    """Takes no positions from outside."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class Ignores(LlamaForCausalLM):
    """Takes positions, and counts by itself all the same."""

    def forward(self, input_ids: Tensor, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize("counting", [CountsItself, Ignores])
def test_a_model_that_counts_positions_runs_as_ever_and_says_why(
    model: LlamaForCausalLM, counting: type[LlamaForCausalLM]
) -> None:
    full = continued(model, DynamicCache(config=model.config), prompt(20), max_new_tokens=5)
    counts = counting(model.config).eval()
    counts.load_state_dict(model.state_dict())
    cache = ArkCache(counts, **ON_KERNELS, budget_tokens=64)
    with pytest.warns(UserWarning, match="counts positions itself"):
        output = arkcache.generate_graphed(
            counts, prompt(20), past_key_values=cache, max_new_tokens=5, do_sample=False
        )
    assert torch.equal(output, full)


def test_a_mask_that_hides_what_the_cache_holds_runs_as_ever(model: LlamaForCausalLM) -> None:
    outputs = []
    for cache in (
        DynamicCache(config=model.config),
        ArkCache(model, **ON_KERNELS, budget_tokens=64),
    ):
        text = continued(model, cache, prompt(24), max_new_tokens=3)
        text = torch.cat((text, prompt(3, seed=9)), dim=1)
        mask = torch.ones_like(text)
        mask[:, 2:12] = 0
        given = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
        if isinstance(cache, ArkCache):
            with pytest.warns(UserWarning, match="hides tokens"):
                text = arkcache.generate_graphed(model, text, past_key_values=cache, **given)
        else:
            text = model.generate(text, past_key_values=cache, **given)
        outputs.append(text)
    assert torch.equal(*outputs)


@pytest.mark.slow
def test_masks_of_the_model_are_not_recorded(model: LlamaForCausalLM) -> None:
    cache = ArkCache(model, **ON_KERNELS, budget_tokens=64)
    text = graphed(model, prompt(20), cache, max_new_tokens=3)
    (manager,) = cache.managers
    manager.attend(0, torch.randn(1, 4, 1, 16), mask=torch.zeros(1, 1, 1, manager.num_columns))
    assert manager.steps is not None
    assert manager.steps.saw_mask
    with pytest.warns(UserWarning, match="masks or biases"):
        arkcache.generate_graphed(model, text, past_key_values=cache, max_new_tokens=4)


def test_plain_torch_runs_as_ever_and_says_why(model: LlamaForCausalLM) -> None:
    expected = continued(model, DynamicCache(config=model.config), prompt(30), max_new_tokens=4)
    cache = ArkCache(model, **SMALL, budget_tokens=None)
    with pytest.warns(UserWarning, match="plain torch"):
        output = arkcache.generate_graphed(
            model, prompt(30), past_key_values=cache, max_new_tokens=4, do_sample=False
        )
    assert torch.equal(output, expected)


def test_another_cache_is_refused(model: LlamaForCausalLM) -> None:
    cache: Any = DynamicCache(config=model.config)
    with pytest.raises(InputError, match="expected an ArkCache"):
        arkcache.generate_graphed(model, prompt(5), past_key_values=cache)


@pytest.mark.parametrize(
    "step", [2, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 6))]
)
def test_an_interrupted_step_changes_nothing(model: LlamaForCausalLM, step: int) -> None:
    """Ctrl-C between two layers, in steps that seal a page and in steps that do not."""
    model = make_model(num_hidden_layers=2, num_key_value_heads=1, initializer_range=0.08)
    full = continued(model, DynamicCache(config=model.config), prompt(30), max_new_tokens=9)
    cache, count = ArkCache(model, **ON_KERNELS, budget_tokens=64), 0
    layer = model.model.layers[1]

    def interrupt(_layer: Any, _args: Any, given: dict[str, Any]) -> None:
        nonlocal count
        count += given.get("past_key_values") is cache
        if count == step + 1:  # the prompt is the first
            raise KeyboardInterrupt

    hook = layer.register_forward_pre_hook(interrupt, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        graphed(model, prompt(30), cache)
    hook.remove()
    cache.check_integrity()
    held = cache.get_seq_length()
    assert held == 30 + step - 1
    assert torch.equal(
        graphed(model, full[:, : held + 1], cache, max_new_tokens=39 - held - 1), full
    )
    cache.check_integrity()
    assert {manager._host.num_pieces for manager in cache.managers if manager._host} == {
        2 * ((cache.get_seq_length() - 8) // 4)
    }


def test_a_recording_that_fails_is_launched_instead(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Recordings, "record", refuse)
    full = continued(model, DynamicCache(config=model.config), prompt(30), max_new_tokens=8)
    cache = ArkCache(model, **ON_KERNELS, budget_tokens=64)
    with pytest.warns(UserWarning, match="not permitted"):
        output = arkcache.generate_graphed(
            model, prompt(30), past_key_values=cache, max_new_tokens=8, do_sample=False
        )
    assert torch.equal(output, full)
    cache.check_integrity()


# -- in a block, and from one call to the next ----------------------------------------------------


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The steps that were recorded."""
    made: list[Any] = []
    record = Recordings.record

    def spy(self: Recordings, step: Any, *args: Any) -> Recording:
        made.append(step)
        return record(self, step, *args)

    monkeypatch.setattr(Recordings, "record", spy)
    return made


def grown(model: LlamaForCausalLM, text: Tensor, cache: ArkCache) -> Tensor:
    """Another turn of six tokens, of which the first are plain steps and one seals."""
    return graphed(model, torch.cat((text, prompt(2)), 1), cache, max_new_tokens=7)


@pytest.mark.slow
def test_a_conversation_is_recorded_once(
    model: LlamaForCausalLM, recorded: list[Any], steps: list[Any]
) -> None:
    cache = ArkCache(model, **ON_KERNELS, budget_tokens=64)
    text = graphed(model, prompt(26), cache, max_new_tokens=12)
    assert len(recorded) == len(set(recorded)) == 2
    launched = len(steps)
    text = grown(model, text, cache)
    assert len(recorded) == 2
    assert len(steps) > launched
    hook = model.model.layers[0].register_forward_hook(lambda *_: None)
    text = grown(model, text, cache)
    assert len(recorded) > 2  # what was recorded knows nothing of the hook
    hook.remove()
    assert torch.equal(
        text[:, :38], continued(model, DynamicCache(), prompt(26), max_new_tokens=12)
    )


@pytest.mark.slow
def test_what_is_recorded_goes_with_the_cache(model: LlamaForCausalLM, recorded: list[Any]) -> None:
    cache = ArkCache(model, **ON_KERNELS, budget_tokens=64)
    graphed(model, prompt(26), cache, max_new_tokens=8)
    (manager,) = cache.managers
    assert manager.steps is not None
    assert manager.steps.recordings is not None
    recordings = ref(manager.steps.recordings)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        (other,) = twin.managers
        assert other.steps is not None
        assert other.steps.recordings is None
    del manager, twin, other
    cache.reset()
    assert recordings() is None
    graphed(model, prompt(20), cache, max_new_tokens=8)
    gone = ref(cache._core)
    gc.disable()  # nobody must be needed to find a cycle
    try:
        del cache
        assert gone() is None
    finally:
        gc.enable()


def test_a_block_replays_and_leaves_the_model_as_it_was(
    model: LlamaForCausalLM, steps: list[Any]
) -> None:
    full = continued(model, DynamicCache(config=model.config), prompt(30), max_new_tokens=5)
    one, two = (ArkCache(model, **ON_KERNELS, budget_tokens=64) for _ in range(2))
    first, second = one.graphed(model), two.graphed(model, new_tokens=20)
    first.__enter__()
    second.__enter__()
    assert torch.equal(continued(model, one, prompt(30), max_new_tokens=5), full)
    launched = len(steps)
    assert launched > 0
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.forward, MethodType)
        assert other.forward.__self__ is other
    assert torch.equal(
        continued(model, DynamicCache(config=model.config), prompt(30), max_new_tokens=5), full
    )
    assert len(steps) == launched
    first.__exit__(None, None, None)  # not the last that was entered
    assert torch.equal(continued(model, two, prompt(30), max_new_tokens=5), full)
    assert len(steps) > launched
    second.__exit__(None, None, None)
    assert "forward" not in vars(model)


def test_steps_under_gradients_run_as_ever_and_say_why(model: LlamaForCausalLM) -> None:
    cache = ArkCache(model, **ON_KERNELS, budget_tokens=64)
    ids = prompt(9)
    with cache.graphed(model):
        model(input_ids=ids, past_key_values=cache)
        cache.end_prompt()
        with pytest.warns(UserWarning, match="gradients are enabled"):
            model(input_ids=ids[:, :1], past_key_values=cache)


def test_another_manner_of_calling_is_recorded_by_itself(
    model: LlamaForCausalLM, recorded: list[Any]
) -> None:
    """A recording has the switches that it was made with."""
    cache = ArkCache(model, **ON_KERNELS | {"page_size": 8}, budget_tokens=64)
    ids = prompt(9)  # no page seals in what follows
    with torch.no_grad(), cache.graphed(model):
        model(input_ids=ids, past_key_values=cache)
        cache.end_prompt()
        for step in range(4):
            switches = {} if step % 2 else {"logits_to_keep": 1}
            output = model(input_ids=ids[:, :1], past_key_values=cache, **switches)
            assert output.past_key_values is cache
    assert len(recorded) == len(set(recorded)) == 2


def test_a_replayed_step_gives_an_output_of_its_own() -> None:
    class Graph:
        def replay(self) -> None:
            logits.copy_(ids + 1)

    ids, logits, cache = torch.zeros(1, 1), torch.zeros(1, 1), object()
    fields = {"logits": logits, "past_key_values": None, "router_logits": (logits,)}
    graph: Any = Graph()
    recording = Recording(graph, {"input_ids": ids}, dict, fields)
    outputs = [recording.replayed({"input_ids": torch.full((1, 1), x)}, cache) for x in (1.0, 2.0)]
    assert [float(output["logits"]) for output in outputs] == [2.0, 3.0]
    assert [float(output["router_logits"][0]) for output in outputs] == [2.0, 3.0]
    assert all(output["past_key_values"] is cache for output in outputs)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: model.train(),
        lambda model: setattr(model.model.layers[0], "_disable_adapters", True),
        lambda model: model.model.norm.register_forward_pre_hook(lambda *_: None),
    ],
)
def test_what_was_recorded_of_a_model_that_changed_is_forgotten(
    model: LlamaForCausalLM, change: Callable[[LlamaForCausalLM], object]
) -> None:
    kept, recording = Recordings(), Recording(None, {}, dict, {})
    kept.keep_for(model)
    kept.keep_at((1, 2))
    kept.keep("step", recording)
    kept.keep_for(model)
    kept.keep_at((1, 2))
    assert kept.of == {"step": recording}
    change(model)
    kept.keep_for(model)
    assert not kept.of


def test_recordings_are_bounded_and_stay_where_they_were_made() -> None:
    kept, recording = Recordings(), Recording(None, {}, dict, {})
    kept.keep_at((1, 2))
    for step in range(3 * MOST):
        kept.keep(step, recording)
    assert list(kept.of) == list(range(2 * MOST, 3 * MOST))
    kept.keep_at((1, 3))
    assert not kept.of


# -- why steps may not be replayed ----------------------------------------------------------------


@pytest.mark.parametrize("waits", [True, False])
def test_switching_the_watch_on_is_no_wait(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first switch in a process warns, as torch does, of what it cannot see."""
    modes = [0]

    def watch(mode: Any) -> None:
        modes.append(mode)
        warnings.warn(
            "Synchronization debug mode is a prototype feature and does not yet detect all "
            "synchronizing operations (Triggered internally at Module.cpp:861.)",
            stacklevel=1,
        )

    def launch() -> str:
        if waits:
            warnings.warn(
                "called a synchronizing CUDA operation (Triggered internally at "
                "CUDAFunctions.cpp:195.)",
                stacklevel=1,
            )
        return "output"

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", watch)
    assert seen_waiting(launch) == ("output", waits)
    assert modes == [0, "warn", 0]


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gpt2", "opt", "gemma3", "deepseek_v3", "smollm3"]
)
def test_which_models_follow_positions(family: str, dtype: torch.dtype) -> None:
    follows = ARCHITECTURES[family].build().to(dtype)
    assert follows_positions(follows, follows.forward)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layers", [1, 4])
def test_an_untrained_model_follows_positions(layers: int, dtype: torch.dtype) -> None:
    """Its attention hardly tells tokens apart."""
    follows = make_model(num_hidden_layers=layers, initializer_range=0.02).to(dtype)
    assert follows_positions(follows, follows.forward)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_which_models_count_positions_themselves(dtype: torch.dtype) -> None:
    config = BartConfig(
        vocab_size=128,
        d_model=64,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=96,
        is_decoder=True,
        is_encoder_decoder=False,
        attn_implementation="sdpa",
    )
    bart = BartForCausalLM(config).eval().to(dtype)
    counting = Ignores(make_model().config).eval().to(dtype)
    nowhere = ARCHITECTURES["granitemoehybrid"].build().to(dtype)  # "nope": no positions at all
    for model in (bart, counting, nowhere):
        assert not follows_positions(model, model.forward)
