"""Quantised pages against the quantised caches of transformers: bytes, speed, and what is lost.

    make bench-formats BENCH_ARGS="[--contexts 4096,16384,65536] [--all] [--write]"

In one run, for every context and cache:

Bytes. Of `QuantizedCache`: every tensor that its layers hold, half of the residual filled (tokens
that are kept exact until the whole cache is quantised anew). Of ArkCache: the host tier, the device
tier and the page index, as `stats()` counts them. "bits" are bits per quantised element with scales
and zeros. The models compute in fp32, in which the others keep their scales, too; ArkCache's are
16 bit in any model.

Speed. One-token steps of a small random Llama (4 layers, 8 query and 2 KV heads of 64), rounds
interleaved: median over rounds of the median step, percentiles 20 and 80 and the worst of all
steps. Every method is timed over what it does now and then: `QuantizedCache` over at least one
step that quantises the whole cache anew, ArkCache over several that seal a page ("events"). Where
a step takes so long that the rounds would exceed `--seconds`, fewer are taken, and the residual is
filled beforehand so that such a step is among them.

Loss. The demonstration model reads a text with facts, exactly, and hands keys and values to every
cache in one update, which is what a prompt in one call does. Then questions and right answers are
forced through the decode path token by token. KL is KL(full cache || cache) of the next token, in
nats, "top-1" how often both rank the same token first, "right" the share of values that the cache
ranks first where they are asked for.

`--write` appends the result to benchmarks/results/formats.json, the ledger. Ctrl-C ends the run
after the contexts that are finished.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from bench_common import RESULTS
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    QuantizedCache,
)

from arkcache import ArkCache, CacheConfig, detach
from arkcache.bench.ledger import append_to_ledger, entry_of
from arkcache.bench.models import VOCABULARY, Past, fill, make_model, make_past, time_steps
from arkcache.demo.conversation import encode, load_text, plan, shipped_voice
from arkcache.demo.models import load_model
from arkcache.formats import PageFormat, PageLayout

LEDGER = RESULTS / "formats.json"
FULL = "DynamicCache"
WARM_UP_STEPS = 4
CHUNK_TOKENS = 1024
NUM_FACTS = 16


@dataclass(frozen=True)
class Method:
    """A cache to measure.

    Attributes:
        name: its name in the table.
        build: makes an empty one for a model.
        settings: what it was built with, for the ledger.
        in_all: whether it is measured with `--all` only.
    """

    name: str
    build: Callable[[PreTrainedModel], Cache]
    settings: dict[str, Any]
    in_all: bool = False


@dataclass(frozen=True)
class Sizes:
    """What a cache holds: bytes, the tokens they are for, and bits per quantised element.

    What transformers' caches hold is in `device_bytes`. `coarse_bits` is the second format's, to
    which some of the pages were rewritten.
    """

    tokens: int
    bits: float
    device_bytes: int
    host_bytes: int = 0
    digest_bytes: int = 0
    coarse_bits: float | None = None


@dataclass(frozen=True)
class Speed:
    """One-token steps, in milliseconds.

    Attributes:
        median_ms, round_medians_ms: the median over rounds of the median step, and the latter.
        p20_ms, p80_ms, slowest_ms: percentiles of all steps, and the slowest three.
        num_steps: steps timed.
        num_events: of those, steps that quantised the whole cache anew, or sealed a page.
    """

    median_ms: float
    round_medians_ms: list[float]
    p20_ms: float
    p80_ms: float
    slowest_ms: list[float]
    num_steps: int
    num_events: int | None


@dataclass(frozen=True)
class Loss:
    """How the next-token distributions differ from the full cache's; see the module docstring."""

    mean_kl: float
    max_kl: float
    top1_agreement: float
    right: float
    num_steps: int
    num_values: int


@dataclass
class Row:
    """One method at one context."""

    method: str
    context: int
    sizes: Sizes | None = None
    speed: Speed | None = None
    loss: Loss | None = None


@dataclass(frozen=True)
class Script:
    """What the demonstration model reads, and what is then forced on it.

    Attributes:
        text: token ids of the text with its facts.
        turns: token ids of the questions, each followed by its right answer.
        values: positions in `turns` after which a value is to come.
    """

    text: list[int]
    turns: list[int]
    values: list[int]


# -- methods --------------------------------------------------------------------------------------


