"""Needles in a haystack: RULER's eight (Hsieh et al. 2024, appendix B and its `niah.py`), and ours.

RULER asks one question about each text. Reading is what takes time, so that several needles with
keys of their own are hidden here and each is asked for; with one question per text the tasks are
RULER's. Its essays are Python's help topics here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from arkcache.demo import facts
from arkcache.evaluation import haystack
from arkcache.evaluation.passage import Passage, Question, Room


@dataclass(frozen=True)
class Magic:
    """Six-digit "special magic numbers" in Python's help topics: ours, the shortest to ask."""

    name: str = "magic"
    most_questions: int = 8

    def draw(self, room: Room, num_questions: int, rng: random.Random) -> Passage:
        """See `Task.draw`."""
        keys = haystack.words(num_questions, rng)
        values = haystack.numbers(num_questions, 6, rng)
        sentences = [
            f"The special magic number for {key} is {value}."
            for key, value in zip(keys, values, strict=True)
        ]
        text = haystack.longest(haystack.prose_with(sentences, rng), room, "")
        questions = [
            Question(
                f"\nWhat is the special magic number for {key}?",
                f"The special magic number for {key} is",
                (value,),
            )
            for key, value in zip(keys, values, strict=True)
        ]
        return Passage(text, shuffled(questions, rng))


@dataclass(frozen=True)
class Needles:
    """One of RULER's NIAH tasks.

    Attributes:
        hay: "noise", "prose", or "needles": nothing but other needles.
        key_kind, value_kind: "words", "numbers" (seven digits) or "uuids".
        num_values: of each key.
        num_queried: keys asked for in one question.
        num_distractors: keys that are never asked for.
    """

    name: str
    hay: str = "prose"
    key_kind: str = "words"
    value_kind: str = "numbers"
    num_values: int = 1
    num_queried: int = 1
    num_distractors: int = 0
    most_questions: int = 8

    def draw(self, room: Room, num_questions: int, rng: random.Random) -> Passage:
        """See `Task.draw`."""
        num_keys = num_questions * self.num_queried + self.num_distractors
        needles = self._needles(num_keys, rng)
        asked = [
            needles[i * self.num_queried : (i + 1) * self.num_queried] for i in range(num_questions)
        ]
        sentences = [self._sentence(key, value) for key, values in needles for value in values]
        rng.shuffle(sentences)
        text = haystack.longest(self._hay(sentences, rng), room, self._opening())
        return Passage(text, shuffled([self._question(group) for group in asked], rng))

    def _needles(self, count: int, rng: random.Random) -> list[tuple[str, list[str]]]:
        keys = _draw(self.key_kind, count, rng)
        values = _draw(self.value_kind, count * self.num_values, rng)
        return [(key, values[i :: len(keys)]) for i, key in enumerate(keys)]

    def _hay(self, sentences: list[str], rng: random.Random) -> haystack.Make:
        if self.hay == "prose":
            return haystack.prose_with(sentences, rng)
        if self.hay == "noise":
            return haystack.noise_with(sentences, rng)
        return _Crowd(sentences, self, rng).make

    def _sentence(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value_kind} for {key} is: {value}."

    @property
    def _is_single(self) -> bool:
        return self.num_values == self.num_queried == 1

    def _opening(self) -> str:
        kind = self.value_kind
        subject = (
            f"A special magic {kind[:-1]} is"
            if self._is_single
            else f"Some special magic {kind} are"
        )
        quiz = f"{kind[:-1]}" if self._is_single else kind
        return (
            f"{subject} hidden within the following text. Make sure to memorize it. I will quiz "
            f"you about the {quiz} afterwards.\n"
        )

    def _question(self, group: list[tuple[str, list[str]]]) -> Question:
        keys = [key for key, _ in group]
        named = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + f", and {keys[-1]}"
        expected = tuple(value for _, values in group for value in values)
        if self._is_single:
            what = (
                f"special magic {self.value_kind[:-1]} for {named} mentioned in the provided text"
            )
            return Question(f"\nWhat is the {what}?", f"The {what} is", expected)
        what = f"special magic {self.value_kind} for {named} mentioned in the provided text"
        spare = 8 * len(expected)
        return Question(f"\nWhat are all the {what}?", f"The {what} are", expected, spare)


class _Crowd:
    """A haystack of needles: so many others around those that are asked for."""

    def __init__(self, sentences: list[str], task: Needles, rng: random.Random) -> None:
        self._sentences, self._task, self._seed = sentences, task, rng.getrandbits(64)

    def make(self, num_others: int) -> str:
        rng = random.Random(self._seed)
        task = self._task
        keys, values = haystack.uuids(num_others, rng), haystack.uuids(num_others, rng)
        if task.key_kind == "words":  # there are not as many words as a long text has needles
            keys = [f"{key}-{i}" for i, key in enumerate(haystack.words(num_others, rng))]
        if task.value_kind == "numbers":
            values = haystack.numbers(num_others, 8, rng)  # no asked value is among them
        others = [task._sentence(key, value) for key, value in zip(keys, values, strict=True)]
        depths = sorted(rng.random() for _ in self._sentences)
        positions = [round(depth * num_others) for depth in depths]
        pieces = [[sentence] for sentence in self._sentences]
        return "\n".join(facts.hide(others, pieces, positions))


def _draw(kind: str, count: int, rng: random.Random) -> list[str]:
    if kind == "words":
        return haystack.words(count, rng)
    return haystack.numbers(count, 7, rng) if kind == "numbers" else haystack.uuids(count, rng)


def shuffled(questions: list[Question], rng: random.Random) -> tuple[Question, ...]:
    """Questions in an order that has nothing to do with where their answers are."""
    return tuple(rng.sample(questions, len(questions)))


NIAH = (
    Needles("niah_single_1", hay="noise"),
    Needles("niah_single_2"),
    Needles("niah_single_3", value_kind="uuids"),
    Needles("niah_multikey_1", num_distractors=3),
    Needles("niah_multikey_2", hay="needles"),
    Needles("niah_multikey_3", hay="needles", key_kind="uuids", value_kind="uuids"),
    Needles("niah_multivalue", num_values=4, most_questions=4),
    Needles("niah_multiquery", num_queried=4, most_questions=4),
)
"""RULER's NIAH tasks with its settings (`synthetic.yaml`)."""
