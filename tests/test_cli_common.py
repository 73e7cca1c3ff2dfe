"""What every command has: help with examples, JSON, a file of it, quiet, errors in a line."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from arkcache import InputError, cli
from arkcache.cli.common import check_writable, replace_file
from arkcache.cli.completing import complete
from arkcache.demo.models import SHIPPED

SIZES = ["--layers", "36", "--kv-heads", "8", "--head-dim", "128"]
COMMANDS: dict[str, list[str]] = {
    "chat": [],
    "demo": [],
    "describe": SIZES,
    "eval": [],
    "generate": ["What?"],
    "sweep": [],
}
READERS = ("chat", "demo", "generate", "sweep")
runner = CliRunner(env={"COLUMNS": "80"})


def run(command: str, *arguments: str, **how: Any) -> Any:
    given = [] if "--model" in arguments and command == "describe" else COMMANDS[command]
    return runner.invoke(cli.app, [command, *given, *arguments], **how)


def tells(done: Any, command: str, message: str) -> None:
    """A mistake of the user's is one line, and nothing else happens."""
    assert (done.exit_code, done.stdout) == (1, ""), done.output
    assert done.stderr.startswith(f"arkcache {command}: "), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_all_have(command: str) -> None:
    text = runner.invoke(cli.app, [command, "--help"]).stdout
    for part in ("--json", "--output", "--quiet", f" arkcache {command} "):
        assert part in text
    assert "Exit codes: 0 done; 1 a mistake" in text
    assert "130 interrupted" in text


@pytest.mark.parametrize(
    "command",
    [
        *("doctor", "trace", "report"),
        *(f"bench {name}" for name in ("tiers", "decode", "prefill", "kernels", "compare")),
    ],
)
def test_the_others_have_examples_and_json(command: str) -> None:
    text = runner.invoke(cli.app, [*command.split(), "--help"]).stdout
    for part in ("--json", "--output", f" arkcache {command} ", "Exit codes: 0 "):
        assert part in text
    assert ("--quiet" in text) == (command not in ("doctor", "bench compare"))  # they have none


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_usage_exits_with_2(command: str) -> None:
    done = run(command, "--no-such-option")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "No such option: --no-such-option" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_no_such_model(command: str) -> None:
    tells(run(command, "--quiet", "--model", "./no-such-folder"), command, "no such folder")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_no_model(command: str, tmp_path: Path) -> None:
    done = run(command, "--quiet", "--model", str(tmp_path))
    tells(done, command, "not a folder with a")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_budget_that_is_too_small(command: str) -> None:
    if command == "eval":
        tells(run(command, "--budgets", "0"), command, "budget '0': expected tokens")
    else:
        tells(run(command, "--budget", "10"), command, "budget_tokens=10")
        assert "--budget)" in run(command, "--budget", "10").stderr


