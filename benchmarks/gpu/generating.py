"""What a user sees: tokens per second of `generate`, hit rates on text, a real checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.baseline import static_step
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.check import Outcome
from benchmarks.gpu.models import cache_config, check_room, filled_cache, make_model
from benchmarks.gpu.steps import TINY_SIZES
from tests.gpu.outcome import Skipped
from tests.gpu.replays import refusal_is_an_error

NEW_TOKENS = {"graphs": 120, "eager": 24, "static": 100}
WARM_TOKENS = {"graphs": 40, "eager": 8, "static": 10}
"""Of these, those that come before both kinds of steps are recorded, and are not timed."""

POOL_FACTORS = (1.0, 1.5, 2.0, 4.0)


class Clock:
    """A streamer for `generate` that notes when each token was known to the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _tokens: Any) -> None:
        """The prompt first, then each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to say."""

    def rate(self, skipped: int) -> float:
        """Tokens per second after so many tokens."""
        times = self.times[1 + skipped :] or self.times[-1:]
        return (len(times) - 1) / max(1e-9, times[-1] - times[0])


# -- tokens per second ----------------------------------------------------------------------------


def tokens_per_second(bench: Bench, shape: str, context: int) -> Outcome:
    """`generate` over a filled cache, replayed and eager; the figure is over a StaticCache's."""
    import arkcache

    check_room(bench, shape, context, 1, "K16V16")
    context, batch = bench.pick((context, 1), TINY_SIZES)
    model = make_model(bench, shape)
    generates = {"graphs": arkcache.generate_graphed, "eager": eagerly}
    rates = {}
    for name, generate in generates.items():
        with filled_cache(bench, model, cache_config(bench), batch, context) as cache:
            rates[name] = generated_rate(bench, model, cache, generate, name)
        bench.note(**{f"{name}_tokens_per_s": round(rates[name], 2)})
    static = static_rate(bench, model, batch, context)
    bench.note(static_tokens_per_s=round(static, 2))
    return Outcome(None if bench.rehearsing else rates["graphs"] / static)


def eagerly(model: Any, ids: Any, **how: Any) -> Any:
    """`generate`, with nothing replayed."""
    return model.generate(ids, **how)


def generated_rate(
    bench: Bench, model: Any, cache: Any, generate: Callable[..., Any], name: str
) -> float:
    """Tokens per second once steps are recorded. Raises where they should be replayed and are not.

    name: "graphs" or "eager".
    """
    clock, new_tokens = Clock(), bench.pick(NEW_TOKENS[name], 3)
    length = cache.get_seq_length() + 1
    ids = torch.ones((1, length), dtype=torch.int64, device=bench.device)
    how = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
    with refusal_is_an_error(bench) as replays:
        generate(model, ids, past_key_values=cache, streamer=clock, pad_token_id=0, **how)
    skipped = bench.pick(WARM_TOKENS[name], 1)
    if name == "graphs":
        replays.check(new_tokens - skipped)
    return clock.rate(skipped)


def static_rate(bench: Bench, model: Any, batch: int, context: int) -> float:
    """Of a `StaticCache` whose steps are a graph, each token known to the host before the next."""
    step = static_step(bench, model, batch, context)
    clock = Clock()
    for number in range(bench.pick(NEW_TOKENS["static"], 3)):
        step(number)[0, -1].argmax().item()
        clock.put(None)
    return clock.rate(bench.pick(WARM_TOKENS["static"], 1))


# -- on text --------------------------------------------------------------------------------------


def hit_rates(bench: Bench, checkpoint: Path | None = None) -> Outcome:
    """Selected pages that were resident, by the pool's factor, while a model is asked questions.

    The model that the package ships reads 16k tokens; it does nothing but this task. The figure is
    the rate by default settings.
    """
    from arkcache import CacheConfig
    from arkcache.demo.conversation import question_ids

    rates: dict[str, Any] = {}
    with conversation(bench, checkpoint) as (model, tokenizer, talk, full):
        tokens = [t for fact in talk.questions for t in question_ids(tokenizer, talk.voice, fact)]
        settings = {"budget_tokens": bench.pick(512, 128), "num_dense_layers": 0}
        settings |= {"backend": "triton", "num_recent_tokens": bench.pick(128, 32)}
        factors = {str(factor): {"device_pool_factor": factor} for factor in POOL_FACTORS}
        for name, chosen in ({"default": {}} | bench.pick(factors, {})).items():
            config = CacheConfig(**settings, **chosen)
            rates[name] = asked(bench, model, full, config, tokens[: bench.pick(None, 3)])
            bench.note(by_pool_factor=rates)
    return Outcome(rates["default"]["hit_rate"])


