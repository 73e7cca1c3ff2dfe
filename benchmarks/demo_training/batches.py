"""Training batches: facts in real text, then questions about them, at widely spread positions."""

import math
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from arkcache.demo import facts
from arkcache.evaluation import trained

# Weight of a token's loss by what the token is.
TEXT_WEIGHT, ANSWER_WEIGHT, UNKNOWABLE_WEIGHT = 0.3, 3.0, 0.0
_TEXT_SHARE = 0.25  # how many of the text's tokens are predicted at all
_MAX_FACTS = 64
_JUMP_SHARE, _MAX_JUMPS = 0.8, 32  # how many sequences have jumps in their positions; how many
_CODE_SHARE, _REFERENCE_SHARE = 0.4, 0.4  # of the facts, where not all of them are single values
_TOKENS_PER_FACT = 32  # at most one fact, and about one question, in so many tokens


# Id, weight of its loss, and whether positions may jump before it.
_Token = tuple[int, float, bool]


class Batch(NamedTuple):
    """One training batch; all are [batch, length], `weights` (fp32) and `ids` per token."""

    ids: torch.Tensor
    position_ids: torch.Tensor
    weights: torch.Tensor


class Frame(NamedTuple):
    """Token ids around the name and what is said of it, in a fact and in a question."""

    fact_head: list[int]
    fact_middle: list[int]
    question_head: list[int]
    question_middle: list[int]


class Vocabulary(NamedTuple):
    """Token ids of the parts that facts and questions are made of."""

    names: np.ndarray
    values: np.ndarray
    value_of: Frame
    code_of: Frame
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
    name, value = facts.names()[0], facts.values()[0]

    def frame(fact: str, question: str) -> Frame:
        fact_ids, question_ids = (tokenizer("\n" + text)["input_ids"] for text in (fact, question))
        at_name, asked = (ids.index(words["names"][0][0]) for ids in (fact_ids, question_ids))
        at_value = fact_ids.index(words["values"][0][0])
        return Frame(
            fact_head=fact_ids[:at_name],
            fact_middle=fact_ids[at_name + 1 : at_value],
            question_head=question_ids[:asked],
            question_middle=question_ids[asked + 1 :],
        )

    return Vocabulary(
        names=np.asarray(words["names"])[:, 0],
        values=np.asarray(words["values"])[:, 0],
        value_of=frame(facts.render_fact(facts.Fact(name, value)), facts.render_question(name)),
        code_of=frame(
            trained.render_code(name, [value] * trained.CODE_VALUES),
            trained.render_code_question(name),
        ),
        stop=tokenizer(f" {value}.")["input_ids"][1:],
        line_break=tokenizer("\n")["input_ids"],
    )


class Item(NamedTuple):
    """A fact: what a text says of a name, and what a question for it is answered.

    Attributes:
        said, answer: token ids.
        needs: the number of the fact that has to be known as well; its own where none has to.
    """

    frame: Frame
    name: int
    said: tuple[int, ...]
    answer: tuple[int, ...]
    needs: int


class BatchMaker:
    """Draws batches from encoded text, seeded; the same seed gives the same batches."""

    def __init__(
        self,
        texts: list[np.ndarray],
        vocabulary: Vocabulary,
        seed: int,
        max_span: int,
        *,
        looks_up: bool = False,
    ) -> None:
        """`texts`: arrays of ids, drawn from equally often; `max_span`: the widest positions;
        `looks_up`: whether there are codes and references beside single values."""
        self._texts = texts
        self._vocabulary = vocabulary
        self._rng = np.random.default_rng(seed)
        self._max_span = max_span
        self._looks_up = looks_up

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
        rng = self._rng
        num_facts = int(rng.integers(2, min(_MAX_FACTS, length // _TOKENS_PER_FACT) + 1))
        num_questions = max(2, min(_MAX_FACTS, length // (2 * _TOKENS_PER_FACT)))
        items = self._lookups(num_facts) if self._looks_up else self._facts(num_facts)
        # With replacement: otherwise elimination is learnt instead of look-up.
        asked = rng.integers(len(items), size=num_questions)
        pieces = [self._fact(item) for item in items]
        pieces += [self._question(items[i]) for i in asked]
        num_text = length - sum(map(len, pieces))
        hidden = rng.integers(num_text + 1, size=len(items))
        known = [max(hidden[i], hidden[items[i].needs]) for i in asked]
        # Half of the questions come in a row at the end, the others as soon as they can be asked.
        at_end = rng.random(num_questions) < 0.5
        placed = np.where(at_end, num_text, rng.integers(known, num_text + 1))
        return facts.hide(self._text(num_text), pieces, [*hidden, *placed])

    def _text(self, length: int) -> list[_Token]:
        text = self._texts[self._rng.integers(len(self._texts))]
        start = self._rng.integers(len(text) - length)
        weights = np.where(self._rng.random(length) < _TEXT_SHARE, TEXT_WEIGHT, 0.0)
        return [
            (int(i), float(weight), True)
            for i, weight in zip(text[start : start + length], weights, strict=True)
        ]

    def _facts(self, count: int) -> list[Item]:
        """Names with a value each."""
        rng, words = self._rng, self._vocabulary
        names = rng.permutation(words.names)[:count]
        values = rng.choice(words.values, count)
        return [
            Item(words.value_of, name, (value,), (value,), needs=at)
            for at, (name, value) in enumerate(zip(names, values, strict=True))
        ]

    def _lookups(self, count: int) -> list[Item]:
        """The same for some of `count` names; others get a code, others refer to one of them."""
        rng, words = self._rng, self._vocabulary
        items = self._facts(count)
        for at in range(1, count):
            kind = rng.random()
            if kind < _CODE_SHARE:
                code = tuple(rng.choice(words.values, trained.CODE_VALUES, replace=False))
                items[at] = Item(words.code_of, items[at].name, code, code, at)
            elif kind < _CODE_SHARE + _REFERENCE_SHARE:
                other = int(rng.choice([i for i in range(at) if len(items[i].answer) == 1]))
                other = items[other].needs  # of a reference, what it refers to
                said = (items[other].name,)
                items[at] = Item(words.value_of, items[at].name, said, items[other].answer, other)
        return items

    def _fact(self, item: Item) -> list[_Token]:
        frame, words = item.frame, self._vocabulary
        head = [*frame.fact_head, item.name, *frame.fact_middle]
        ids = [*head, *item.said, *words.stop, *words.line_break]
        return _weigh(ids, dict.fromkeys((item.name, *item.said), UNKNOWABLE_WEIGHT))

    def _question(self, item: Item) -> list[_Token]:
        """A question and its answer, or, one time in four, the fact over again."""
        frame = item.frame
        if self._rng.random() < 0.25 and item.said == item.answer:
            head = [*frame.fact_head, item.name, *frame.fact_middle]
        else:
            head = [*frame.question_head, item.name, *frame.question_middle]
        weights = {item.name: UNKNOWABLE_WEIGHT} | dict.fromkeys(item.answer, ANSWER_WEIGHT)
        return _weigh([*head, *item.answer, *self._vocabulary.stop], weights)

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
