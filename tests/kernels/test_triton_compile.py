"""Every GPU kernel compiles ahead of time for every target, and those that must not spill do not.

In processes of their own: what the interpreter has imported cannot be compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FAMILIES = {"attention", "score", "select", "seal", "append", "copy"}
SPILLING = """
from types import SimpleNamespace
from compile_kernels import TARGETS, compile_only, of_ptxas
from kernel_variants import variants

launch = next(variant.launch for variant in variants() if variant.family == "copy")
with compile_only(TARGETS["sm_90"]) as compiled:
    launch()
ptx = compiled[0].asm["ptx"]
for text in (ptx, ptx.replace(".reqntid", ".maxnreg 16\\n.reqntid")):
    print(*of_ptxas(SimpleNamespace(asm={"ptx": text}, metadata=compiled[0].metadata)))
"""


def run(*arguments: str | Path, cwd: Path, interpret: bool = False) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(BENCHMARKS.parent), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": str(cwd / "cache")}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def compile_kernels(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    ledger = tmp_path / "kernels.json"
    script = BENCHMARKS / "compile_kernels.py"
    done = run(script, "--write", ledger, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return json.loads(ledger.read_text())["kernels"]


def test_copies_and_attention_compile_without_a_gpu(tmp_path: Path) -> None:
    few = ["--kernels", "copy", "attention", "--only", "K4V2 bf16 d128", "4096 bytes"]
    found = compile_kernels(tmp_path, "--target", "sm_90", *few)
    plain = "K4V2 bf16 d128 g4"
    assert {(figures["family"], figures["variant"]) for figures in found} == {
        ("attention", plain),
        ("attention", f"{plain}, estimates"),
        ("attention", f"{plain}, mass"),
        ("copy", "4096 bytes"),
    }
    kernels = {figures["kernel"] for figures in found}
    assert {"gather_kernel", "scatter_kernel", "gather_lines_kernel"} < kernels
    assert all(figures["spills"] == 0 for figures in found)
    # Pages through a list, of packed formats too, and the window are fetched ahead.
    attention = {
        figures["variant"]: figures["buffers"]
        for figures in found
        if figures["kernel"] == "partial_kernel"
    }
    assert attention[plain] == "3 2"
    assert attention[f"{plain}, estimates"] == "3 2 2"
    assert all(0 < figures["registers"] < 256 for figures in found)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_all_kernels_compile(tmp_path: Path, target: str) -> None:
    found = compile_kernels(tmp_path, "--target", target)
    assert {figures["family"] for figures in found} == FAMILIES
    assert {figures["target"] for figures in found} == {target}


def test_interpreted_kernels_are_refused(tmp_path: Path) -> None:
    done = run(BENCHMARKS / "compile_kernels.py", cwd=tmp_path, interpret=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


def test_spills_are_seen(tmp_path: Path) -> None:
    script = tmp_path / "spilling.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n{SPILLING}")
    done = run(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (_, _, spills), (registers, _, squeezed) = (
        map(int, line.split()) for line in done.stdout.splitlines()
    )
    assert spills == 0
    assert squeezed > 0
    assert registers <= 24


def test_what_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from compile_kernels import Figures, unfit

    def figures(family: str, spills: int = 0, shared_bytes: int = 65536) -> Figures:
        kernel = f"{family}_kernel"
        return Figures(family, kernel, "K4V2", "gfx942", 4, 255, shared_bytes, spills, "0 1")

    def attention(buffers: str) -> Figures:
        return Figures("attention", "partial_kernel", "K4V2", "sm_90", 4, 96, 54272, 0, buffers)

    fine = ("3 2", "2", "4 3", "3 2 2", "")
    assert unfit([attention(buffers) for buffers in fine]) == []
    late = {"0 3": "3 2", "3 1": "3 2", "1": "2", "3 2 0": "3 2 2"}
    assert unfit([attention(buffers) for buffers in late]) == [
        f"partial_kernel (attention K4V2) on sm_90 has {buffers} buffers in its loops, of {least} "
        "or more"
        for buffers, least in late.items()
    ]
    assert unfit([figures("attention"), figures("copy", 8), figures("seal", 8)]) == []
    assert unfit([figures("attention", 8), figures("score", 4), figures("score")]) == [
        "attention_kernel (attention K4V2) on gfx942 spills: 8",
        "score_kernel (score K4V2) on gfx942 spills: 4",
    ]
    assert unfit([figures("copy", shared_bytes=65537)]) == [
        "copy_kernel (copy K4V2) on gfx942 needs 65537 bytes of shared memory, of 65536"
    ]