def asked(bench: Bench, model: Any, full: Any, config: Any, tokens: list[int]) -> dict[str, Any]:
    """Hit rate and milliseconds of steps with these tokens, one after another, not replayed."""
    import arkcache
    from arkcache.demo.methods import open_arkcache

    cache: Any = open_arkcache(model, full, config, config.index)
    bench.synchronize()
    start = time.perf_counter()
    for token in tokens:
        model(torch.tensor([[token]], device=bench.device), past_key_values=cache)
    bench.synchronize()
    seconds, stats = time.perf_counter() - start, cache.stats()
    cache.reset()
    arkcache.detach(model)
    return {
        "hit_rate": round(stats.hit_rate, 4),
        "speculative_hits": stats.speculative_hits,
        "eager_ms_per_token": round(1e3 * seconds / len(tokens), 3),
    }


@contextmanager
def conversation(bench: Bench, checkpoint: Path | None) -> Iterator[tuple[Any, Any, Any, Any]]:
    """A model, its tokenizer, a text with facts and questions, and a full cache of the text."""
    from arkcache.demo.conversation import load_text, plain_voice, plan, shipped_voice
    from arkcache.demo.methods import reading_cache
    from arkcache.demo.models import load_model

    name = None if checkpoint is None else str(checkpoint.resolve())
    model, tokenizer = load_model(name, bench.device, "auto")
    voice = shipped_voice() if name is None else plain_voice(tokenizer)
    context, num_facts = bench.pick((16 << 10, 16), (512, 2))
    text = load_text(None)
    talk = plan(tokenizer, voice, text, context_tokens=context, num_facts=num_facts, seed=0)
    full = reading_cache(model)
    with torch.inference_mode():
        for chunk in torch.tensor([talk.text_ids], device=bench.device).split(1024, dim=1):
            model(chunk, past_key_values=full, logits_to_keep=1)
        yield model, tokenizer, talk, full


def checkpoint(bench: Bench) -> Outcome:
    """A real model: hit rates on text, and how many greedy tokens are those of the full cache."""
    from transformers import DynamicCache

    import arkcache

    folder = bench.checkpoint
    if folder is None and not bench.rehearsing:
        raise Skipped("no checkpoint was given: --model FOLDER")
    hit_rates(bench, folder)
    with conversation(bench, folder) as (model, _tokenizer, talk, _full):
        ids = torch.tensor([talk.text_ids], device=bench.device)
        new_tokens = bench.pick(100, 3)
        how = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
        how |= {"prefill_chunk_size": 1024}
        clock, full = Clock(), DynamicCache(config=model.config)
        expected = model.generate(ids, past_key_values=full, streamer=clock, **how)
        skipped = bench.pick(WARM_TOKENS["graphs"], 1)
        full_rate = clock.rate(skipped)
        settings = {"budget_tokens": bench.pick(2048, 256)}
        cache = arkcache.ArkCache(model, backend="triton", **settings)
        bench.note(model=model.config.model_type, mode=cache.mode, reason=cache.reason)
        clock = Clock()
        with refusal_is_an_error(bench) as replays:
            tokens = arkcache.generate_graphed(
                model, ids, past_key_values=cache, streamer=clock, **how
            )
        replays.check(new_tokens - skipped)
        equal = int((tokens == expected)[0, ids.shape[1] :].long().cumprod(0).sum())
        arkcache.detach(model)
    rate = clock.rate(skipped)
    bench.note(
        tokens_per_s=round(rate, 2),
        full_cache_tokens_per_s=round(full_rate, 2),
        first_tokens_equal=equal,
        of_tokens=new_tokens,
    )
    return Outcome(None if bench.rehearsing else rate)
