"""Settings of a cache as the commands take them, and say where they have them from."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from arkcache import cli

SIZES = ["--layers", "36", "--kv-heads", "8", "--head-dim", "128"]
runner = CliRunner(env={"COLUMNS": "80"})


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)


def described(*arguments: str) -> dict[str, Any]:
    done = runner.invoke(cli.app, ["describe", *SIZES, "--json", *arguments])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_counts_first(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("arkcache.toml").write_text(
        "page_size = 16\nbudget_tokens = 1024\nnum_recent_tokens = 64\ndemote_after = 9\n"
    )
    monkeypatch.setenv("ARKCACHE_BUDGET_TOKENS", "512")
    monkeypatch.setenv("ARKCACHE_NUM_RECENT_TOKENS", "48")
    found = described("--budget", "256", "--set", "num_sink_tokens = 8", "--set", "rotation=keys")
    expected = {
        "page_size": (16, "arkcache.toml:1"),
        "budget_tokens": (256, "--budget"),
        "num_recent_tokens": (48, "ARKCACHE_NUM_RECENT_TOKENS"),
        "demote_after": (9, "arkcache.toml:4"),
        "num_sink_tokens": (8, "--set num_sink_tokens"),
        "rotation": ("keys", "--set rotation"),
        "group_size": (32, "default"),
        "key_bits": ("by format", "default"),
    }
    for name, (value, source) in expected.items():
        assert (found["settings"][name], found["sources"][name]) == (value, source)
    assert found["formats"]["K4V4"]["attended_tokens"] <= 256


def test_the_table_says_where_each_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARKCACHE_SPECULATIVE_RECALL", "false")
    Path("mine.toml").write_text("\nestimate_pages = 1\n")
    done = runner.invoke(cli.app, ["describe", *SIZES, "--config", "mine.toml"])
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["speculative_recall", "false", "ARKCACHE_SPECULATIVE_RECALL"] in rows
    assert ["estimate_pages", "1", "mine.toml:2"] in rows
    assert ["audit_every", "none", "default"] in rows


def test_bits_from_outside_are_the_format_unless_one_is_asked_for() -> None:
    Path("arkcache.toml").write_text("key_bits = 8\nvalue_bits = 4\ncoarse_key_bits = 4\n")
    assert [*described()["formats"]] == ["K8V4+K4V4"]
    found = described("--format", "K2V2")
    assert [*found["formats"]] == ["K2V2"]
    assert found["settings"]["key_bits"] == 2
    assert found["sources"]["key_bits"] == "--format"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "page_size"], "--set page_size: expected NAME=VALUE"),
        (["--set", "page_sise=4"], "--set: unknown setting 'page_sise': did you mean page_size?"),
        (["--set", "page_size=x"], "--set page_size: page_size = 'x': expected an integer"),
        (["--set", "page_size=0"], "(page_size from --set page_size)"),
        (["--budget", "512", "--set", "budget_tokens=9"], "beside --budget: expected one of them"),
        (["--config", "none.toml"], "cannot read none.toml: No such file or directory"),
    ],
)
@pytest.mark.parametrize("command", [["describe", *SIZES], ["chat"], ["generate", "What?"]])
def test_mistakes(command: list[str], arguments: list[str], message: str) -> None:
    done = runner.invoke(cli.app, [*command, *arguments])
    assert (done.exit_code, done.stdout) == (1, "")
    assert message in done.stderr
    assert done.stderr.startswith(f"arkcache {command[0]}: ")


def test_a_variable_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARKCACHE_BUDGET_TOKENS", "10")
    for command in (["describe", *SIZES], ["chat"], ["generate", "What?"]):
        done = runner.invoke(cli.app, command)
        assert (done.exit_code, done.stdout) == (1, "")
        assert "(budget_tokens from ARKCACHE_BUDGET_TOKENS)" in done.stderr
