"""Decode steps that were recorded, and what they were recorded from.

They are kept with the steps of the cache (`CapturableSteps.recordings`) and hold neither it nor the
model: they outlive a call of `generate`, and go when the cache is reset or goes itself.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from transformers import PreTrainedModel

MOST = 8
"""Recordings kept: sealing or not, for two managers, in two manners of calling the model."""

WAITED = "called a synchronizing CUDA operation"
"""What torch says of an operation that waited. Switching its watch on warns once, too, and of
synchronizing operations, but only that not all of them are detected."""


class Recording(NamedTuple):
    """A step that can be done again.

    Attributes:
        graph: does it; None without a GPU, where it is launched anew.
        inputs: tensors that it reads.
        kind: of the output.
        output: its fields, which it writes; None stands for the cache.
    """

    graph: torch.cuda.CUDAGraph | None
    inputs: dict[str, Tensor]
    kind: type
    output: dict[str, Any]

    def replayed(self, inputs: dict[str, Tensor], cache: Any) -> Any:
        """Do the step with these inputs; returns an output of its own, which holds `cache`."""
        assert self.graph is not None
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        own = {name: cache if x is None else _cloned(x) for name, x in self.output.items()}
        return self.kind(**own)


class Recordings:
    """The recorded steps of one cache, with one model in one state, at fixed addresses."""

    def __init__(self) -> None:
        self._model: Callable[[], PreTrainedModel | None] = lambda: None
        self._state: Hashable = None
        self._addresses: tuple[int, ...] = ()
        self._stream: torch.cuda.Stream | None = None
        self.follows: bool | None = None
        """Whether the model follows the positions it is given; None is not known yet."""
        self._forget()

    def _forget(self) -> None:
        self.of: dict[Hashable, Recording] = {}
        self.warm: set[Hashable] = set()
        self._pool: Any = None

    def keep_for(self, model: PreTrainedModel) -> None:
        """Forget what was recorded of another model, or of this one in another state."""
        state = _state_of(model)
        if self._model() is not model or self._state != state:
            self._forget()
            self._model, self._state, self.follows = ref(model), state, None

    def keep_at(self, addresses: tuple[int, ...]) -> None:
        """Forget what reads and writes elsewhere: that is gone."""
        if addresses != self._addresses:
            self._forget()
            self._addresses = addresses

    def record(
        self,
        step: Hashable,
        launch: Callable[..., Any],
        inputs: dict[str, Tensor],
        cache: Any,
    ) -> Recording:
        """Record what `launch(inputs, recorded=True)` queues; it is not done by that."""
        with torch.inference_mode(False):  # written to in and out of it
            own = {name: tensor.clone() for name, tensor in inputs.items()}
        device = next(iter(own.values())).device
        if device.type != "cuda":
            return self.keep(step, Recording(None, own, dict, {}))
        graph = torch.cuda.CUDAGraph()
        self._stream = self._stream or torch.cuda.Stream(device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream(device))
        # In a guard of its own: a capture that fails leaves its stream current.
        capture = torch.cuda.graph(
            graph, self._pool, self._stream, capture_error_mode="thread_local"
        )
        with torch.cuda.device(device), torch.cuda.stream(self._stream), _no_collection(), capture:
            output = launch(own, recorded=True)
        torch.cuda.current_stream(device).wait_stream(self._stream)
        fields = {name: None if x is cache else x for name, x in output.items()}
        return self.keep(step, Recording(graph, own, type(output), fields))

    def keep(self, step: Hashable, recording: Recording) -> Recording:
        """Keep a recording, in place of the oldest where there are many."""
        if len(self.of) == MOST:
            del self.of[next(iter(self.of))]
        self.of[step] = recording
        return recording


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


def _state_of(model: PreTrainedModel) -> Hashable:
    """What a recording took from a model: weights, hooks and switches (adapters set many)."""
    tensors = chain(model.parameters(), model.buffers())
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return (
        tuple(tensor.data_ptr() for tensor in tensors),
        tuple(tuple(getattr(module, name)) for module in model.modules() for name in hooks),
        tuple(
            (name, repr(value) if _is_plain(value) else "")
            for module in model.modules()
            for name, value in vars(module).items()
        ),
    )


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a string or a switch, or is made of them."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _cloned(value: Any) -> Any:
    """A copy of tensors, alone or in tuples and lists: the next step overwrites them."""
    if isinstance(value, Tensor):
        return value.clone()
    return type(value)(map(_cloned, value)) if type(value) in (tuple, list) else value


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
