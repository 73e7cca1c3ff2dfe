"""A conversation about long texts whose keys and values an `ArkCache` keeps.

Start reading at `Session.read` and `Session.ask`. Nothing here prints.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from arkcache.chat.streaming import TextStream
from arkcache.chat.template import (
    encode,
    end_tokens,
    special_opening,
    template_of,
    vocabulary_of,
)
from arkcache.config import CacheConfig
from arkcache.errors import InputError, SessionError
from arkcache.huggingface import ArkCache, PrefixCache
from arkcache.huggingface.attachment import device_of
from arkcache.huggingface.saving import load_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_TOKENS = 1024
"""Of what is read at a time; Ctrl-C waits until one is over."""

LONGEST_TOKEN = 64
"""Characters: what has more for each token that the model was made for cannot fit."""

Progress = Callable[[int, int], None]
"""Told how many tokens of a text have been read, and of how many."""


class Turn(NamedTuple):
    """What was said: by "user" or "assistant"; a text that was read is the user's."""

    role: str
    text: str


class Session:
    """Reads texts and answers questions about them, one after another.

        session = Session(model, tokenizer, budget_tokens=2048)
        session.read(Path("book.txt").read_text())
        for part in session.ask("Who wrote the letter?"):
            print(part, end="", flush=True)

    What happens is whole: after Ctrl-C or an error within `read` the conversation is what it was
    before; an answer that is stopped ends where it was stopped.

    Args:
        model, tokenizer: a causal language model of transformers.
        config: settings of the cache; None is `CacheConfig()` with `settings` as its fields.
        system: who the assistant is said to be; None is what the chat template says by itself.
        past_limit: also read more tokens than the model was made for.
        prefixes: shares what other conversations have read, and brings the settings; texts that are
            read first are kept in it.

    Attributes:
        cache: holds the tokens `ids`.
        turns: what was said so far.

    Raises `InputError` for a chat template that conversations do not fit, and what `ArkCache`
    raises.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: CacheConfig | None = None,
        *,
        system: str | None = None,
        past_limit: bool = False,
        prefixes: PrefixCache | None = None,
        **settings: Any,
    ) -> None:
        if prefixes is not None and (config is not None or settings):
            raise InputError("prefixes beside other settings: they bring those of their caches")
        self.model, self.tokenizer, self.past_limit = model, tokenizer, past_limit
        self._system = system
        self._template = template_of(tokenizer, system)
        self._prefixes = prefixes
        self.cache = ArkCache(model, config, **settings) if prefixes is None else prefixes.begin([])
        self.turns: list[Turn] = []
        self.ids: list[int] = []
        self._asked: list[tuple[int, int]] = []

    # -- what one says ----------------------------------------------------------------------------

    def read(self, text: str, progress: Progress = lambda *_: None) -> int:
        """Read a text, which questions may then be about; returns how many tokens it has.

        It is attended exactly. Raises `InputError` for an empty text and for one with which the
        conversation is longer than the model was made for.
        """
        if not text.strip():
            raise InputError("the text is empty: there is nothing to read")
        if self.limit is not None and len(text) > LONGEST_TOKEN * self.limit:
            self._refuse(f"{len(text):,} characters")  # without making tokens of them for minutes
        ids = self._encoded(text + "\n\n")
        is_first = not self.ids
        with self._whole():
            self._feed(ids, progress)
        self.turns.append(Turn("user", text))
        if self._prefixes is not None and is_first:
            self._prefixes.keep(self.cache, self.ids)
        return len(ids)

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        exact: bool = False,
    ) -> Iterator[str]:
        """Ask a question: the answer as it comes.

        Args:
            max_new_tokens: the longest answer.
            temperature: 0 takes the most likely token each time; more draws, by torch's generator.
            top_p: draws among the most likely tokens that have this share of the probability.
            repetition_penalty: above 1 makes what this answer has said already less likely (CTRL,
                section 4.1): small models repeat themselves.
            exact: each step attends everything, not only what the budget allows.

        Raises `InputError` for an empty question, for impossible settings, and where the
        conversation would be longer than the model was made for.
        """
        if not question.strip():
            raise InputError("the question is empty")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens}: expected at least 1")
        if not temperature >= 0:
            raise InputError(f"temperature={temperature}: expected at least 0")
        if not 0 < top_p <= 1:
            raise InputError(f"top_p={top_p}: expected a share above 0, at most 1")
        if not repetition_penalty > 0:
            raise InputError(f"repetition_penalty={repetition_penalty}: expected more than 0")
        ids = self._encoded(question + self._template.closing)
        choose = _chooser(temperature, top_p, repetition_penalty)
        return self._answer(question, ids, max_new_tokens, choose, exact)

    def undo(self) -> str:
        """Forget the latest question and its answer; returns the question.

        Raises `InputError` where there is none, and what the cache raises where a layer that keeps
        a window of its own cannot go back.
        """
        if not self._asked:
            raise InputError("no question was asked yet")
        turn, length = self._asked[-1]
        self.cache.crop(length)
        self._asked.pop()
        question = self.turns[turn].text
        del self.turns[turn:], self.ids[length:]
        return question

    @property
    def questions(self) -> list[str]:
        """What was asked so far."""
        return [self.turns[turn].text for turn, _ in self._asked]

    def reset(self) -> None:
        """Forget everything."""
        self.cache.reset()
        self.turns.clear()
        self.ids.clear()
        self._asked.clear()

    # -- as a folder ------------------------------------------------------------------------------

    def save(self, folder: str | Path, progress: Progress = lambda *_: None) -> None:
        """Save the conversation, so that `load` goes on with it without reading its texts again.

        See `ArkCache.save`, also for what it raises. progress: told how many bytes are written.
        """
        note = {
            "conversation": [list(turn) for turn in self.turns],
            "ids": self.ids,
            "asked": self._asked,
            "system": self._system,
            "vocabulary": vocabulary_of(self.tokenizer),
        }
        self.cache.save(folder, note=note, progress=progress)

    @classmethod
    def load(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: str | Path,
        *,
        past_limit: bool = False,
        progress: Progress = lambda *_: None,
        **settings: Any,
    ) -> Session:
        """The conversation that `save` wrote; see `ArkCache.load`, also for what it raises.

        Raises `SessionError` for a cache without a conversation and for another tokenizer as well.
        """
        cache, note = load_cache(model, Path(folder), progress, **settings)
        if not (isinstance(note, dict) and "conversation" in note):
            raise SessionError(f"{folder} holds a cache without a conversation: use ArkCache.load")
        if note["vocabulary"] != vocabulary_of(tokenizer):
            raise SessionError(f"{folder} was saved with another tokenizer: load it with that one")
        session = cls(model, tokenizer, cache.config, system=note["system"], past_limit=past_limit)
        session.cache, session.ids = cache, note["ids"]
        session.turns = [Turn(*turn) for turn in note["conversation"]]
        session._asked = [(turn, length) for turn, length in note["asked"]]
        return session

    @property
    def limit(self) -> int | None:
        """Tokens that the model was made for, if it says so."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) else None

    # -- inside -----------------------------------------------------------------------------------

    def _encoded(self, text: str) -> list[int]:
        """Tokens of what the user says, with what the template puts before it."""
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError("the text is not UTF-8: it holds bytes that are no characters")
        tokenizer, opening = self.tokenizer, self._template.opening
        if not self.ids:
            ids = encode(tokenizer, opening) or special_opening(tokenizer)
            ids += encode(tokenizer, text)
        elif self.turns[-1].role == "assistant":
            ids = encode(tokenizer, self._template.between + text)
        else:
            ids = encode(tokenizer, text)
        if self.limit is not None and len(self.ids) + len(ids) > self.limit:
            self._refuse(f"{len(ids):,} tokens")
        return ids

    def _refuse(self, more: str) -> None:
        if not self.past_limit:
            raise InputError(
                f"{more} beside the {len(self.ids):,} tokens held: this model was made for "
                f"{self.limit:,} in all; read less, or allow it with past_limit=True (--past-limit)"
            )

    def _answer(
        self,
        question: str,
        ids: list[int],
        most_tokens: int,
        choose: Callable[[Tensor, list[int]], int],
        exact: bool,
    ) -> Iterator[str]:
        turn, length = len(self.turns), len(self.ids)
        with self._whole():
            logits = self._feed(ids)
        self._asked.append((turn, length))
        self.turns += [Turn("user", question), Turn("assistant", "")]
        self.cache.end_prompt()
        stream, stops, said = TextStream(self.tokenizer), self._stops(), len(self.ids)
        for _ in range(most_tokens):
            token = choose(logits, self.ids[said:])
            if token in stops:
                break
            part = stream.push(token)
            self._say(part)
            if part:
                yield part
            with self.cache.exact() if exact else nullcontext():
                logits = self._feed([token])
        rest = stream.rest()
        self._say(rest)
        if rest:
            yield rest

    def _say(self, part: str) -> None:
        self.turns[-1] = Turn("assistant", self.turns[-1].text + part)

    def _feed(self, ids: list[int], progress: Progress = lambda *_: None) -> Tensor:
        """Give the model tokens; what it expects next: logits [vocabulary]."""
        logits, known = torch.empty(0), 0
        if self._prefixes is not None and not self.ids:
            self.cache = self._prefixes.begin(ids)
            known = self.cache.get_seq_length()
            self.ids += ids[:known]
        for start in range(known, len(ids), CHUNK_TOKENS):
            progress(start, len(ids))
            chunk = ids[start : start + CHUNK_TOKENS]
            given = torch.tensor([chunk], device=device_of(self.model))
            with torch.inference_mode(), interrupts_wait(), self._whole():
                output = self.model(given, past_key_values=self.cache, logits_to_keep=1)
                logits = output.logits[0, -1].float()
                self.ids += chunk
        progress(len(ids), len(ids))
        return logits

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What fails or is interrupted within it has not happened."""
        length, cache = len(self.ids), self.cache
        with cache.atomic():
            try:
                yield
            except BaseException:
                self.cache = cache  # not one that began with what is known
                del self.ids[length:]
                raise

    def _stops(self) -> set[int]:
        own = self.tokenizer.eos_token_id
        return end_tokens(self.model) | ({own} if isinstance(own, int) else set())


def _chooser(
    temperature: float, top_p: float, repetition_penalty: float
) -> Callable[[Tensor, list[int]], int]:
    """Picks the next token from logits [vocabulary] and what the answer has said so far."""
    processors: list[Any] = []
    if repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature > 0:
        processors += [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]

    def choose(logits: Tensor, said: list[int]) -> int:
        scores = logits[None]
        for processor in processors:
            given = torch.tensor([said], dtype=torch.long, device=logits.device)
            scores = processor(given, scores)
        if temperature == 0:
            return int(scores.argmax())
        return int(torch.multinomial(scores[0].softmax(dim=-1), 1))

    return choose


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Within it Ctrl-C waits: half a step would leave layers of different lengths."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread
        return
    before, waiting = signal.getsignal(signal.SIGINT), []
    if not callable(before):  # ignored, or handled outside Python
        yield
        return
    signal.signal(signal.SIGINT, lambda *arguments: waiting.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            before(*waiting[0])
