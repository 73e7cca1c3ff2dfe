"""The demonstration: one text, five caches, and two baselines that keep exactly what they say."""

import copy
import dataclasses
import io
import itertools
import random
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import DynamicCache, LlamaForCausalLM
from typer.testing import CliRunner

from arkcache import cli
from arkcache.demo import conversation, facts
from arkcache.demo import run as demo
from arkcache.demo.baselines import (
    FullLayer,
    HeavyHitterLayer,
    SinkWindowLayer,
    attention_received,
    held,
    observing,
)
from arkcache.demo.methods import reading_cache, usage
from arkcache.demo.models import SHIPPED, load_model, pick_device
from arkcache.demo.table import render, sentences
from arkcache.errors import ConfigError, InputError
from tests.terminal import Terminal

METHODS = ["full", "arkcache-tokens", "arkcache-boxes", "sinks-and-window", "heavy-hitters"]
BUDGET, NUM_SINKS = 24, 4


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with demo.threads(1):
        yield


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return load_model(None, torch.device("cpu"), "auto")


@pytest.fixture(scope="module")
def result() -> demo.Result:
    return demo.run(demo.Settings(context_tokens=1024, num_facts=5, budget_tokens=256))


# -- the run --------------------------------------------------------------------------------------


def test_every_method_has_a_row_and_answers_every_question(result: demo.Result) -> None:
    assert [row.method for row in result.rows] == METHODS
    assert [row.skipped for row in result.rows] == [None] * 5
    questions = [(answer.name, answer.value) for answer in result.rows[0].answers]
    assert len(questions) == len(set(questions)) + 1 == 6  # one of five is asked twice
    for row in result.rows:
        assert [(answer.name, answer.value) for answer in row.answers] == questions
        assert row.num_right == sum(answer.right for answer in row.answers)
        assert row.num_questions == 6


def test_recall_answers_what_eviction_forgets(result: demo.Result) -> None:
    rows = {row.method: row for row in result.rows}
    assert rows["full"].num_right == 6
    assert rows["arkcache-tokens"].num_right == 6
    assert rows["arkcache-boxes"].num_right >= 5
    assert rows["sinks-and-window"].num_right <= 3
    assert rows["heavy-hitters"].num_right <= 3


def test_budgets_are_kept_and_used(result: demo.Result) -> None:
    full, tokens, boxes, window, heavy = result.rows
    assert full.attended_tokens > 1024
    assert window.attended_tokens == heavy.attended_tokens == 256  # the mean, so in every step
    assert 256 - 32 < boxes.attended_tokens <= 256
    assert boxes.attended_tokens == tokens.attended_tokens
    per_token = full.device_bytes / (1024 + full.num_steps)
    assert window.device_bytes == pytest.approx(256 * per_token, rel=0.02)
    assert window.device_bytes < heavy.device_bytes < 1.05 * window.device_bytes
    assert boxes.device_bytes < full.device_bytes
    assert boxes.host_bytes > 0
    assert boxes.pages_recalled
    assert full.pages_recalled is None


def test_a_budget_above_the_context_changes_no_answer() -> None:
    settings = demo.Settings(context_tokens=400, num_facts=4, budget_tokens=1024, seed=3)
    rows = demo.run(settings).rows
    assert [row.skipped for row in rows] == [None] * 5
    for row in rows[1:]:
        assert row.answers == rows[0].answers


def test_the_same_seed_gives_the_same_answers(result: demo.Result) -> None:
    again = demo.run(demo.Settings(context_tokens=1024, num_facts=5, budget_tokens=256))
    for row, row_again in zip(result.rows, again.rows, strict=True):
        assert row.answers == row_again.answers
        assert row.pages_recalled == row_again.pages_recalled


