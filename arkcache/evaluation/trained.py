"""Tasks for the models that `benchmarks/train_demo_model.py` trains: facts by the hundred.

Names and values are those of `demo/facts.py`, each one token to these models' tokenizer, so that
what is asked is to look up, not to spell. Of the shipped model only `facts` can be asked.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from arkcache.demo import facts
from arkcache.evaluation import haystack
from arkcache.evaluation.needles import shuffled
from arkcache.evaluation.passage import Passage, Question, Room

CODE_VALUES = 4
"""Values of a code."""
_MIN_FACTS, _TOKENS_PER_FACT = 16, 32


def render_code(name: str, values: Sequence[str]) -> str:
    """Several values as a sentence: "The code of amber is 4821 1234 5678 9012."."""
    return f"The code of {name} is {' '.join(values)}."


def render_code_question(name: str) -> str:
    """The question for a name's code: "What is the code of amber?"."""
    return f"What is the code of {name}?"


def render_reference(name: str, other: str) -> str:
    """A name that has the value of another one: "The value of birch is amber."."""
    return facts.render_fact(facts.Fact(name, other))


@dataclass(frozen=True)
class Facts:
    """The demonstration's facts and questions, one value each: what the shipped model can do."""

    name: str = "facts"
    most_questions: int = 128

    def draw(self, room: Room, num_questions: int, rng: random.Random) -> Passage:
        """See `Task.draw`."""
        hidden = facts.draw_facts(_that_fit(num_questions, room), rng)
        asked = [_question(facts.render_question(fact.name), fact.value) for fact in hidden]
        return _passage(list(map(facts.render_fact, hidden)), asked, room, rng)


@dataclass(frozen=True)
class Codes:
    """Names with four values each, to be copied in order, as the UUIDs of `kv_retrieval` are."""

    name: str = "codes"
    most_questions: int = 128

    def draw(self, room: Room, num_questions: int, rng: random.Random) -> Passage:
        """See `Task.draw`."""
        names = rng.sample(facts.names(), _that_fit(num_questions, room))
        codes = {name: rng.sample(facts.values(), CODE_VALUES) for name in names}
        asked = [_question(render_code_question(name), " ".join(codes[name])) for name in names]
        return _passage([render_code(*code) for code in codes.items()], asked, room, rng)


@dataclass(frozen=True)
class Hops:
    """Names that refer to names that have a value: RULER's variable tracking, from the other end.

    Every pair is asked for, so that all others are in its way; which of its two sentences comes
    first is left to chance.
    """

    name: str = "hops"
    most_questions: int = 64

    def draw(self, room: Room, num_questions: int, rng: random.Random) -> Passage:
        """See `Task.draw`."""
        count = _that_fit(num_questions, room)
        names = rng.sample(facts.names(), 2 * count)
        values = rng.sample(facts.values(), count)
        chains = list(zip(names[::2], names[1::2], values, strict=True))
        sentences = [render_reference(first, second) for first, second, _ in chains]
        sentences += [facts.render_fact(facts.Fact(*chain[1:])) for chain in chains]
        rng.shuffle(sentences)
        asked = [_question(facts.render_question(first), value) for first, _, value in chains]
        return _passage(sentences, asked, room, rng)


def _that_fit(num_questions: int, room: Room) -> int:
    """As many as are asked for, as far as there is room for text between them."""
    return min(num_questions, max(_MIN_FACTS, room.num_tokens // _TOKENS_PER_FACT))


def _question(text: str, expected: str) -> Question:
    return Question("\n" + text, "", (expected,), spare_tokens=12)


def _passage(
    sentences: list[str], questions: list[Question], room: Room, rng: random.Random
) -> Passage:
    text = haystack.longest(haystack.prose_with(sentences, rng), room, "")
    return Passage(text, shuffled(questions, rng))
