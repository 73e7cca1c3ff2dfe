"""Prompts that begin alike: what is shared, what is read, and that nobody can tell."""

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from arkcache import ArkCache, InputError, PrefixCache
from tests.test_huggingface import EVERYTHING, SPARSE, make_model, prompt

DOCUMENT = prompt(203)[0].tolist()
QUESTIONS = [prompt(17, seed=seed)[0].tolist() for seed in (2, 3)]


@pytest.fixture
def model() -> LlamaForCausalLM:
    return make_model()


def answer(model: Any, cache: ArkCache, ids: list[int], count: int = 12) -> list[int]:
    """The most likely tokens after a prompt, of which the cache holds a part."""
    said, given = [], ids[cache.get_seq_length() :]
    with torch.inference_mode():
        for _ in range(count):
            logits = model(torch.tensor([given]), past_key_values=cache).logits[0, -1]
            given = [int(logits.argmax())]
            said += given
    return said


@pytest.mark.parametrize("settings", [EVERYTHING, SPARSE], ids=["everything", "sparse"])
def test_the_answers_of_a_cache_that_read_it_all(
    model: LlamaForCausalLM, settings: dict[str, Any]
) -> None:
    prefixes = PrefixCache(model, **settings)
    first = prefixes.begin(DOCUMENT)
    assert first.get_seq_length() == 0
    answer(model, first, DOCUMENT, count=1)
    prefixes.keep(first, DOCUMENT)
    for question in QUESTIONS:
        cache = prefixes.begin(DOCUMENT + question)
        assert cache.get_seq_length() == len(DOCUMENT)  # all of it, though its last page is open
        fresh = ArkCache(model, **settings)
        ids = DOCUMENT + question
        assert answer(model, cache, ids) == answer(model, fresh, ids)
        cache.check_integrity()


def test_prompts_part_at_a_page(model: LlamaForCausalLM) -> None:
    """What is read begins with the first page that is not known."""
    prefixes = PrefixCache(model, **SPARSE)
    whole = DOCUMENT + QUESTIONS[0]
    cache = prefixes.begin(whole)
    answer(model, cache, whole, count=1)
    prefixes.keep(cache, whole)
    other = DOCUMENT + QUESTIONS[1]
    shared = prefixes.begin(other)
    assert shared.get_seq_length() == 200  # of 203, in pages of 4
    assert answer(model, shared, other) == answer(model, ArkCache(model, **SPARSE), other)
    assert prefixes.begin(whole).get_seq_length() == len(whole) - len(whole) % 4 - 4 * (
        len(whole) % 4 == 0
    )
    assert prefixes.begin(DOCUMENT[1:]).get_seq_length() == 0
    assert prefixes.begin(DOCUMENT[:3]).get_seq_length() == 0


def test_one_token_that_is_left_attends_everything(model: LlamaForCausalLM) -> None:
    prefixes = PrefixCache(model, **SPARSE)
    whole = DOCUMENT[:200] + QUESTIONS[0]
    cache = prefixes.begin(whole)
    answer(model, cache, whole, count=1)
    prefixes.keep(cache, whole)
    ids = [*DOCUMENT[:200], 5]
    shared, fresh = prefixes.begin(ids), ArkCache(model, **SPARSE)
    assert shared.get_seq_length() == 200
    answers = [answer(model, one, ids, count=1) for one in (shared, fresh)]
    assert answers[0] == answers[1]
    assert shared.stats().attended_tokens == 201 * 3


def test_pages_are_shared_and_outlive_who_read_them(model: LlamaForCausalLM) -> None:
    prefixes = PrefixCache(model, **SPARSE)
    cache = prefixes.begin(DOCUMENT)
    answer(model, cache, DOCUMENT, count=1)
    prefixes.keep(cache, DOCUMENT)
    host = cache.managers[0].host
    assert host is not None
    pieces = host.num_pieces
    ids = DOCUMENT + QUESTIONS[0]
    others = [prefixes.begin(ids) for _ in range(3)]
    assert host.num_pieces == pieces
    assert (host.references(cache.managers[0].held_pieces()) == 5).all()
    cache.reset()
    expected = answer(model, ArkCache(model, **SPARSE), ids)
    assert [answer(model, one, ids) for one in others] == [expected] * 3
    prefixes.clear()
    del others
    assert len(prefixes) == 0


def test_quantised_pages(model: LlamaForCausalLM) -> None:
    settings = {**SPARSE, "key_bits": 8, "value_bits": 8, "group_size": 16, "page_size": 8}
    prefixes = PrefixCache(model, **{**settings, "budget_tokens": 64})
    whole = DOCUMENT + QUESTIONS[0]
    cache = prefixes.begin(whole)
    answer(model, cache, whole, count=1)
    prefixes.keep(cache, whole)
    shared = prefixes.begin(DOCUMENT + QUESTIONS[1])
    assert shared.get_seq_length() == 200
    assert len(answer(model, shared, DOCUMENT + QUESTIONS[1])) == 12
    shared.check_integrity()


def test_the_one_that_was_used_longest_ago_goes(model: LlamaForCausalLM) -> None:
    prefixes = PrefixCache(model, **SPARSE, most=2)
    texts = [prompt(40, seed=seed)[0].tolist() for seed in range(5, 8)]
    for text in texts[:2]:
        cache = prefixes.begin(text)
        answer(model, cache, text, count=1)
        prefixes.keep(cache, text)
    assert prefixes.begin([*texts[0], 1]).get_seq_length() == 40  # used once more
    cache = prefixes.begin(texts[2])
    answer(model, cache, texts[2], count=1)
    prefixes.keep(cache, texts[2])
    held = [prefixes.begin([*text, 1]).get_seq_length() for text in texts]
    assert (held, len(prefixes)) == ([40, 0, 40], 2)


def test_layers_that_cannot_go_back(tmp_path: Any) -> None:
    """A sliding window has forgotten what a shorter prompt needs: that is read anew."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    config = Gemma2Config(
        vocab_size=128, num_attention_heads=4, num_key_value_heads=2, sliding_window=16, **sizes
    )
    model = Gemma2ForCausalLM(config).eval()
    prefixes = PrefixCache(model, **SPARSE)
    whole = DOCUMENT + QUESTIONS[0]
    cache = prefixes.begin(whole)
    answer(model, cache, whole, count=1)
    prefixes.keep(cache, whole)
    other = DOCUMENT + QUESTIONS[1]
    expected = answer(model, ArkCache(model, **SPARSE), other)
    assert answer(model, prefixes.begin(other), other) == expected
    longer = whole + QUESTIONS[1]
    shared = prefixes.begin(longer)
    assert shared.get_seq_length() == len(whole)
    assert answer(model, shared, longer) == answer(model, ArkCache(model, **SPARSE), longer)


def test_what_cannot_be_kept(model: LlamaForCausalLM) -> None:
    with pytest.raises(InputError, match="most=0"):
        PrefixCache(model, most=0)
    prefixes = PrefixCache(model, **SPARSE)
    cache = prefixes.begin(DOCUMENT)
    answer(model, cache, DOCUMENT, count=1)
    with pytest.raises(InputError, match="3 ids for a cache of 203 tokens"):
        prefixes.keep(cache, DOCUMENT[:3])
    cache.batch_repeat_interleave(2)
    with pytest.raises(InputError, match="several sequences"):
        prefixes.keep(cache, DOCUMENT)
