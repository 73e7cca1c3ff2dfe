"""`arkcache bench` as a user meets it: tables, files, mistakes; and what its benchmarks time."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import arkcache
from arkcache import cli
from arkcache.bench import decode, kernels, models, prefill, tiers
from arkcache.bench.comparing import compare
from arkcache.bench.models import fill, make_model, make_past
from arkcache.demo.run import threads
from arkcache.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
TIERS = ["tiers", "--pieces", "4KiB", "--counts", "1,4", "--rounds", "2", "--pool", "1MiB"]
DECODE = ["decode", "--contexts", "256", "--steps", "2", "--rounds", "2", "--budget", "128"]
PREFILL = ["prefill", "--contexts", "96", "--chunk", "64", "--rounds", "2", "--layers", "1"]
KERNELS = ["kernels", "--contexts", "640", "--budget", "256", "--rounds", "2", "--device", "cpu"]
ALL = {"tiers": TIERS, "decode": DECODE, "prefill": PREFILL, "kernels": KERNELS}
runner = CliRunner(env={"COLUMNS": "80"})


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


SLOW = {"prefill"}
"""What takes several times as long as the others."""


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.slow) if one in SLOW else one for one in ALL]
)
def test_json_and_output(name: str, tmp_path: Path) -> None:
    output = tmp_path / "ledger.json"
    done = runner.invoke(cli.app, ["bench", *ALL[name], "--json", "--output", str(output)])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed == json.loads(output.read_text())
    assert printed["benchmark"] == name
    assert printed["versions"]["torch"] == torch.__version__
    assert printed["machine"]["num_cores"] >= 1
    assert printed["settings"]["num_threads"] == 1
    assert printed["rows"]
    assert "commit" in printed
    assert printed["date"].startswith("20")
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.json"]
    same = runner.invoke(cli.app, ["bench", "compare", str(output), str(output)])
    assert same.exit_code == 0, same.output


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiers", ["RAM to RAM, gather", "4 KiB", "4 per step", "of peak"]),
        ("decode", ["bare model", "StaticCache", "ArkCache K4V4", "speed-up"]),
        pytest.param(
            "prefill",
            ["DynamicCache, chunks of 64", "ArkCache boxes", "device MiB"],
            marks=pytest.mark.slow,
        ),
        ("kernels", ["append", "step", "rate", "cuboid-mean", "640"]),
    ],
)
def test_tables_fit_a_terminal(name: str, words: list[str]) -> None:
    done = runner.invoke(cli.app, ["bench", *ALL[name]])
    assert done.exit_code == 0, done.output
    shown = " ".join(done.stdout.split())
    assert [word for word in words if word not in shown] == []
    assert "…" not in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 80


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")
    picture = tmp_path / "tiers.png"
    done = runner.invoke(cli.app, ["bench", *TIERS, "--plot", str(picture)])
    assert done.exit_code == 0, done.output
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiers", "--pieces", "4Kib,x"], "'x' bytes: expected a number"),
        (["tiers", "--counts", "1,-2"], "--counts '1,-2': expected numbers"),
        (["tiers", "--rounds", "0"], "rounds=0: expected at least 1"),
        (["tiers", "--threads", "0"], "--threads 0: expected at least 1"),
        (["tiers", "--pool", "1KiB"], "a pool of 1024 bytes"),
        (["tiers", "--pool", "8TiB"], "a pool of 8 TiB and"),
        (["tiers", "--folder", "no-such-folder"], "in no-such-folder (No such file"),
        (["decode", "--contexts", "many"], "--contexts 'many': expected numbers"),
        (["decode", "--contexts", "1"], "contexts=(1,): expected numbers of tokens, from 2"),
        (["decode", "--contexts", "1000000000"], "need about"),
        (["decode", "--steps", "0"], "steps=0"),
        (["decode", "--methods", "nothing"], "expected a part of a name among bare model"),
        (["decode", "--contexts", "64", "--budget", "3"], "budget_tokens=3"),
        (["prefill", "--chunk", "0"], "chunk=0"),
        (["prefill", "--dense", "3"], "dense=3: expected 0 to 2"),
        (["prefill", "--contexts", "10000000000"], "need about"),
        (["kernels", "--contexts", "8"], "contexts=(8,)"),
        (["kernels", "--device", "abacus"], "expected auto, cpu or cuda"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], message: str) -> None:
    done = runner.invoke(cli.app, ["bench", *arguments])
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("name", ALL)
def test_a_file_that_cannot_be_written_is_missed_first(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("measured before it was known that nothing can be kept")

    for module in (tiers, decode, prefill, kernels):
        monkeypatch.setattr(module, "run", never)
    done = runner.invoke(cli.app, ["bench", name, "--output", "no-such-folder/ledger.json"])
    assert done.exit_code == 1
    assert "cannot write no-such-folder/ledger.json: No such file or directory" in done.stderr


def test_a_picture_without_matplotlib_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "sys.argv = ['arkcache', 'bench', 'tiers', '--quick', '--plot', 'a.png']\n"
        "from arkcache.cli import main; main()"
    )
    done = python(code, tmp_path)
    assert "pip install 'arkcache[plot]'" in done.stderr
    assert done.returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_tiers_need_no_transformers_and_no_numba(tmp_path: Path) -> None:
    arguments = ["bench", *TIERS, "--json"]
    code = (
        "import sys\n"
        "for name in ('transformers', 'numba', 'triton', 'matplotlib'): sys.modules[name] = None\n"
        f"sys.argv = ['arkcache', *{arguments!r}]\n"
        "from arkcache.cli import main; main()"
    )
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]


def test_an_interrupt_shows_what_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(settings: decode.Settings, *_: object) -> decode.Measured[decode.Row]:
        row = decode.Row("bare model", settings.contexts[0], 1.0, [1.0], 1.0)
        return decode.Measured([row], finished=False)

    monkeypatch.setattr(decode, "run", interrupted)
    output = tmp_path / "ledger.json"
    done = runner.invoke(cli.app, ["bench", "decode", "--output", str(output)])
    assert done.exit_code == 130
    assert "bare model" in done.stdout
    assert "this is what was measured by then" in done.stderr
    assert len(json.loads(output.read_text())["rows"]) == 1


# -- what is timed --------------------------------------------------------------------------------


@torch.inference_mode()
def test_every_cache_is_given_the_same_past() -> None:
    model, context = make_model(num_layers=2), 96
    past = make_past(model, context)
    assert models.past_bytes(model, context) == sum(x.nbytes for pair in past for x in pair)
    logits = {}
    chosen = decode.methods(budget=256, num_steps=2)  # which holds all
    for method in chosen:
        cache = method.build(model, context + 8)
        fill(cache, past, stop=method.past_tokens)
        step = model(input_ids=torch.tensor([[5]]), past_key_values=cache, use_cache=True)
        logits[method.name] = step.logits
    full = logits["DynamicCache"]
    for name in ("StaticCache", "ArkCache", "ArkCache boxes", "ArkCache torch"):
        torch.testing.assert_close(logits[name], full, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(logits["bare model"], full, atol=1e-3)


@pytest.mark.parametrize("module", [decode, prefill])
def test_an_interrupt_keeps_the_contexts_so_far(
    module: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, calls = module.Settings((64, 96)), []  # type: ignore[attr-defined]

    def measure(_model: object, context: int, *_: object) -> list[str]:
        calls.append(context)
        if context == 96:
            raise KeyboardInterrupt
        return [f"row of {context}"]

    monkeypatch.setattr(module, "measure", measure)
    done = module.run(settings)  # type: ignore[attr-defined]
    assert (done.rows, done.finished) == (["row of 64"], False)
    first = module.Settings((96, 64))  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        module.run(first)  # type: ignore[attr-defined]


def test_many_rounds_fit_into_a_static_cache() -> None:
    with torch.inference_mode():
        model = make_model(num_layers=1)
        static = [one for one in decode.methods(64, 80) if one.name == "StaticCache"]
        (row,) = decode.measure(model, 32, static, rounds=4)  # 160 steps, more than ROOM
    assert len(row.round_medians_ms) == 4


@pytest.mark.backends("numba")
@torch.inference_mode()
@pytest.mark.parametrize("index", kernels.INDEXES)
def test_a_step_in_parts_is_the_step(index: str) -> None:
    manager = kernels.make_layer(4096, index, 256, torch.device("cpu"))
    query = torch.randn(1, kernels.NUM_HEADS, 1, kernels.HEAD_DIM)
    whole = manager.attend(0, query)
    before = manager.stats()
    parts = manager.time_parts(0, query)
    assert parts is not None
    assert [*parts] == ["score", "select", "attend"]
    assert all(seconds > 0 for seconds in parts.values())
    after = manager.stats()
    assert after.pages_recalled == before.pages_recalled  # the same query selects the same pages
    assert after.pages_hit > before.pages_hit
    torch.testing.assert_close(manager.attend(0, query), whole, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_plain_torch_tells_no_parts() -> None:
    config = arkcache.CacheConfig(budget_tokens=256, backend="torch")
    manager = arkcache.KVCacheManager(1, 2, 64, config, device="cpu", dtype=torch.float32)
    manager.append(0, *kernels.draw(512, torch.device("cpu")))
    assert manager.time_parts(0, torch.randn(1, 8, 1, 64)) is None
    assert [part for part, _ in kernels.one_round(manager)] == ["append", "step", "rate"]
    with pytest.raises(InputError):
        manager.time_parts(0, torch.randn(1, 8, 1, 32))


def test_every_round_appends_one_token() -> None:
    with torch.inference_mode():
        manager = kernels.make_layer(640, "tokens", 256, torch.device("cpu"))
        rows = kernels.measure(manager, "tokens", 640, rounds=3)
    assert manager.num_columns == 640 + 4  # the first round warms up
    assert {len(row.rounds_us) for row in rows} == {3}


@pytest.mark.slow
def test_the_same_cases_under_pytest(tmp_path: Path) -> None:
    """What `make bench-tests` runs, a part of it; what it writes can be compared."""
    written = tmp_path / "tests.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q"]
    command += [f"--benchmark-json={written}", "-k", "RAM or bare or tokens-append or pageable"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    found = compare(written, written)
    names = " ".join(case.name for case in found.cases)
    for part in ("test_route[RAM to RAM, gather-16384-1]", "bare model", "tokens-append"):
        assert part in names


def test_quick_leaves_what_is_given() -> None:
    given = ["bench", "tiers", "--quick", "--pool", "2MiB", "--rounds", "1", "--json"]
    settings = json.loads(runner.invoke(cli.app, given).stdout)["settings"]
    assert (settings["pool_bytes"], settings["rounds"]) == (2 << 20, 1)
    assert settings["piece_bytes"] == [16 << 10, 256 << 10]
