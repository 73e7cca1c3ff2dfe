"""Text of an answer, piece by piece as its tokens come."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns tokens into text that can be printed as it comes.

    A character may be made of several tokens, and what a token says may depend on the one before
    it: so each piece is the difference between the text with and without the newest tokens, and is
    held back while it ends within a character.

    Args:
        tokenizer: that of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._known, self._said = 0, 0

    def push(self, token: int) -> str:
        """What can be printed now that this token has come; it may be empty."""
        self._ids.append(token)
        text = self._text()
        before = self._text(stop=self._said)
        if text.endswith(_UNFINISHED):
            return ""
        self._known, self._said = self._said, len(self._ids)
        return text[len(before) :]

    def rest(self) -> str:
        """What was held back, when no more tokens come."""
        return self._text()[len(self._text(stop=self._said)) :]

    def _text(self, stop: int | None = None) -> str:
        """The newest tokens as text, from one that was complete before them."""
        return str(self._tokenizer.decode(self._ids[self._known : stop]))
