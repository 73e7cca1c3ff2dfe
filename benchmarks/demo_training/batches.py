"""Training batches: facts in real text, then questions about them, at widely spread positions."""

import math
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from arkcache.demo import facts

# Weight of a token's loss by what the token is.
TEXT_WEIGHT, ANSWER_WEIGHT, UNKNOWABLE_WEIGHT = 0.3, 3.0, 0.0
_TEXT_SHARE = 0.25  # how many of the text's tokens are predicted at all
_MAX_FACTS = 64
_JUMP_SHARE, _MAX_JUMPS = 0.8, 32  # how many sequences have jumps in their positions; how many
_TOKENS_PER_FACT = 32  # at most one fact, and about one question, in so many tokens


# Id, weight of its loss, and whether positions may jump before it.
_Token = tuple[int, float, bool]


class Batch(NamedTuple):
    """One training batch; all are [batch, length], `weights` (fp32) and `ids` per token."""

    ids: torch.Tensor
    position_ids: torch.Tensor
    weights: torch.Tensor


class Vocabulary(NamedTuple):
    """Token ids of the parts that facts and questions are made of."""

    names: np.ndarray
    values: np.ndarray
    fact_head: list[int]
    fact_middle: list[int]
    question_head: list[int]
    question_middle: list[int]
    stop: list[int]
    line_break: list[int]


def make_vocabulary(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """Splits rendered facts and questions at their name and value.

    Raises ValueError where a name or value is not one token.
    """
    words = {
        kind: tokenizer([f" {word}" for word in group])["input_ids"]
        for kind, group in (("names", facts.names()), ("values", facts.values()))
    }
    if any(len(ids) != 1 for group in words.values() for ids in group):
        raise ValueError("the tokenizer splits a name or a value; add each as one token")
    fact = facts.Fact(facts.names()[0], facts.values()[0])
    name, value = words["names"][0], words["values"][0]
    fact_ids = tokenizer("\n" + facts.render_fact(fact))["input_ids"]
    question_ids = tokenizer("\n" + facts.render_question(fact.name))["input_ids"]
    at_name, at_value = fact_ids.index(name[0]), fact_ids.index(value[0])
    asked = question_ids.index(name[0])
    return Vocabulary(
        names=np.asarray(words["names"])[:, 0],
        values=np.asarray(words["values"])[:, 0],
        fact_head=fact_ids[:at_name],
        fact_middle=fact_ids[at_name + 1 : at_value],
        question_head=question_ids[:asked],
        question_middle=question_ids[asked + 1 :],
        stop=fact_ids[at_value + 1 :],
        line_break=tokenizer("\n")["input_ids"],
    )


class BatchMaker:
    """Draws batches from encoded text, seeded; the same seed gives the same batches."""

    def __init__(
        self, texts: list[np.ndarray], vocabulary: Vocabulary, seed: int, max_span: int
    ) -> None:
        """`texts`: arrays of ids, drawn from equally often; `max_span`: the widest positions."""
        self._texts = texts
        self._vocabulary = vocabulary
        self._rng = np.random.default_rng(seed)
        self._max_span = max_span

    def draw(self, batch_size: int, length: int) -> Batch:
        """A batch of `batch_size` sequences of `length` tokens."""
        rows = [self._sequence(length) for _ in range(batch_size)]
        ids, weights, may_jump = np.moveaxis(np.asarray(rows), -1, 0)
        positions = [self._positions(row > 0) for row in may_jump]
        return Batch(
            torch.from_numpy(ids.astype(np.int64)),
            torch.from_numpy(np.stack(positions)),
            torch.from_numpy(weights.astype(np.float32)),
        )

    def _sequence(self, length: int) -> list[_Token]:
        """Real text with facts anywhere and each question somewhere after its fact."""
        rng, vocabulary = self._rng, self._vocabulary
        num_facts = int(rng.integers(2, min(_MAX_FACTS, length // _TOKENS_PER_FACT) + 1))
        num_questions = max(2, min(_MAX_FACTS, length // (2 * _TOKENS_PER_FACT)))
        known = list(
            zip(
                rng.permutation(vocabulary.names)[:num_facts],
                rng.choice(vocabulary.values, num_facts),
                strict=True,
            )
        )
        # With replacement: otherwise elimination is learnt instead of look-up.
        asked = rng.integers(num_facts, size=num_questions)
        pieces = [self._fact(*fact) for fact in known]
        pieces += [self._question(*known[i]) for i in asked]
        num_text = length - sum(map(len, pieces))
        hidden = rng.integers(num_text + 1, size=num_facts)
        # Half of the questions come in a row at the end, the others as soon as they can be asked.
        at_end = rng.random(num_questions) < 0.5
        placed = np.where(at_end, num_text, rng.integers(hidden[asked], num_text + 1))
        return facts.hide(self._text(num_text), pieces, [*hidden, *placed])

    def _text(self, length: int) -> list[_Token]:
        text = self._texts[self._rng.integers(len(self._texts))]
        start = self._rng.integers(len(text) - length)
        weights = np.where(self._rng.random(length) < _TEXT_SHARE, TEXT_WEIGHT, 0.0)
        return [
            (int(i), float(weight), True)
            for i, weight in zip(text[start : start + length], weights, strict=True)
        ]

    def _fact(self, name: int, value: int) -> list[_Token]:
        words = self._vocabulary
        ids = [*words.fact_head, name, *words.fact_middle, value, *words.stop, *words.line_break]
        return _weigh(ids, {name: UNKNOWABLE_WEIGHT, value: UNKNOWABLE_WEIGHT})

    def _question(self, name: int, value: int) -> list[_Token]:
        """A question and its answer, or, one time in four, the fact over again."""
        words = self._vocabulary
        if self._rng.random() < 0.25:
            ids = [*words.fact_head, name, *words.fact_middle, value, *words.stop]
        else:
            ids = [*words.question_head, name, *words.question_middle, value, *words.stop]
        return _weigh(ids, {name: UNKNOWABLE_WEIGHT, value: ANSWER_WEIGHT})

    def _positions(self, may_jump: np.ndarray) -> np.ndarray:
        """Position ids [length], int64: consecutive, or with jumps where `may_jump` allows them."""
        rng, length = self._rng, len(may_jump)
        steps = np.ones(length, dtype=np.int64)
        steps[0] = 0
        if rng.random() < _JUMP_SHARE:
            span = length * (self._max_span / length) ** math.sqrt(rng.random())
            places = rng.choice(np.flatnonzero(may_jump[1:]) + 1, rng.integers(1, _MAX_JUMPS + 1))
            sizes = rng.dirichlet(np.ones(len(places))) * (span - length)
            np.add.at(steps, places, sizes.astype(np.int64))
        return np.cumsum(steps)


def _weigh(ids: list[int], special: dict[int, float]) -> list[_Token]:
    """Tokens of one piece; positions may jump only before its first."""
    return [(i, special.get(i, TEXT_WEIGHT), at == 0) for at, i in enumerate(ids)]
