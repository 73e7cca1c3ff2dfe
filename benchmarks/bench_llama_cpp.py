"""A real model's decode step here and in llama.cpp, on the same weights.

    pip install llama-cpp-python      # in the environment of `make eval`; compiles, some minutes
    python benchmarks/bench_llama_cpp.py [--context 7168] [--write]

llama.cpp reads SmolLM2's GGUF file twice: as it comes (4 bits) and unpacked to 32 bits, which is
what PyTorch computes with here. Each reads the same text once, and all step through the same tokens
in turn, in blocks, since two pools of threads that alternate step by step wait for each other. What
a cache adds is the step with the context less the step with one token, of the same program.

`--write` appends the result to benchmarks/results/llama_cpp.json, the ledger.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from bench_common import RESULTS
from bench_real_model import read
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from arkcache import ArkCache
from arkcache.bench.ledger import append_to_ledger, entry_of
from arkcache.bench.models import fill
from arkcache.demo import smollm2
from arkcache.demo.conversation import load_text
from arkcache.demo.models import load_model

LEDGER = RESULTS / "llama_cpp.json"
BLOCK_STEPS = 10
WARM_UP_BLOCKS = 1
SETTLE_SECONDS = 0.2
"""Between blocks: until the threads of the program before no longer spin."""
ALL_F32 = 0
"""llama.cpp's LLAMA_FTYPE_ALL_F32."""

Step = Callable[[int], object]


@dataclass(frozen=True)
class Row:
    """One program with one cache. Milliseconds per step: median over blocks, least, most; and what
    the context adds to its own step without one."""

    program: str
    median_ms: float
    least_ms: float
    most_ms: float
    added_ms: float


def unpacked(gguf: Path, folder: Path) -> Path:
    """The file's weights in 32 bits."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = ALL_F32, True
    file = folder / "f32.gguf"
    failed = llama_cpp.llama_model_quantize(
        str(gguf).encode(), str(file).encode(), ctypes.byref(params)
    )
    if failed:
        raise RuntimeError(f"llama.cpp could not unpack {gguf}: code {failed}")
    return file


def of_llama_cpp(file: Path, ids: list[int], room: int, threads: int) -> Step:
    """A step of llama.cpp after it has read a text."""
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=len(ids) + room, n_threads=threads, verbose=False)
    model.eval(ids)
    return lambda token: model.eval([token])


def of_torch(model: PreTrainedModel, cache: Cache) -> Step:
    """A step of the model with a cache."""
    return lambda token: model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)


def measure(steps: dict[str, Step], tokens: list[int]) -> dict[str, list[float]]:
    """Milliseconds per step in each block."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for first in range(0, len(tokens), BLOCK_STEPS):
        block = tokens[first : first + BLOCK_STEPS]
        for name, step in steps.items():
            time.sleep(SETTLE_SECONDS)
            start = time.perf_counter()
            for token in block:
                step(token)
            times[name].append((time.perf_counter() - start) * 1e3 / len(block))
    return {name: one[WARM_UP_BLOCKS:] for name, one in times.items()}


def rows_of(times: dict[str, list[float]]) -> list[Row]:
    """Every `NAME, CACHE` beside `NAME, one token`."""
    rows = []
    for name, own in times.items():
        bare = times[f"{name.rpartition(', ')[0]}, one token"]
        added = statistics.median(mine - other for mine, other in zip(own, bare, strict=True))
        figures = (statistics.median(own), min(own), max(own), added)
        rows.append(Row(name, *(round(figure, 2) for figure in figures)))
    return rows


def main() -> None:
    """Measure, print, and with --write keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=7168)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help=f"append to {LEDGER.name}")
    options = parser.parse_args()
    import llama_cpp

    @llama_cpp.llama_log_callback
    def unsaid(_level: int, _text: bytes, _data: object) -> None:
        """In place of llama.cpp's log, which has a line for each tensor."""

    torch.set_num_threads(options.threads)
    llama_cpp.llama_log_set(unsaid, None)
    gguf = smollm2.gguf_of_wheel()
    if gguf is None:
        parser.error(f"no GGUF file of SmolLM2: {smollm2.ADVICE}")
    model, tokenizer = load_model(smollm2.NAME, torch.device("cpu"), "auto")
    ids = tokenizer(load_text(None), return_tensors="pt", verbose=False).input_ids
    room = (options.blocks + WARM_UP_BLOCKS) * BLOCK_STEPS
    tokens = ids[0, options.context :][:room].tolist()
    ids = ids[:, : options.context]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        past = read(model, ids)
        full = StaticCache(config=model.config, max_cache_len=options.context + room)
        caches: dict[str, Cache] = {
            "one token": DynamicCache(config=model.config),
            "StaticCache": full,
            "ArkCache": ArkCache(model, budget_tokens=options.budget),
            "ArkCache boxes": ArkCache(
                model, budget_tokens=options.budget, index="cuboid-mean", page_size=32
            ),
        }
        for name, cache in caches.items():
            fill(cache, past, stop=1 if name == "one token" else None)
        program = f"PyTorch {str(model.dtype).removeprefix('torch.')}"
        steps = {f"{program}, {name}": of_torch(model, cache) for name, cache in caches.items()}
        files = {"llama.cpp f32": unpacked(gguf, Path(folder)), "llama.cpp 4 bits": gguf}
        for name, file in files.items():
            for kind, read_ids in (("one token", ids[:, :1]), ("f16 cache", ids)):
                steps[f"{name}, {kind}"] = of_llama_cpp(
                    file, read_ids[0].tolist(), room, options.threads
                )
        rows = rows_of(measure(steps, tokens))
    for row in rows:
        print(
            f"{row.program:<34} {row.median_ms:7.1f} ms ({row.least_ms:.1f} to {row.most_ms:.1f})"
            f"  the context adds {row.added_ms:6.1f}"
        )
    settings = vars(options) | {"llama_cpp_python": version("llama-cpp-python")}
    entry = entry_of("llama_cpp", settings, rows=[asdict(row) for row in rows])
    if options.write:
        append_to_ledger(LEDGER, entry)
    print(json.dumps(entry))


if __name__ == "__main__":
    main()
