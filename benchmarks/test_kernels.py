"""Parts of a layer's step, as in `arkcache bench kernels`, under pytest-benchmark."""

from typing import Any

import pytest
import torch

from arkcache.bench.kernels import (
    HEAD_DIM,
    INDEXES,
    NUM_HEADS,
    draw,
    make_layer,
    read_between,
)

CONTEXT, BUDGET = 16384, 2048
CPU = torch.device("cpu")


@pytest.mark.parametrize("part", ["append", "step", "rate"])
@pytest.mark.parametrize("index", INDEXES)
def test_part(benchmark: Any, index: str, part: str) -> None:
    """One call of a layer with 16,384 tokens, whose bytes have left the processor's caches."""
    manager = make_layer(CONTEXT, index, BUDGET, CPU)
    key, value = draw(1, CPU)
    query = torch.randn(1, NUM_HEADS, 1, HEAD_DIM)
    manager.attend(0, query)
    work = {
        "append": lambda: manager.append(0, key, value),
        "step": lambda: manager.attend(0, query),
        "rate": lambda: manager.ratings(0, query),
    }[part]
    benchmark.pedantic(work, setup=lambda: read_between(CPU), rounds=20, warmup_rounds=2)
