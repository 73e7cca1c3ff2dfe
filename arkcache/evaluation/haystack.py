"""Texts to hide things in: prose, the sentences that RULER calls noise, and names to hide."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Sequence
from operator import attrgetter

from arkcache.demo import facts
from arkcache.demo.conversation import load_text
from arkcache.evaluation.passage import Room

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""RULER's noise, which is that of the passkey task (Mohtashami and Jaggi 2023)."""

Make = Callable[[int], str]


def prose(rng: random.Random) -> str:
    """Python's help topics, from a random line on and round to it again.

    RULER takes essays by Paul Graham, which cannot be distributed; the help topics are in every
    Python installation.
    """
    lines = load_text(None).splitlines()
    start = rng.randrange(len(lines))
    return "\n".join(lines[start:] + lines[:start])


def prose_with(sentences: Sequence[str], rng: random.Random) -> Make:
    """Prose of so many characters with sentences at evenly spread depths."""
    text = prose(rng)
    hidden = [facts.Fact(sentence, "") for sentence in sentences]
    depths = sorted(facts.spread_depths(len(sentences), rng))

    def make(num_chars: int) -> str:
        repeated = text * (1 + num_chars // len(text))
        return facts.hide_in_text(repeated[:num_chars], hidden, depths, attrgetter("name"))

    return make


def noise_with(sentences: Sequence[str], rng: random.Random) -> Make:
    """So many lines of noise with sentences as lines between them, evenly spread, in order."""
    depths = sorted(facts.spread_depths(len(sentences), rng))

    def make(num_lines: int) -> str:
        positions = [round(depth * num_lines) for depth in depths]
        return "\n".join(facts.hide([NOISE] * num_lines, [[s] for s in sentences], positions))

    return make


def longest(make: Make, room: Room, before: str, after: str = "") -> str:
    """The longest text of `make` that fits between what introduces it and what follows."""

    def whole(units: int) -> str:
        return f"{before}{make(units)}{after}"

    return whole(room.most(whole))


def words(count: int, rng: random.Random) -> list[str]:
    """Different words to name things by: single ones, then pairs."""
    single = rng.sample(facts.names(), len(facts.names()))
    pairs = (f"{one}-{other}" for one in single for other in single if one != other)
    return single[:count] + [
        pair for pair, _ in zip(pairs, range(count - len(single)), strict=False)
    ]


def numbers(count: int, digits: int, rng: random.Random) -> list[str]:
    """Different numbers of so many digits, none beginning with 0."""
    first = 10 ** (digits - 1)
    return [str(number) for number in rng.sample(range(first, 10 * first), count)]


def uuids(count: int, rng: random.Random) -> list[str]:
    """Random UUIDs of version 4."""
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]
