"""The GPU check without a GPU: its list, its refusal, and rehearsals of what it would do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.marks import needs_interpreter

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "gpu_check.py"

LISTED = """
import runpy, sys
sys.argv = ["gpu_check.py", "--list"]
sys.path.insert(0, {folder!r})
try:
    runpy.run_path({program!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0
assert not {{"triton", "cupy", "torch", "arkcache"}} & set(sys.modules)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # One thread: tests run side by side.
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def rehearse(*arguments: str) -> None:
    done = run(str(PROGRAM), "--rehearse", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n0 failed: \n0 missed: \n" in done.stdout


def test_the_list_names_every_check_and_imports_nothing() -> None:
    done = run("-c", LISTED.format(program=str(PROGRAM), folder=str(PROGRAM.parent)))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    names = [line.split()[0] for line in lines]
    assert len(names) == len(set(names)) > 30
    assert any(line.startswith("scan ") and "[aim <= 12 us]" in line for line in lines)


def test_a_name_that_is_none_is_refused() -> None:
    done = run(str(PROGRAM), "--list", "--only", "step-*", "nothing")
    assert done.returncode == 2
    assert "nothing" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run(str(PROGRAM))
    assert done.returncode == 2
    assert "--rehearse" in done.stdout


def test_every_result_is_in_the_file_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import gpu_check

    ledger = tmp_path / "gpu.json"
    ledger.write_text('[{"benchmark": "an earlier run"}]')
    monkeypatch.setattr(gpu_check, "LEDGER", ledger)
    results = gpu_check.Ledger([ledger, tmp_path / "new" / "one.json"])
    for number, name in enumerate(("first", "second"), start=1):
        results.add(name, {"status": "ok"})
        earlier, entry = json.loads(ledger.read_text())
        assert earlier == {"benchmark": "an earlier run"}
        assert len(entry["checks"]) == number
        assert json.loads((tmp_path / "new" / "one.json").read_text()) == entry


def test_a_check_that_fails_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import gpu_check
    from gpu_catalogue import Check, least
    from gpu_common import Bench

    bench = Bench(torch.device("cpu"), 1 << 30, seconds=50)
    broken = Check("broken", "gpu_nowhere:check", "fails", 1)
    slow = Check("slow", "gpu_nowhere:check", "there is no time for it", 100)
    assert gpu_check.run_check(broken, bench)["status"] == "failed"
    assert "50 are left" in gpu_check.run_check(slow, bench)["reason"]
    assert Check("fast", "", "", 1, least(2)).verdict(1.9) == "missed"
    assert Check("fast", "", "", 1, least(2)).verdict(2.0) == "ok"


@needs_interpreter
def test_a_rehearsal_of_the_quick_checks() -> None:
    rehearse("--quick")


@needs_interpreter
@pytest.mark.slow
def test_a_rehearsal_of_everything() -> None:
    rehearse()
