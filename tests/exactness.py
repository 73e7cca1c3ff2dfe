"""The ways to generate with a cache, and how far two generations are apart.

Knows nothing of ArkCache beyond its constructor: every mode takes a function that makes the cache,
so that the reference is the same mode with a `DynamicCache`.
"""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PreTrainedModel,
)

import arkcache
from tests.families import VOCAB

NUM_NEW_TOKENS = 12

# Small enough that the prompts fill many pages, and outgrow sinks and recent window several times.
SMALL = {"num_sink_tokens": 4, "num_recent_tokens": 8, "num_dense_layers": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "unlimited": {"budget_tokens": None},
    "pages": {"budget_tokens": 256, "page_size": 4, **SMALL},
}

Inputs = dict[str, torch.Tensor]
MakeCache = Callable[[PreTrainedModel], Cache]


class Outcome(NamedTuple):
    """What one `generate` returned: tokens [rows, length], logits [rows, steps, vocabulary]."""

    tokens: torch.Tensor
    logits: torch.Tensor


def full_cache(model: PreTrainedModel) -> Cache:
    """The reference: everything kept, everything attended."""
    return for_decoder(model, DynamicCache(config=model.config))


def ark_cache(**settings: Any) -> MakeCache:
    """Makes `ArkCache`s, each in the place where its model expects a decoder's cache."""

    def make(model: PreTrainedModel) -> Cache:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it fell back, which its `mode` says as well
            ark = arkcache.ArkCache(model, **settings)
        return for_decoder(model, ark)

    return make


def decoder_cache(cache: Cache) -> Cache:
    """The half that is under test."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def for_decoder(model: PreTrainedModel, cache: Cache) -> Cache:
    """`cache`, as the self-attention half of a pair if the model has an encoder."""
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(cache, DynamicCache(config=model.config))
    return cache


def generate(model: PreTrainedModel, inputs: Inputs, cache: Cache, **options: Any) -> Outcome:
    """Greedy generation unless `options` say otherwise."""
    # The pure state space models have another name for it.
    name = "cache_params" if "mamba" in type(model).__name__.lower() else "past_key_values"
    defaults = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False, name: cache}
    # Not `model.generate`: Whisper's own splits what is returned, the cache too, by rows.
    out = GenerationMixin.generate(
        model, **inputs, **(defaults | options), return_dict_in_generate=True, output_logits=True
    )
    return Outcome(out.sequences, torch.stack(out.logits, dim=1))


def distance(outcome: Outcome, reference: Outcome) -> float:
    """The largest difference of two logits, relative to the largest logit."""
    difference = (outcome.logits - reference.logits).abs().max()
    return float(difference / reference.logits.abs().max())


def greedy(model: PreTrainedModel, make_cache: MakeCache, inputs: Inputs) -> list[Outcome]:
    return [generate(model, inputs, make_cache(model))]


def beams(model: PreTrainedModel, make_cache: MakeCache, inputs: Inputs) -> list[Outcome]:
    """Reorders the cache at every step."""
    return [generate(model, inputs, make_cache(model), num_beams=3)]


def samples(model: PreTrainedModel, make_cache: MakeCache, inputs: Inputs) -> list[Outcome]:
    """Several continuations of each prompt."""
    cache = make_cache(model)
    torch.manual_seed(0)
    return [generate(model, inputs, cache, do_sample=True, num_return_sequences=2)]


def chunked_prefill(model: PreTrainedModel, make_cache: MakeCache, inputs: Inputs) -> list[Outcome]:
    """Prompts read a few tokens at a time; alone, the second begins with chunks of padding."""
    alone = rows(inputs)[1]
    options = {"prefill_chunk_size": 5}
    return [generate(model, prompt, make_cache(model), **options) for prompt in (inputs, alone)]


def assisted(model: PreTrainedModel, make_cache: MakeCache, inputs: Inputs) -> list[Outcome]:
    """A blurred copy drafts: some drafts are accepted, the others cropped."""
    assistant = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in assistant.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.01)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assistant.generation_config.num_assistant_tokens = 4
    options = {"assistant_model": assistant}
    return [generate(model, row, make_cache(model), **options) for row in rows(inputs)]


def prompt_lookup(model: PreTrainedModel, make_cache: MakeCache, inputs: Inputs) -> list[Outcome]:
    """Drafts are copied from the prompt."""
    options = {"prompt_lookup_num_tokens": 3}
    return [generate(model, row, make_cache(model), **options) for row in rows(inputs)]


def turns(model: PreTrainedModel, make_cache: MakeCache, inputs: Inputs) -> list[Outcome]:
    """A conversation: what is generated stays in the cache, the next question is appended."""
    cache = make_cache(model)
    outcomes = []
    for turn in range(3):
        outcomes.append(generate(model, inputs, cache))
        inputs = extended(inputs, outcomes[-1].tokens, num_new_tokens=5 + turn)
    return outcomes


def embeddings(model: PreTrainedModel, make_cache: MakeCache, inputs: Inputs) -> list[Outcome]:
    """Prompts given as embeddings."""
    inputs = dict(inputs)
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    return [generate(model, inputs | {"inputs_embeds": embedded}, make_cache(model))]


def shared_prefix(model: PreTrainedModel, make_cache: MakeCache, inputs: Inputs) -> list[Outcome]:
    """One prefix, read once; copies of its cache are continued in different ways."""
    cache = make_cache(model)
    prefix = generate(model, inputs, cache, max_new_tokens=2)
    return [
        generate(model, extended(inputs, prefix.tokens, num_new_tokens=n), copy.deepcopy(cache))
        for n in (3, 9)
    ]


def pickled(model: PreTrainedModel, make_cache: MakeCache, inputs: Inputs) -> list[Outcome]:
    """A cache that was written away and read back."""
    cache = make_cache(model)
    prefix = generate(model, inputs, cache, max_new_tokens=2)
    cache = pickle.loads(pickle.dumps(cache))
    return [generate(model, extended(inputs, prefix.tokens, num_new_tokens=3), cache)]


def reset(model: PreTrainedModel, make_cache: MakeCache, inputs: Inputs) -> list[Outcome]:
    """A cache used for other prompts before: the outcome is `greedy`'s."""
    cache = make_cache(model)
    generate(model, {key: value.flip(0) for key, value in inputs.items()}, cache)
    cache.reset()
    return [generate(model, inputs, cache)]


