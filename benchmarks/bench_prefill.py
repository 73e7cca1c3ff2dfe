"""`arkcache bench prefill`, which can be kept in the ledger.

    python benchmarks/bench_prefill.py [--contexts 7168,16384,32768] [--layers 2] [--write]

See `arkcache/bench/prefill.py` for what is measured. `--write` appends the result to
benchmarks/results/prefill.json, the ledger.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import torch
from bench_common import RESULTS
from rich.console import Console

from arkcache.bench.ledger import append_to_ledger, entry_of
from arkcache.bench.prefill import Settings, render, run

LEDGER = RESULTS / "prefill.json"


def main() -> None:
    """Measure, print, and with --write keep the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--contexts", default="7168,16384,32768")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dense", type=int, default=0, help="layers that attend everything")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help=f"append to {LEDGER.name}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    contexts = tuple(map(int, options.contexts.split(",")))
    done = run(Settings(contexts, options.chunk, options.layers, options.dense, options.rounds))
    Console().print(render(done.rows))
    entry = entry_of("prefill", vars(options), rows=[asdict(row) for row in done.rows])
    if options.write:
        append_to_ledger(LEDGER, entry)
    print(json.dumps(entry))


if __name__ == "__main__":
    main()
