"""Generators of passages: as long as asked, seeded, with every answer where the task says."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable

import pytest
import torch

from arkcache.demo.models import load_model
from arkcache.errors import InputError
from arkcache.evaluation import haystack
from arkcache.evaluation.passage import Passage, Question, Room
from arkcache.evaluation.records import Budget
from arkcache.evaluation.speaker import Speaker, speaker_of
from arkcache.evaluation.tasks import GROUPS, TASKS, task_names

LENGTH = 2048
COUNTS = {
    # How often a text says what is asked for; 1 where it is not named here.
    "passkey": {2},
    "number_string": {2},
    "variable_tracking": {1, 2},
    "common_words": {30},
    "facts": {1, 2, 3},  # values may repeat
}
TRAINED = GROUPS["trained"]


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return speaker_of(load_model(None, torch.device("cpu"), "auto")[1])


def draw(name: str, room: Room, seed: int = 0) -> Passage:
    task = TASKS[name]
    return task.draw(room, task.most_questions, random.Random(seed))


def words_and_digits(text: str) -> int:
    """A tokenizer of its own kind: words, and every digit apart."""
    return len(text.split()) + sum(map(str.isdigit, text))


@pytest.mark.parametrize("name", TASKS)
def test_a_passage_fills_its_room(name: str, speaker: Speaker) -> None:
    passage = draw(name, speaker.room(LENGTH))
    num_tokens = len(speaker.read(passage)) + len(speaker.said(passage))
    slack = 0.05 if name != "own_output" else 0.1  # its request comes on top
    assert LENGTH * 0.95 <= num_tokens <= LENGTH * (1 + (slack if passage.said else 0))


@pytest.mark.parametrize("count", [len, words_and_digits])
@pytest.mark.parametrize("name", TASKS)
def test_any_way_to_count_will_do(name: str, count: Callable[[str], int]) -> None:
    room = Room(count, 20000 if count is len else 3000)
    passage = draw(name, room)
    assert 0.95 * room.num_tokens <= count(passage.text + passage.said) <= room.num_tokens


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_in_the_text(name: str, speaker: Speaker) -> None:
    passage = draw(name, speaker.room(LENGTH))
    text = passage.text + passage.said
    counts = {text.count(value) for question in passage.questions for value in question.expected}
    if name == "frequent_words":
        assert len(counts) == 3 <= min(counts)
    else:
        assert counts <= COUNTS.get(name, {1}), counts
    questions = [question.text for question in passage.questions]
    most = TASKS[name].most_questions
    expected = min(most, LENGTH // 32) if name in TRAINED else most
    assert len({*questions}) == len(questions) == expected


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_decides_everything(name: str, speaker: Speaker) -> None:
    room = speaker.room(LENGTH)
    first, again, other = (draw(name, room, seed) for seed in (0, 0, 1))
    assert first == again
    assert first.text != other.text
    assert first.questions[0].expected != other.questions[0].expected


@pytest.mark.parametrize("name", TASKS)
def test_too_little_room_is_said(name: str) -> None:
    with pytest.raises(InputError, match=r"a passage of \d+ tokens is too short: expected at"):
        draw(name, Room(len, 10))


def test_frequent_words_are_the_most_frequent(speaker: Speaker) -> None:
    passage = draw("frequent_words", speaker.room(LENGTH))
    listed = passage.text.partition("coded words. ")[2].split()
    by_count = sorted({*listed}, key=listed.count, reverse=True)
    assert by_count[0] == "...."
    assert tuple(by_count[1:4]) == passage.questions[0].expected


def test_common_words_are_the_most_common(speaker: Speaker) -> None:
    for length, most, others in ((1024, 10, 1), (4096, 30, 3)):
        passage = draw("common_words", speaker.room(length))
        listed = passage.text.splitlines()[1].split()[1::2]
        counts = {word: listed.count(word) for word in listed}
        common = {word for word, count in counts.items() if count == most}
        assert common == {*passage.questions[0].expected}
        assert {*counts.values()} == {most, others}


def test_chains_lead_to_their_value(speaker: Speaker) -> None:
    passage = draw("variable_tracking", speaker.room(LENGTH))
    held: dict[str, str] = {}
    for line in passage.text.splitlines():
        if line.startswith("VAR "):
            name, _, value = line.removeprefix("VAR ").partition(" = ")
            held[name] = held[value.removeprefix("VAR ")] if value.startswith("VAR") else value
    for question in passage.questions:
        value = next(word for word in question.text.split() if word.isdigit())
        assert {name for name in held if held[name] == value} == {*question.expected}


def test_references_lead_to_a_value_in_two_steps(speaker: Speaker) -> None:
    passage = draw("hops", speaker.room(LENGTH))
    said = dict(re.findall(r"The value of (\w+) is (\w+)\.", passage.text))
    order = []
    for question in passage.questions:
        first = question.text.removeprefix("\nWhat is the value of ").removesuffix("?")
        assert (said[said[first]],) == question.expected
        places = [passage.text.index(f"The value of {name} is") for name in (first, said[first])]
        order.append(places[0] < places[1])
    assert len(said) == 2 * len(passage.questions)
    assert {*order} == {True, False}


def test_a_code_is_right_as_a_whole(speaker: Speaker) -> None:
    question = draw("codes", speaker.room(LENGTH)).questions[0]
    (code,) = question.expected
    assert re.fullmatch(r"(\d{4} ){3}\d{4}", code)
    assert question.score(f" {code}.") == 1
    assert question.score(f" {' '.join(reversed(code.split()))}.") == 0


@pytest.mark.parametrize("name", TRAINED)
def test_names_and_values_are_a_token_each(name: str, speaker: Speaker) -> None:
    """What the trained models' circuit looks up."""
    for question in draw(name, speaker.room(LENGTH)).questions:
        ids = speaker.tokenizer(f" {question.expected[0]}")["input_ids"]
        assert len(ids) == len(question.expected[0].split())
        asked = question.text.removesuffix("?").split()[-1]
        assert len(speaker.tokenizer(f" {asked}")["input_ids"]) == 1


