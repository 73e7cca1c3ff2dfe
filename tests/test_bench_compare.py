"""Two ledgers against each other: ratios, what is no noise, exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from arkcache import cli
from arkcache.bench.comparing import compare
from arkcache.bench.ledger import append_to_ledger, read_ledger
from arkcache.errors import InputError

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
runner = CliRunner(env={"COLUMNS": "100"})


def write(path: Path, **rounds: list[float]) -> Path:
    """A ledger of decode steps: the rounds of each cache."""
    rows = [
        {"method": name, "context": 4096, "round_medians_ms": own} for name, own in rounds.items()
    ]
    path.write_text(json.dumps({"benchmark": "decode", "rows": rows}))
    return path


@pytest.fixture
def ledgers(tmp_path: Path) -> tuple[Path, Path]:
    """One cache got slower, one faster, one stayed, and each has one more."""
    first = write(tmp_path / "a", slow=[1, 1.1, 1.2], fast=[2, 2.1], same=[1, 2, 3], gone=[1])
    second = write(tmp_path / "b", slow=[1.5, 1.6, 1.9], fast=[1, 1.1], same=[2, 2.5, 3], new=[1])
    return first, second


def test_ratios_and_what_differs(ledgers: tuple[Path, Path]) -> None:
    found = compare(*ledgers)
    assert [(case.name.partition(",")[0], case.differs) for case in found.cases] == [
        ("slow", True),
        ("fast", True),
        ("same", False),  # a quarter longer, but the rounds overlap
    ]
    assert [case.ratio for case in found.cases] == pytest.approx([1.6 / 1.1, 1.05 / 2.05, 1.25])
    assert (found.only_first, found.only_second) == (["gone, 4096"], ["new, 4096"])
    assert [case.name for case in found.slower_than(0)] == ["slow, 4096"]
    assert found.slower_than(46) == []


def test_pytest_benchmark(tmp_path: Path) -> None:
    def saved(name: str, factor: float) -> Path:
        stats = {"median": 2 * factor, "q1": 1.9 * factor, "q3": 2.1 * factor}
        path = tmp_path / name
        path.write_text(json.dumps({"benchmarks": [{"fullname": "t::one", "stats": stats}]}))
        return path

    (case,) = compare(saved("a", 1), saved("b", 2)).cases
    assert (case.name, case.ratio, case.differs) == ("t::one", 2, True)
    (case,) = compare(saved("c", 1), saved("d", 1.05)).cases
    assert not case.differs


@pytest.mark.parametrize("name", ["decode.json", "prefill.json", "tiers.json"])
def test_the_ledgers_that_are_kept(name: str) -> None:
    found = compare(RESULTS / name, RESULTS / name)
    assert len(found.cases) > 10
    assert all(case.ratio == 1 and not case.differs for case in found.cases)


def test_of_several_entries_the_last_is_taken(tmp_path: Path) -> None:
    ledger = tmp_path / "new" / "ledger.json"
    append_to_ledger(ledger, {"benchmark": "one"})
    append_to_ledger(ledger, {"benchmark": "two"})
    assert read_ledger(ledger) == {"benchmark": "two"}


BROKEN: dict[str, Any] = {
    "{": "is not JSON",
    "[]": "no ledger",
    "7": "no ledger",
    "{}": "KeyError: 'benchmark'",
    '{"benchmark": "gpu"}': "KeyError: 'gpu'",
    '{"benchmark": "decode", "rows": []}': "no case that was timed",
    '{"benchmark": "decode", "rows": [{}]}': "KeyError",
    '{"benchmarks": [1]}': "TypeError",
}


@pytest.mark.parametrize("text", BROKEN)
def test_what_is_no_ledger(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(text)
    with pytest.raises(InputError, match=BROKEN[text]):
        compare(path, path)


def test_nothing_in_common(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no case in common, as in 'one, 4096' and 'two, 4096'"):
        compare(write(tmp_path / "a", one=[1]), write(tmp_path / "b", two=[1]))


# -- the command ----------------------------------------------------------------------------------


def test_exit_codes(ledgers: tuple[Path, Path], tmp_path: Path) -> None:
    files = [str(path) for path in ledgers]

    def code(*arguments: str) -> int:
        return runner.invoke(cli.app, ["bench", "compare", *arguments]).exit_code

    assert code(*files) == 0  # something is slower, and nobody asked to fail
    assert code(*files, "--fail-above", "50") == 0
    assert code(*files, "--fail-above", "40") == 1
    assert code(*files[::-1], "--fail-above", "40") == 1  # seen from the other side `fast` is slow
    assert code(files[0], files[0], "--fail-above", "0") == 0
    missing = runner.invoke(cli.app, ["bench", "compare", files[0], str(tmp_path / "none")])
    assert missing.exit_code == 2
    assert "cannot read" in missing.stderr
    (tmp_path / "text").write_text("hello")
    text = runner.invoke(cli.app, ["bench", "compare", str(tmp_path / "text"), files[0]])
    assert (text.exit_code, "is not JSON" in text.stderr) == (2, True)


def test_what_is_shown(ledgers: tuple[Path, Path]) -> None:
    files = [str(path) for path in ledgers]
    done = runner.invoke(cli.app, ["bench", "compare", *files, "--fail-above", "10"])
    lines = done.stdout.splitlines()
    (slow,) = (line for line in lines if "slow, 4096" in line and "x" in line)
    assert "1.45x" in slow
    assert slow.rstrip().endswith("slower")
    shown = " ".join(done.stdout.split())
    assert "1 slower and 1 faster by more than the spread" in shown
    assert "1 only in the first, as 'gone, 4096'" in shown
    assert "1 slower than allowed: slow, 4096" in shown
    printed = json.loads(runner.invoke(cli.app, ["bench", "compare", *files, "--json"]).stdout)
    assert [case["name"] for case in printed["cases"]] == ["slow, 4096", "fast, 4096", "same, 4096"]
    assert printed["cases"][0]["first"]["median"] == 1.1
    assert printed["too_slow"] == []
