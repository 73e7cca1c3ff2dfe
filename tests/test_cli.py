"""The command line as a user meets it: output, errors, exit codes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

import arkcache
from arkcache import CacheConfig, cli
from arkcache.demo import run as demo
from arkcache.demo import sweep
from arkcache.demo.models import SHIPPED
from arkcache.evaluation import run as evaluation
from arkcache.formats import PRESETS
from arkcache.memory import CacheShape, plan_memory
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
    commands = runner.invoke(cli.app, ["--help"]).stdout
    shared = ("--budget", "--page-size", "--context", "--model", "--json", "--device")
    for command, options in (
        ("demo", ("--file", "--seed")),
        ("describe", ("--layers", "--kv-heads", "--format", "--device-bytes", "--unpacked-slots")),
        ("sweep", ("--file", "--draws", "--format", "--device-bytes")),
    ):
        assert command in commands
        text = runner.invoke(cli.app, [command, "--help"]).stdout
        for option in (*shared, *options):
            assert option in text
    assert "eval" in commands
    text = runner.invoke(cli.app, ["eval", "--help"]).stdout
    for option in ("--tasks", "--lengths", "--budgets", "--methods", "--questions", "--seed"):
        assert option in text


@pytest.mark.parametrize("command", ["", "chat", "demo", "describe", "eval", "generate", "sweep"])
def test_help_loads_nothing_heavy(command: str) -> None:
    code = (
        f"import sys; sys.argv = ['arkcache', *{command.split()!r}, '--help']\n"
        "from arkcache.cli import main\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        "assert not {'torch', 'numpy', 'transformers', 'numba', 'matplotlib'} & {*sys.modules}"
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


# -- describe -------------------------------------------------------------------------------------

SIZES = ["--layers", "36", "--kv-heads", "8", "--head-dim", "128"]


def described(*arguments: str) -> dict[str, Any]:
    done = runner.invoke(cli.app, ["describe", "--json", *arguments])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_describe_prints_a_row_for_each_preset() -> None:
    done = runner.invoke(cli.app, ["describe", *SIZES])
    assert done.exit_code == 0, done.output
    for name in PRESETS:
        assert sum(line.split()[:1] == [name] for line in done.stdout.splitlines()) == 2
    assert "36 layers, 8 KV heads" in done.stdout
    assert "18 GiB" in done.stdout  # the full cache
    assert "…" not in done.stdout


def test_describe_agrees_with_the_plan() -> None:
    limits = ["--device-bytes", "2GiB", "--packed-slots", "--context", "65536", "--batch", "2"]
    found = described(*SIZES, *limits, "--format", "K4V2", "--value-dim", "64")
    shape = CacheShape(36, 8, 128, 64, torch.bfloat16)
    config = CacheConfig.preset("K4V2", device_bytes=2 << 30, packed_slots=True)
    expected = plan_memory(config, shape, 65536, 2).to_dict()
    assert found["formats"] == {"K4V2": expected}
    assert found["shape"]["dtype"] == "bfloat16"


def test_describe_reads_the_config_of_a_model() -> None:
    found = described("--model", str(SHIPPED), "--context", "8192", "--dense-layers", "1")
    assert found["shape"] == {
        "num_layers": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "value_dim": 64,
        "dtype": "bfloat16",
    }
    assert [*found["formats"]] == [*PRESETS]
    assert found["formats"]["K16V16"]["dense_bytes"] == 8192 * 2 * 128 * 2


def test_describe_counts_only_layers_that_attend_their_whole_past(tmp_path: Path) -> None:
    config = LlamaConfig(num_hidden_layers=6, num_key_value_heads=2, head_dim=64)
    values = config.to_dict() | {
        "model_type": "gemma3_text",
        "sliding_window": 512,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    options = ("--context", "1000", "--dtype", "float16", "--dense-layers", "2")
    found = described("--model", str(tmp_path), *options)
    assert found["shape"]["num_layers"] == 3
    assert found["settings"]["num_dense_layers"] == 1  # of the first two layers, one slides


def test_describe_splits_the_heads_over_ranks(tmp_path: Path) -> None:
    whole, half = described(*SIZES), described(*SIZES, "--ranks", "2")
    assert (whole["ranks"], half["ranks"], half["shape"]["num_kv_heads"]) == (1, 2, 4)
    for name, plan in half["formats"].items():
        assert plan["host_bytes"] * 2 == whole["formats"][name]["host_bytes"]
    assert described("--model", str(SHIPPED), "--ranks", "2")["shape"]["num_kv_heads"] == 1
    # A model whose plan gathers the keys of all heads keeps them all on every rank.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmo2"}))
    assert described("--model", str(tmp_path), "--ranks", "3")["shape"]["num_kv_heads"] == 32


def test_describe_says_when_there_is_no_plan_for_ranks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    done = runner.invoke(cli.app, ["describe", "--model", str(tmp_path), "--ranks", "2"])
    assert done.exit_code == 1
    assert "transformers has no tensor-parallel plan for 'gpt2'" in done.stderr


def test_describe_says_that_the_tier_is_on_a_disk() -> None:
    in_a_file = [*SIZES, "--format", "K4V2", "--set", "host_path=pages"]
    done = runner.invoke(cli.app, ["describe", *in_a_file])
    said = " ".join(done.stdout.split())
    assert "The host tier is a file on a disk, in pages; of it, at most 1 GiB are in RAM" in said
    found = described(*in_a_file, "--set", "host_resident_bytes=256MiB")["formats"]["K4V2"]
    assert found["host_resident_bytes"] == 256 << 20
    assert found["disk_bytes"] == found["host_bytes"] > 1 << 30
    in_memory = described(*SIZES, "--format", "K4V2")["formats"]["K4V2"]
    assert in_memory["host_resident_bytes"] == in_memory["host_bytes"]
    assert in_memory["disk_bytes"] == 0


def test_describe_takes_two_formats() -> None:
    done = runner.invoke(cli.app, ["describe", *SIZES, "--format", "K8V4+K4V2"])
    assert done.exit_code == 0, done.output
    found = described(*SIZES, "--format", "K8V4+K4V2")["formats"]["K8V4+K4V2"]
    assert 0 < found["coarse_host_bytes"] < found["host_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no sizes given: expected --model, or all of --layers, --kv-heads and --head-dim"),
        (["--layers", "2"], "--layers given: expected --model"),
        (["--model", "x", *SIZES], "--layers, --kv-heads, --head-dim beside --model"),
        (["--model", "./no-such-folder"], "no such folder"),
        ([*SIZES, "--format", "K5V5"], "preset 'K5V5': expected one of"),
        ([*SIZES, "--device-bytes", "2 pigs"], "'2 pigs' bytes: expected a number and one of"),
        ([*SIZES, "--device-bytes", "1MB"], "device_bytes=1000000"),
        ([*SIZES, "--context", "0"], "context=0: expected at least 1"),
        ([*SIZES, "--dtype", "int8"], "dtype 'int8': expected float32, bfloat16 or float16"),
        ([*SIZES, "--device", "abacus"], "device 'abacus': expected cpu or cuda"),
        ([*SIZES, "--rotation", "sideways"], "rotation='sideways'"),
        ([*SIZES, "--dense-layers", "-1"], "num_dense_layers=-1"),
        ([*SIZES, "--ranks", "3"], "8 KV heads over 3 ranks"),
        (["--model", str(SHIPPED), "--ranks", "0"], "ranks=0: expected at least 1"),
        (["--layers", "0", *SIZES[2:]], "num_layers=0: expected an integer of at least 1"),
    ],
)
def test_describe_tells_mistakes_in_a_line(arguments: list[str], message: str) -> None:
    done = runner.invoke(cli.app, ["describe", *arguments])
    assert (done.exit_code, done.stdout) == (1, "")
    assert message in done.stderr
    assert done.stderr.startswith("arkcache describe: ")


# -- sweep ----------------------------------------------------------------------------------------

TINY = ["--context", "320", "--facts", "1", "--budget", "256", "--format", "K4V4"]


def test_sweep_prints_tables() -> None:
    done = runner.invoke(cli.app, ["sweep", *TINY])
    assert done.exit_code == 0, done.output
    for part in ("Equal tokens", "Equal bytes", "K4V4, rotated", "full cache"):
        assert part in done.stdout
    assert "K4V4, equal bytes" in done.stderr


def test_sweep_as_json() -> None:
    done = runner.invoke(cli.app, ["sweep", *TINY, "--json", "--device-bytes", "600KB"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert [row["format"] for row in printed["rows"]] == ["full cache", *["K4V4"] * 4]
    assert printed["settings"]["device_bytes"] == 600_000
    assert printed["settings"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draws", "0"], "draws=0: expected at least 1"),
        (["--device-bytes", "much"], "'much' bytes: expected a number"),
        (["--budget", "0"], "budget_tokens=0: the 0 sink tokens, 1 recent tokens and one page of"),
        (["--budget", "-5"], "(budget_tokens is --budget)"),
        (["--page-size", "0"], "page_size=0: expected an integer of at least 1\n"),
        (["--file", "no-such-file.txt"], "cannot read no-such-file.txt"),
    ],
)
def test_sweep_tells_mistakes_in_a_line(arguments: list[str], message: str) -> None:
    done = runner.invoke(cli.app, ["sweep", *arguments])
    assert (done.exit_code, done.stdout) == (1, "")
    assert message in done.stderr


def test_an_interrupted_sweep_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run", interrupt)
    done = runner.invoke(cli.app, ["sweep"])
    assert done.exit_code == 130
    assert "arkcache sweep: interrupted" in done.stderr


# -- eval -----------------------------------------------------------------------------------------

ASKED = ["--tasks", "facts,language", "--lengths", "384", "--budgets", "1/2", "--questions", "2"]
ASKED += ["--passages", "1", "--steps", "2", "--methods", "sinks;ark:num_recent_tokens=64"]


def test_eval_prints_tables_and_keeps_all(tmp_path: Path) -> None:
    out = tmp_path / "measured.json"
    done = runner.invoke(cli.app, ["eval", *ASKED, "--output", str(out)])
    assert done.exit_code == 0, done.output
    for part in ("facts", "language", "sinks", "retention", "KL"):
        assert part in done.stdout
    assert "facts 384: sinks at 1/2" in done.stderr
    kept = json.loads(out.read_text())
    assert kept["finished"]
    assert len(kept["asked"]) == 6
    assert [row["case"]["method"] for row in kept["figures"]["language"]] == [
        "full",
        "sinks",
        "ark:num_recent_tokens=64",
    ]
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_an_eval_is_shown_and_drawn_again(tmp_path: Path) -> None:
    """Without a model: from its JSON alone."""
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    out, pictures = tmp_path / "measured.json", tmp_path / "pictures"
    first = runner.invoke(cli.app, ["eval", *ASKED, "--output", str(out), "--plots", str(pictures)])
    assert first.exit_code == 0, first.output
    drawn = {path.name: path.read_bytes() for path in pictures.iterdir()}
    assert {*drawn} == {
        "kept-384.png",
        "retention-384.png",
        "kl-384.png",
        "depth-facts-384.png",
    }
    again = runner.invoke(cli.app, ["eval", "--from", str(out), "--plots", str(tmp_path / "more")])
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    assert {path.name: path.read_bytes() for path in (tmp_path / "more").iterdir()} == drawn


def test_pictures_that_cannot_be_drawn_are_told_before_anything_runs() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "sys.argv = ['arkcache', 'eval', '--plots', 'pictures', '--model', 'no/such/model']\n"
        "from arkcache.cli import main; main()"
    )
    done = python("-c", code)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "arkcache: matplotlib is not installed; pictures need: pip install 'arkcache[plot]'"
    )


def test_an_interrupted_eval_shows_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation.language, "draw", interrupt)
    out = tmp_path / "measured.json"
    done = runner.invoke(cli.app, ["eval", *ASKED, "--output", str(out)])
    assert done.exit_code == 130
    assert "Interrupted: this is what was measured until then." in done.stdout
    kept = json.loads(out.read_text())
    assert (kept["finished"], len(kept["asked"]), kept["predicted"]) == (False, 6, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "poetry"], "task 'poetry': expected one of magic"),
        (["--lengths", "long"], "--lengths 'long': expected numbers with commas between"),
        (["--budgets", "0"], "budget '0': expected tokens"),
        (["--methods", "ark:page_size=0"], "page_size=0: expected an integer of at least 1"),
        (["--output", "no/such/folder/x.json"], "cannot write no/such/folder/x.json"),
    ],
)
def test_eval_tells_mistakes_in_a_line(arguments: list[str], message: str) -> None:
    done = runner.invoke(cli.app, ["eval", *ASKED, *arguments])
    assert (done.exit_code, done.stdout) == (1, "")
    assert message in done.stderr


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
