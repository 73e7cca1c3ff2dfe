"""The command line as a user meets it: output, errors, exit codes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import arkcache
from arkcache import cli
from arkcache.demo import run as demo
from tests.test_demo import METHODS

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--context", "512", "--facts", "3", "--budget", "256"]
runner = CliRunner(env={"COLUMNS": "80"})


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with demo.threads(1):
        yield


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )


def test_version() -> None:
    done = runner.invoke(cli.app, ["--version"])
    assert (done.exit_code, done.stdout.strip()) == (0, arkcache.__version__)


def test_help_names_the_options() -> None:
    assert "demo" in runner.invoke(cli.app, ["--help"]).stdout
    text = runner.invoke(cli.app, ["demo", "--help"]).stdout
    for option in ("--file", "--budget", "--page-size", "--context", "--model", "--json", "--seed"):
        assert option in text


def test_help_loads_no_model_library() -> None:
    code = (
        "import sys; sys.argv = ['arkcache', 'demo', '--help']\n"
        "from arkcache.cli import main\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        "assert 'transformers' not in sys.modules"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_table(tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 50)
    done = runner.invoke(cli.app, ["demo", *SMALL, "--file", str(text)])
    assert done.exit_code == 0, done.output
    for title in ("full cache", "ArkCache, boxes", "ArkCache, token index", "heavy hitters (H2O)"):
        assert title in done.stdout
    assert "mine.txt" in done.stdout.replace("\n", "")
    assert "Asking: full cache" in done.stderr
    assert "Asking" not in done.stdout


def test_json_in_a_process_of_its_own() -> None:
    done = python("-m", "arkcache.cli", "demo", "--context", "1024", "--facts", "4", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert [row["method"] for row in printed["rows"]] == METHODS
    assert printed["settings"]["seed"] == 0
    assert printed["settings"]["budget_tokens"] == 512
    assert printed["versions"]["arkcache"] == arkcache.__version__
    assert printed["machine"]["num_cores"] >= 1
    assert printed["rows"][0]["num_right"] == printed["rows"][0]["num_questions"] == 5
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--file", "no-such-file.txt"], "cannot read no-such-file.txt: No such file"),
        (["--budget", "10"], "budget_tokens=10"),
        (["--page-size", "0"], "page_size=0"),
        (["--facts", "1000"], "1000 facts: expected 1 to 256"),
        (["--context", "20"], "a context of 20 tokens is too short"),
        (["--device", "abacus"], "expected auto, cpu or cuda"),
        (["--model", "./no-such-folder"], "no such folder"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], message: str) -> None:
    done = runner.invoke(cli.app, ["demo", *arguments])
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stdout == ""
    assert isinstance(done.exception, SystemExit)


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    done = runner.invoke(cli.app, ["demo"])
    assert done.exit_code == 130
    assert "interrupted" in done.stderr


@pytest.mark.parametrize("missing", ["typer", "transformers"])
def test_a_missing_extra_is_told_in_a_line(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['arkcache', 'demo']\n"
        "from arkcache.cli import main; main()"
    )
    done = python("-c", code)
    assert done.returncode == 1
    assert "pip install 'arkcache[cli]'" in done.stderr
    assert missing in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
