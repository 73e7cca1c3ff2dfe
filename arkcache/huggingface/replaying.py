"""The steps of one cache, replayed: the host counts, the device does what was recorded.

A step of one token is recorded twice, once as it is when a page seals and once as it is when none
does. From then on the model's Python code does not run.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from arkcache.engines.capture import CapturableSteps, PlannedStep
from arkcache.errors import HostTierFullError
from arkcache.huggingface.cache import ArkCache, PagedCacheLayer
from arkcache.huggingface.probe import follows_positions
from arkcache.huggingface.recordings import Recordings, seen_waiting

INPUTS = ("input_ids", "position_ids", "cache_position")
"""Tensors that are new at every step: a recording reads them from where they were first."""

KNOWN = {*INPUTS, "attention_mask", "past_key_values"}
"""What a step may be given besides switches; of anything else a recording would keep the value."""


class Replayer:
    """What replays the steps of one cache, and has the model run where it cannot.

    Args:
        model: the model.
        forward: its own forward.
        cache: whose steps are replayed.
        new_tokens: to make room for after every prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        cache: ArkCache,
        new_tokens: int,
    ) -> None:
        self._model, self._forward, self.cache = model, forward, cache
        self._new_tokens = new_tokens
        self._kept = Recordings()
        self._begun = self._given_up = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replay a decode step, or run the model."""
        if args or self._given_up or not self._is_step(kwargs):
            self._begun = False
            return self._forward(*args, **kwargs)
        if not self._begun and not self._begin(kwargs.get("attention_mask")):
            return self._forward(**kwargs)
        return self._step(kwargs)

    def _begin(self, mask: Tensor | None) -> bool:
        """See before the first step after a prompt whether steps can be replayed.

        mask: of that step. What comes after it is `generate`'s, which only appends ones.
        """
        reason = self._why_not(mask)
        if reason is not None:
            self._warn(reason)
            return False
        self._reserve()
        self._begun = True
        return True

    def _reserve(self) -> None:
        """Make room for all tokens to come, as far as there is any."""
        for manager, steps in zip(self.cache.managers, self._steps, strict=True):
            # If generating ends early there is enough: the step that finds none says so.
            with suppress(HostTierFullError, torch.OutOfMemoryError):
                steps.reserve(manager.num_columns + self._new_tokens)

    def _is_step(self, kwargs: dict[str, Any]) -> bool:
        """Whether this is a step of one token of the cache, and nothing else."""
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        given = {name for name, value in kwargs.items() if isinstance(value, Tensor)}
        wanted = any(kwargs.get(name) for name in ("output_attentions", "output_hidden_states"))
        return (
            kwargs.get("past_key_values") is self.cache
            and ids is not None
            and ids.shape[1] == 1
            and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2))
            and given <= KNOWN
            and not wanted
            and kwargs.get("return_dict") is not False
            and self.cache.get_seq_length() > 0
            and not self.cache.next_is_exact
            and not self.cache.is_traced
        )

    def _why_not(self, mask: Tensor | None) -> str | None:
        """Why steps of this model cannot be replayed; None where they can."""
        if self.cache.reason is not None:
            return self.cache.reason
        others = {type(x).__name__ for x in self.cache.layers if not isinstance(x, PagedCacheLayer)}
        if others:
            return f"layers of kind {', '.join(sorted(others))} keep a cache of changing shape"
        if len({parameter.device for parameter in self._model.parameters()}) > 1:
            return "the model is on several devices"
        managers = self.cache.managers
        if any(manager.steps is None for manager in managers):
            return "its decode steps run on plain torch"
        if torch.is_grad_enabled():
            return "gradients are enabled: use torch.no_grad()"
        if mask is not None and not all(m.has_padding(mask[:, : m.num_columns]) for m in managers):
            return "the attention mask hides tokens that are no padding to the cache"
        if not self._follows_positions():
            return "the model counts positions itself, whatever position_ids say"
        return None

    def _follows_positions(self) -> bool:
        """Whether the model does; known of a model in the state that was recorded."""
        kept = self._kept = self._recordings()
        kept.keep_for(self._model)
        if kept.follows is None:
            kept.follows = follows_positions(self._model, self._forward)
        return kept.follows

    def _recordings(self) -> Recordings:
        """Those of the cache, kept where they go with what they read and write."""
        (first, *_) = self._steps
        if not isinstance(first.recordings, Recordings):
            first.recordings = Recordings()
        return first.recordings

    @property
    def _steps(self) -> list[CapturableSteps]:
        return [manager.steps for manager in self.cache.managers if manager.steps is not None]

    def _warn(self, reason: str) -> None:
        """Give up, and say why."""
        self._given_up = True
        warnings.warn(f"decode steps are not replayed as graphs: {reason}", stacklevel=5)

    def _step(self, kwargs: dict[str, Any]) -> Any:
        inputs = {name: kwargs[name] for name in INPUTS if kwargs.get(name) is not None}
        # Said now: the model would count what is counted already.
        position = torch.full_like(inputs["input_ids"], self.cache.get_seq_length())
        inputs.setdefault("position_ids", position)
        planned: list[PlannedStep] = []
        try:
            for steps in self._steps:
                planned.append(steps.plan())  # noqa: PERF401 - those before a failure are undone
            return self._run(planned, kwargs, inputs)
        except BaseException:  # interrupted, too: the cache is to be what it was before
            for step in planned:
                step.undo()
            self.cache.forget_step()
            raise

    def _run(
        self, planned: list[PlannedStep], kwargs: dict[str, Any], inputs: dict[str, Tensor]
    ) -> Any:
        """Do a step that is counted: the first time as it is, then recorded."""
        kept = self._kept
        kind = tuple(step.seals for step in planned)
        launch = functools.partial(self._launch, planned, kwargs)
        kept.keep_at(tuple(address for steps in self._steps for address in steps.addresses))
        step = (kind, _manner(kwargs, inputs))
        if step not in kept.warm:
            output = self._warm_up(functools.partial(launch, inputs))
            kept.warm.add(step)
            return output
        if any(steps.saw_mask for steps in self._steps):
            self._warn("the model masks or biases its attention by itself, anew at every step")
            return launch(inputs)
        recording = kept.of.get(step)
        if recording is None:
            try:
                recording = kept.record(step, launch, inputs, self.cache)
            except Exception as error:  # whatever a model's code does that no graph can hold
                self._warn(f"recording one failed ({type(error).__name__}: {error})")
                self.cache.forget_step()
                return launch(inputs)
        return launch(inputs) if recording.graph is None else recording.replayed(inputs, self.cache)

    def _warm_up(self, launch: Callable[[], Any]) -> Any:
        """Do a step that compiles kernels and loads libraries, and see whether it waits."""
        if self._model.device.type != "cuda":
            output, waits = launch(), False
        else:
            output, waits = seen_waiting(launch)
        if waits:
            self._warn("the model's own code waits for the device in the middle of a step")
        elif not isinstance(output, ModelOutput):
            self._warn(f"the model returns a {type(output).__name__}, not a ModelOutput")
        return output

    def _launch(
        self,
        planned: list[PlannedStep],
        kwargs: dict[str, Any],
        inputs: dict[str, Tensor],
        recorded: bool = False,
    ) -> Any:
        """Run the model over a step that has been counted already."""
        with ExitStack() as stack:
            for step in planned:
                stack.enter_context(step.run(recorded=recorded))
            # The manager knows the padding: a mask would be recorded as it is now.
            return self._forward(**{**kwargs, **inputs, "attention_mask": None})


def _manner(kwargs: dict[str, Any], inputs: dict[str, Tensor]) -> Hashable:
    """How a step is called: switches and what tensors it is given, which a recording keeps."""
    switches = sorted((name, repr(x)) for name, x in kwargs.items() if name not in KNOWN)
    tensors = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
    return tuple(switches), tensors
