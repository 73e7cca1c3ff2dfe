"""RULER's variable tracking (Hsieh et al. 2024, section 3.2 and its `variable_tracking.py`)."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from itertools import pairwise

from arkcache.evaluation import haystack
from arkcache.evaluation.needles import shuffled
from arkcache.evaluation.passage import Passage, Question, Room

_OPENING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
)


@dataclass(frozen=True)
class VariableTracking:
    """Chains of assignments in noise; all variables with a value are to be named.

    RULER has one chain; with several questions about a text there are as many.

    Attributes:
        num_hops: assignments after the first in each chain.
    """

    name: str = "variable_tracking"
    num_hops: int = 4
    most_questions: int = 4

    def draw(self, room: Room, num_questions: int, rng: random.Random) -> Passage:
        """See `Task.draw`."""
        names = self._names(num_questions * (self.num_hops + 1), rng)
        values = haystack.numbers(num_questions, 5, rng)
        chains = [names[i::num_questions] for i in range(num_questions)]
        lines = _interleaved(
            [_assignments(*pair) for pair in zip(chains, values, strict=True)], rng
        )
        text = haystack.longest(haystack.noise_with(lines, rng), room, _OPENING)
        questions = [self._question(*pair) for pair in zip(chains, values, strict=True)]
        return Passage(text, shuffled(questions, rng))

    def _names(self, count: int, rng: random.Random) -> list[str]:
        drawn: dict[str, None] = {}
        while len(drawn) < count:
            drawn["".join(rng.choices(string.ascii_uppercase, k=5))] = None
        return list(drawn)

    def _question(self, chain: list[str], value: str) -> Question:
        return Question(
            f"\nQuestion: Find all variables that are assigned the value {value} in the text "
            "above.",
            "According to the chain(s) of variable assignment in the text above, "
            f"{len(chain)} variables are assigned the value {value}, they are:",
            tuple(chain),
            spare_tokens=4 * len(chain),
        )


def _assignments(chain: list[str], value: str) -> list[str]:
    first = f"VAR {chain[0]} = {value}"
    rest = [f"VAR {new} = VAR {old}" for old, new in pairwise(chain)]
    return [first, *rest]


def _interleaved(chains: list[list[str]], rng: random.Random) -> list[str]:
    """The lines of all chains, those of each in order."""
    turns = [number for number, chain in enumerate(chains) for _ in chain]
    rng.shuffle(turns)
    lines = [iter(chain) for chain in chains]
    return [next(lines[number]) for number in turns]