def other_cache(model: PreTrainedModel, make_cache: MakeCache, inputs: Inputs) -> list[Outcome]:
    """A `DynamicCache` on the same model, between two turns with the cache under test."""
    cache = make_cache(model)
    first = generate(model, inputs, cache)
    between = generate(model, inputs, full_cache(model))
    return [first, between, generate(model, extended(inputs, first.tokens, 4), cache)]


MODES = {
    mode.__name__: mode
    for mode in (
        greedy,
        beams,
        samples,
        chunked_prefill,
        assisted,
        prompt_lookup,
        turns,
        embeddings,
        shared_prefix,
        pickled,
        reset,
        other_cache,
    )
}
# A mode whose outcome must be another's: DynamicCache.reset kept the length before 5.23.
REFERENCE_MODE = {"reset": "greedy"}


def rows(inputs: Inputs) -> list[Inputs]:
    """The rows as batches of one, for what only takes one: the second is left-padded."""
    batch = next(iter(inputs.values())).shape[0]
    return [{key: value[row : row + 1] for key, value in inputs.items()} for row in range(batch)]


def extended(inputs: Inputs, tokens: torch.Tensor, num_new_tokens: int) -> Inputs:
    """The inputs of the next turn: `tokens` so far and `num_new_tokens` random ones."""
    prefix = "decoder_" if "decoder_input_ids" in inputs else ""
    generator = torch.Generator().manual_seed(num_new_tokens)
    new = torch.randint(3, VOCAB, (tokens.shape[0], num_new_tokens), generator=generator)
    tokens = torch.cat([tokens, new], dim=1)
    mask = inputs[prefix + "attention_mask"]
    seen = torch.ones(mask.shape[0], tokens.shape[1] - mask.shape[1], dtype=mask.dtype)
    mask = torch.cat([mask, seen], dim=1)
    return {**inputs, prefix + "input_ids": tokens, prefix + "attention_mask": mask}
