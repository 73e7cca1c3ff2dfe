"""Gives a model one token after another, and brings its cache back to where it was."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from arkcache.chat.template import end_tokens
from arkcache.huggingface import ArkCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from arkcache.evaluation.passage import Question


class Decoder:
    """Every token is a step of its own: the code that answers users.

    Attributes:
        seconds: of each step.
    """

    def __init__(self, model: PreTrainedModel, cache: DynamicCache) -> None:
        self._model, self._cache = model, cache
        self.seconds: list[float] = []

    def feed(self, ids: list[int]) -> Tensor:
        """Give tokens one by one; the last logits [vocabulary], on the CPU."""
        logits = torch.empty(0)
        for token in ids:
            given = torch.tensor([[token]], device=self._model.device)
            start = time.perf_counter()
            output = self._model(given, past_key_values=self._cache, logits_to_keep=1)
            logits = output.logits[0, -1].cpu()  # waits for the device
            self.seconds.append(time.perf_counter() - start)
        return logits

    def greedy(self, token: int, num_tokens: int) -> list[int]:
        """The most likely tokens after one that is given, each given in turn; no end ends it."""
        said: list[int] = []
        for _ in range(num_tokens):
            token = int(self.feed([token]).argmax())
            said.append(token)
        return said

    def answer(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ids: list[int],
        question: Question,
        most_tokens: int,
    ) -> str:
        """The greedy answer to a question of token ids.

        It ends where the model ends it, or once everything that is expected is in it.
        """
        stops = end_tokens(self._model)
        said: list[int] = []
        text = ""
        token = int(self.feed(ids).argmax())
        while len(said) < most_tokens and token not in stops:
            said.append(token)
            text = str(tokenizer.decode(said))
            if question.score(text) == 1 or len(said) == most_tokens:
                break
            token = int(self.feed([token]).argmax())
        return text


class Bookmark:
    """Where a cache is now; `restore` brings it back there after more tokens.

    An `ArkCache` is cropped, as its users would, but for one that gives pages up: a copy is taken.
    Layers that evict cannot be cropped either, and are kept as they are: their tensors are replaced
    by a step, never written to.
    """

    def __init__(self, cache: DynamicCache) -> None:
        self._cache, self._length = cache, cache.get_seq_length()
        self._layers = [copy.copy(layer) for layer in cache.layers]
        loses = isinstance(cache, ArkCache) and cache.config.retention is not None
        self._copy = copy.deepcopy(cache) if loses else None

    def restore(self) -> None:
        """Forget what came after."""
        if self._copy is not None:
            vars(self._cache).update(vars(copy.deepcopy(self._copy)))
        elif isinstance(self._cache, ArkCache):
            self._cache.crop(self._length)
        else:
            self._cache.layers = [copy.copy(layer) for layer in self._layers]