def test_questions_take_the_decode_path(
    shipped: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = shipped
    lengths: list[int] = []

    def note(_module: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        lengths.append(args[0].shape[1])

    # Only the demonstration's forwards: ArkCache's own probe passes no positional ids.
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: note(module, args, kwargs) if args else None, with_kwargs=True
    )
    monkeypatch.setattr(demo, "load_model", lambda *_: (model, tokenizer))
    monkeypatch.setattr(demo, "CHUNK_TOKENS", 300)
    result = demo.run(demo.Settings(context_tokens=700, num_facts=2, budget_tokens=256))
    handle.remove()
    chunks = lengths[:3]
    assert sum(chunks) == result.context_tokens
    assert set(lengths[3:]) == {1}
    assert len(lengths) - 3 == sum(row.num_steps for row in result.rows)
    assert all(row.num_steps > 3 * 10 for row in result.rows)


def test_an_interrupt_leaves_the_model_as_it_was(
    shipped: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = shipped
    monkeypatch.setattr(demo, "load_model", lambda *_: (model, tokenizer))
    settings = demo.Settings(context_tokens=400, num_facts=2, budget_tokens=256)
    for stage in ("Reading", "ArkCache, boxes", "heavy hitters"):

        def interrupt(description: str, *_: int, stage: str = stage) -> None:
            if stage in description:
                raise KeyboardInterrupt

        num_threads = torch.get_num_threads()
        with pytest.raises(KeyboardInterrupt):
            demo.run(settings, interrupt)
        assert model.config._attn_implementation == "sdpa"
        assert torch.get_num_threads() == num_threads


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="budget_tokens=40"):
        demo.run(demo.Settings(budget_tokens=40))
    with pytest.raises(InputError, match="expected at least 768"):
        demo.run(demo.Settings(context_tokens=100))
    with pytest.raises(InputError, match="expected auto, cpu or cuda"):
        demo.run(demo.Settings(device="abacus"))
    with pytest.raises(InputError, match="dtype 'int8'"):
        demo.run(demo.Settings(dtype="int8"))


# -- any model ------------------------------------------------------------------------------------

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def random_model(shipped: tuple[Any, Any], tmp_path: Path) -> Path:
    """A model that knows nothing, with the shipped tokenizer, in a folder."""
    model, tokenizer = shipped
    config = copy.deepcopy(model.config)
    config.update({"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("template", [None, CHAT])
def test_any_model_is_asked_in_plain_language(
    random_model: Path, shipped: tuple[Any, Any], template: str | None
) -> None:
    tokenizer = copy.deepcopy(shipped[1])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(random_model)
    result = demo.run(
        demo.Settings(
            context_tokens=400, num_facts=2, budget_tokens=256, model=str(random_model), seed=1
        )
    )
    assert [row.skipped for row in result.rows] == [None] * 5
    assert result.settings["model"] == str(random_model)
    assert "answers less than half" in " ".join(sentences(result))


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_model(str(tmp_path / "nowhere"), torch.device("cpu"), "auto")
    with pytest.raises(InputError, match="not a folder with a causal language model"):
        load_model(str(tmp_path), torch.device("cpu"), "auto")


def test_device_auto_is_what_there_is() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_chat_template_is_cut_around_text_and_questions(shipped: tuple[Any, Any]) -> None:
    tokenizer = copy.deepcopy(shipped[1])
    tokenizer.chat_template = CHAT
    voice = conversation.plain_voice(tokenizer)
    assert voice.opening == "<|user|>"
    assert voice.between == "<|end|><|user|>"
    assert voice.closing == "<|end|><|assistant|>"
    fact = facts.Fact("amber", "4821")
    assert voice.fact(fact) == "The secret number of amber is 4821."
    assert voice.is_right("It is **4821**.", fact)
    assert not voice.is_right("It is 4812.", fact)


# -- the conversation -----------------------------------------------------------------------------


@pytest.mark.parametrize("context", [256, 1000, 5000])
def test_the_text_fills_the_context_and_holds_every_fact(
    shipped: tuple[Any, Any], context: int
) -> None:
    tokenizer = shipped[1]
    talk = conversation.plan(
        tokenizer,
        conversation.shipped_voice(),
        "one two three four five six seven\n" * 20,
        context_tokens=context,
        num_facts=4,
        seed=5,
    )
    assert context - 8 <= len(talk.text_ids) <= context
    text = tokenizer.decode(talk.text_ids)
    for fact in talk.questions:
        assert text.count(facts.render_fact(fact)) == 1


def test_questions_come_back_after_others() -> None:
    for count in range(1, 40):
        hidden = facts.draw_facts(count, random.Random(count))
        asked = conversation.order_questions(hidden)
        assert sorted(asked[:count]) == sorted(hidden)
        assert asked[count:] == asked[: len(asked) - count] != []
        jumps = [abs(hidden.index(a) - hidden.index(b)) for a, b in itertools.pairwise(asked)]
        assert count < 8 or statistics.fmean(jumps[: count - 1]) > count / 4


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "text"
    with pytest.raises(InputError, match=r"cannot read .*text: No such file"):
        conversation.load_text(path)
    with pytest.raises(InputError, match="cannot read"):
        conversation.load_text(tmp_path)
    for content, message in (
        (b"too short", "too short: 9 characters"),
        (b"\xff\xfe" * 400, "not UTF-8 text"),
        (b"zero\0" * 400, "zero bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            conversation.load_text(path)
    path.write_text("é" * 200, encoding="utf-8")
    assert conversation.load_text(path) == "é" * 200


# -- the baselines --------------------------------------------------------------------------------


def numbered(num_tokens: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [1, 2, tokens, 3] that say which token they are of."""
    states = torch.arange(first, first + num_tokens, dtype=torch.float32)[None, None, :, None]
    return states.expand(1, 2, -1, 3).clone(), -states.expand(1, 2, -1, 3).clone()


def read_layer(num_tokens: int) -> FullLayer:
    layer = FullLayer()
    layer.update(*numbered(num_tokens))
    return layer


def kept_tokens(layer: SinkWindowLayer | HeavyHitterLayer, head: int) -> list[int]:
    key, value = held(layer)
    assert torch.equal(key, -value)
    return key[0, head, :, 0].int().tolist()


@pytest.mark.parametrize("read", [3, BUDGET - 1, BUDGET, BUDGET + 1, 100])
def test_sinks_and_window(read: int) -> None:
    layer = SinkWindowLayer(read_layer(read), BUDGET, NUM_SINKS)
    for token in range(read, read + 40):
        length, offset = layer.get_mask_sizes(1)
        key, _ = layer.update(*numbered(1, token))
        seen = list(range(token + 1))
        expected = seen if len(seen) <= BUDGET else seen[:NUM_SINKS] + seen[NUM_SINKS - BUDGET :]
        assert kept_tokens(layer, 0) == kept_tokens(layer, 1) == expected
        assert (length, offset) == (key.shape[2], 0)
        assert layer.get_seq_length() == token + 1


@pytest.mark.parametrize("read", [3, BUDGET, BUDGET + 1, 100])
def test_heavy_hitters_against_lists(read: int) -> None:
    full = read_layer(read)
    full.observe(torch.rand(2, read))
    assert full.received is not None
    received = [dict(enumerate(row)) for row in full.received.tolist()]
    layer = HeavyHitterLayer(full, BUDGET)
    for token in range(read, read + 40):
        layer.update(*numbered(1, token))
        for head in range(2):
            received[head][token] = 0.0
            while len(received[head]) > BUDGET:
                older = sorted(received[head])[: -BUDGET // 2]
                del received[head][min(older, key=received[head].__getitem__)]
            assert kept_tokens(layer, head) == sorted(received[head])
        new = torch.rand(2, layer.num_kept)
        layer.observe(new)
        for head, row in enumerate(new.tolist()):
            for kept, attention in zip(sorted(received[head]), row, strict=True):
                received[head][kept] += attention


def test_attention_received_is_the_sum_of_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(1, 6, 20, 8), torch.randn(1, 2, 50, 8)
    logits = (query[0] @ key[0].repeat_interleave(3, 0).transpose(1, 2)) * 0.3
    future = torch.ones(20, 50, dtype=torch.bool).triu(31)
    expected = logits.masked_fill(future, float("-inf")).softmax(-1).sum(1)
    expected = expected.unflatten(0, (2, 3)).sum(1)
    for elements in (2**23, 1500, 1):
        monkeypatch.setattr("arkcache.demo.baselines._BLOCK_ELEMENTS", elements)
        torch.testing.assert_close(attention_received(query, key, 0.3), expected)


@torch.inference_mode()
def test_baselines_attend_what_they_kept_and_nothing_else(shipped: tuple[Any, Any]) -> None:
    """The next token's logits are those of the full cache with all that was evicted masked."""
    model, _ = shipped
    ids = torch.randint(5, 1000, (1, 90))
    full = reading_cache(model)
    with observing(model):
        model(ids[:, :60], past_key_values=full)
        model(ids[:, 60:], past_key_values=full)
    assert model.config._attn_implementation == "sdpa"
    for make in (
        lambda read: SinkWindowLayer(read, BUDGET, NUM_SINKS),
        lambda read: HeavyHitterLayer(read, BUDGET),
    ):
        cache = DynamicCache(config=model.config)
        cache.layers = [make(read) for read in full.layers]
        keys = [held(layer)[0] for layer in full.layers]
        logits = model(ids[:, -1:], past_key_values=cache).logits
        assert usage(cache).attended_tokens == BUDGET
        masks = [
            mask_of_kept(key, held(layer)[0]) for key, layer in zip(keys, cache.layers, strict=True)
        ]
        torch.testing.assert_close(logits, masked_logits(model, ids[:, -1:], full, masks))


def mask_of_kept(all_keys: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Which of all tokens [1, heads, 1, tokens + 1] are kept, the new one included."""
    same = (all_keys[:, :, :, None] == kept[:, :, None, :-1]).all(-1).any(-1)
    assert (same.sum(-1) == kept.shape[2] - 1).all()
    mask = torch.cat((same, torch.ones_like(same[:, :, :1])), dim=2)
    return mask.repeat_interleave(2, dim=1)[:, :, None]


def masked_logits(
    model: Any, ids: torch.Tensor, full: DynamicCache, masks: list[torch.Tensor]
) -> torch.Tensor:
    """Logits of one token over a full cache, each layer with a mask of its own."""
    cache = copy.deepcopy(full)
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda _module, args, kwargs, mask=mask: (args, kwargs | {"attention_mask": mask}),
            with_kwargs=True,
        )
        for layer, mask in zip(model.model.layers, masks, strict=True)
    ]
    logits: torch.Tensor = model(ids, past_key_values=cache).logits
    for handle in handles:
        handle.remove()
    return logits


# -- the table ------------------------------------------------------------------------------------


def shown(result: demo.Result, columns: int) -> str:
    screen = io.StringIO()
    Console(file=screen, width=columns).print(render(result))
    return screen.getvalue()


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits(result: demo.Result, columns: int) -> None:
    text = shown(result, columns)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= columns
    for row in result.rows:
        assert f" {row.title} " in text
    assert " 5 facts hidden in 1,02" in text


def test_a_method_that_did_not_run_is_named(result: demo.Result) -> None:
    rows = [*result.rows[:4], demo.Row("heavy-hitters", "heavy hitters", skipped="no attention")]
    partial = dataclasses.replace(result, rows=rows)
    assert "heavy hitters was not run: no attention." in sentences(partial)
    assert " heavy hitters " in shown(partial, 80)


def test_shipped_model_is_there() -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in SHIPPED.iterdir()
    }


# -- live -----------------------------------------------------------------------------------------

SMALL = ["--context", "512", "--facts", "4", "--budget", "128"]


def test_live_in_a_real_terminal() -> None:
    """What each cache does is shown while it answers, and wiped away before the table comes."""
    with Terminal("demo", *SMALL, "--live") as terminal:
        terminal.wait(r"tokens, device [\d.]+ [KM]iB .*\r?\n.*nothing in a host tier")
        terminal.wait(r"index [\d.]+ KiB, host .*\r?\n.* steps")
        assert terminal.read_all() == 0
        assert re.search(r"[a-z]+\? ", terminal.shown)
        table = terminal.shown[terminal.shown.rindex("╯") :]
        assert "\x1b[2K" in table  # lines of the panel
        assert "ArkCache, token index" in table
        assert "nothing in a host tier" not in table


def test_live_does_nothing_elsewhere() -> None:
    runner = CliRunner(env={"COLUMNS": "80"})
    for more in ([], ["--quiet"]):
        done = runner.invoke(cli.app, ["demo", *SMALL, "--live", *more])
        assert done.exit_code == 0, done.output
        assert "heavy hitters" in done.stdout
        assert "╭" not in done.output
