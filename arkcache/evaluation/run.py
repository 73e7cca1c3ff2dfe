"""The evaluation: texts are read once, then every method answers questions about them.

Start reading at `run`. What is measured is the decode path that users run: a text is read in chunks
with full attention, every method takes over its keys and values, and questions come token by token,
each to the text alone. Nothing here prints; `table.py` renders the result.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from arkcache.demo import run as demo
from arkcache.demo.baselines import FullLayer, observing
from arkcache.demo.machine import describe_machine, versions
from arkcache.demo.methods import Usage, reading_cache, usage
from arkcache.demo.models import load_model, pick_device
from arkcache.demo.run import CHUNK_TOKENS, Progress
from arkcache.errors import ConfigError, InputError, UnsupportedModelError
from arkcache.evaluation import language
from arkcache.evaluation.attention import record
from arkcache.evaluation.decoding import Bookmark, Decoder
from arkcache.evaluation.figures import FULL
from arkcache.evaluation.language import Continuation
from arkcache.evaluation.methods import Method, Reading, parse_method
from arkcache.evaluation.passage import Passage, Question, Task
from arkcache.evaluation.records import (
    Asked,
    Attended,
    Budget,
    Case,
    Cost,
    Predicted,
    Result,
    Skipped,
)
from arkcache.evaluation.replay import replay
from arkcache.evaluation.snapkv import WINDOW_TOKENS
from arkcache.evaluation.speaker import speaker_of
from arkcache.evaluation.tasks import ATTENTION, LANGUAGE, TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Keep = Callable[[Result], None]
"""Told what was measured so far, whenever a method is through with a passage."""


@dataclass(frozen=True)
class Settings:
    """What is to be measured; see the options of `arkcache eval`.

    Attributes:
        tasks: names of `TASKS`, "language" or "attention".
        lengths: tokens to read.
        budgets, methods: as they are given, see `Budget` and `parse_method`.
        num_questions: of each task and length, over as many passages as they need.
        num_passages: of the two tasks on real texts, for each length.
        num_steps: tokens that are predicted after each of its passages.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    budgets: tuple[str, ...]
    methods: tuple[str, ...]
    num_questions: int = 16
    num_passages: int = 3
    num_steps: int = 64
    model: str | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def check(self) -> None:
        """Raise `InputError` for sizes that are none."""
        for name in ("num_questions", "num_passages", "num_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected at least 1")
        for length in self.lengths:
            if length <= WINDOW_TOKENS:
                raise InputError(f"length {length}: expected more than {WINDOW_TOKENS} tokens")


@torch.inference_mode()
def run(
    settings: Settings, progress: Progress = lambda *_: None, keep: Keep = lambda _: None
) -> Result:
    """Measure everything, or what could be until Ctrl-C.

    Raises `InputError` for what cannot be read, loaded or fitted, `ConfigError` for settings that
    are impossible.
    """
    start = time.perf_counter()
    settings.check()
    methods = [parse_method(spec) for spec in settings.methods if spec != FULL]
    budgets = [Budget(given) for given in settings.budgets]
    device = pick_device(settings.device)
    progress("Loading the model", 0, 1)
    model, tokenizer = load_model(settings.model, device, settings.dtype)
    num_threads = demo.threads_for(settings.model)
    resolved = asdict(settings) | {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_threads": num_threads,
    }
    result = Result(resolved, describe_machine(device), versions())
    bench = Bench(settings, model, tokenizer, [parse_method(FULL), *methods], budgets, result)
    try:
        with demo.threads(num_threads):
            for _ in bench.all(progress):
                result.seconds = time.perf_counter() - start
                keep(result)
        result.finished = True
    except KeyboardInterrupt:  # what was measured is worth having
        result.finished = False
    result.seconds = time.perf_counter() - start
    return result