def methods() -> list[Method]:
    """What is compared."""
    return [
        Method(FULL, lambda model: DynamicCache(config=model.config), {}),
        theirs("quanto 4 bit", "quanto"),
        theirs("quanto 4 bit, axis_key -1", "quanto", axis_key=-1),
        theirs("hqq 4 bit", "hqq"),
        theirs("hqq 4 bit, axes 1", "hqq", in_all=True, axis_key=1, axis_value=1),
        ours("K4V4"),
        ours("K4V4", rotation="values"),
        ours("K4V4", budget_tokens=2048),
        ours("K4V4", budget_tokens=2048, packed_slots=True),
        ours("K4V4", in_all=True, group_size=64),
        ours("K16V16", in_all=True),
        ours("K8V4", in_all=True),
        ours("K4V2", in_all=True),
        ours("K2V2", in_all=True),
        ours("K2V2", in_all=True, rotation="both"),
        ours("K8V4+K4V2", in_all=True, budget_tokens=2048),
    ]


def theirs(name: str, backend: str, in_all: bool = False, **settings: int) -> Method:
    """A `QuantizedCache` of 4 bits; what is not set is its default."""
    return Method(
        name,
        lambda model: QuantizedCache(backend, config=model.config, nbits=4, **settings),
        {"backend": backend, "nbits": 4, **settings},
        in_all,
    )


def ours(preset: str, in_all: bool = False, **settings: Any) -> Method:
    """An ArkCache with pages of a named format; everything is attended unless a budget is set."""
    settings = {"budget_tokens": None, "num_dense_layers": 0, **settings}
    config = CacheConfig.preset(preset, **settings)
    name = f"ArkCache {preset}"
    if "group_size" in settings:
        name += f", groups of {config.group_size}"
    if config.rotation != "none":
        name += f", rotated {config.rotation}"
    if config.budget_tokens is not None:
        name += f", budget {config.budget_tokens}"
    if config.packed_slots:
        name += ", packed slots"
    built = {"preset": preset, **settings}
    return Method(name, lambda model: ArkCache(model, config), built, in_all)


def usable(chosen: list[Method], model: LlamaForCausalLM) -> tuple[list[Method], dict[str, str]]:
    """Those of the methods that work here, and why the others do not."""
    works, skipped = [], {}
    past = make_past(model, 256)
    for method in chosen:
        if "backend" in method.settings:
            try:
                cache = method.build(model)
                fill(cache, past)
                time_steps(model, cache, [1])
            # A package that is missing, or its extension, which is compiled when it is first used.
            except (ImportError, OSError, RuntimeError) as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                skipped[method.name] = lines[0]
                tell(f"Left out: {method.name}: {lines[0]}")
                continue
        works.append(method)
    return works, skipped


# -- bytes ----------------------------------------------------------------------------------------


def sizes_of(cache: Cache, model: PreTrainedModel) -> Sizes:
    """What a cache holds now."""
    tokens = cache.get_seq_length()
    if isinstance(cache, ArkCache):
        stats, config = cache.stats(), cache.config
        return Sizes(
            tokens,
            bits_of(config.format, config, model),
            stats.device_bytes,
            stats.host_bytes,
            stats.digest_bytes,
            bits_of(config.coarse_format, config, model) if config.coarse_format else None,
        )
    if not isinstance(cache, QuantizedCache):
        num_bytes = held_bytes([(layer.keys, layer.values) for layer in cache.layers])
        return Sizes(tokens, bits(num_bytes, tokens, model), num_bytes)
    quantised = held_bytes(
        [(layer._quantized_keys, layer._quantized_values) for layer in cache.layers]
    )
    exact = held_bytes([(layer.keys, layer.values) for layer in cache.layers])
    num_quantised = tokens - residual_of(cache)
    return Sizes(tokens, bits(quantised, num_quantised, model), quantised + exact)


def bits_of(form: PageFormat, config: CacheConfig, model: PreTrainedModel) -> float:
    """Bits per element of a page of ours."""
    dim = model.config.head_dim
    return PageLayout(form, config.page_size, dim, dim, model.dtype.itemsize).bits_per_element


def bits(num_bytes: int, tokens: int, model: PreTrainedModel) -> float:
    """Bits per element of the keys and values of so many tokens."""
    sizes = model.config
    elements = 2 * sizes.num_hidden_layers * sizes.num_key_value_heads * sizes.head_dim
    return 8 * num_bytes / (tokens * elements)


