"""`generate()` with decode steps that are replayed as CUDA graphs.

A step of one token is recorded twice, once as it is when a page seals and once as it is when none
does. From then on the host keeps the books and replays: the model's Python code does not run.
"""

from __future__ import annotations

import copy
import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from arkcache.errors import HostTierFullError, InputError
from arkcache.huggingface.cache import ArkCache, PagedCacheLayer
from arkcache.huggingface.probe import follows_positions
from arkcache.stepping import StaticSteps

INPUTS = ("input_ids", "position_ids", "cache_position")
"""Tensors that are new at every step: a recording reads them from where they were first."""

KNOWN = {*INPUTS, "attention_mask", "past_key_values"}
"""What a step may be given besides switches; of anything else a recording would keep the value."""


WAITED = "called a synchronizing CUDA operation"
"""What torch says of an operation that waited. Switching its watch on warns once, too, and of
synchronizing operations, but only that not all of them are detected."""


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
    new_tokens = kwargs.get("max_new_tokens") or config.max_new_tokens
    new_tokens = new_tokens or kwargs.get("max_length") or config.max_length or 0
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


Kind = tuple[bool, ...]
"""Of a step: whether it seals pages, in each of the cache's managers."""


class Recording(NamedTuple):
    """A step that can be done again: `run` reads these inputs and returns the model's output."""

    run: Callable[[], Any]
    inputs: dict[str, Tensor]


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
        self._recordings: dict[Kind, Recording] = {}
        self._is_warm: set[Kind] = set()
        self._addresses: tuple[int, ...] = ()
        self._begun = self._given_up = False
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replay a decode step, or run the model."""
        if args or self._given_up or not self._is_step(kwargs):
            return self._forward(*args, **kwargs)
        if not self._begun:
            reason = self._why_not(kwargs.get("attention_mask"))
            if reason is not None:
                self._warn(reason)
                return self._forward(**kwargs)
            self._reserve()
            self._begun = True
        return self._step(kwargs)

    def _reserve(self) -> None:
        """Make room for all tokens to come, as far as there is any."""
        for manager in self._cache.managers:
            # If generating ends early there is enough: the step that finds none says so.
            with suppress(HostTierFullError, torch.OutOfMemoryError):
                manager.reserve(manager.num_columns + self._new_tokens)

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
            and not self._cache.next_is_exact
        )

    def _why_not(self, mask: Tensor | None) -> str | None:
        """Why steps of this model cannot be replayed; None where they can.

        mask: of the first step. What comes after it is `generate`'s, which only appends ones.
        """
        if self._cache.reason is not None:
            return self._cache.reason
        others = {
            type(x).__name__ for x in self._cache.layers if not isinstance(x, PagedCacheLayer)
        }
        if others:
            return f"layers of kind {', '.join(sorted(others))} keep a cache of changing shape"
        if len({parameter.device for parameter in self._model.parameters()}) > 1:
            return "the model is on several devices"
        managers = self._cache.managers
        if any(manager.steps is None for manager in managers):
            return "its decode steps run on plain torch"
        if mask is not None and not all(m.has_padding(mask[:, : m.num_columns]) for m in managers):
            return "the attention mask hides tokens that are no padding to the cache"
        if not follows_positions(self._model, self._forward):
            return "the model counts positions itself, whatever position_ids say"
        return None

    @property
    def _steps(self) -> list[StaticSteps]:
        return [manager.steps for manager in self._cache.managers if manager.steps is not None]

    def _warn(self, reason: str) -> None:
        """Give up, and say why."""
        self._given_up = True
        warnings.warn(f"decode steps are not replayed as graphs: {reason}", stacklevel=5)

    def _step(self, kwargs: dict[str, Any]) -> Any:
        managers = self._cache.managers
        inputs = {name: kwargs[name] for name in INPUTS if kwargs.get(name) is not None}
        # Said now: the model would count what the books hold already.
        position = torch.full_like(inputs["input_ids"], self._cache.get_seq_length())
        inputs.setdefault("position_ids", position)
        for manager in managers:
            manager.check_step()
        try:
            return self._booked_step(kwargs, inputs)
        except BaseException:  # interrupted, too: the cache is to be what it was before
            for manager in managers:
                manager.undo_step()
            self._cache.forget_step()
            raise

    def _booked_step(self, kwargs: dict[str, Any], inputs: dict[str, Tensor]) -> Any:
        """Keep the books of a step, then do it: the first time as it is, then recorded."""
        kind = tuple(manager.begin_step() for manager in self._cache.managers)
        launch = functools.partial(self._launch, kind, kwargs)
        addresses = tuple(address for steps in self._steps for address in steps.addresses)
        if addresses != self._addresses:  # what was recorded reads and writes what is gone
            self._recordings.clear()
            self._is_warm.clear()
            self._addresses, self._pool = addresses, None
        if kind not in self._is_warm:
            self._is_warm.add(kind)
            return self._warm_up(functools.partial(launch, inputs))
        if any(steps.saw_mask for steps in self._steps):
            self._warn("the model masks or biases its attention by itself, anew at every step")
            return launch(inputs)
        if kind not in self._recordings:
            own = {name: tensor.clone() for name, tensor in inputs.items()}
            try:
                run = self._record(functools.partial(launch, own), inputs["input_ids"].device)
            except Exception as error:  # whatever a model's code does that no graph can hold
                self._warn(f"recording one failed ({type(error).__name__}: {error})")
                self._cache.forget_step()
                return launch(inputs)
            self._recordings[kind] = Recording(run, own)
        return self._replay(self._recordings[kind], inputs)

    def _warm_up(self, launch: Callable[[], Any]) -> Any:
        """Do a step that compiles kernels and loads libraries, and see whether it waits."""
        if self._model.device.type != "cuda":
            return launch()
        output, waits = seen_waiting(launch)
        if waits:
            self._warn("the model's own code waits for the device in the middle of a step")
        return output

    def _replay(self, recording: Recording, inputs: dict[str, Tensor]) -> Any:
        for name, tensor in inputs.items():
            recording.inputs[name].copy_(tensor)
        output = copy.copy(recording.run())
        output.logits = output.logits.clone()
        return output

    def _launch(
        self, kind: Kind, kwargs: dict[str, Any], inputs: dict[str, Tensor], recorded: bool = False
    ) -> Any:
        """Run the model, whose books have been kept already."""
        with ExitStack() as stack:
            for steps, seals in zip(self._steps, kind, strict=True):
                stack.enter_context(steps.launch(seals, recorded=recorded))
            # Padding is in the books: a mask would be recorded as it is now.
            return self._forward(**{**kwargs, **inputs, "attention_mask": None})

    def _record(self, launch: Callable[..., Any], device: torch.device) -> Callable[[], Any]:
        """What does the same as `launch` whenever it is called."""
        if device.type != "cuda":
            return launch
        graph = torch.cuda.CUDAGraph()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream(device))
        # In a guard of its own: a capture that fails leaves its stream current.
        capture = torch.cuda.graph(
            graph, self._pool, self._stream, capture_error_mode="thread_local"
        )
        with torch.cuda.device(device), torch.cuda.stream(self._stream), _no_collection(), capture:
            output = launch(recorded=True)
        torch.cuda.current_stream(device).wait_stream(self._stream)

        def replay() -> Any:
            graph.replay()
            return output

        return replay


def seen_waiting(launch: Callable[[], Any]) -> tuple[Any, bool]:
    """What `launch` returns, and whether torch saw it wait for the device."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            output = launch()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return output, any(WAITED in str(warning.message) for warning in caught)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect garbage now and not in between: what is freed may wait for the device."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
