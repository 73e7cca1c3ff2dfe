"""Replayed decode steps that really are replayed: a refusal is a failure, never a slow success."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from tests.gpu.card import Card

REFUSAL = "decode steps are not replayed as graphs"
"""How the warning begins with which a replay is given up."""


class Replays:
    """Graphs replayed so far.

    Attributes:
        count: on the CPU, where nothing is recorded, it stays 0.
    """

    def __init__(self, card: Card) -> None:
        self._card, self.count = card, 0

    def check(self, least: int) -> None:
        """Raise `AssertionError` if fewer graphs were replayed."""
        assert self._card.rehearsing or self.count >= least, (
            f"{self.count} graphs were replayed in {least} decode steps: the others ran eagerly"
        )


@contextlib.contextmanager
def refusal_is_an_error(card: Card) -> Iterator[Replays]:
    """Within it giving up on replaying raises; counts what is replayed."""
    replays, replay = Replays(card), torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        replays.count += 1
        replay(graph)

    torch.cuda.CUDAGraph.replay = counted
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=REFUSAL)
            yield replays
    finally:
        torch.cuda.CUDAGraph.replay = replay


@contextlib.contextmanager
def replaying(card: Card, model: Any, cache: Any, new_tokens: int) -> Iterator[Replays]:
    """Within it the model's steps with this cache are replayed, or raise."""
    from arkcache.huggingface.graphed import replayed

    with refusal_is_an_error(card) as replays, replayed(model, cache, new_tokens):
        yield replays
