"""Tokens against bits: what quantised pages cost, and what more of them in the same bytes give.

The figure of "More Tokens, Lower Precision" (arXiv 2412.12706) for the demonstration's text, facts
and questions. Each text is read once, and every cache starts from those very keys and values. Two
comparisons: at equal tokens, which is what the bits alone cost, and at equal bytes of the device
tier, where fewer bits attend more tokens. Nothing here prints; `sweep_table.py` renders the result.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from arkcache.config import CacheConfig
from arkcache.demo import run as demo
from arkcache.demo.conversation import (
    Conversation,
    load_text,
    plain_voice,
    plan,
    question_ids,
    shipped_voice,
)
from arkcache.demo.machine import describe_machine, versions
from arkcache.demo.methods import Method, device_of, open_arkcache, open_full, shape_of
from arkcache.demo.models import load_model, pick_device
from arkcache.demo.run import Listener, Progress
from arkcache.errors import InputError
from arkcache.formats import PRESETS
from arkcache.huggingface import ArkCache
from arkcache.memory import CacheShape, plan_memory

EQUAL_TOKENS, EQUAL_BYTES = "equal tokens", "equal bytes"


@dataclass(frozen=True)
class Settings:
    """What is to be compared; see the options of `arkcache sweep`. Sizes are in tokens.

    Attributes:
        device_bytes: of the device tier at equal bytes; None is what a budget of
            `reference_tokens` takes in 16 bits.
        formats: names of presets.
        num_draws: texts, with facts of their own each; their figures are averaged.
    """

    context_tokens: int = 8192
    num_facts: int = 16
    num_draws: int = 1
    budget_tokens: int = 512
    device_bytes: int | None = None
    reference_tokens: int = 384
    page_size: int = 32
    group_size: int = 32
    index: str = "cuboid-mean"
    formats: tuple[str, ...] = tuple(PRESETS)
    file: Path | None = None
    model: str | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def cache_config(self, name: str, rotation: str) -> CacheConfig:
        """The settings of a format at equal tokens, with a device tier that is all slots.

        Slots stay packed, so that bytes are what the bits say (of two formats they cannot, on a
        CPU), and the streaming block, which questions never need, is as small as it can be. Raises
        `ConfigError` for what is impossible.
        """
        return CacheConfig.preset(
            name,
            rotation=rotation,
            packed_slots=None if "+" in name else True,
            group_size=self.group_size,
            index=self.index,
            stream_block_tokens=self.page_size,
            page_size=self.page_size,
            budget_tokens=self.budget_tokens,
            num_sink_tokens=max(0, min(32, self.budget_tokens // 8)),
            num_recent_tokens=max(1, min(128, self.budget_tokens // 4)),
        )

    def model_dtype(self) -> str:
        """The shipped model runs in bf16, also where fp32 is faster: 16 bits are to be 16 bits."""
        return "bfloat16" if self.model is None and self.dtype == "auto" else self.dtype


@dataclass(frozen=True)
class Case:
    """One row of the sweep: a format at equal tokens or at equal bytes."""

    mode: str
    format: str
    rotation: str
    config: CacheConfig

    @property
    def title(self) -> str:
        """For the progress bar."""
        rotated = ", rotated" if self.rotation != "none" else ""
        return f"{self.format}{rotated}, {self.mode}"


@dataclass(frozen=True)
class Row:
    """What one cache did, over all draws.

    Attributes:
        mode: "full", "equal tokens" or "equal bytes".
        format, rotation: how pages are stored.
        num_right, num_questions: greedy answers, each cache in a conversation of its own.
        attended_tokens: per step, KV head and layer; the mean over all steps.
        device_bytes: the device tier (all keys and values for the full cache).
        digest_bytes: the page index, which is the same for all formats.
        host_bytes_per_token: sealed pages of all layers and heads (what a token takes anywhere
            for the full cache).
        kl: of the next token to the full cache, in nats: the mean over all tokens of questions and
            answers, in the full cache's conversation.
        kl_answers: the same where the next token is one of an answer.
        agreement: how often the most likely token of an answer is the full cache's.
        ms_per_token: time of a one-token step; the median of a draw, the mean over draws.
    """

    mode: str
    format: str
    rotation: str
    num_right: int
    num_questions: int
    attended_tokens: float
    device_bytes: int
    digest_bytes: int
    host_bytes_per_token: float
    kl: float
    kl_answers: float
    agreement: float
    ms_per_token: float


@dataclass(frozen=True)
class Result:
    """The whole sweep: settings as they were resolved, machine, versions, rows."""

    settings: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    rows: list[Row]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Result:
        """What `to_dict` gave."""
        return cls(**(values | {"rows": [Row(**row) for row in values["rows"]]}))


@dataclass(frozen=True)
class Reference:
    """The full cache's conversation about a text: what the others are compared with.

    Attributes:
        ids: all tokens of questions and answers, one after another.
        log_probs: of the token after each of them [len(ids), vocabulary], fp32, on the CPU.
        answers: positions in `ids` after which a token of an answer comes.
    """

    ids: list[int]
    log_probs: Tensor
    answers: list[int]


@torch.inference_mode()
def run(settings: Settings, progress: Progress = lambda *_: None) -> Result:
    """Compare all formats on all draws.

    Raises `InputError` for what cannot be read, loaded or fitted, `ConfigError` for settings that
    are impossible, `UnsupportedModelError` for a model that cannot be paged.
    """
    start = time.perf_counter()
    if settings.num_draws < 1:
        raise InputError(f"draws={settings.num_draws}: expected at least 1")
    for name in settings.formats:
        settings.cache_config(name, "none")
    text = load_text(settings.file)
    device = pick_device(settings.device)
    progress("Loading the model", 0, 1)
    model, tokenizer = load_model(settings.model, device, settings.model_dtype())
    voice = shipped_voice() if settings.model is None else plain_voice(tokenizer)
    num_threads = demo.threads_for(settings.model)
    draws: list[list[Row]] = []
    resolved: dict[str, Any] = {}
    with demo.threads(num_threads):
        for draw in range(settings.num_draws):
            conversation = plan(
                tokenizer,
                voice,
                text,
                context_tokens=settings.context_tokens,
                num_facts=settings.num_facts,
                seed=settings.seed + draw,
            )
            told = partial(_tell, progress, draw, settings.num_draws)
            full = demo.read(model, conversation.text_ids, told)
            shape = shape_of(full)
            device_bytes = settings.device_bytes or _default_bytes(settings, shape, device)
            resolved = {"device_bytes": device_bytes, "context_tokens": len(conversation.text_ids)}
            cases = _cases(settings, device_bytes)
            for case in cases:  # refused now rather than after minutes
                plan_memory(case.config, shape, settings.context_tokens, device=device.type)
            draws.append(_compare(model, tokenizer, full, shape, conversation, cases, told))
    return Result(
        demo.resolve(settings, model, num_threads) | resolved,
        describe_machine(device),
        versions(),
        [_mean(rows) for rows in zip(*draws, strict=True)],
        time.perf_counter() - start,
    )


def _tell(progress: Progress, draw: int, num_draws: int, stage: str, done: int, total: int) -> None:
    progress(stage if num_draws == 1 else f"{draw + 1}/{num_draws} {stage}", done, total)


def _cases(settings: Settings, device_bytes: int) -> list[Case]:
    """Every format without and, where it is quantised, with rotation: equal tokens, then bytes."""
    cases = []
    for mode in (EQUAL_TOKENS, EQUAL_BYTES):
        for name in settings.formats:
            for rotation in ("none",) if name == "K16V16" else ("none", "both"):
                config = settings.cache_config(name, rotation)
                if mode == EQUAL_BYTES:
                    config = replace(config, budget_tokens="auto", device_bytes=device_bytes)
                cases.append(Case(mode, name, rotation, config))
    return cases


def _default_bytes(settings: Settings, shape: CacheShape, device: torch.device) -> int:
    """What the device tier takes in 16 bits at `reference_tokens`, or at what can be least."""
    config = settings.cache_config("K16V16", "none")
    least = config.num_sink_pages * config.page_size + config.window_tokens
    config = replace(config, budget_tokens=max(settings.reference_tokens, least))
    return plan_memory(config, shape, settings.context_tokens, device=device.type).tier_bytes


def _compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    full: DynamicCache,
    shape: CacheShape,
    conversation: Conversation,
    cases: list[Case],
    progress: Progress,
) -> list[Row]:
    """The rows of one text: the full cache's, then one for each case."""
    progress("Asking: full cache", 0, len(cases))
    method = Method("full", "full cache", open_full)
    row, fed = _ask(method, model, tokenizer, full, conversation)
    reference = _follow_full(method, model, tokenizer, full, conversation, fed)
    rows = [
        Row(
            mode="full",
            format="full cache",
            rotation="none",
            digest_bytes=0,
            host_bytes_per_token=float(shape.token_bytes),
            kl=0.0,
            kl_answers=0.0,
            agreement=1.0,
            **_outcome(row),
        )
    ]
    for number, case in enumerate(cases):
        progress(case.title, number, len(cases))
        rows.append(_row(case, model, tokenizer, full, shape, conversation, reference))
    return rows


