"""How far a model is from itself when its cache is another: at answers, and in real texts.

Each text is given in a few long steps, so that a judgement takes as long as reading it does.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from arkcache.chat.template import encode
from arkcache.config import CacheConfig
from arkcache.errors import UnsupportedModelError
from arkcache.evaluation import language
from arkcache.evaluation.speaker import speaker_of
from arkcache.evaluation.tasks import TASKS
from arkcache.huggingface import ArkCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_TEXTS, TEXT_TOKENS, PREDICTED = 2, 192, 64
"""Real texts that are predicted: how many, the tokens before those that count, and these."""


@dataclass(frozen=True)
class Judgement:
    """What a model makes of texts behind a cache, against itself behind the first one.

    Attributes:
        kl: mean divergence at the tokens of the answers, in nats.
        text_kl: likewise at tokens of real texts.
        right: questions all of whose answer's tokens are the most likely ones.
    """

    kl: float
    text_kl: float
    right: int


class Judge:
    """Puts the same texts to a model behind any cache.

    Args:
        task: asks the questions, one of `TASKS`.
        length, num_questions: tokens of the text that is asked about, and questions about it.
        seed: draws other texts.

    Attributes:
        answers: of each question, the tokens that are expected.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: str,
        length: int,
        num_questions: int,
        seed: int,
    ) -> None:
        self._model = model
        speaker, lots = speaker_of(tokenizer), random.Random(f"{seed} judged")
        passage = TASKS[task].draw(speaker.room(length), num_questions, lots)
        self._read = speaker.read(passage)
        self._questions = [speaker.ask(question) for question in passage.questions]
        self.answers = [
            encode(tokenizer, " " + ", ".join(one.expected)) for one in passage.questions
        ]
        self._texts = [
            language.draw(tokenizer, number, TEXT_TOKENS, PREDICTED, lots)
            for number in range(NUM_TEXTS)
        ]
        self._expected: tuple[list[Tensor], list[Tensor]] | None = None

    @torch.inference_mode()
    def of(self, config: CacheConfig) -> Judgement:
        """Judge the model behind a cache; the first one is what others are held to.

        Raises `UnsupportedModelError` where the model runs in compat mode.
        """
        given = self._at_answers(config), self._in_texts(config)
        if self._expected is None:
            self._expected = given
        right = sum(
            own.argmax(dim=-1).tolist() == answer
            for own, answer in zip(given[0], self.answers, strict=True)
        )
        kl, text_kl = map(_divergence, given, self._expected)
        return Judgement(kl, text_kl, right)

    def _at_answers(self, config: CacheConfig) -> list[Tensor]:
        """Of each question, log-probabilities at the answer's tokens [tokens, vocabulary]."""
        cache, found = self._cache(config), []
        self._logits(self._read, cache, 1)
        for question, answer in zip(self._questions, self.answers, strict=True):
            found.append(self._logits(question + answer[:-1], cache, len(answer)))
            cache.crop(len(self._read))
        cache.reset()
        return found

    def _in_texts(self, config: CacheConfig) -> list[Tensor]:
        """Of each real text, log-probabilities of its last tokens [tokens, vocabulary]."""
        found = []
        for text in self._texts:
            cache = self._cache(config)
            self._logits(text.context, cache, 1)
            found.append(self._logits(text.following[:-1], cache, PREDICTED))
            cache.reset()
        return found

    def _cache(self, config: CacheConfig) -> ArkCache:
        cache = ArkCache(self._model, config)
        if cache.reason is not None:
            raise UnsupportedModelError(f"it runs in compat mode: {cache.reason}")
        return cache

    def _logits(self, ids: list[int], cache: ArkCache, last: int) -> Tensor:
        given = torch.tensor([ids], device=self._model.device)
        logits: Tensor = self._model(given, past_key_values=cache, logits_to_keep=last).logits
        return logits[0, -last:].float().log_softmax(dim=-1).cpu()


def _divergence(given: list[Tensor], expected: list[Tensor]) -> float:
    """The mean over all tokens of KL(expected, given), in nats."""
    own, true = torch.cat(given), torch.cat(expected)
    return float((true.exp() * (true - own)).sum(dim=-1).mean())
