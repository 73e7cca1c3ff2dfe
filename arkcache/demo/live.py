"""The demonstration in a terminal as it runs: the latest answers, and the cache that gives them."""

from __future__ import annotations

import time

from rich.console import RenderableType
from rich.text import Text
from transformers import DynamicCache

from arkcache.chat.live import REFRESH_SECONDS, boxed, figures
from arkcache.demo.facts import Fact
from arkcache.demo.methods import Method, usage
from arkcache.huggingface import ArkCache
from arkcache.sizes import bytes_text
from arkcache.stats import CacheStats

NUM_ANSWERS = 4
"""Shown at a time, the newest."""


class LiveView:
    """What the cache holds and did that answers at present: `look` after each step, `show` it.

    Counted from a method's first step on; looked at a few times a second, between two steps.
    """

    def __init__(self) -> None:
        self._shown: RenderableType = Text()
        self._title, self._before, self._looked = "", CacheStats(), 0.0
        self._answers: dict[Fact, str] = {}

    def look(self, method: Method, cache: DynamicCache, fact: Fact, answer: str) -> None:
        """A step was taken: what `run` tells its `watch`."""
        now = time.monotonic()
        if self._title != method.title:
            self._title, self._looked, self._answers = method.title, 0.0, {}
            if isinstance(cache, ArkCache):
                self._before = cache.stats()
        self._answers.pop(fact, None)  # one that is asked again is the newest again
        self._answers[fact] = " ".join(answer.split())
        if now - self._looked < REFRESH_SECONDS:
            return
        self._looked = now
        newest = [*self._answers.items()][-NUM_ANSWERS:]
        lines = ["   ".join(f"{one.name}? {said}" for one, said in newest)]
        if isinstance(cache, ArkCache):
            lines += figures(cache, self._before)
        else:
            used = usage(cache)
            attended, held = round(used.attended_tokens), bytes_text(used.device_bytes)
            lines += [f"{attended:,} tokens, device {held}", "nothing in a host tier"]
        self._shown = boxed(lines)

    def show(self) -> RenderableType:
        """The latest look."""
        return self._shown
