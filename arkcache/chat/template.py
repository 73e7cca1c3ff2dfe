"""Texts as a chat model wants them: what its template puts around them, and their tokens."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, NamedTuple

from arkcache.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TEXT, _ANSWER, _QUESTION = "<<text>>", "<<answer>>", "<<question>>"


class Template(NamedTuple):
    """What stands before the user's first words, between an answer and the user's next words, and
    between those and their answer."""

    opening: str
    between: str
    closing: str


PLAIN = Template("", "\n\n", "\nAnswer:")
"""For a model that has no template."""


def template_of(tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> Template:
    """A tokenizer's chat template, or `PLAIN`.

    system: says who the assistant is; None is what the template says by itself. Raises `InputError`
    for a template that drops parts of a conversation, or has no place for `system`.
    """
    if not tokenizer.chat_template:
        return PLAIN if system is None else Template(system + "\n\n", *PLAIN[1:])
    turns = [
        {"role": "user", "content": _TEXT},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _QUESTION},
    ]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    # Templates that know of thinking leave it out; the others ignore the argument.
    rendered = str(
        tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    )
    opening, _, rest = rendered.partition(_TEXT)
    _, _, rest = rest.partition(_ANSWER)
    between, found, closing = rest.partition(_QUESTION)
    if not found or (system is not None and system.strip() not in opening):
        raise InputError("the tokenizer's chat template drops parts of a conversation")
    return Template(opening, between, closing)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, without anything added."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def special_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text by itself, such as a begin-of-sequence token."""
    bare, whole = encode(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:start]


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Tokens with which a model ends what it says."""
    config = model.generation_config
    ends = None if config is None else config.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what a tokenizer calls its tokens, by which another one is known."""
    named = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()
