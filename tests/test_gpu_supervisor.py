"""The processes of the GPU check: whatever a check does to its own, the others run and are kept."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.gpu.check import Check, most
from benchmarks.gpu.ledger import Ledger
from benchmarks.gpu.supervisor import Supervisor

ROOT = Path(__file__).resolve().parents[1]

MISCHIEF = '''
"""Checks that do what checks should not, and a bench without a device."""

import os
import signal
import subprocess
import sys
import time

sys.path.insert(0, {root!r} + "/benchmarks")
from gpu_check import find_repository

find_repository()
from benchmarks.gpu.check import Check, Outcome, most
from benchmarks.gpu.worker import sender, serve
from tests.gpu.outcome import Skipped


class Bench:
    """What a worker needs of one."""

    has_failed = False

    def begin(self, tell):
        self.notes, self._tell = {{}}, tell

    def note(self, **details):
        self.notes |= details
        self._tell(details)

    def seconds_left(self):
        return 1e9

    def synchronize(self):
        if self.has_failed:
            raise RuntimeError("an illegal memory access was encountered")

    def release(self):
        pass


def fine(bench):
    bench.note(half=1)
    return Outcome(3.0, details={{"process": os.getpid()}})


def hangs(bench):
    bench.note(measured=17, child=subprocess.Popen(["sleep", "60"]).pid)
    time.sleep(60)


def dies(bench):
    bench.note(measured=18)
    os.kill(os.getpid(), signal.SIGKILL)


def ends(bench):
    os._exit(3)


def raises(bench):
    bench.note(measured=19)
    raise ValueError("it does not work")


def skips(bench):
    bench.note(measured=20)
    raise Skipped("no more can be done here")


def breaks(bench):
    bench.has_failed = True


if __name__ == "__main__":
    names = sys.argv[2:]
    if "never" in names:
        sys.exit(1)
    places = {{name: "__main__:" + name.partition("-")[0] for name in names}}
    checks = [Check(name, place, "", 1, most(4, 2)) for name, place in places.items()]
    code = serve(checks, Bench(), sender(int(sys.argv[1])))
    os._exit(code)
'''


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "mischief.py"
    path.write_text(MISCHIEF.format(root=str(ROOT)))
    return path


def checks(*names: str, limit: float = 30.0) -> list[Check]:
    return [Check(name, "", "", 1, most(4, 2), most_seconds=limit) for name in names]


def supervise(
    program: Path, wanted: list[Check], seconds: float = 60.0, output: Path | None = None
) -> Ledger:
    def command(rest: Sequence[Check], _seconds: float, report: int) -> list[str]:
        return [sys.executable, str(program), str(report), *(check.name for check in rest)]

    ledger = Ledger([] if output is None else [output])
    Supervisor(wanted, command, ledger, seconds).run()
    return ledger


def test_whatever_a_check_does_the_others_run(program: Path, tmp_path: Path) -> None:
    names = ["fine", "raises", "skips", "dies", "fine-2", "ends", "breaks", "hangs", "fine-3"]
    wanted = checks(*names)
    wanted[names.index("hangs")] = checks("hangs", limit=1.0)[0]
    output = tmp_path / "new" / "gpu.json"
    ledger = supervise(program, wanted, output=output)
    results = ledger.results
    assert list(results) == names
    assert [result["status"] for result in results.values()] == [
        *("below aim", "failed", "skipped", "failed", "below aim"),
        *("failed", "failed", "timeout", "below aim"),
    ]
    assert json.loads(output.read_text())["checks"] == results
    # What was measured before is kept.
    measured = {name: results[name]["details"].get("measured") for name in names}
    assert [measured[name] for name in ("hangs", "dies", "raises", "skips")] == [17, 18, 19, 20]
    assert results["skips"]["reason"] == "no more can be done here"
    assert results["raises"]["reason"] == "ValueError: it does not work"
    assert results["dies"]["reason"] == "its process ended: SIGKILL"
    assert results["ends"]["reason"] == "its process ended: exit code 3"
    assert "illegal memory access" in results["breaks"]["reason"]
    assert results["hangs"]["reason"] == "did not end within 1 s"
    processes = [results[name]["details"]["process"] for name in ("fine", "fine-2", "fine-3")]
    assert len(set(processes)) == 3
    assert ledger.has_failures
    assert not is_running(results["hangs"]["details"]["child"])


def is_running(process: int) -> bool:
    """Whether it exists and is no corpse."""
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rpartition(") ")[2].split()[0] != "Z"


def test_when_time_is_over_what_is_under_way_is_cut_off(program: Path) -> None:
    start = time.monotonic()
    results = supervise(program, checks("fine", "hangs", "fine-2"), seconds=3.0).results
    assert time.monotonic() - start < 20
    assert [result["status"] for result in results.values()] == ["below aim", "skipped", "skipped"]
    assert results["hangs"]["reason"] == "cut off: the 3 s for all checks are over"
    assert results["hangs"]["details"]["measured"] == 17


def test_workers_that_never_start_are_given_up(program: Path) -> None:
    results = supervise(program, checks("fine", "never")).results
    assert {result["status"] for result in results.values()} == {"failed"}
    assert "before they do anything" in results["fine"]["reason"]


def test_an_interrupted_run_ends_its_worker_and_keeps_what_it_has(
    program: Path, tmp_path: Path
) -> None:
    output = tmp_path / "gpu.json"
    code = (
        "import sys, signal\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "from pathlib import Path\n"
        "from tests.test_gpu_supervisor import checks, supervise\n"
        f"supervise(Path({str(program)!r}), checks('fine', 'hangs', 'fine-2'), "
        f"output=Path({str(output)!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    child = wait_for_child(output)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in error
    statuses = {
        name: result["status"] for name, result in json.loads(output.read_text())["checks"].items()
    }
    assert statuses == {"fine": "below aim", "hangs": "skipped", "fine-2": "skipped"}
    assert not is_running(child)


def wait_for_child(output: Path) -> int:
    """What a check that hangs has started, as soon as the file says so."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if output.exists():
            results = json.loads(output.read_text())["checks"]
            child: int | None = results.get("hangs", {}).get("details", {}).get("child")
            if child is not None:
                return child
        time.sleep(0.05)
    raise AssertionError("the check that hangs never began")
