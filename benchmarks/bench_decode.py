"""`arkcache bench decode`, with quanto's cache beside it where that is installed.

    python benchmarks/bench_decode.py [--contexts 4096,16384,65536,262144] [--write]

See `arkcache/bench/decode.py` for what is measured. `--write` appends the result to
benchmarks/results/decode.json, the ledger.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from importlib.util import find_spec

import torch
from bench_common import RESULTS
from rich.console import Console
from transformers import QuantizedCache

from arkcache.bench.decode import Method, Settings, render, run
from arkcache.bench.ledger import append_to_ledger, entry_of

LEDGER = RESULTS / "decode.json"
QUANTO = Method(
    "QuantizedCache quanto 4 bit",
    lambda model, _: QuantizedCache("quanto", config=model.config, nbits=4),
    3,
    longest=65536,
)


def main() -> None:
    """Measure, print, and with --write keep the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--contexts", default="4096,16384,65536,262144")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", default="", help="only those whose name contains this")
    parser.add_argument("--write", action="store_true", help=f"append to {LEDGER.name}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    contexts = tuple(map(int, options.contexts.split(",")))
    settings = Settings(contexts, options.budget, options.rounds, options.steps, options.methods)
    more = [QUANTO]
    if find_spec("optimum") is None:
        print("optimum-quanto is not installed (make bench installs it): left out", flush=True)
        more = []
    done = run(settings, more=more)
    Console().print(render(done.rows))
    entry = entry_of("decode", vars(options), rows=[asdict(row) for row in done.rows])
    if options.write:
        append_to_ledger(LEDGER, entry)
    print(json.dumps(entry))


if __name__ == "__main__":
    main()
