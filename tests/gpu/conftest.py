"""What the tests of a GPU run under in pytest; `gpu-check` calls them without it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.card import Card
from tests.gpu.outcome import Skipped

FOLDER = Path(__file__).parent


# First: the conftest.py above skips what is marked.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    try:
        return (yield)
    except Skipped as reason:
        pytest.skip(str(reason))


@pytest.fixture
def card() -> Card:
    return Card(torch.device("cuda", 0))
