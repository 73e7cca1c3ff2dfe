"""One decode step of each cache, as in `arkcache bench decode`, under pytest-benchmark."""

from typing import Any

import pytest
import torch

from arkcache.bench.decode import ROOM, WARM_UP_STEPS, methods
from arkcache.bench.models import fill, make_model, make_past, time_steps

CONTEXT = 4096
ROUNDS = 20
METHODS = {method.name: method for method in methods(budget=2048, num_steps=ROUNDS)}


@pytest.mark.parametrize("name", METHODS)
def test_step(benchmark: Any, name: str) -> None:
    """A token through the model, behind 4,096 others."""
    model, method = make_model(), METHODS[name]
    cache = method.build(model, CONTEXT + ROOM)
    fill(cache, make_past(model, CONTEXT), stop=method.past_tokens)
    token = torch.tensor([[1]])

    def step() -> None:
        model(input_ids=token, past_key_values=cache, use_cache=True)

    time_steps(model, cache, [1] * WARM_UP_STEPS)
    benchmark.pedantic(step, rounds=ROUNDS)