def test_a_setting_that_has_another_name_than_its_option() -> None:
    tells(run("eval", "--questions", "0"), "eval", "at least 1 (num_questions is --questions)")
    given = ["--model", str(SHIPPED), "--max-tokens", "0"]
    done = run("generate", *given)
    assert done.stderr == (
        "arkcache generate: max_new_tokens=0: expected at least 1 (max_new_tokens is "
        "--max-tokens)\n"
    )


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(200_000_000)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(bytes(range(256))), "is not UTF-8 text (byte 128"),
        (lambda path: path.touch(), "is empty"),
        (sparse, "holds zero bytes: give a plain text file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: None, "No such file or directory"),
    ],
)
@pytest.mark.parametrize("command", READERS)
def test_a_file_that_is_no_text(
    command: str, make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "given"
    make(file)
    tells(run(command, "--file", str(file)), command, message)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cannot_be_written_is_told_before_anything_else(
    command: str, tmp_path: Path
) -> None:
    for place, message in (
        (tmp_path, "it is a folder"),
        (tmp_path / "no" / "folder.json", "No such file or directory"),
        (Path("/proc/no.json"), "No such file or directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        done = run(command, "--output", str(place), "--model", "./no-such-folder")
        tells(done, command, f"cannot write {place}: {message}")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"):
        check_writable(tmp_path / "out.json")


def test_that_an_output_can_be_written_leaves_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    check_writable(path)
    assert [*tmp_path.iterdir()] == []
    path.write_text("before")
    tells(run("describe", "--output", str(path), "--budget", "10"), "describe", "budget_tokens=10")
    assert path.read_text() == "before"
    assert [*tmp_path.iterdir()] == [path]


def test_an_output_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "out.json", tmp_path / "link.json"
    path.write_text("before")
    link.symlink_to(path)

    def full(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(InputError, match=r"cannot write .*: No space left on device"):
            replace_file(link, {"a": 1})
    assert path.read_text() == "before"
    assert {*tmp_path.iterdir()} == {path, link}
    replace_file(link, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    assert link.is_symlink()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_what_a_full_disk_refuses_was_printed() -> None:
    done = run("describe", "--json", "--output", "/dev/full")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["device"] == "cuda"
    assert done.stderr == "arkcache describe: cannot write /dev/full: No space left on device\n"


def test_the_file_holds_what_is_printed(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run("describe", "--json", "--output", str(out))
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(out.read_text()) == json.loads(done.stdout)
    out.unlink()
    table = run("describe", "--output", str(out))
    assert "K4V4" in table.stdout
    assert json.loads(out.read_text()) == json.loads(done.stdout)


def test_demo_and_sweep_write_files_quietly(tmp_path: Path) -> None:
    small = ["--context", "320", "--facts", "1", "--budget", "256", "--quiet", "--json"]
    for command, more in (("demo", []), ("sweep", ["--format", "K4V4"])):
        out = tmp_path / f"{command}.json"
        done = run(command, *small, *more, "--output", str(out))
        assert (done.exit_code, done.stderr) == (0, "")
        assert json.loads(out.read_text()) == json.loads(done.stdout)
        assert json.loads(out.read_text())["rows"]


def test_comparisons_say_which_settings_they_do_not_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ARKCACHE_PAGE_SIZE", "16")
    Path("arkcache.toml").touch()
    for command, given in (("demo", ["--facts", "0"]), ("sweep", ["--draws", "0"])):
        said = run(command, *given).stderr.replace("\n", " ")
        assert "as this command sets them: ARKCACHE_PAGE_SIZE, arkcache.toml" in said
        assert "ARKCACHE_PAGE_SIZE" not in run(command, *given, "--quiet").stderr


def test_a_conversation_as_json(tmp_path: Path) -> None:
    out = tmp_path / "talk.json"
    given = ["--model", str(SHIPPED), "--no-file", "--max-tokens", "4", "--json", "--quiet"]
    done = run("chat", *given, "--output", str(out), input="The value of amber is 7.\n/stats\n")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert [turn["role"] for turn in printed["turns"]] == ["user", "assistant"]
    assert printed["tokens"] > 4
    assert json.loads(out.read_text()) == printed
    assert "tokens held" in done.stderr
    assert "Ask about the text" not in done.stderr
    assert "attended" not in done.stderr


def test_an_answer_as_a_file(tmp_path: Path) -> None:
    out = tmp_path / "answer.json"
    done = run("generate", "--model", str(SHIPPED), "--max-tokens", "4", "--output", str(out))
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["answer"] == done.stdout.strip()


def test_names_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for folder in ("hub/models--org--smart", "mine/smaller", "mine/other"):
        Path(folder).mkdir(parents=True)
    Path("mine/smaller/config.json").touch()
    assert complete("format")("K4") == ["K4V4", "K4V2"]
    assert complete("index")("cuboid-m") == ["cuboid-mean", "cuboid-max"]
    assert complete("setting")("page") == ["page_size="]
    assert complete("model")("sm") == ["smollm2"]
    assert complete("model")("org") == ["org/smart"]
    assert complete("model")("mine/") == ["mine/smaller"]
    assert complete("model")("./mine/") == ["./mine/smaller"]


def test_a_shell_asks_for_completions() -> None:
    environment = {
        "_ARKCACHE_COMPLETE": "complete_bash",
        "COMP_WORDS": "arkcache describe --format K2",
        "COMP_CWORD": "3",
    }
    done = runner.invoke(cli.app, [], prog_name="arkcache", env=environment)
    assert done.stdout.split() == ["K2V2"]
