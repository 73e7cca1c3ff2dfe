"""`generate()` with decode steps that are replayed as CUDA graphs.

A step of one token is recorded twice, once as it is when a page seals and once as it is when none
does. From then on the host keeps the books and replays: the model's Python code does not run.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from arkcache.errors import HostTierFullError, InputError
from arkcache.huggingface.cache import ArkCache, PagedCacheLayer
from arkcache.stepping import StaticSteps

KNOWN = {"input_ids", "attention_mask", "position_ids", "past_key_values", "cache_position"}
"""What a step may be given besides switches; of anything else a recording would keep the value."""


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
    new_tokens = kwargs.get("max_new_tokens") or config.max_new_tokens or 0
    with replayed(model, cache, new_tokens):
        generate: Any = model.generate
        return generate(inputs, past_key_values=cache, **kwargs)


@contextmanager
def replayed(model: PreTrainedModel, cache: ArkCache, new_tokens: int) -> Iterator[None]:
    """Within it, the model's forward replays decode steps with this cache."""
    forward = model.forward
    had_own = "forward" in vars(model)
    model.forward = functools.wraps(forward)(Replayer(model, forward, cache, new_tokens))
    try:
        yield
    finally:
        if had_own:
            model.forward = forward
        else:
            del model.forward


class Recording(NamedTuple):
    """A step that can be done again: `run` reads these inputs and returns the model's output."""

    run: Callable[[], Any]
    input_ids: Tensor
    position_ids: Tensor


class Replayer:
    """A model's forward that replays what it can.

    Args:
        model: the model.
        forward: its own forward.
        cache: whose steps are replayed.
        new_tokens: to make room for, so that nothing that a recording reads moves.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        cache: ArkCache,
        new_tokens: int,
    ) -> None:
        self._model, self._forward, self._cache = model, forward, cache
        self._new_tokens = new_tokens
        self._recordings: dict[tuple[bool, ...], Recording] = {}
        self._addresses: tuple[int, ...] = ()
        self._is_warm: set[tuple[bool, ...]] = set()
        self._given_up = self._has_reserved = False
        self._pool: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replay a decode step, or run the model."""
        if args or not self._is_step(kwargs) or self._given_up:
            return self._forward(*args, **kwargs)
        reason = self._why_not()
        if reason is not None:
            self._warn(reason)
            return self._forward(**kwargs)
        managers = self._cache.managers
        if not self._has_reserved:
            for manager in managers:
                # If generating ends early there may be room: the step that finds none says so.
                with suppress(HostTierFullError):
                    manager.reserve(manager.num_columns + self._new_tokens)
            self._has_reserved = True
        kind = tuple(manager.next_step_seals() for manager in managers)
        if kind not in self._is_warm:  # kernels are compiled and libraries loaded as it runs
            self._is_warm.add(kind)
            return self._forward(**kwargs)
        return self._step(kind, kwargs)

    def _is_step(self, kwargs: dict[str, Any]) -> bool:
        """Whether this is a step of one token of the cache, and nothing else."""
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        given = {name for name, value in kwargs.items() if isinstance(value, Tensor)}
        wanted = any(kwargs.get(name) for name in ("output_attentions", "output_hidden_states"))
        return (
            kwargs.get("past_key_values") is self._cache
            and ids is not None
            and ids.shape[1] == 1
            and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2))
            and given <= KNOWN
            and not wanted
            and self._cache.get_seq_length() > 0
        )

    def _why_not(self) -> str | None:
        """Why steps of this model cannot be replayed; None where they can."""
        if self._cache.reason is not None:
            return self._cache.reason
        others = {
            type(x).__name__ for x in self._cache.layers if not isinstance(x, PagedCacheLayer)
        }
        if others:
            return f"layers of kind {', '.join(sorted(others))} keep a cache of changing shape"
        if len({parameter.device for parameter in self._model.parameters()}) > 1:
            return "the model is on several devices"
        if any(manager.steps is None for manager in self._cache.managers):
            return "its decode steps run on plain torch"
        return None

    @property
    def _steps(self) -> list[StaticSteps]:
        return [manager.steps for manager in self._cache.managers if manager.steps is not None]

    def _warn(self, reason: str) -> None:
        """Give up, and say why."""
        self._given_up = True
        warnings.warn(f"decode steps are not replayed as graphs: {reason}", stacklevel=5)

    def _step(self, kind: tuple[bool, ...], kwargs: dict[str, Any]) -> Any:
        managers = self._cache.managers
        ids, position_ids = kwargs["input_ids"], kwargs.get("position_ids")
        if position_ids is None:
            position_ids = torch.full_like(ids, self._cache.get_seq_length())
        for manager in managers:
            manager.begin_step()
        addresses = tuple(address for steps in self._steps for address in steps.addresses)
        if addresses != self._addresses:
            self._recordings.clear()
            self._addresses = addresses
        if kind not in self._recordings:
            own = {"input_ids": ids.clone(), "position_ids": position_ids.clone()}
            launch = functools.partial(self._launch, kind, {**kwargs, **own})
            try:
                self._recordings[kind] = Recording(self._record(launch, ids.device), **own)
            except RuntimeError as error:  # the model waits for the device, or copies from it
                self._warn(f"recording one failed ({error})")
                return launch()
        recording = self._recordings[kind]
        recording.input_ids.copy_(ids)
        recording.position_ids.copy_(position_ids)
        output = copy.copy(recording.run())
        output.logits = output.logits.clone()
        return output

    def _launch(self, kind: tuple[bool, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model, whose books have been kept already."""
        with ExitStack() as stack:
            for steps, seals in zip(self._steps, kind, strict=True):
                stack.enter_context(steps.launch(seals))
            # Padding is in the books: a mask would be recorded as it is now.
            return self._forward(**{**kwargs, "attention_mask": None})

    def _record(self, launch: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
        """What does the same as `launch` whenever it is called."""
        if device.type != "cuda":
            return launch
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = launch()

        def replay() -> Any:
            graph.replay()
            return output

        return replay