@pytest.mark.parametrize("name", TRAINED)
def test_as_many_facts_as_there_is_room_for(name: str) -> None:
    for num_units, asked, drawn in ((3200, 40, 40), (1280, 64, 40), (1280, 8, 8)):
        room = Room(words_and_digits, num_units)
        passage = TASKS[name].draw(room, asked, random.Random(0))
        assert len(passage.questions) == drawn


def test_needles_are_all_over_the_text(speaker: Speaker) -> None:
    for name in ("magic", "niah_single_1", "niah_multikey_2", "kv_retrieval", "records", *TRAINED):
        passage = draw(name, speaker.room(LENGTH))
        depths = [
            passage.text.index(value) / len(passage.text)
            for question in passage.questions
            for value in question.expected
        ]
        assert min(depths) < 0.25
        assert max(depths) > 0.75


def test_a_chat_template_is_put_around(speaker: Speaker) -> None:
    tokenizer = copy.deepcopy(speaker.tokenizer)
    tokenizer.chat_template = (
        "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = speaker_of(tokenizer)
    passage = Passage("Read this.", (Question(" What?", "It is", ("x",)),), "Done.", " Do.")
    parts = [chat.read(passage), chat.ask(passage.questions[0]), chat.said(passage)]
    assert [str(tokenizer.decode(part)) for part in parts] == [
        "<user>Read this.",
        " What?</s><assistant>It is",
        " Do.</s><assistant>Done.</s><user>",
    ]


def test_without_a_template_lines_are_plain(speaker: Speaker) -> None:
    asked = [speaker.ask(Question("\nWhat?", prefix, ("x",))) for prefix in ("It is", "")]
    assert [str(speaker.tokenizer.decode(ids)) for ids in asked] == ["\nWhat? It is", "\nWhat?"]


def test_a_score_is_the_share_that_was_found() -> None:
    question = Question("?", "", ("123456", "654321"))
    assert question.score("123456 and 65432") == 0.5
    assert question.score("654321, 123456.") == 1.0
    assert question.score("12345") == 0.0


def test_many_words_differ() -> None:
    drawn = haystack.words(1000, random.Random(0))
    assert len({*drawn}) == len(drawn) == 1000


def test_tasks_by_name() -> None:
    assert task_names("magic, niah,magic") == ("magic", *GROUPS["niah"])
    assert len(GROUPS["ruler"]) == 11
    for given, message in (
        ("nonsense", "task 'nonsense': expected one of"),
        (" ,", "at least one"),
    ):
        with pytest.raises(InputError, match=message):
            task_names(given)


def test_budgets() -> None:
    assert [Budget(given).tokens(3072) for given in ("512", "1/8", "none")] == [512, 384, None]
    for given in ("", "0", "1/0", "-5", "half", "1/"):
        with pytest.raises(InputError, match="expected tokens as in 512"):
            Budget(given)
