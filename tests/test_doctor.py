"""`arkcache doctor`: what it finds, where packages are missing, and its exit codes."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import arkcache
from arkcache import cli
from arkcache.bench import diagnosis, tiers
from arkcache.bench.diagnosis import Diagnosis, diagnose
from arkcache.bench.routes import GATHER
from arkcache.tiering.system_memory import machine_memory_bytes, physical_memory_bytes

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("transformers", "numba", "triton", "cupy", "psutil", "matplotlib")
runner = CliRunner(env={"COLUMNS": "80"})
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def doctor(*arguments: str) -> Any:
    return runner.invoke(cli.app, ["doctor", *arguments])


def test_json_says_all() -> None:
    done = doctor("--json")
    assert done.exit_code in (0, 1)
    found = json.loads(done.stdout)
    assert done.exit_code == (not found["is_fine"])
    assert found["versions"]["arkcache"] == arkcache.__version__
    assert {"python", "torch", "numpy", "safetensors"} <= {*found["versions"]}
    assert found["memory"]["total_bytes"] >= found["memory"]["available_bytes"] > 0
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    assert found["memory"]["locked_limit_bytes"] == (None if soft < 0 else soft)
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert {row["route"] for row in found["paths"]["rows"]} >= {GATHER}


@needs_no_gpu
def test_a_screen() -> None:
    done = doctor("--no-measure")
    assert done.exit_code == 0, done.output
    shown = " ".join(done.stdout.split())
    for words in (
        *("versions", "torch ", "threads", "ulimit -l", "there is no CUDA device"),
        *("numba: it serves the default settings on cpu", "there is no GPU to pin it for"),
        "All hardware that was found can be used",
    ):
        assert words in shown
    assert GATHER not in shown  # not measured
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    measured = " ".join(doctor().stdout.split())
    assert GATHER in measured
    assert "GB/s" in measured


def blocked(*names: str, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The command, where some packages cannot be imported."""
    code = (
        "import sys\n"
        f"for name in {names!r}: sys.modules[name] = None\n"
        f"sys.argv = ['arkcache', 'doctor', *{arguments!r}]\n"
        "from arkcache.cli import main; main()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


@needs_no_gpu
def test_every_optional_package_is_missing() -> None:
    done = blocked(*OPTIONAL)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    shown = " ".join(done.stdout.split())
    assert "torch: numba is not installed; with it a step on a CPU takes half as long" in shown
    assert "none are kept: numba is not installed" in shown
    for package, extra in (("transformers", "hf"), ("numba", "cpu"), ("matplotlib", "plot")):
        assert f"missing: {package}: " in shown
        assert f"pip install 'arkcache[{extra}]'" in shown
    assert GATHER in shown


def test_without_rich_it_says_what_to_install() -> None:
    done = blocked("rich", arguments=("--no-measure",))
    assert done.returncode == 1
    assert "pip install 'arkcache[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


# -- hardware that goes unused --------------------------------------------------------------------


def missing_of(found: Diagnosis, device: str) -> dict[str, diagnosis.Missing]:
    return {one.what: one for one in diagnosis._missing(found, torch.device(device))}


@pytest.fixture
def found() -> Diagnosis:
    return diagnose(measure=False)


@needs_no_gpu
def test_a_driver_without_a_torch_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_driver", lambda: "NVIDIA UNIX x86_64 Kernel Module 580.65")
    done = doctor("--no-measure")
    assert done.exit_code == 1
    shown = " ".join(done.stdout.split())
    assert "unused hardware: a torch that finds the GPU: an NVIDIA driver is loaded" in shown
    assert "Hardware that this machine has cannot be used" in shown


@pytest.mark.parametrize(("version", "extra"), [("12.8", "gpu-cuda12"), ("13.0", "gpu-cuda13")])
def test_a_gpu_without_triton_and_cupy(
    found: Diagnosis, monkeypatch: pytest.MonkeyPatch, version: str, extra: str
) -> None:
    for name in ("triton", "cupy"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch.version, "cuda", version)
    found.missing = [*missing_of(found, "cuda").values()]
    assert not found.is_fine
    wasted = {one.what: one.cure for one in found.missing if one.is_waste}
    assert wasted == dict.fromkeys(("triton", "cupy"), f"pip install 'arkcache[{extra}]'")


def test_a_gpu_that_memory_cannot_be_pinned_for(
    found: Diagnosis, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("triton", "cupy"):
        fake = SimpleNamespace(__spec__=SimpleNamespace(name=name))
        monkeypatch.setitem(sys.modules, name, fake)
    found.memory["why_pageable"] = "RuntimeError: not permitted"
    wasted = [one for one in missing_of(found, "cuda").values() if one.is_waste]
    assert [(one.what, one.without) for one in wasted] == [
        ("pinned memory", "RuntimeError: not permitted")
    ]
    assert "ulimit -l" in wasted[0].cure
    found.memory["why_pageable"] = None
    found.missing = [*missing_of(found, "cuda").values()]
    assert found.is_fine


# -- the rest -------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "available_memory_bytes", lambda: 1 << 20)
    measured = diagnose()
    assert measured.paths is None
    (said,) = (one.without for one in measured.missing if one.what == "measured paths")
    assert "MiB of memory, and 1 MiB are available" in said


@needs_no_gpu
def test_kernels_that_are_not_compiled_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    numba_compile = pytest.importorskip("arkcache.kernels.numba_compile")
    monkeypatch.setattr(numba_compile, "cache_folder", lambda: tmp_path)
    kernels = diagnosis.compiled_kernels()
    assert kernels == {"folder": str(tmp_path), "compiled": [], "why_not": None}
    found = diagnose(measure=False)
    (one,) = (one for one in found.missing if one.what == "compiled kernels")
    assert "compile_all()" in one.cure
    monkeypatch.setattr(numba_compile, "cache_folder", lambda: None)
    assert diagnosis.compiled_kernels()["why_not"] == "no folder for them can be written to"


def test_kernels_that_are_compiled_are_told() -> None:
    launch = pytest.importorskip("arkcache.kernels.numba_launch")
    launch.task_of(torch.float32)
    assert "float32" in diagnosis.compiled_kernels()["compiled"]


def test_memory_of_a_machine(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 400 kB\n")
    assert machine_memory_bytes(tmp_path) == 1000 << 10
    assert machine_memory_bytes() >= physical_memory_bytes()
