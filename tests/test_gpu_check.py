"""The GPU check without a GPU: its list, its refusal, and rehearsals of what it would do."""

import ast
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import ledger as ledgers
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.catalogue import CHECKS
from benchmarks.gpu.check import Check, Outcome, least, most
from benchmarks.gpu.main import SECONDS, parse, work
from benchmarks.gpu.worker import run_check
from tests import interpreter
from tests.marks import needs_interpreter

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "benchmarks" / "gpu_check.py"

WITHOUT = """
import importlib, runpy, sys
for name in {missing!r}:
    sys.modules[name] = None  # importing it fails
sys.path.insert(0, {folder!r})
import gpu_check
gpu_check.find_repository()
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # One thread: tests run side by side.
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def without(*missing: str) -> str:
    """The start of a program for which these packages do not exist."""
    return WITHOUT.format(missing=missing, folder=str(PROGRAM.parent))


def rehearse(*arguments: str) -> None:
    if (reason := interpreter.why_it_fails()) is not None:
        pytest.skip(reason)
    done = run(str(PROGRAM), "--rehearse", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n0 failed:\n0 timeout:\n0 missed:\n" in done.stdout


def test_the_list_names_every_check_and_imports_nothing() -> None:
    code = without("triton", "cupy", "torch", "arkcache", "pytest")
    done = run("-c", code + "from benchmarks.gpu.main import main; main(['--list'])")
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    names = [line.split()[0] for line in lines]
    assert len(names) == len(set(names)) == len(CHECKS)
    assert any(line.startswith("scan ") and "[<= 20, aim 12 us]" in line for line in lines)
    assert last.startswith(f"{len(CHECKS)} checks")


def test_all_checks_together_fit_the_time_of_a_run() -> None:
    assert sum(check.seconds for check in CHECKS) < SECONDS <= 580
    assert all(check.seconds <= check.limit < SECONDS for check in CHECKS)


def test_what_tells_most_comes_first() -> None:
    names = [check.name for check in CHECKS]
    stages = ["environment", "peaks", "compile", "smoke-append", "gather-8k", "attend-32k"]
    stages += ["step-8b-32k-b1", "profile-32k", "step-8b-128k-b1", "profile-128k"]
    stages += ["seal", "manager", "memory", "gather-16gib", "sanitizer"]
    assert [name for name in names if name in stages] == stages
    before_timing = sum(check.seconds for check in CHECKS[: names.index("gather-8k")])
    assert before_timing <= 45


def test_no_check_needs_what_a_machine_with_a_gpu_may_lack() -> None:
    """Nothing but torch, triton, cupy, transformers and numpy: no pytest, no extras of ours."""
    missing = ("pytest", "hypothesis", "psutil", "rich", "typer")
    code = without(*missing) + (
        "from benchmarks.gpu.catalogue import CHECKS\n"
        "for check in CHECKS:\n"
        "    assert callable(check.function), check.name\n"
    )
    done = run("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_every_test_of_a_gpu_is_a_check() -> None:
    defined = {
        f"tests.gpu.{path.stem}:{node.name}"
        for path in (ROOT / "tests" / "gpu").glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert defined == {check.place for check in CHECKS if ".gpu.test_" in check.place}


def test_a_name_that_is_none_is_refused() -> None:
    done = run(str(PROGRAM), "--list", "--only", "step-*", "nothing")
    assert done.returncode == 2
    assert "nothing" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run(str(PROGRAM))
    assert done.returncode == 2, done.stderr
    assert "--rehearse" in done.stdout


def test_a_rehearsal_with_an_interpreter_that_fails_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(interpreter, "why_it_fails", lambda: "Triton 3.6.0 beside numpy 2.4.6")
    receiver, sender = os.pipe()
    options = parse(["--rehearse", "--quick", "--report", str(sender)])
    assert work(options, []) == 0
    os.close(sender)
    with os.fdopen(receiver) as messages:
        (message,) = map(json.loads, messages)
    reason = "No rehearsal here: Triton 3.6.0 beside numpy 2.4.6"
    assert message == {"event": "refuse", "reason": reason}


def test_every_result_is_in_the_file_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = tmp_path / "gpu.json"
    ledger.write_text('[{"benchmark": "an earlier run"}]')
    monkeypatch.setattr(ledgers, "LEDGER", ledger)
    results = ledgers.Ledger([ledger, tmp_path / "new" / "one.json"])
    for number, name in enumerate(("first", "second"), start=1):
        results.add(name, {"status": "ok"})
        earlier, entry = json.loads(ledger.read_text())
        assert earlier == {"benchmark": "an earlier run"}
        assert len(entry["checks"]) == number
        assert json.loads((tmp_path / "new" / "one.json").read_text()) == entry


@pytest.mark.parametrize(
    ("goal", "figures"),
    [
        (least(4, 7, "x"), {7.0: "ok", 6.9: "below aim", 4.0: "below aim", 3.9: "missed"}),
        (most(28, 10, "us"), {10.0: "ok", 10.1: "below aim", 28.0: "below aim", 28.1: "missed"}),
        (most(1.1), {1.1: "ok", 1.2: "missed"}),
    ],
)
def test_a_figure_is_held_against_what_is_expected_and_what_is_hoped_for(
    goal: object, figures: dict[float, str]
) -> None:
    check = Check("fast", "", "", 1, goal)  # type: ignore[arg-type]
    assert {figure: check.verdict(figure) for figure in figures} == figures
    assert check.verdict(float("nan")) == check.verdict(None) == "ok"


def test_there_is_no_nan_in_a_result() -> None:
    outcome = Outcome(float("nan"), details={"timing": {"median_us": float("nan"), "n": 1}})
    result = Check("fast", "", "", 1).result("ok", 1.0, {"noted": float("nan")}, outcome)
    assert json.loads(json.dumps(result, allow_nan=False))["details"] == {
        "noted": None,
        "timing": {"median_us": None, "n": 1},
    }


def test_a_check_that_fails_is_recorded() -> None:
    bench = Bench(torch.device("cpu"), seconds=50)
    broken = Check("broken", "nowhere:check", "fails", 1)
    slow = Check("slow", "nowhere:check", "there is no time for it", 100)
    assert run_check(broken, bench)["status"] == "failed"
    result = run_check(slow, bench)
    assert result["status"] == "skipped"
    assert result["reason"] in {f"takes about 100 s, {left} are left" for left in (49, 50)}


@needs_interpreter
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("step-8b-32k-b1", marks=pytest.mark.slow),
        pytest.param("profile-32k", marks=pytest.mark.slow),
        pytest.param("tokens-per-second", marks=pytest.mark.slow),
    ],
)
def test_a_step_that_is_not_replayed_fails_its_check(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from arkcache.huggingface.graphed import Replayer

    monkeypatch.setattr(Replayer, "_why_not", lambda *_: "it is made to refuse")
    bench = Bench(torch.device("cpu"), seconds=600)
    bench.begin(lambda _details: None)
    check = next(check for check in CHECKS if check.name == name)
    with warnings.catch_warnings(record=True):  # as outside of tests, where none is an error
        warnings.simplefilter("always")
        result = run_check(check, bench)
    assert result["status"] == "failed"
    assert "decode steps are not replayed as graphs: it is made to refuse" in result["reason"]
    assert result["figure"] is None


@needs_interpreter
def test_a_rehearsal_of_the_quick_checks() -> None:
    rehearse("--quick")


@needs_interpreter
@pytest.mark.slow
def test_a_rehearsal_of_everything() -> None:
    rehearse()
