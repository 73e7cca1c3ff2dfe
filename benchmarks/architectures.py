"""Writes docs/architectures.md: what every architecture of the tests does with an `ArkCache`.

    python -m benchmarks.architectures [family ...]

Prints a row per family as it goes; writes the page unless families are named. The models are the
tiny ones of `tests/families.py`, so this says what is exact, not what is fast.
"""

import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import arkcache
from tests import exactness
from tests.architectures import ARCHITECTURES, Architecture

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
INTRODUCTION = """\
# Architectures

Made by `python -m benchmarks.architectures` with transformers {transformers}, torch {torch},
Python {python}. Do not edit.

Each family's tiny, randomly initialised model generates {steps} tokens after a prompt of 60 (batch
of two, one row left-padded), with an unlimited budget and with pages of 4 tokens inside a budget
larger than the context. Both are compared with a `DynamicCache`: are all tokens equal, and what is
the largest difference of two logits, relative to the largest logit (float32; rounding is 1e-6).

Mode "paged": decode steps attend selected pages. "compat": pages store the context, and every step
attends all of it. Layers that transformers itself keeps short (sliding windows, linear attention)
stay as they are; the third column counts those that are paged.

| family | model type | paged layers | mode | tokens equal | logit difference | why |
|---|---|---|---|---|---|---|
"""


@dataclass
class Row:
    """One line of the table."""

    architecture: Architecture
    mode: str = "none"
    layers: str = ""
    equal: str = ""
    difference: str = ""
    why: str = ""

    def __str__(self) -> str:
        cells = (
            self.architecture.name,
            f"`{self.architecture.model_type}`",
            self.layers,
            self.mode,
            self.equal,
            self.difference,
            self.why.replace("|", "/").replace("\n", " "),
        )
        return "| " + " | ".join(cells) + " |"


def measure(architecture: Architecture) -> Row:
    """Both configurations of one family against its reference."""
    row = Row(architecture)
    try:
        model = architecture.build()
        [expected] = exactness.greedy(model, exactness.full_cache, architecture.prompt())
    except ValueError as error:
        row.why = str(error)
        return row
    equal, differences = [], []
    for settings in exactness.CONFIGS.values():
        model = architecture.build()
        try:
            cache = exactness.ark_cache(**settings)(model)
        except arkcache.UnsupportedModelError as error:
            row.why = str(error)
            return row
        describe(row, exactness.decoder_cache(cache))
        outcome = exactness.generate(model, architecture.prompt(), cache)
        equal.append(torch.equal(outcome.tokens, expected.tokens))
        differences.append(exactness.distance(outcome, expected))
    row.equal = "yes" if all(equal) else "**no**"
    row.difference = f"{max(differences):.0e}" if max(differences) else "0"
    return row


def describe(row: Row, cache: arkcache.ArkCache) -> None:
    """What the cache says about itself."""
    paged = sum(type(layer).__module__.startswith("arkcache.") for layer in cache.layers)
    row.layers = f"{paged}/{len(cache.layers)}"
    row.mode, row.why = cache.mode, cache.reason or ""


def page(rows: Iterable[Row]) -> str:
    """The whole page."""
    introduction = INTRODUCTION.format(
        transformers=transformers.__version__,
        torch=torch.__version__.split("+")[0],
        python=platform.python_version(),
        steps=exactness.NUM_NEW_TOKENS,
    )
    return introduction + "".join(f"{row}\n" for row in rows)


def main(names: list[str]) -> None:
    """Measures the named families, or all of them and writes the page."""
    torch.set_num_threads(1)
    rows = []
    for name in names or ARCHITECTURES:
        rows.append(measure(ARCHITECTURES[name]))
        print(rows[-1], flush=True)
    if not names:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
