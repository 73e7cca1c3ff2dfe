"""`generate()` with decode steps that are replayed as CUDA graphs.

While they are replayed the model's forward is a `ReplayingForward`, which asks the `Replayer` of
the cache that a call is made with (`replaying.py`). Nothing else of the model is touched.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from arkcache.errors import InputError
from arkcache.huggingface.cache import ArkCache
from arkcache.huggingface.replaying import Replayer

ROOM = 1024
"""Tokens to make room for where nobody says how many are to come."""

_installing = threading.Lock()


def generate_graphed(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    *,
    past_key_values: ArkCache | None = None,
    **kwargs: Any,
) -> Any:
    """`model.generate(inputs, past_key_values=cache, ...)`, decode steps replayed as CUDA graphs.

        cache = ArkCache(model, budget_tokens=2048)
        output = arkcache.generate_graphed(model, **inputs, past_key_values=cache)

    All of `generate` works as ever; steps that cannot be replayed (prompts, beams, layers that are
    not paged, a model on several devices) run as they always do, with one warning that says why.
    What is recorded serves the next call with the same cache, too. See `ArkCache.graphed` for
    several calls, and for loops of your own.

    Args:
        model: as for `generate`.
        inputs: token ids [batch, tokens], or None where `input_ids=` is given.
        past_key_values: the cache; None is `ArkCache(model)`.
        kwargs: of `generate`.

    Returns what `generate` returns.
    """
    cache = ArkCache(model) if past_key_values is None else past_key_values
    if not isinstance(cache, ArkCache):
        raise InputError(
            f"past_key_values is a {type(cache).__name__}: expected an ArkCache of this model"
        )
    config = kwargs.get("generation_config") or model.generation_config
    new_tokens = kwargs.get("max_new_tokens") or config.max_new_tokens
    new_tokens = new_tokens or kwargs.get("max_length") or config.max_length or ROOM
    with replayed(model, cache, new_tokens):
        generate: Any = model.generate
        return generate(inputs, past_key_values=cache, **kwargs)


@contextmanager
def replayed(model: PreTrainedModel, cache: ArkCache, new_tokens: int = ROOM) -> Iterator[None]:
    """Within it, the model's forward replays decode steps with this cache.

    new_tokens: of each sequence to make room for after every prompt, so that nothing that a
        recording reads moves.
    """
    with _installing:
        forward = vars(model).get("forward")
        if not isinstance(forward, ReplayingForward):
            forward = ReplayingForward(model)
            model.forward = forward
        replayer = Replayer(model, forward.own, cache, new_tokens)
        forward.replayers.append(replayer)
    try:
        yield
    finally:
        with _installing:
            forward.leave(replayer)


class ReplayingForward:
    """A model's forward while the steps of some caches are replayed.

    A copy of the model, and what a pickle of it becomes, has the model's own forward.

    Args:
        model: the model.

    Attributes:
        own: its own forward, or what others had put in its place.
        replayers: of the caches; of two for one cache the newer one counts.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._had_own = model, "forward" in vars(model)
        self.own: Callable[..., Any] = model.forward
        self.replayers: list[Replayer] = []
        functools.update_wrapper(self, self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, or do what the replayer of the cache that is given does."""
        cache = kwargs.get("past_key_values")
        for replayer in reversed(self.replayers):
            if replayer.cache is cache and cache is not None:
                return replayer(*args, **kwargs)
        return self.own(*args, **kwargs)

    def leave(self, replayer: Replayer) -> None:
        """Do without this replayer; without any, the model has its own forward back."""
        self.replayers.remove(replayer)
        # Others may have wrapped it meanwhile: then it stays and passes everything on.
        if self.replayers or vars(self._model).get("forward") is not self:
            return
        if self._had_own:
            self._model.forward = self.own
        else:
            del self._model.forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.own, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.own.__reduce_ex__(protocol)