def _row(
    case: Case,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    full: DynamicCache,
    shape: CacheShape,
    conversation: Conversation,
    reference: Reference,
) -> Row:
    opened = partial(open_arkcache, config=case.config, index=case.config.index)
    method = Method("arkcache", case.title, opened)
    row, _ = _ask(method, model, tokenizer, full, conversation)
    with method.cache(model, full) as cache:
        kl, same = _divergence(model, cache, reference)
        assert isinstance(cache, ArkCache)
        stats = cache.stats()
    planned = plan_memory(case.config, shape, len(conversation.text_ids), device=device_of(full))
    outcome = _outcome(row) | {"device_bytes": stats.device_bytes}
    # Pages that were demoted take less than they did when they were backed up.
    left = stats.host_bytes / stats.bytes_backed_up if stats.bytes_backed_up else 1.0
    return Row(
        mode=case.mode,
        format=case.format,
        rotation=case.rotation,
        digest_bytes=stats.digest_bytes,
        host_bytes_per_token=planned.host_bytes_per_token * left,
        kl=float(kl.mean()),
        kl_answers=float(kl[reference.answers].mean()),
        agreement=float(same[reference.answers].float().mean()),
        **outcome,
    )


def _ask(
    method: Method,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    full: DynamicCache,
    conversation: Conversation,
) -> tuple[demo.Row, list[list[int]]]:
    """Greedy answers to all questions, and the tokens that were given for each."""
    with method.cache(model, full) as cache:
        listener = Listener(model, tokenizer, cache, conversation.voice)
        answers = [listener.ask(fact) for fact in conversation.questions]
        return listener.row(method, answers), listener.fed


