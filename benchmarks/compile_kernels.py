"""Compile every GPU kernel ahead of time, without a GPU, and show what each one takes.

    python benchmarks/compile_kernels.py
    python benchmarks/compile_kernels.py --target sm_90 --kernels attention score --only K4V2 tokens
    python benchmarks/compile_kernels.py --write FILE.json

The launchers themselves are called, with tensors on the CPU whose contents nobody reads, while a
driver pretends to be the target: so what is compiled is what is launched, with its warps and its
constants. Registers and spills are those of `ptxas -v` on CUDA, of the assembler's metadata on AMD.
Spills are bytes stored to and loaded from local memory on CUDA, spilled registers on AMD. Buffers
are read from the compiler's IR for CUDA: of each innermost loop with a matrix product, how many
iterations have what they load on its way at once (0: something is loaded when it is needed). Exits
with 1 if anything fails to compile, needs more shared memory than a block can have, if attention
or score spills, or if attention does not fetch its pages ahead.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from kernel_variants import Variant, variants
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia import compiler as nvidia_compiler
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MAX_SHARED_BYTES = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
"""What a block can have; what is compiled for sm_80 also runs on sm_86 and sm_89, the least."""

MUST_NOT_SPILL = ("attention", "score")
MIN_BUFFERS = {
    "partial_kernel": ((2,), (3, 2), (3, 2, 2)),
    "score_tokens_kernel": ((2,),),
}
"""Of the loops of a kernel, by how many it has, whose loads must be under way before they are
needed: of pages, of estimates, of the window."""
LATE = ("K4V2 bf16 d96 g4", "K4V2 bf16 d96 g4, estimates")
"""Variants whose pages are read when they are needed: of a width that is no power of two, channels
and planes of codes do not lie in the same order."""

LINE = "{:<10} {:<24} {:<30} {:<7} {:>5} {:>9} {:>12} {:>6} {:>7}"
HEADER = (
    *("family", "kernel", "variant", "target", "warps", "registers", "shared bytes"),
    *("spills", "buffers"),
)


@dataclass(frozen=True)
class Figures:
    """What one compiled kernel takes of a target."""

    family: str
    kernel: str
    variant: str
    target: str
    num_warps: int
    registers: int
    shared_bytes: int
    spills: int
    buffers: str
    """Of each loop, as in "3 2"; empty where there is none, and on AMD."""


class _TargetDriver(DriverBase):
    """A driver whose device is the target: enough to compile for it, not to launch."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        # Triton keeps what it compiled per device: targets must not share one.
        return [*TARGETS.values()].index(self._target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


@contextmanager
def compile_only(target: GPUTarget) -> Iterator[list[Any]]:
    """Inside, launches compile for `target` and go no further; yields what was compiled."""
    compiled: list[Any] = []
    run = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    driver.set_active(_TargetDriver(target))
    JITFunction.run, hip = warm_up, torch.version.hip
    torch.version.hip = target.backend if target.backend == "hip" else None
    try:
        yield compiled
    finally:
        JITFunction.run, torch.version.hip = run, hip


def compile_variant(variant: Variant, target: str) -> list[Figures]:
    """Every kernel that a variant launches, compiled once."""
    try:
        with compile_only(TARGETS[target]) as compiled:
            variant.launch()
    except Exception as error:
        # Not all that Triton raises survives the way to another process.
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
    measure = of_ptxas if TARGETS[target].backend == "cuda" else of_assembly
    found = []
    for kernel in {kernel.hash: kernel for kernel in compiled}.values():
        loops = loop_buffers(kernel.asm["ttgir"]) if measure is of_ptxas else []
        where = (variant.family, kernel.name, variant.name, target, kernel.metadata.num_warps)
        found.append(Figures(*where, *measure(kernel), " ".join(map(str, loops))))
    return found


def of_ptxas(kernel: Any) -> tuple[int, int, int]:
    """Registers, shared memory and spills of a kernel for CUDA."""
    (arch,) = re.findall(r"^\.target (sm_\w+)", kernel.asm["ptx"], re.MULTILINE)
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = folder / "ptxas"
    if int(re.sub(r"\D", "", arch)) >= 100 and (folder / "ptxas-blackwell").exists():
        ptxas = folder / "ptxas-blackwell"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(kernel.asm["ptx"])
        source.flush()
        # With Triton's own options for registers the figures are those of what it loads.
        options = re.findall(r"--regAllocOptLevel=\d+", inspect.getsource(nvidia_compiler))
        command = [ptxas, "-v", *options, f"--gpu-name={arch}", source.name, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(map(int, re.findall(r"Used (\d+) registers", log)))
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    return registers, kernel.metadata.shared, spills


def loop_buffers(ttgir: str) -> list[int]:
    """How many iterations' loads are under way, of each innermost loop with a matrix product.

    The least number of buffers that the compiler made for anything that the loop loads; 0 where a
    load is used in the iteration that issues it.
    """
    allocated = re.findall(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x", ttgir)
    counts = []
    for body in _innermost_loops(ttgir.splitlines()):
        text = "\n".join(body)
        if not re.search(r"= \S*(tt\.dot|warp_group_dot|tc_gen5_mma)\b", text):
            continue
        used = [int(count) for name, count in allocated if re.search(rf"{name}\b", text)]
        # A load through registers hands its result to a later iteration.
        now = "\n".join(line for line in body if not line.lstrip().startswith("scf.yield"))
        loads = re.findall(r"(%\w+) = tt\.load\b", now)
        late = any(len(re.findall(rf"{name}\b", now)) > 1 for name in loads)
        counts.append(0 if late else min(used, default=0))
    return counts


def _innermost_loops(lines: list[str]) -> Iterator[list[str]]:
    """The bodies of the loops of a module, as MLIR indents them."""
    for start, line in enumerate(lines):
        if " scf.for " not in line:
            continue
        indent = len(line) - len(line.lstrip())
        closing = " " * indent + "}"
        stop = next(i for i in range(start, len(lines)) if lines[i].startswith(closing))
        body = lines[start + 1 : stop]
        if not any(" scf.for " in inner for inner in body):
            yield body


def of_assembly(kernel: Any) -> tuple[int, int, int]:
    """Registers, shared memory and spills of a kernel for AMD."""

    def read(name: str) -> int:
        (number,) = re.findall(rf"^\s*\.{name}:\s*(\d+)", kernel.asm["amdgcn"], re.MULTILINE)
        return int(number)

    shared_bytes = max(kernel.metadata.shared, read("group_segment_fixed_size"))
    return read("vgpr_count"), shared_bytes, read("vgpr_spill_count") + read("sgpr_spill_count")


def compile_all(wanted: list[tuple[Variant, str]]) -> tuple[list[Figures], list[str]]:
    """Compile on all processors, printing as it goes; the figures, and what did not compile."""
    found: list[Figures] = []
    failed = []
    print(LINE.format(*HEADER))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [(pool.submit(compile_variant, *task), *task) for task in wanted]
        for future, variant, target in futures:
            if error := future.exception():
                print(f"{variant.family:<10} {variant.name} on {target} FAILED", flush=True)
                failed.append(f"{variant.family} {variant.name} on {target} failed: {error}")
                continue
            found += future.result()
            for figures in future.result():
                print(LINE.format(*asdict(figures).values()), flush=True)
    return found, failed


def unfit(found: list[Figures]) -> list[str]:
    """A line for every kernel that spills or loads late and must not, or that would not start."""
    lines = []
    for each in found:
        name = f"{each.kernel} ({each.family} {each.variant}) on {each.target}"
        if each.spills and each.family in MUST_NOT_SPILL:
            lines.append(f"{name} spills: {each.spills}")
        options = () if each.variant in LATE else MIN_BUFFERS.get(each.kernel, ())
        counts = [*map(int, each.buffers.split())]
        least = next((one for one in options if len(one) == len(counts)), ())
        if any(count < want for count, want in zip(counts, least, strict=False)):
            wanted = " ".join(map(str, least))
            lines.append(f"{name} has {each.buffers} buffers in its loops, of {wanted} or more")
        most = MAX_SHARED_BYTES[each.target]
        if each.shared_bytes > most:
            lines.append(f"{name} needs {each.shared_bytes} bytes of shared memory, of {most}")
    return lines


def main() -> int:
    """Compile, print, write; 1 where anything is wrong."""
    families = list(dict.fromkeys(variant.family for variant in variants()))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=[*TARGETS])
    parser.add_argument("--kernels", nargs="+", choices=families, default=families)
    parser.add_argument("--only", nargs="+", metavar="TEXT", default=[""], help="in the variant")
    parser.add_argument("--write", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    wanted = [
        (variant, target)
        for target in arguments.target
        for variant in variants()
        if variant.family in arguments.kernels
        and any(text in variant.name for text in arguments.only)
    ]
    if not wanted:
        parser.error(f"no variant has any of {arguments.only} in its name")
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        found, failed = compile_all(wanted)
    if arguments.write is not None:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        entry = {"versions": versions, "kernels": [asdict(figures) for figures in found]}
        arguments.write.write_text(json.dumps(entry, indent=1) + "\n")
    wrong = failed + unfit(found)
    if wrong:
        print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
