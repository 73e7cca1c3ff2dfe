"""How passages and questions are put to a model: its chat template around them, as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from arkcache.chat.template import encode, special_opening, template_of
from arkcache.evaluation.passage import Passage, Question, Room

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Speaker:
    """Puts things to a model. Passage and question are one turn of the user.

    Attributes:
        opening: goes before a passage.
        closing: between a question and its answer.
        between: between an answer and the next question.
    """

    tokenizer: PreTrainedTokenizerBase
    opening: str
    closing: str
    between: str

    def room(self, num_tokens: int) -> Room:
        """Room for a passage, so that what is read has `num_tokens` tokens."""
        return Room(
            lambda text: len(encode(self.tokenizer, text)), num_tokens - len(self._opening())
        )

    def read(self, passage: Passage) -> list[int]:
        """What is read before any question."""
        return self._opening() + encode(self.tokenizer, passage.text)

    def said(self, passage: Passage) -> list[int]:
        """What was said before any question, decoded token by token; mostly nothing."""
        if not passage.said:
            return []
        text = passage.request + self.closing + passage.said + self.between
        return encode(self.tokenizer, text)

    def ask(self, question: Question) -> list[int]:
        """A question with the beginning of its answer."""
        closing = self.closing or (" " if question.prefix else "")
        return encode(self.tokenizer, question.text + closing + question.prefix)

    def longest_answer(self, question: Question) -> int:
        """Tokens that an answer may have."""
        expected = " " + ", ".join(question.expected)
        return len(encode(self.tokenizer, expected)) + question.spare_tokens

    def _opening(self) -> list[int]:
        return encode(self.tokenizer, self.opening) or special_opening(self.tokenizer)


def speaker_of(tokenizer: PreTrainedTokenizerBase) -> Speaker:
    """A speaker of the tokenizer's chat template, or of plain lines where it has none.

    Raises `InputError` for a template that drops parts of a conversation.
    """
    if not tokenizer.chat_template:
        return Speaker(tokenizer, "", "", "\n")
    opening, between, closing = template_of(tokenizer)
    return Speaker(tokenizer, opening, closing, between)
