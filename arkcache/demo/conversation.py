"""What is said to a model: a long text with facts hidden in it, then questions in the same chat.

Knows tokenizers, but neither models nor caches.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from arkcache.chat.documents import load_document
from arkcache.chat.template import encode, special_opening, template_of
from arkcache.demo import facts
from arkcache.demo.facts import Fact
from arkcache.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MIN_CHARS = 200
_FACT_TOKENS = 24  # reserve for a fact in any tokenizer


@dataclass(frozen=True)
class Voice:
    """How facts and questions are put to a model, and what surrounds them.

    Attributes:
        fact, question: the sentences.
        is_right: judges an answer.
        opening: goes before the text.
        closing: goes between a question and its answer.
        between: goes between the text, or an answer, and the next question.
        answer_tokens: the longest answer.
        stops_at_value: whether an answer ends with its first four-digit number.
    """

    fact: Callable[[Fact], str]
    question: Callable[[str], str]
    is_right: Callable[[str, Fact], bool]
    opening: str
    closing: str
    between: str
    answer_tokens: int
    stops_at_value: bool


@dataclass(frozen=True)
class Conversation:
    """A text to read and the questions to ask, as token ids.

    Attributes:
        voice: how the questions are put.
        text_ids: the text with its facts.
        questions: the facts in the order in which they are asked; some come twice.
    """

    voice: Voice
    text_ids: list[int]
    questions: list[Fact]


def shipped_voice() -> Voice:
    """As the shipped model was trained: "What is the value of amber?" " 4821."."""
    return Voice(
        fact=facts.render_fact,
        question=facts.render_question,
        is_right=facts.is_right,
        opening="",
        closing="",
        between="\n",
        answer_tokens=2,
        stops_at_value=False,
    )


def plain_voice(tokenizer: PreTrainedTokenizerBase) -> Voice:
    """Plain language for any model, in its chat template if it has one."""
    if not tokenizer.chat_template:
        return Voice(
            fact=_secret,
            question=lambda name: f"Question: {_ask(name)}\nAnswer: The secret number of {name} is",
            is_right=_contains,
            opening="",
            closing="",
            between="\n\n",
            answer_tokens=12,
            stops_at_value=True,
        )
    opening, between, closing = template_of(tokenizer)
    return Voice(
        fact=_secret,
        question=lambda name: f"{_ask(name)} Answer with the number only.",
        is_right=_contains,
        opening=opening,
        closing=closing,
        between=between,
        answer_tokens=24,
        stops_at_value=False,
    )


def _secret(fact: Fact) -> str:
    return f"The secret number of {fact.name} is {fact.value}."


def _ask(name: str) -> str:
    return f"What is the secret number of {name}?"


def _contains(text: str, fact: Fact) -> bool:
    return fact.value in text


def load_text(path: Path | None) -> str:
    """The text to read: a UTF-8 file, or the topics of Python's own help.

    Raises `InputError` for a file that is missing, not text or too short.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(text for _, text in sorted(topics.items()))
    text = load_document(path)
    if len(text.strip()) < _MIN_CHARS:
        raise InputError(
            f"{path} is too short: {len(text.strip())} characters, expected at least "
            f"{_MIN_CHARS}; it is repeated to fill the context"
        )
    return text


def plan(
    tokenizer: PreTrainedTokenizerBase,
    voice: Voice,
    text: str,
    *,
    context_tokens: int,
    num_facts: int,
    seed: int,
) -> Conversation:
    """Hide facts in a text of `context_tokens` and decide what is asked when.

    Raises `InputError` where the facts do not fit.
    """
    least = 2 * _FACT_TOKENS * num_facts
    if num_facts < 1 or num_facts > len(facts.names()):
        raise InputError(f"{num_facts} facts: expected 1 to {len(facts.names())}")
    if context_tokens < least:
        raise InputError(
            f"a context of {context_tokens} tokens is too short for {num_facts} facts: "
            f"expected at least {least}"
        )
    rng = random.Random(seed)
    hidden = facts.draw_facts(num_facts, rng)
    depths = sorted(facts.spread_depths(num_facts, rng))
    start = encode(tokenizer, voice.opening) or special_opening(tokenizer)
    room = context_tokens - len(start)
    left = room - len(encode(tokenizer, "\n".join(map(voice.fact, hidden))))
    ids: list[int] = []
    # A fact may split a token of the text, which only shows afterwards.
    while not ids or len(ids) > room:
        left -= max(0, len(ids) - room)
        document = _cut(tokenizer, text, left)
        ids = encode(tokenizer, facts.hide_in_text(document, hidden, depths, voice.fact))
    return Conversation(voice, start + ids, order_questions(hidden))


def order_questions(hidden: list[Fact]) -> list[Fact]:
    """Every fact once, far from the last one each time; then the first quarter of them again.

    `hidden` is in the order of the text. What one question needs has been displaced by the
    others when it is asked for again.
    """
    count = len(hidden)
    stride = max(1, round(count * 0.618))
    while math.gcd(stride, count) > 1:
        stride += 1
    once = [hidden[i * stride % count] for i in range(count)]
    return once + once[: max(1, count // 4)]


def question_ids(tokenizer: PreTrainedTokenizerBase, voice: Voice, fact: Fact) -> list[int]:
    """Token ids of the question for a fact, with what surrounds it."""
    return encode(tokenizer, voice.between + voice.question(fact.name) + voice.closing)


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, num_tokens: int) -> str:
    """The first `num_tokens` tokens of a text that is repeated where it is too short."""
    # No tokenizer makes more than a token of a byte; at most 16 characters go into one.
    ids = encode(tokenizer, text[: 16 * num_tokens])
    if not ids:
        raise InputError("the tokenizer makes no tokens of this text")
    while len(ids) < num_tokens:
        ids += encode(tokenizer, "\n" + text)
    return str(tokenizer.decode(ids[:num_tokens]))