class Bench:
    """Measures methods on passages and notes it in a result."""

    def __init__(
        self,
        settings: Settings,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        methods: list[Method],
        budgets: list[Budget],
        result: Result,
    ) -> None:
        self._settings, self._model, self._tokenizer = settings, model, tokenizer
        self._methods, self._budgets, self._result = methods, budgets, result
        self._speaker = speaker_of(tokenizer)
        self._progress: Progress = lambda *_: None

    def all(self, progress: Progress) -> Iterator[None]:
        """Do everything; yields whenever a method is through with a passage."""
        self._progress = progress
        for length in self._settings.lengths:
            for task in self._settings.tasks:
                if task in TASKS:
                    yield from self._task(TASKS[task], length)
                else:
                    yield from {LANGUAGE: self._language, ATTENTION: self._attention}[task](length)

    # -- questions --------------------------------------------------------------------------------

    def _task(self, task: Task, length: int) -> Iterator[None]:
        """As many passages as the questions need."""
        left, number = self._settings.num_questions, 0
        while left > 0:
            count = min(left, task.most_questions)
            lots = self._lots(task.name, length, number)
            passage = task.draw(self._speaker.room(length), count, lots)
            reading = self.read(self._speaker.read(passage), f"{task.name} {length}")
            for method, case, budget in self._cases(task.name, length):
                with self._opened(method, case, budget, reading) as cache:
                    if cache is not None:
                        self._ask(case, number, cache, passage)
                yield
            left, number = left - len(passage.questions), number + 1

    def _ask(self, case: Case, number: int, cache: DynamicCache, passage: Passage) -> None:
        """Ask all questions about a passage, each of the passage alone."""
        decoder = Decoder(self._model, cache)
        decoder.feed(self._speaker.said(passage))
        decoder.seconds.clear()
        mark = Bookmark(cache)
        asked: list[Asked] = []
        used: list[Usage] = []
        for question in passage.questions:
            self._tell(case, len(asked), len(passage.questions))
            ids, most = self._speaker.ask(question), self._speaker.longest_answer(question)
            answer = decoder.answer(self._tokenizer, ids, question, most)
            used.append(usage(cache))
            asked.append(asked_of(case, number, passage, question, answer))
            mark.restore()
        self._result.asked += asked
        self._note_cost(case, number, cache, decoder.seconds, used)

    # -- real texts -------------------------------------------------------------------------------

    def _language(self, length: int) -> Iterator[None]:
        """Predict what follows each passage."""
        for number in range(self._settings.num_passages):
            passage, reading = self._read_text(LANGUAGE, length, number)
            expected: Tensor | None = None
            for done, (method, case, budget) in enumerate(cases := self._cases(LANGUAGE, length)):
                self._tell(case, done, len(cases))
                with self._opened(method, case, budget, reading) as cache:
                    if cache is not None:
                        own = self._predict(case, number, cache, passage, expected)
                        expected = own if expected is None else expected
                yield

    def _read_text(self, task: str, length: int, number: int) -> tuple[Continuation, Reading]:
        """Passage `number` of real text, which is the same for all tasks, and what was read."""
        lots = self._lots(LANGUAGE, length, number)
        steps = self._settings.num_steps
        passage = language.draw(self._tokenizer, number, length, steps, lots)
        return passage, self.read(passage.context, f"{task} {length}")

    def _predict(
        self,
        case: Case,
        number: int,
        cache: DynamicCache,
        passage: Continuation,
        expected: Tensor | None,
    ) -> Tensor:
        """Predict a passage's continuation token by token, then go on freely from where it began.

        The log-probabilities of the former.
        """
        decoder = Decoder(self._model, cache)
        mark = Bookmark(cache)
        rows = [decoder.feed([token]) for token in passage.following[:-1]]
        own = torch.stack(rows).float().log_softmax(dim=-1)
        found = language.compare(own, own if expected is None else expected, passage.following[1:])
        self._note_cost(case, number, cache, decoder.seconds, [usage(cache)])
        mark.restore()
        said = decoder.greedy(passage.following[0], len(own))
        record = Predicted(case, number, passage.source, **vars(found), said=said)
        self._result.predicted.append(record)
        return own

    # -- attention itself -------------------------------------------------------------------------

    def _attention(self, length: int) -> Iterator[None]:
        """Put the decode steps of the full cache on the passages of `_language` to every method."""
        cases = [
            (method.on_torch(), case, budget)
            for method, case, budget in self._cases(ATTENTION, length)
            if method.kind != FULL
        ]
        shared = [one for one in cases if "layer_sources" in one[0].settings]
        for _, case, _ in shared:
            self._skip(case, ConfigError("layer_sources: layers that share are not replayed"))
        cases = [one for one in cases if one not in shared]
        for number in range(self._settings.num_passages if cases else 0):
            passage, reading = self._read_text(ATTENTION, length, number)
            try:
                recorded = record(self._model, reading.cache, passage.following[:-1])
            except UnsupportedModelError as error:
                for _, case, _ in cases:
                    self._skip(case, error)
                return
            for done, (method, case, budget) in enumerate(cases):
                self._tell(case, done, len(cases))
                with self._opened(method, case, budget, reading) as cache:
                    if cache is not None:
                        seen = replay(recorded, cache)
                        found = Attended(case, number, passage.source, **vars(seen))
                        self._result.attended.append(found)
                yield

    # -- both -------------------------------------------------------------------------------------

    def _cases(self, task: str, length: int) -> list[tuple[Method, Case, Budget]]:
        """The full cache first, then every method at every budget."""
        cases: dict[Case, tuple[Method, Budget]] = {}
        for method, budget in product(self._methods, self._budgets):
            own = method.has_own_budget
            case = Case(task, length, method.spec, "-" if own else budget.given)
            cases.setdefault(case, (method, Budget("none") if own else budget))
        return [(method, case, budget) for case, (method, budget) in cases.items()]

    @contextmanager
    def _opened(
        self, method: Method, case: Case, budget: Budget, reading: Reading
    ) -> Iterator[DynamicCache | None]:
        """A cache of what was read; None, and a note, where the method does not fit."""
        with ExitStack() as stack:
            cache = None
            try:
                tokens = budget.tokens(case.length)
                if tokens is not None and budget.is_of_bytes:
                    method = method.within(tokens, reading, case.length)
                opened = method.cache(self._model, reading, tokens, self._settings.seed)
                cache = stack.enter_context(opened)
            except (ConfigError, UnsupportedModelError) as error:
                self._skip(case, error)
            yield cache

    def _skip(self, case: Case, error: Exception) -> None:
        """Note that a case is not run, and why."""
        note = Skipped(case, str(error))
        if note not in self._result.skipped:
            self._result.skipped.append(note)

    def read(self, ids: list[int], stage: str) -> Reading:
        """Read a text once, in chunks, with full attention.

        Where a method has to know what the last queries attend, they are a chunk of their own.
        """
        observes = any(method.observes for method in self._methods)
        cut = max(1, len(ids) - WINDOW_TOKENS)
        cache = reading_cache(self._model)
        full = {n: layer for n, layer in enumerate(cache.layers) if isinstance(layer, FullLayer)}
        before: dict[int, Tensor] = {}
        with observing(self._model) if observes else nullcontext():
            chunks = [(i, min(i + CHUNK_TOKENS, cut)) for i in range(0, cut, CHUNK_TOKENS)]
            for first, last in [*chunks, (cut, len(ids))]:
                self._progress(f"Reading: {stage}", first, len(ids))
                before = {
                    n: layer.received for n, layer in full.items() if layer.received is not None
                }
                chunk = torch.tensor([ids[first:last]], device=self._model.device)
                self._model(chunk, past_key_values=cache, logits_to_keep=1)
        observed = {number: _more(full[number], earlier) for number, earlier in before.items()}
        return Reading(cache, observed, tuple(ids))

    def _note_cost(
        self,
        case: Case,
        number: int,
        cache: DynamicCache,
        seconds: list[float],
        used: list[Usage],
    ) -> None:
        """used: after each answer, when a retention has given up what it will."""
        self._result.costs.append(
            Cost(
                case,
                number,
                statistics.fmean(one.attended_tokens for one in used),
                usage(cache).device_bytes,
                used[-1].host_bytes,
                1000 * statistics.median(seconds),
            )
        )

    def _lots(self, task: str, length: int, number: int) -> random.Random:
        """What a passage is drawn with: it does not depend on what else is measured."""
        return random.Random(f"{self._settings.seed} {task} {length} {number}")

    def _tell(self, case: Case, done: int, total: int) -> None:
        budget = "" if case.budget == "-" else f" at {case.budget}"
        self._progress(f"{case.task} {case.length}: {case.method}{budget}", done, total)


def asked_of(case: Case, number: int, passage: Passage, question: Question, answer: str) -> Asked:
    """The record of an answer."""
    place = passage.text.find(question.expected[0])
    return Asked(
        case,
        number,
        question.text.strip(),
        list(question.expected),
        answer,
        question.score(answer),
        place / len(passage.text) if place >= 0 else None,
    )


def _more(layer: FullLayer, earlier: Tensor) -> Tensor:
    """What a layer's tokens have received since they had received `earlier`."""
    assert layer.received is not None
    more = layer.received.clone()
    more[:, : earlier.shape[1]] -= earlier
    return more
