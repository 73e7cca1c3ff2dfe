"""What metrics cost: decode steps of a watched cache against others, and a scrape.

    python benchmarks/bench_metrics.py

Short runs of steps take turns, in changing order, so that what else the machine does meets both
alike. A scrape is timed by itself, in the process that decodes: while it lasts, no step is begun.
All times are of the processor.
"""

import argparse
import statistics
import time

import torch
from prometheus_client import CollectorRegistry, generate_latest
from transformers import LlamaConfig, LlamaForCausalLM

from arkcache import ArkCache
from arkcache.metrics import CacheMetrics


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=16384, help="tokens that are held")
    parser.add_argument("--steps", type=int, default=5, help="steps of a run")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--backend", default="auto", help="auto, numba or torch")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1 << 20,
    )
    model = LlamaForCausalLM(config).eval()
    cache = ArkCache(model, budget_tokens=2048, backend=options.backend)
    metrics, registry = CacheMetrics(), CollectorRegistry()
    registry.register(metrics)
    times: dict[str, list[float]] = {"not watched": [], "watched": []}
    scrapes = []
    with torch.inference_mode():
        for _ in range(0, options.context, 1024):
            model(torch.randint(0, 512, (1, 1024)), past_key_values=cache, logits_to_keep=1)
        cache.end_prompt()
        run(model, cache, 50)
        for number in range(options.rounds):
            for name in sorted(times, reverse=number % 2 == 1):
                if name == "not watched":
                    times[name] += run(model, cache, options.steps)
                    continue
                with metrics.watching(cache):
                    times[name] += run(model, cache, options.steps)
                    start = time.process_time()
                    generate_latest(registry)
                    scrapes.append(time.process_time() - start)
                    run(model, cache, 1)  # the step after it is no step of a run
    base, watched = (statistics.median(times[name]) for name in ("not watched", "watched"))
    count, pairs = options.steps, []
    for first in range(0, len(times["watched"]), count):
        runs = [statistics.median(values[first : first + count]) for values in times.values()]
        pairs.append(runs[1] / runs[0])
    print(f"not watched  {base * 1e3:.3f} ms a step")
    print(f"watched      {watched * 1e3:.3f} ms a step, {watched / base - 1:+.2%}")
    print(f"             {statistics.median(pairs) - 1:+.2%}, the median of {len(pairs)} pairs")
    scrape = statistics.median(scrapes)
    print(f"a scrape     {scrape * 1e3:.3f} ms: {scrape:.2%} of the time at one a second")


def run(model: LlamaForCausalLM, cache: ArkCache, count: int) -> list[float]:
    """Seconds of so many decode steps."""
    token, times = torch.zeros(1, 1, dtype=torch.long), []
    for _ in range(count):
        start = time.process_time()
        output = model(token, past_key_values=cache, logits_to_keep=1)
        times.append(time.process_time() - start)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
    return times


if __name__ == "__main__":
    main()
