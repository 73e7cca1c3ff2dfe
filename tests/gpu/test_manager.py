"""The manager on the GPU, step by step against the dense oracle of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tests.gpu.card import Card
from tests.twins import Twins, small_config

QUANTISED = {"key_bits": 4, "value_bits": 2, "group_size": 8}
REAL = {"page_size": 32, "num_sink_tokens": 32, "num_recent_tokens": 64, "budget_tokens": 512}
REAL_SHAPE = {"head_dim": 128, "group": 4, "batch": 1}
DECODE = (("append", 45), ("step", 9))

Scenario = tuple[dict[str, Any], dict[str, Any], Sequence[tuple[str, Any]]]

SCENARIOS: dict[str, Scenario] = {
    # settings beside those of `tests.twins.SMALL`, shapes, and what is done
    "decode": ({}, {}, DECODE),
    "several prompts": (
        {"num_dense_layers": 1},
        {"num_layers": 2, "group": 3},
        (("append", 45), ("attend", 45), ("append", 7), ("attend", 7), ("step", 6)),
    ),
    "speculation": ({"device_pool_factor": 2.0}, {}, (("append", 90), ("step", 12))),
    "crop": (
        {"device_pool_factor": 1.5},
        {},
        (("append", 70), ("step", 2), ("crop", 66), ("step", 6), ("crop", 9), ("step", 12)),
    ),
    "reorder": (
        {"num_dense_layers": 1, **QUANTISED},
        {"num_layers": 2},
        (("append", 50), ("step", 2), ("keep", [1, 1, 0]), ("step", 4), ("keep", [2]), ("step", 4)),
    ),
    "left padding": (
        {},
        {},
        (("padded", torch.arange(43) >= torch.tensor([[0], [17]])), ("step", 6)),
    ),
    "K4V2, rotated": (QUANTISED | {"rotation": "both"}, {}, DECODE),
    "tokens": ({"index": "tokens"}, {"group": 1}, DECODE),
    "budgets per head": ({"budget_tokens": ((16, 40),)}, {}, DECODE),
    "unlimited, K4V2": ({"budget_tokens": None, **QUANTISED}, {}, DECODE),
    "real sizes": (REAL, REAL_SHAPE, (("append", 900), ("step", 40))),
    "real sizes, bf16": (
        REAL | {"index": "tokens", "key_bits": 8, "value_bits": 4},
        REAL_SHAPE | {"dtype": torch.bfloat16},
        (("append", 900), ("step", 40)),
    ),
}

ESTIMATES: dict[str, Scenario] = {
    "few": ({"estimate_pages": None}, {"batch": 1}, (("append", 60), ("step", 2))),
    "the best": (
        {"estimate_pages": 3, "device_pool_factor": 2.0, **QUANTISED},
        {"group": 3},
        (("append", 90), ("step", 5), ("crop", 70), ("step", 5), ("keep", [1, 0, 0]), ("step", 4)),
    ),
    "real sizes, bf16": (
        REAL | {"estimate_pages": None, "key_bits": 8, "value_bits": 4},
        REAL_SHAPE | {"dtype": torch.bfloat16},
        (("append", 2900), ("step", 40)),
    ),
}

AIM: dict[str, Any] = {"index": "tokens", "target_missed_mass": 0.1}
TARGETS: dict[str, Scenario] = {
    "few": (AIM, {"batch": 1}, (("append", 60), ("step", 2))),
    "estimated": (
        AIM | {"estimate_pages": None, "device_pool_factor": 2.0, **QUANTISED},
        {"group": 3},
        (("append", 90), ("step", 5), ("crop", 70), ("step", 5), ("keep", [1, 0, 0]), ("step", 4)),
    ),
    "real sizes": (REAL | AIM, REAL_SHAPE, (("append", 2900), ("step", 40))),
}


def test_oracle(card: Card) -> None:
    """Every scenario, every output against the oracle; the metadata and the tiers afterwards."""
    play(card, SCENARIOS, ["several prompts", "left padding"])


def test_estimates(card: Card) -> None:
    """The same of scenarios in which pages that are not attended are estimated."""
    play(card, ESTIMATES, ["few"])


def test_target(card: Card) -> None:
    """The same of scenarios with a target of missed mass instead of a budget."""
    play(card, TARGETS, ["few"])


def play(card: Card, scenarios: dict[str, Scenario], rehearsed: Sequence[str]) -> None:
    """All of them, or in a rehearsal those."""
    failures = []
    names = card.pick(list(scenarios), rehearsed)
    for name in names:
        settings, shapes, script = scenarios[name]
        try:
            config = small_config(backend="triton", **settings)
            _play(Twins(config, device=card.device, **shapes), script)
        except Exception as error:  # whatever it is, the other scenarios go on
            failures.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    if failures:
        raise AssertionError(f"{len(failures)} of {len(names)} scenarios: " + "; ".join(failures))
    card.note(scenarios=len(names))


def _play(twins: Twins, script: Sequence[tuple[str, Any]]) -> None:
    eps = torch.finfo(twins.dtype).eps
    for verb, value in script:
        if verb == "append":
            twins.append(value)
        elif verb == "padded":
            twins.append(value.shape[1], value)
        elif verb == "attend":
            twins.attend(value)
        elif verb == "crop":
            twins.crop(value)
        elif verb == "keep":
            twins.keep_sequences(value)
        else:
            for _ in range(value):
                for layer in range(twins.num_layers):
                    twins.append_layer(layer, 1)
                    twins.attend_layer(layer, twins.query(), tolerance=max(3e-5, 4 * eps))
        twins.check()
