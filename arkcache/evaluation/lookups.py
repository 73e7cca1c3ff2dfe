"""InfiniteBench's retrieval tasks (Zhang et al. 2024, section 3.3 and its `eval_utils`)."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from arkcache.evaluation import haystack
from arkcache.evaluation.needles import shuffled
from arkcache.evaluation.passage import Passage, Question, Room

_HIDDEN = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I "
    "will quiz you about the important information there.\n\n"
)


@dataclass(frozen=True)
class PassKey:
    """A pass key of five digits in noise (Retrieve.PassKey); one question a text."""

    name: str = "passkey"
    most_questions: int = 1

    def draw(self, room: Room, num_questions: int, rng: random.Random) -> Passage:
        """See `Task.draw`."""
        (key,) = haystack.numbers(1, 5, rng)
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        text = haystack.longest(haystack.noise_with([needle], rng), room, _HIDDEN)
        return Passage(text, (Question("\n\nWhat is the pass key?", "The pass key is", (key,)),))


@dataclass(frozen=True)
class NumberString:
    """A string of ten digits, most of them repeated, in noise (Retrieve.Number)."""

    name: str = "number_string"
    most_questions: int = 1

    def draw(self, room: Room, num_questions: int, rng: random.Random) -> Passage:
        """See `Task.draw`."""
        digits = ""
        while len(digits) < 10:
            digits += rng.choice("0123456789") * rng.randint(1, 4)
        digits = digits[:10]
        needle = (
            f"The sequence of digits is {digits}. Remember it. {digits} is the sequence of digits."
        )
        text = haystack.longest(haystack.noise_with([needle], rng), room, _HIDDEN)
        asked = "\n\nWhat is the sequence of digits?"
        return Passage(text, (Question(asked, "The sequence of digits is", (digits,)),))


@dataclass(frozen=True)
class KeyValue:
    """The value of a key in a JSON object of UUIDs (Retrieve.KV, after Liu et al. 2023)."""

    name: str = "kv_retrieval"
    most_questions: int = 16

    def draw(self, room: Room, num_questions: int, rng: random.Random) -> Passage:
        """See `Task.draw`."""
        seed = rng.getrandbits(64)

        def pairs(count: int) -> dict[str, str]:
            drawn = haystack.uuids(2 * count, random.Random(seed))
            return dict(zip(drawn[::2], drawn[1::2], strict=True))

        def make(count: int) -> str:
            opening = (
                "Extract the value corresponding to the specified key in the JSON object below."
            )
            return f"{opening}\n\n{json.dumps(pairs(count), indent=0)}\n"

        held = pairs(room.most(make, least=1))
        count = min(num_questions, len(held))
        spread = [list(held)[i * len(held) // count] for i in range(count)]
        questions = [
            Question(
                f'\nKey: "{key}"\nThe value associated with the specified key is:',
                "The value associated with the specified key is",
                (held[key],),
            )
            for key in spread
        ]
        return Passage(make(len(held)), shuffled(questions, rng))
