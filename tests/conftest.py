"""What every test runs under: fixed seeds, poisoned memory, no network, hypothesis profiles."""

import os
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any

import hypothesis
import pytest
import torch

from tests import interpreter

hypothesis.settings.register_profile("default", deadline=None, max_examples=40)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=40, derandomize=True, print_blob=True
)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hub", action="store_true", help="run the tests that use the network")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hub"):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel module is imported
    if config.getoption("--hypothesis-profile") is None:
        hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unmet = {}
    if not torch.cuda.is_available():
        unmet["gpu"] = "needs a CUDA device"
    if not config.getoption("--hub"):
        unmet["hub"] = "needs --hub"
    for item in items:
        for marker, reason in unmet.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Skip, and say why, what fails for no other reason than the interpreter's."""
    try:
        return (yield)
    except (Exception, pytest.fail.Exception) as error:
        reason = interpreter.why_it_fails()
        if reason is None or not interpreter.is_that(error):
            raise
        pytest.skip(reason)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("backends")
    if marker is not None:
        metafunc.parametrize("_backend", marker.args, indirect=True)


@pytest.fixture(autouse=True)
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `small_config` ask for the backend of a test that is marked with some."""
    from tests import twins  # once it is settled whether kernels are interpreted

    backend = getattr(request, "param", None)
    if backend == "torch":
        monkeypatch.setitem(twins.SMALL, "backend", "torch")
    elif backend is not None:
        pytest.importorskip(backend)  # "auto" takes it then, where it serves the other settings


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`allocate`, but what arkcache allocates holds NaN (or the largest integer) until written."""

    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").startswith("arkcache."):
            poison(tensor)
        return tensor

    return allocate_poisoned


def poison(tensor: torch.Tensor) -> None:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


@pytest.fixture(autouse=True, scope="session")
def _poison_uninitialised_memory() -> Iterator[None]:
    """A kernel that reads what nobody wrote must fail its test, not pass by luck."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
        yield