def held_bytes(held: Any) -> int:
    """Bytes of the memory behind all tensors in nested tuples, lists and dicts, each once."""
    memory = {}
    for tensor in plain_tensors(held):
        storage = tensor.untyped_storage()
        memory[storage.data_ptr()] = storage.nbytes()
    return sum(memory.values())


def plain_tensors(held: Any) -> Iterator[Tensor]:
    """The tensors in nested containers, and those that a quantised tensor consists of."""
    if isinstance(held, dict):
        held = list(held.values())
    if isinstance(held, list | tuple):
        for item in held:
            yield from plain_tensors(item)
    elif hasattr(held, "__tensor_flatten__"):
        yield from plain_tensors([getattr(held, name) for name in held.__tensor_flatten__()[0]])
    elif isinstance(held, Tensor):
        yield held


def residual_of(cache: QuantizedCache) -> int:
    """Tokens that a layer holds exactly."""
    keys = cache.layers[0].keys
    return keys.shape[-2] if keys.dim() == 4 else 0


# -- speed ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """How many rounds of how many steps, and how many seconds a method may take for all."""

    rounds: int
    steps: int
    seconds: float

    def steps_in_a_round(self, step_ms: float) -> int:
        """Steps that a method takes in a round if one takes so long."""
        affordable = int(self.seconds * 1000 / step_ms / self.rounds)
        return max(2, min(self.steps, affordable))


