"""Tests of kernels are skipped where the interpreter is known to fail, and only for that."""

import pytest

from tests import conftest, interpreter


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    installed = {"triton": "3.6.0", "numpy": "2.4.6"}
    monkeypatch.setattr(interpreter, "version", installed.__getitem__)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return installed


def test_it_names_what_does_not_go_together(versions: dict[str, str]) -> None:
    reason = interpreter.why_it_fails()
    assert reason is not None
    assert reason.startswith("Triton 3.6.0's interpreter fails beside numpy 2.4.6")


@pytest.mark.parametrize(
    ("package", "release"), [("triton", "3.7.1"), ("triton", "3.10.0"), ("numpy", "2.3.5")]
)
def test_other_versions_do(versions: dict[str, str], package: str, release: str) -> None:
    versions[package] = release
    assert interpreter.why_it_fails() is None


def test_compiled_kernels_have_nothing_to_do_with_it(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    assert interpreter.why_it_fails() is None


def test_only_that_error_is_meant() -> None:
    cause = TypeError(interpreter.SYMPTOM)
    outer = RuntimeError("InterpreterError")
    outer.__cause__ = cause
    assert interpreter.is_that(outer)
    assert interpreter.is_that(ExceptionGroup("several", [outer, cause]))
    assert not interpreter.is_that(ExceptionGroup("several", [outer, ValueError("another")]))
    assert not interpreter.is_that(ValueError("another"))
    assert not interpreter.is_that(None)


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_what_is_skipped(monkeypatch: pytest.MonkeyPatch, known: bool, fails: bool) -> None:
    monkeypatch.setattr(interpreter, "why_it_fails", lambda: "too old" if fails else None)
    error = TypeError(interpreter.SYMPTOM if known else "another")
    missing = pytest.fail.Exception("DID NOT WARN")  # it kept a test from getting there
    missing.__context__ = error
    for raised in (error, missing):
        running = conftest.pytest_runtest_call()
        next(running)
        expected = pytest.skip.Exception if known and fails else type(raised)
        with pytest.raises(expected):
            running.throw(raised)


def test_what_passes_passes() -> None:
    running = conftest.pytest_runtest_call()
    next(running)
    with pytest.raises(StopIteration):
        running.send(None)
