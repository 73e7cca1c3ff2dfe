"""Predicting real texts: passages of what every Python installation carries, token by token."""

from __future__ import annotations

import importlib.metadata
import random
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arkcache.chat.template import encode, special_opening
from arkcache.demo.conversation import load_text
from arkcache.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MODULES = ("argparse", "decimal", "email/message", "ipaddress", "tarfile", "typing")
_TEXT_SUFFIXES = ("", ".txt", ".md", ".rst")
_CHARS_PER_TOKEN = 16
"""No more go into a token but in runs of spaces."""


@dataclass(frozen=True)
class Continuation:
    """A passage to read and the tokens that follow it.

    Attributes:
        source: where it is from.
        context: token ids to read.
        following: token ids that come next, one more than is given to the model.
    """

    source: str
    context: list[int]
    following: list[int]


@dataclass(frozen=True)
class Predictions:
    """What a cache predicts after each token that it is given.

    Attributes:
        kl: to the full cache, in nats.
        nll: of the token that follows, in nats.
        same: whether the most likely token is the full cache's.
    """

    kl: list[float]
    nll: list[float]
    same: list[bool]


@cache
def texts() -> Mapping[str, str]:
    """Real texts by name: help topics, the standard library's source, licences of packages.

    They are looked for once; they depend on the Python version and, the licences, on what is
    installed.
    """
    library = Path(sysconfig.get_path("stdlib"))
    modules = (library / f"{name}.py" for name in _MODULES)
    found = {
        "help topics": load_text(None),
        "source": "\n".join(path.read_text(encoding="utf-8") for path in modules if path.exists()),
        "licences": "\n".join(_licences()),
    }
    return MappingProxyType({name: text for name, text in found.items() if text})


def _licences() -> list[str]:
    """The licence texts of installed packages, each once, by package."""
    found: dict[str, None] = {}
    packages = importlib.metadata.distributions()
    for package in sorted(packages, key=lambda one: str(one.metadata["Name"]).lower()):
        for file in sorted(package.files or (), key=str):
            path = Path(str(package.locate_file(file)))
            is_text = file.name.upper().startswith("LICEN") and path.suffix in _TEXT_SUFFIXES
            if is_text and path.is_file():
                found[path.read_text(encoding="utf-8", errors="replace")] = None
    return list(found)


def draw(
    tokenizer: PreTrainedTokenizerBase, number: int, length: int, num_steps: int, rng: random.Random
) -> Continuation:
    """Passage `number` of `length` tokens, and `num_steps + 1` tokens after it.

    The texts take turns; a passage begins at a random line. Raises `InputError` where no text is
    long enough.
    """
    named = sorted(texts().items())
    name, text = named[number % len(named)]
    start = special_opening(tokenizer)
    needed = length - len(start) + num_steps + 1
    lines = text.splitlines(keepends=True)
    for _ in range(64):
        first = rng.randrange(len(lines))
        ids = encode(tokenizer, "".join(lines[first:])[: _CHARS_PER_TOKEN * needed])
        if len(ids) >= needed:
            ids = start + ids[:needed]
            return Continuation(name, ids[:length], ids[length:])
        lines = lines[: max(1, first)] if first > len(lines) // 2 else lines
    raise InputError(
        f"the {name} found here have no passage of {needed} tokens: expected a shorter length"
    )


def compare(predicted: Tensor, expected: Tensor, following: list[int]) -> Predictions:
    """Log-probabilities [steps, vocabulary] against the full cache's, and what really follows."""
    kl = (expected.exp() * (expected - predicted)).sum(dim=-1)
    nll = -predicted.gather(1, torch.tensor(following)[:, None])[:, 0]
    same = expected.argmax(dim=-1) == predicted.argmax(dim=-1)
    return Predictions(kl.tolist(), nll.tolist(), same.tolist())
