"""What tracing adds to a decode step on this machine.

    python benchmarks/bench_trace.py [--context 16384] [--steps 400] [--threads 1] [--write]

The small random Llama of bench_decode.py with one cache that is traced and one that is not; both
step through the same tokens in turn, step by step, so that what disturbs the machine disturbs both.
The first line compares steps without samples: neither their phases timed nor masses looked at. The
second compares all of them, with the samples at their default rates. Figures are medians (the
second line's also means), and the median difference within a pair.

`--write` appends the result to benchmarks/results/trace.json, the ledger.
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch
from bench_common import RESULTS

from arkcache import ArkCache
from arkcache.bench.ledger import append_to_ledger, entry_of
from arkcache.bench.models import VOCABULARY, fill, make_model, make_past, time_steps
from arkcache.tracing.recorder import Recorder

LEDGER = RESULTS / "trace.json"
WARM_UP_STEPS = 8


def measure(context: int, steps: int, budget: int, *, samples: bool) -> dict[str, float]:
    """Milliseconds of a step without and with a recorder, and what it adds in percent."""
    model = make_model()
    past = make_past(model, context)
    plain, traced = (ArkCache(model, budget_tokens=budget) for _ in range(2))
    for cache in (plain, traced):
        fill(cache, past)
        time_steps(model, cache, [1] * WARM_UP_STEPS)
    recorder = Recorder() if samples else Recorder(time_every=None, mass_every=None)
    tokens = torch.randint(VOCABULARY, (steps,), generator=torch.Generator().manual_seed(2))
    times: tuple[list[float], list[float]] = ([], [])
    with traced.trace(recorder):
        for number, token in enumerate(tokens.tolist()):
            for which in (0, 1) if number % 2 else (1, 0):
                times[which].extend(time_steps(model, (plain, traced)[which], [token]))
    off, on = map(statistics.median, times)
    added = statistics.median(mine - its for its, mine in zip(*times, strict=True))
    means = [statistics.fmean(sorted(one)[: int(len(one) * 0.98)]) for one in times]
    return {
        "off_ms": round(off, 3),
        "on_ms": round(on, 3),
        "added_percent": round(100 * added / off, 2),
        "added_in_the_mean_percent": round(100 * (means[1] / means[0] - 1), 2),
    }


def main() -> None:
    """Measure, print, and with --write keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help=f"append to {LEDGER.name}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = {}
    with torch.inference_mode():
        for name, samples in (("without samples", False), ("with samples", True)):
            rows[name] = measure(options.context, options.steps, options.budget, samples=samples)
            print(f"{name:16} {rows[name]}", flush=True)
    entry = entry_of("trace", vars(options), rows=rows)
    if options.write:
        append_to_ledger(LEDGER, entry)
    print(json.dumps(entry))


if __name__ == "__main__":
    main()
