"""RULER's aggregation tasks: common words and frequent words (Hsieh et al. 2024, section 3.3)."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from functools import partial

from arkcache.evaluation import haystack
from arkcache.evaluation.passage import Passage, Question, Room


@dataclass(frozen=True)
class CommonWords:
    """A numbered list in which ten words come more often than all others (RULER's CWE).

    Attributes:
        counts: how often the common and the other words come, the first that fits: RULER's 30 and
            3, and for short texts a third of that.
    """

    name: str = "common_words"
    num_common: int = 10
    counts: tuple[tuple[int, int], ...] = ((30, 3), (10, 1))
    most_questions: int = 1

    def draw(self, room: Room, num_questions: int, rng: random.Random) -> Passage:
        """See `Task.draw`."""
        seed = rng.getrandbits(64)
        common = haystack.words(self.num_common, random.Random(seed))

        def make(num_others: int, counts: tuple[int, int]) -> str:
            draw = random.Random(seed)
            others = haystack.words(self.num_common + num_others, draw)[self.num_common :]
            listed = common * counts[0] + others * counts[1]
            draw.shuffle(listed)
            return (
                "Below is a numbered list of words. In these words, some appear more often than "
                "others. Memorize the ones that appear most often.\n"
                + " ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1))
            )

        fitting = (one for one in self.counts[:-1] if room.fits(make(self.num_common, one)))
        listing = partial(make, counts=next(fitting, self.counts[-1]))
        question = Question(
            f"\nQuestion: What are the {self.num_common} most common words in the above list?",
            f"The top {self.num_common} words that appear most often in the list are:",
            tuple(common),
            spare_tokens=4 * self.num_common,
        )
        return Passage(listing(room.most(listing)), (question,))


@dataclass(frozen=True)
class FrequentWords:
    """Coded words by Zipf's law, of which the three most frequent are asked for (RULER's FWE).

    The most frequent word of all is the dots, which are to be ignored.
    """

    name: str = "frequent_words"
    alpha: float = 2.0
    num_asked: int = 3
    num_coded: int = 50
    most_questions: int = 1

    def draw(self, room: Room, num_questions: int, rng: random.Random) -> Passage:
        """See `Task.draw`."""
        coded = _coded_words(self.num_coded, rng)
        seed = rng.getrandbits(64)

        def make(num_words: int) -> str:
            # Shares by rank, so that the order of frequencies is no matter of luck.
            shares = [rank**-self.alpha for rank in range(1, self.num_coded + 2)]
            counts = [int(num_words * share / sum(shares)) for share in shares]
            drawn = [
                word for word, n in zip(["....", *coded], counts, strict=True) for _ in range(n)
            ]
            random.Random(seed).shuffle(drawn)
            return (
                "Read the following coded text and track the frequency of each coded word. Find "
                f"the three most frequently appeared coded words. {' '.join(drawn)}"
            )

        question = Question(
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are "
            "the three most frequently appeared words in the above coded text?",
            "According to the coded text above, the three most frequently appeared words are:",
            tuple(coded[: self.num_asked]),
            spare_tokens=4 * self.num_asked,
        )
        return Passage(make(room.most(make)), (question,))


def _coded_words(count: int, rng: random.Random) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    return list(drawn)