class Runner:
    """A filled cache, about to be timed.

    Attributes:
        sizes: what it held, half of the residual filled where there is one.
        times: of each round, milliseconds of each step.
    """

    def __init__(
        self, method: Method, model: LlamaForCausalLM, past: Past, context: int, limit: Limit
    ) -> None:
        self.method, self.model = method, model
        self.times: list[list[float]] = []
        self.cache = cache = method.build(model)
        is_theirs = isinstance(cache, QuantizedCache)
        half = cache.layers[0].residual_length // 2 if is_theirs else 0
        fill(cache, past, 0, context - half)
        if half:
            fill(cache, past, context - half, context)
        warm_up = time_steps(model, cache, [1] * WARM_UP_STEPS)
        self.sizes = sizes_of(cache, model)
        self.num_steps = limit.steps_in_a_round(min(warm_up))
        if half:
            self._approach(past, context, self.num_steps * limit.rounds)
        self.num_events = events(cache, self.num_steps * limit.rounds)

    def _approach(self, past: Past, context: int, total_steps: int) -> None:
        """Fill the residual so far that the cache is quantised anew halfway through the steps."""
        missing = self.cache.layers[0].residual_length - residual_of(self.cache)
        ahead = max(0, missing - max(1, total_steps // 2))
        if ahead:
            fill(self.cache, past, context, context + ahead)

    def run(self, tokens: list[int]) -> None:
        """Time a round."""
        self.times.append(time_steps(self.model, self.cache, tokens[: self.num_steps]))

    def speed(self) -> Speed:
        """The figures of all rounds."""
        steps = [time for one in self.times for time in one]
        medians = [round(statistics.median(one), 3) for one in self.times]
        fifths = statistics.quantiles(steps, n=5, method="inclusive")
        return Speed(
            statistics.median(medians),
            medians,
            round(fifths[0], 3),
            round(fifths[-1], 3),
            [round(time, 3) for time in sorted(steps, reverse=True)[:3]],
            len(steps),
            self.num_events,
        )


def events(cache: Cache, num_steps: int) -> int | None:
    """How often the next steps will quantise the whole cache anew, or seal a page."""
    if isinstance(cache, QuantizedCache):
        return (residual_of(cache) + num_steps) // cache.layers[0].residual_length
    if not isinstance(cache, ArkCache) or (
        cache.config.format.is_raw and cache.config.budget_tokens is None
    ):
        return None
    page_size = cache.config.page_size
    beyond_window = cache.get_seq_length() - cache.config.num_recent_tokens
    return (beyond_window + num_steps) // page_size - beyond_window // page_size


def measure_speed(
    model: LlamaForCausalLM, context: int, chosen: list[Method], limit: Limit
) -> dict[str, tuple[Sizes, Speed]]:
    """Bytes and speed of all methods at one context, in turn."""
    past = make_past(model, context + 128)
    runners = []
    for method in chosen:
        tell(f"{context}: {method.name}: filling")
        runners.append(Runner(method, model, past, context, limit))
    del past
    generator = torch.Generator().manual_seed(2)
    for number in range(limit.rounds):
        tokens = torch.randint(VOCABULARY, (limit.steps,), generator=generator).tolist()
        for runner in runners:
            tell(f"{context}: {runner.method.name}: round {number + 1} of {limit.rounds}")
            runner.run(tokens)
    detach(model)
    return {runner.method.name: (runner.sizes, runner.speed()) for runner in runners}


# -- loss -----------------------------------------------------------------------------------------


def write_script(tokenizer: PreTrainedTokenizerBase, context: int, seed: int) -> Script:
    """The demonstration's text of so many tokens, its questions and their right answers."""
    voice = shipped_voice()
    conversation = plan(
        tokenizer,
        voice,
        load_text(None),
        context_tokens=context,
        num_facts=NUM_FACTS,
        seed=seed,
    )
    turns: list[int] = []
    values: list[int] = []
    for fact in conversation.questions:
        turns += encode(tokenizer, voice.between + voice.question(fact.name) + voice.closing)
        values.append(len(turns) - 1)
        turns += encode(tokenizer, f" {fact.value}.")
    return Script(conversation.text_ids, turns, values)


def read(model: PreTrainedModel, ids: list[int]) -> Past:
    """Keys and values of a text, with full attention."""
    cache = DynamicCache(config=model.config)
    chunks = torch.tensor([ids]).split(CHUNK_TOKENS, dim=1)
    for number, chunk in enumerate(chunks):
        if number % 8 == 0:
            tell(f"{len(ids)}: reading: {number * CHUNK_TOKENS} of {len(ids)} tokens")
        model(chunk, past_key_values=cache, logits_to_keep=1)
    return [(layer.keys, layer.values) for layer in cache.layers]


def follow(model: PreTrainedModel, cache: Cache, ids: list[int]) -> Tensor:
    """Log-probabilities [len(ids), vocabulary] of the token after each of `ids`, one by one."""
    logits = [
        model(torch.tensor([[token]]), past_key_values=cache, logits_to_keep=1).logits[0, -1]
        for token in ids
    ]
    return torch.stack(logits).double().log_softmax(dim=-1)


def loss_of(full: Tensor, other: Tensor, script: Script) -> Loss:
    """Compare log-probabilities with the full cache's."""
    kl = (full.exp() * (full - other)).sum(dim=-1).clamp_min(0)
    values = [script.turns[position + 1] for position in script.values]
    right = other[script.values].argmax(dim=-1) == torch.tensor(values)
    agree = full.argmax(dim=-1) == other.argmax(dim=-1)
    return Loss(
        float(kl.mean()),
        float(kl.max()),
        float(agree.double().mean()),
        float(right.double().mean()),
        len(full),
        len(values),
    )


def measure_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    chosen: list[Method],
    seed: int,
) -> dict[str, Loss]:
    """The loss of all methods at one context; the full cache is the yardstick."""
    script = write_script(tokenizer, context, seed)
    past = read(model, script.text)
    full = DynamicCache(config=model.config)
    fill(full, past)
    expected = follow(model, full, script.turns)
    found = {FULL: expected}
    for method in chosen:
        if method.name not in found:
            tell(f"{context}: {method.name}: {len(script.turns)} forced steps")
            cache = method.build(model)
            fill(cache, past)
            found[method.name] = follow(model, cache, script.turns)
    detach(model)
    return {method.name: loss_of(expected, found[method.name], script) for method in chosen}


# -- the run --------------------------------------------------------------------------------------


def measure(
    context: int, chosen: list[Method], limit: Limit, options: argparse.Namespace
) -> list[Row]:
    """All methods at one context."""
    rows = {method.name: Row(method.name, context) for method in chosen}
    if options.only != "loss":
        for name, (sizes, speed) in measure_speed(make_model(), context, chosen, limit).items():
            rows[name].sizes, rows[name].speed = sizes, speed
    gc.collect()
    if options.only != "speed":
        model, tokenizer = load_model(None, torch.device("cpu"), "auto")
        for name, loss in measure_loss(model, tokenizer, context, chosen, options.seed).items():
            rows[name].loss = loss
    gc.collect()
    return list(rows.values())


def tell(line: str) -> None:
    """Say on stderr what is under way."""
    print(line, file=sys.stderr, flush=True)


def report(rows: list[Row]) -> None:
    """Print the table of one context."""
    print(
        f"\n{rows[0].context:,} tokens: bytes per token (total MiB); ms per step\n"
        f"{'cache':<33}{'bits':>6}{'device':>8}{'host':>7}{'index':>7}{'(MiB)':>8}"
        f"{'ms':>9}{'p20':>9}{'p80':>9}{'worst':>9}{'events':>7}"
        f"{'mean KL':>10}{'max KL':>9}{'top-1':>7}{'right':>6}"
    )
    for row in rows:
        cells = size_cells(row.sizes) + speed_cells(row.speed) + loss_cells(row.loss)
        print(f"{row.method:<33}{cells}")
    print(flush=True)


def size_cells(sizes: Sizes | None) -> str:
    """The columns about bytes."""
    if sizes is None:
        return f"{'-':>6}{'-':>8}{'-':>7}{'-':>7}{'-':>8}"
    parts = (sizes.device_bytes, sizes.host_bytes, sizes.digest_bytes)
    device, host, digest = (part / sizes.tokens for part in parts)
    return f"{sizes.bits:>6.2f}{device:>8.0f}{host:>7.0f}{digest:>7.0f}{sum(parts) / 2**20:>8.1f}"


def speed_cells(speed: Speed | None) -> str:
    """The columns about time."""
    if speed is None:
        return f"{'-':>9}{'-':>9}{'-':>9}{'-':>9}{'-':>7}"
    events = "-" if speed.num_events is None else f"{speed.num_events}"
    return (
        f"{speed.median_ms:>9.2f}{speed.p20_ms:>9.2f}{speed.p80_ms:>9.2f}"
        f"{speed.slowest_ms[0]:>9.1f}{events:>7}"
    )


def loss_cells(loss: Loss | None) -> str:
    """The columns about what is lost."""
    if loss is None:
        return f"{'-':>10}{'-':>9}{'-':>7}{'-':>6}"
    return f"{loss.mean_kl:>10.2e}{loss.max_kl:>9.1e}{loss.top1_agreement:>7.3f}{loss.right:>6.2f}"


def parse_options() -> argparse.Namespace:
    """The options; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="4096,16384,65536")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=48, help="timed steps of a round")
    parser.add_argument(
        "--seconds", type=float, default=90, help="for all timed steps of a cache at a context"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the facts")
    parser.add_argument("--all", action="store_true", help="also other formats than 4 bits")
    parser.add_argument("--methods", default="", help="only those whose name contains this")
    parser.add_argument("--only", choices=("speed", "loss"), help="leave out the other half")
    parser.add_argument("--write", action="store_true", help=f"append to {LEDGER.name}")
    return parser.parse_args()


def built_with(method: Method, model: PreTrainedModel) -> dict[str, Any]:
    """The settings of a method; of a `QuantizedCache` also those left at their defaults."""
    cache = method.build(model)
    if not isinstance(cache, QuantizedCache):
        return method.settings
    names = ("q_group_size", "residual_length", "axis_key", "axis_value")
    return method.settings | {name: getattr(cache.layers[0], name) for name in names}


def main() -> int:
    """Measure, print, and with --write keep the result."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    limit = Limit(options.rounds, options.steps, options.seconds)
    rows: list[Row] = []
    interrupted = False
    with torch.inference_mode():
        model = make_model()
        asked = [
            method
            for method in methods()
            if (options.all or not method.in_all) and options.methods in method.name
        ]
        chosen, skipped = usable(asked, model)
        built = {method.name: built_with(method, model) for method in chosen}
        try:
            for context in map(int, options.contexts.split(",")):
                found = measure(context, chosen, limit, options)
                report(found)
                rows += found
        except KeyboardInterrupt:
            interrupted = True
            tell("Interrupted: keeping the contexts that are finished.")
    for name, reason in skipped.items():
        print(f"not measured: {name}: {reason}")
    entry = entry_of(
        "formats",
        vars(options),
        methods=built,
        skipped=skipped,
        interrupted=interrupted,
        rows=[asdict(row) for row in rows],
    )
    if options.write and rows:
        append_to_ledger(LEDGER, entry)
    print(json.dumps(entry))
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
