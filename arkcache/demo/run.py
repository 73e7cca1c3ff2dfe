"""The demonstration: one text, read once; then the same questions of every cache.

Start reading at `run`. Nothing here prints; `table.py` renders the result.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from arkcache.chat.template import end_tokens
from arkcache.config import CacheConfig
from arkcache.demo.baselines import observing
from arkcache.demo.conversation import (
    Conversation,
    Voice,
    load_text,
    plain_voice,
    plan,
    question_ids,
    shipped_voice,
)
from arkcache.demo.facts import Fact, parse_answer
from arkcache.demo.machine import describe_machine, versions
from arkcache.demo.methods import Method, methods, reading_cache, usage
from arkcache.demo.models import load_model, pick_device
from arkcache.errors import UnsupportedModelError
from arkcache.huggingface import ArkCache

CHUNK_TOKENS = 1024
"""Of a text that is read."""

Progress = Callable[[str, int, int], None]
"""Told what is under way, how many steps of it are done, and of how many."""

Watch = Callable[[Method, DynamicCache, Fact, str], None]
"""Told after each step which method's cache took it, what was asked, and the answer so far."""


@dataclass(frozen=True)
class Settings:
    """What the demonstration is to do; see the options of `arkcache demo`."""

    context_tokens: int = 8192
    num_facts: int = 16
    budget_tokens: int = 512
    page_size: int = 8
    file: Path | None = None
    model: str | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def cache_config(self) -> CacheConfig:
        """The settings of both ArkCache rows. Raises `ConfigError` for an impossible budget."""
        return CacheConfig(
            page_size=self.page_size,
            budget_tokens=self.budget_tokens,
            stream_block_tokens=max(self.budget_tokens, self.page_size),
        )


@dataclass(frozen=True)
class Answer:
    """One question's outcome: what was asked for, the text generated, whether it is right."""

    name: str
    value: str
    text: str
    right: bool


@dataclass(frozen=True)
class Row:
    """What one method did.

    Attributes:
        method, title: its name in JSON and in the table.
        num_right, num_questions: answers.
        attended_tokens: per step, KV head and layer; the mean over all steps.
        device_bytes, host_bytes: keys and values and, on the device, what the method looks them up
            by, after the last question.
        pages_recalled: copied back from the host tier; None where a method recalls nothing.
        hit_rate: share of the selected pages that were in the device tier already; None likewise.
        ms_per_token: median time of a one-token step.
        num_steps: one-token steps taken.
        answers: in the order asked.
        skipped: why the method does not fit the model; None where it ran.
    """

    method: str
    title: str
    num_right: int = 0
    num_questions: int = 0
    attended_tokens: float = 0.0
    device_bytes: int = 0
    host_bytes: int = 0
    pages_recalled: int | None = None
    hit_rate: float | None = None
    ms_per_token: float = 0.0
    num_steps: int = 0
    answers: list[Answer] = field(default_factory=list)
    skipped: str | None = None


@dataclass(frozen=True)
class Result:
    """The whole run: settings as they were resolved, machine, versions, rows."""

    settings: dict[str, Any]
    context_tokens: int
    num_layers: int
    machine: dict[str, Any]
    versions: dict[str, str]
    rows: list[Row]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@torch.inference_mode()
def run(
    settings: Settings, progress: Progress = lambda *_: None, watch: Watch = lambda *_: None
) -> Result:
    """Read the text once and ask every method the same questions.

    Raises `InputError` for what cannot be read, loaded or fitted; `ConfigError` for a budget that
    is impossible beside the page size.
    """
    start = time.perf_counter()
    config = settings.cache_config()
    text = load_text(settings.file)
    device = pick_device(settings.device)
    progress("Loading the model", 0, 1)
    model, tokenizer = load_model(settings.model, device, settings.dtype)
    voice = shipped_voice() if settings.model is None else plain_voice(tokenizer)
    conversation = plan(
        tokenizer,
        voice,
        text,
        context_tokens=settings.context_tokens,
        num_facts=settings.num_facts,
        seed=settings.seed,
    )
    num_threads = threads_for(settings.model)
    with threads(num_threads):
        full = read(model, conversation.text_ids, progress)
        rows = [
            ask_all(method, model, tokenizer, full, conversation, progress, watch)
            for method in methods(config)
        ]
    resolved = resolve(settings, model, num_threads) | {
        "num_sink_tokens": config.num_sink_tokens,
        "num_recent_tokens": config.num_recent_tokens,
        "num_dense_layers": config.num_dense_layers,
    }
    return Result(
        resolved,
        len(conversation.text_ids),
        len(full.layers),
        describe_machine(device),
        versions(),
        rows,
        time.perf_counter() - start,
    )


