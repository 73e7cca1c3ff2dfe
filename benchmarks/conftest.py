"""What the benchmarks that pytest runs share: one thread, no network, no gradients."""

import os
from collections.abc import Iterator

import pytest
import torch

from arkcache.demo.run import threads

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """So many as BENCH_THREADS says, one without it; inference only."""
    with threads(int(os.environ.get("BENCH_THREADS", "1"))), torch.inference_mode():
        yield
