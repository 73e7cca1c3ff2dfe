"""The sweep of formats on a short text: what is held equal, what differs, what is compared."""

import dataclasses
import io
import json
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console

from arkcache.demo import run as demo
from arkcache.demo import sweep
from arkcache.demo.conversation import load_text, plan, shipped_voice
from arkcache.demo.methods import Method, open_full
from arkcache.demo.models import load_model
from arkcache.demo.sweep_table import render
from arkcache.errors import ConfigError, InputError

SMALL = sweep.Settings(
    context_tokens=768,
    num_facts=3,
    budget_tokens=256,
    reference_tokens=256,
    formats=("K16V16", "K4V4", "K2V2"),
)
TINY = dataclasses.replace(SMALL, context_tokens=320, num_facts=1, formats=("K4V4",))
ROWS = [("K16V16", "none"), ("K4V4", "none"), ("K4V4", "both"), ("K2V2", "none"), ("K2V2", "both")]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with demo.threads(1):
        yield


@pytest.fixture(scope="module")
def result() -> sweep.Result:
    return sweep.run(SMALL)


def rows_of(result: sweep.Result, mode: str) -> dict[tuple[str, str], sweep.Row]:
    return {(row.format, row.rotation): row for row in result.rows if row.mode == mode}


def test_every_format_has_a_row_in_both_comparisons(result: sweep.Result) -> None:
    assert result.rows[0].mode == "full"
    for mode in (sweep.EQUAL_TOKENS, sweep.EQUAL_BYTES):
        assert [*rows_of(result, mode)] == ROWS
    assert len(result.rows) == 1 + 2 * len(ROWS)
    assert {row.num_questions for row in result.rows} == {4}
    assert result.rows[0].num_right == 4


def test_equal_tokens_differ_in_bytes(result: sweep.Result) -> None:
    rows = rows_of(result, sweep.EQUAL_TOKENS)
    assert len({row.attended_tokens for row in rows.values()}) == 1
    raw, four, two = (rows[name, "none"] for name in SMALL.formats)
    assert raw.device_bytes > four.device_bytes > two.device_bytes
    assert raw.host_bytes_per_token == result.rows[0].host_bytes_per_token == 2048
    assert (four.host_bytes_per_token, two.host_bytes_per_token) == (640, 384)


def test_equal_bytes_differ_in_tokens(result: sweep.Result) -> None:
    rows = rows_of(result, sweep.EQUAL_BYTES)
    limit = result.settings["device_bytes"]
    raw, four, two = (rows[name, "none"] for name in SMALL.formats)
    assert (
        raw.device_bytes == limit == rows_of(result, "equal tokens")["K16V16", "none"].device_bytes
    )
    for row in rows.values():
        assert limit * 0.9 < row.device_bytes <= limit
    assert raw.attended_tokens < four.attended_tokens < two.attended_tokens


def test_divergence_is_of_the_bits(result: sweep.Result) -> None:
    assert (result.rows[0].kl, result.rows[0].agreement) == (0.0, 1.0)
    rows = rows_of(result, sweep.EQUAL_TOKENS)
    assert all(row.kl > 0 and row.kl_answers >= 0 for row in rows.values())
    assert rows["K2V2", "none"].kl > rows["K4V4", "none"].kl
    assert rows["K4V4", "none"].kl < 2 * rows["K16V16", "none"].kl + 0.01


@pytest.mark.slow
def test_draws_are_other_texts_and_add_up() -> None:
    settings = dataclasses.replace(TINY, num_draws=2)
    both = sweep.run(settings)
    first, second = (
        sweep.run(dataclasses.replace(settings, num_draws=1, seed=seed)) for seed in (0, 1)
    )
    for row, one, other in zip(both.rows, first.rows, second.rows, strict=True):
        assert row.num_questions == one.num_questions + other.num_questions
        assert row.num_right == one.num_right + other.num_right
        assert row.kl == pytest.approx((one.kl + other.kl) / 2)
    assert first.rows[1].kl != second.rows[1].kl


@torch.inference_mode()
def test_the_full_cache_diverges_from_itself_by_nothing() -> None:
    model, tokenizer = load_model(None, torch.device("cpu"), "auto")
    talk = plan(
        tokenizer, shipped_voice(), load_text(None), context_tokens=300, num_facts=2, seed=0
    )
    full = demo.read(model, talk.text_ids, lambda *_: None)
    method = Method("full", "full", open_full)
    row, fed = sweep._ask(method, model, tokenizer, full, talk)
    reference = sweep._follow_full(method, model, tokenizer, full, talk, fed)
    assert len(reference.ids) == row.num_steps == len(reference.log_probs)
    following = [int(reference.log_probs[position].argmax()) for position in reference.answers]
    told = [reference.ids[position + 1] for position in reference.answers]
    assert following == told
    for answer in row.answers:
        assert answer.text.rstrip(".") in str(tokenizer.decode(told))
    with method.cache(model, full) as cache:
        kl, same = sweep._divergence(model, cache, reference)
    assert float(kl.abs().max()) < 1e-6
    assert bool(same.all())


def test_a_sweep_survives_json_and_is_rendered(result: sweep.Result) -> None:
    again = sweep.Result.from_dict(json.loads(json.dumps(result.to_dict(), default=str)))
    assert again.rows == result.rows
    out = io.StringIO()
    Console(file=out, width=80).print(render(again))
    text = out.getvalue()
    for part in ("K4V4, rotated", "full cache", "Equal tokens, a budget of 256", "Equal bytes"):
        assert part in text
    assert "…" not in text


@pytest.mark.slow
def test_stages_are_told() -> None:
    stages = []
    settings = dataclasses.replace(TINY, num_draws=2)
    sweep.run(settings, lambda stage, *_: stages.append(stage))
    assert stages[0] == "Loading the model"
    assert "1/2 K4V4, rotated, equal bytes" in stages
    assert "2/2 Reading" in stages


def test_an_interrupt_leaves_the_threads_as_they_were() -> None:
    def interrupt(stage: str, *_: int) -> None:
        if "equal bytes" in stage:
            raise KeyboardInterrupt

    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        sweep.run(TINY, interrupt)
    assert torch.get_num_threads() == before


def test_two_formats_count_what_demoted_pages_still_take() -> None:
    result = sweep.run(dataclasses.replace(TINY, formats=("K8V4", "K8V4+K2V2")))
    fine, mixed = (
        next(row for row in result.rows if row.mode == sweep.EQUAL_TOKENS and row.format == name)
        for name in ("K8V4", "K8V4+K2V2")
    )
    assert mixed.host_bytes_per_token <= fine.host_bytes_per_token


def test_impossible_sweeps_are_refused() -> None:
    for changes, error, message in (
        ({"num_draws": 0}, InputError, "draws=0: expected at least 1"),
        ({"formats": ("K3V3",)}, ConfigError, "preset 'K3V3': expected one of"),
        ({"budget_tokens": 20}, ConfigError, "budget_tokens=20"),
        ({"device_bytes": 1000}, ConfigError, "device_bytes=1000"),
        ({"group_size": 7}, ConfigError, "group_size=7 does not divide"),
    ):
        with pytest.raises(error, match=message):
            sweep.run(dataclasses.replace(SMALL, **changes))
