"""Tasks of our own: scattered records, and the model's own output."""

from __future__ import annotations

import random
from dataclasses import dataclass

from arkcache.evaluation import haystack
from arkcache.evaluation.needles import shuffled
from arkcache.evaluation.passage import Passage, Question, Room


@dataclass(frozen=True)
class Records:
    """Records of several depots scattered over a text; all of one depot are to be listed.

    An answer needs many places of the text at once, which no one page holds.

    Attributes:
        num_records: of each depot.
    """

    name: str = "records"
    num_records: int = 6
    most_questions: int = 4

    def draw(self, room: Room, num_questions: int, rng: random.Random) -> Passage:
        """See `Task.draw`."""
        depots = haystack.words(num_questions, rng)
        codes = haystack.numbers(num_questions * self.num_records, 4, rng)
        of = {depot: codes[i::num_questions] for i, depot in enumerate(depots)}
        sentences = [
            f"Delivery record: depot {depot} received crate {code}."
            for depot, held in of.items()
            for code in held
        ]
        rng.shuffle(sentences)
        text = haystack.longest(haystack.prose_with(sentences, rng), room, "")
        questions = [
            Question(
                f"\nList all crates that depot {depot} received.",
                f"According to the delivery records, depot {depot} received the crates",
                tuple(held),
                spare_tokens=4 * len(held),
            )
            for depot, held in of.items()
        ]
        return Passage(text, shuffled(questions, rng))


@dataclass(frozen=True)
class OwnOutput:
    """Numbers that the model itself has said, in an answer that is decoded token by token.

    The answer is forced, so that all caches ask for the same; it is as long as `said_share` of the
    passage, and what comes after the numbers pushes them out of every recent window.
    """

    name: str = "own_output"
    said_share: float = 0.25
    most_questions: int = 4

    def draw(self, room: Room, num_questions: int, rng: random.Random) -> Passage:
        """See `Task.draw`."""
        keys = haystack.words(num_questions, rng)
        values = haystack.numbers(num_questions, 6, rng)
        lines = [
            f"I choose the number {value} for {key}."
            for key, value in zip(keys, values, strict=True)
        ]
        spoken = Room(room.count, int(room.num_tokens * self.said_share))
        said = haystack.longest(haystack.prose_with(lines, rng), spoken, "")
        read = Room(room.count, room.num_tokens - room.count(said))
        text = haystack.longest(haystack.prose_with([], rng), read, "")
        request = "\nGo on with this text, and choose a number for each of " + ", ".join(keys) + "."
        questions = [
            Question(
                f"Which number did you choose for {key}?",
                "I chose the number",
                (value,),
            )
            for key, value in zip(keys, values, strict=True)
        ]
        return Passage(text, shuffled(questions, rng), said, request)
