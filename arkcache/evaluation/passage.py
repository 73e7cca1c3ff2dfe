"""What a task is made of: a text, questions about it, and a judge that only looks for strings.

Knows neither models nor tokenizers: a task is given a `Room`, which says whether a text fits.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from arkcache.errors import InputError

_MAX_UNITS = 1 << 24


@dataclass(frozen=True)
class Question:
    """One question about a passage.

    Attributes:
        text: as it is put, in the same turn as the passage.
        prefix: the words with which the answer begins; they are given, so that the answer itself
            comes next.
        expected: what must be in the answer; the score is the share that is found.
        spare_tokens: how much longer than `expected` the answer may be.
    """

    text: str
    prefix: str
    expected: tuple[str, ...]
    spare_tokens: int = 8

    def score(self, answer: str) -> float:
        """The share of what is expected that an answer holds: RULER's string match of all."""
        return sum(value in answer for value in self.expected) / len(self.expected)


@dataclass(frozen=True)
class Passage:
    """A text to read once, the questions about it, and what the model says before any is asked.

    Attributes:
        text: everything that is read, with what introduces it.
        questions: in the order in which they are asked, each to the passage alone.
        said: what the assistant has answered before, decoded token by token; empty for most tasks.
        request: the question to which `said` is the answer.
    """

    text: str
    questions: tuple[Question, ...]
    said: str = ""
    request: str = ""


@dataclass(frozen=True)
class Room:
    """How long a passage may be.

    Attributes:
        count: tokens of a text.
        num_tokens: that a passage may have.
    """

    count: Callable[[str], int]
    num_tokens: int

    def fits(self, text: str) -> bool:
        """Whether a text is short enough."""
        return self.count(text) <= self.num_tokens

    def most(self, make: Callable[[int], str], least: int = 0) -> int:
        """The largest number of units with which `make(units)` still fits.

        Longer texts must have more units. Raises `InputError` where `least` units do not fit.
        """
        if not self.fits(make(least)):
            raise InputError(
                f"a passage of {self.num_tokens} tokens is too short: expected at least "
                f"{self.count(make(least))} for what is hidden in it"
            )
        fits, fails = least, max(1, 2 * least)
        while fails < _MAX_UNITS and self.fits(make(fails)):
            fits, fails = fails, 2 * fails
        while fails - fits > 1:
            middle = (fits + fails) // 2
            if self.fits(make(middle)):
                fits = middle
            else:
                fails = middle
        return fits


class Task(Protocol):
    """A generator of passages."""

    @property
    def name(self) -> str:
        """In options, tables and JSON."""
        ...

    @property
    def most_questions(self) -> int:
        """Of one passage; one where a passage answers a single question."""
        ...

    def draw(self, room: Room, num_questions: int, rng: random.Random) -> Passage:
        """A passage of nearly `room.num_tokens` tokens with at most so many questions.

        The same `rng` state gives the same passage. Raises `InputError` where it does not fit.
        """
        ...