def _outcome(row: demo.Row) -> dict[str, Any]:
    names = ("num_right", "num_questions", "attended_tokens", "device_bytes", "ms_per_token")
    return {name: getattr(row, name) for name in names}


def _follow_full(
    method: Method,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    full: DynamicCache,
    conversation: Conversation,
    fed: list[list[int]],
) -> Reference:
    """What the full cache predicts along its own conversation."""
    ids: list[int] = []
    answers: list[int] = []
    for fact, tokens in zip(conversation.questions, fed, strict=True):
        asked = len(question_ids(tokenizer, conversation.voice, fact))
        # From the question's last token to the last but one of the answer.
        answers += range(len(ids) + asked - 1, len(ids) + len(tokens) - 1)
        ids += tokens
    with method.cache(model, full) as cache:
        return Reference(ids, torch.stack(list(_predict(model, cache, ids))), answers)


def _divergence(
    model: PreTrainedModel, cache: DynamicCache, reference: Reference
) -> tuple[Tensor, Tensor]:
    """After each token of the full cache's conversation: the KL divergence to the full cache in
    nats, and whether the most likely token is the same."""
    kl, same = [], []
    predictions = _predict(model, cache, reference.ids)
    for log_probs, expected in zip(predictions, reference.log_probs, strict=True):
        kl.append((expected.exp() * (expected - log_probs)).sum())
        same.append(expected.argmax() == log_probs.argmax())
    return torch.stack(kl), torch.stack(same)


def _predict(model: PreTrainedModel, cache: DynamicCache, ids: list[int]) -> Iterator[Tensor]:
    """Log-probabilities of the next token after each of `ids`, given one by one, on the CPU."""
    for token in ids:
        given = torch.tensor([[token]], device=model.device)
        logits = model(given, past_key_values=cache, logits_to_keep=1).logits
        yield logits[0, -1].float().log_softmax(dim=-1).cpu()


def _mean(draws: tuple[Row, ...]) -> Row:
    """One row for all draws: answers add up, sizes are the largest, everything else the mean."""
    return replace(
        draws[0],
        num_right=sum(row.num_right for row in draws),
        num_questions=sum(row.num_questions for row in draws),
        device_bytes=max(row.device_bytes for row in draws),
        digest_bytes=max(row.digest_bytes for row in draws),
        attended_tokens=statistics.fmean(row.attended_tokens for row in draws),
        kl=statistics.fmean(row.kl for row in draws),
        kl_answers=statistics.fmean(row.kl_answers for row in draws),
        agreement=statistics.fmean(row.agreement for row in draws),
        ms_per_token=statistics.fmean(row.ms_per_token for row in draws),
    )