def resolve(settings: Any, model: PreTrainedModel, num_threads: int) -> dict[str, Any]:
    """Settings of a run as plain values: what was left open as it was decided."""
    return asdict(settings) | {
        "file": None if settings.file is None else str(settings.file),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_threads": num_threads,
    }


def threads_for(model: str | None) -> int:
    """Threads to compute with; None is the shipped model.

    Work on it is too short to share: on a busy machine threads would mostly wait for each other,
    and a run could take ten times as long.
    """
    return 1 if model is None else torch.get_num_threads()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Lets torch compute with so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def read(model: PreTrainedModel, ids: list[int], progress: Progress) -> DynamicCache:
    """Read a text once, in chunks, with full attention."""
    cache = reading_cache(model)
    chunks = torch.tensor([ids], device=model.device).split(CHUNK_TOKENS, dim=1)
    with observing(model):
        for number, chunk in enumerate(chunks):
            progress("Reading", number * CHUNK_TOKENS, len(ids))
            model(chunk, past_key_values=cache, logits_to_keep=1)
    return cache


def ask_all(
    method: Method,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    full: DynamicCache,
    conversation: Conversation,
    progress: Progress,
    watch: Watch,
) -> Row:
    """Ask one method all questions, one after another in the same conversation."""
    try:
        with method.cache(model, full) as cache:
            listener = Listener(model, tokenizer, cache, conversation.voice)
            answers = []
            for number, fact in enumerate(conversation.questions):
                progress(f"Asking: {method.title}", number, len(conversation.questions))
                answers.append(listener.ask(fact, partial(watch, method, cache)))
            return listener.row(method, answers)
    except UnsupportedModelError as error:
        return Row(method.key, method.title, skipped=str(error))


class Listener:
    """Asks a model questions token by token, and keeps count of what that takes.

    Attributes:
        fed: for each question, the tokens that the model was given: the question and the answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: DynamicCache,
        voice: Voice,
    ) -> None:
        self._model, self._tokenizer, self._cache, self._voice = model, tokenizer, cache, voice
        self.fed: list[list[int]] = []
        self._seconds: list[float] = []
        self._attended: list[float] = []

    def ask(self, fact: Fact, watch: Callable[[Fact, str], None] = lambda *_: None) -> Answer:
        """The greedy answer to the question for a fact; both stay in the conversation.

        watch: told after each step of the fact and of the answer so far.
        """
        voice = self._voice
        self.fed.append([])
        token = 0
        for question_token in question_ids(self._tokenizer, voice, fact):
            token = self._step(question_token)
            watch(fact, "")
        answer: list[int] = []
        text = ""
        while len(answer) < voice.answer_tokens and token not in end_tokens(self._model):
            answer.append(token)
            text = str(self._tokenizer.decode(answer))
            token = self._step(token)
            watch(fact, text)
            if voice.stops_at_value and parse_answer(text) is not None:
                break
        return Answer(fact.name, fact.value, text.strip(), voice.is_right(text, fact))

    def row(self, method: Method, answers: list[Answer]) -> Row:
        """The row of the table for what was asked so far."""
        used = usage(self._cache)
        recalls = isinstance(self._cache, ArkCache)
        return Row(
            method=method.key,
            title=method.title,
            num_right=sum(answer.right for answer in answers),
            num_questions=len(answers),
            attended_tokens=statistics.fmean(self._attended),
            device_bytes=used.device_bytes,
            host_bytes=used.host_bytes,
            pages_recalled=used.pages_recalled if recalls else None,
            hit_rate=used.hit_rate if recalls else None,
            ms_per_token=1000 * statistics.median(self._seconds),
            num_steps=len(self._seconds),
            answers=answers,
        )

    def _step(self, token: int) -> int:
        """Give the model one token; the most likely next one."""
        self.fed[-1].append(token)
        ids = torch.tensor([[token]], device=self._model.device)
        start = time.perf_counter()
        logits = self._model(ids, past_key_values=self._cache, logits_to_keep=1).logits
        following = int(logits[0, -1].argmax())  # waits for the device
        self._seconds.append(time.perf_counter() - start)
        self._attended.append(usage(self._cache).attended_tokens)
        return following
