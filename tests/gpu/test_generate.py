"""Small random Llamas on the GPU: generated tokens are those of transformers' own cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.gpu.card import Card
from tests.gpu.replays import refusal_is_an_error, replaying


def small_llama(card: Card, seed: int, **sizes: int) -> Any:
    """A random model in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {
        "vocab_size": 1024,
        "hidden_size": card.pick(256, 64),
        "intermediate_size": card.pick(512, 96),
        "num_hidden_layers": card.pick(4, 2),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape | sizes))
    return model.to(card.device).eval()


def prompt(card: Card, seed: int, tokens: int) -> Tensor:
    """Random tokens of two sequences."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 1024, (2, tokens), generator=generator).to(card.device)


def small_settings(card: Card, **settings: Any) -> dict[str, Any]:
    """Of a cache: pages that a short prompt has many of."""
    sizes = {"page_size": 8, "num_sink_tokens": 8, "num_recent_tokens": 16, "backend": "triton"}
    return card.pick(sizes, sizes | {"page_size": 4, "num_sink_tokens": 4}) | settings


def test_exactness(card: Card) -> None:
    """Greedy tokens with all tokens attended, eager and replayed as graphs, padded and not."""
    from transformers import DynamicCache

    import arkcache

    model, new_tokens = small_llama(card, 0), card.pick(64, 5)
    ids = prompt(card, 1, card.pick(300, 40))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    given: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False}
    num_equal = 0
    for name, inputs in (("plain", {}), ("padded", {"attention_mask": mask})):
        full = model.generate(
            ids, past_key_values=DynamicCache(config=model.config), **inputs, **given
        )
        for budget in card.pick((None, 1 << 16), (1 << 16,)):
            for graphed in (False, True):
                cache = arkcache.ArkCache(model, **small_settings(card, budget_tokens=budget))
                assert cache.mode == "paged", cache.reason
                how: dict[str, Any] = {"past_key_values": cache, **inputs, **given}
                if graphed:
                    with refusal_is_an_error(card) as replays:
                        tokens = arkcache.generate_graphed(model, ids, **how)
                    replays.check(new_tokens // 2)  # some are warmed up and recorded first
                else:
                    tokens = model.generate(ids, **how)
                case = f"{name} {budget=} {graphed=}"
                assert torch.equal(tokens, full), f"{case}: {_first_difference(tokens, full)}"
                cache.check_integrity()
                cache.reset()
                num_equal += tokens.numel() - ids.numel()
                card.note(tokens_equal=num_equal)
        arkcache.detach(model)


def _first_difference(tokens: Tensor, full: Tensor) -> str:
    wrong = (tokens != full).nonzero()
    return f"{len(wrong)} of {full.numel()} tokens differ, first at {wrong[:1].tolist()}"


def test_no_waiting_graphed(card: Card) -> None:
    """Replayed steps while waiting is an error, and while the GPU is kept busy."""
    import arkcache

    model, page_size = small_llama(card, 0), card.pick(8, 4)
    settings = small_settings(card, budget_tokens=64, device_pool_factor=2.0)
    cache = arkcache.ArkCache(model, **settings)
    ids = prompt(card, 1, card.pick(300, 60))
    with torch.inference_mode(), replaying(card, model, cache, 16 * page_size) as replays:
        model(input_ids=ids, past_key_values=cache)

        def steps(count: int) -> None:
            for _ in range(count):
                model(input_ids=ids[:, :1], past_key_values=cache)

        steps(card.pick(4, 2) * page_size)  # both kinds are recorded
        replays.count = 0
        with card.waiting_is_an_error():
            steps(2 * page_size)
        host_ms = card.while_busy(lambda: steps(2 * page_size)) / (2 * page_size)
        replays.check(4 * page_size)
    cache.check_integrity()
    arkcache.detach(model)
    card.note(steps=4 * page_size, step_host_ms=round(host_ms, 3))


def test_two_models(card: Card) -> None:
    """Two models, each with its cache, step in turn: the tokens of each by itself."""
    from transformers import DynamicCache

    import arkcache

    models = [small_llama(card, 0), small_llama(card, 1, num_key_value_heads=4)]
    prompts = [prompt(card, 2, card.pick(200, 40)), prompt(card, 3, card.pick(330, 60))]
    new_tokens = card.pick(40, 3)
    expected = [
        model.generate(
            ids,
            past_key_values=DynamicCache(config=model.config),
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        for model, ids in zip(models, prompts, strict=True)
    ]
    caches = [
        arkcache.ArkCache(model, **small_settings(card, budget_tokens=1 << 16)) for model in models
    ]
    texts, latest = list(prompts), list(prompts)
    with torch.inference_mode():
        for _ in range(new_tokens):
            for number, (model, cache) in enumerate(zip(models, caches, strict=True)):
                logits = model(input_ids=latest[number], past_key_values=cache).logits
                latest[number] = logits[:, -1:].argmax(dim=-1)
                texts[number] = torch.cat((texts[number], latest[number]), dim=1)
    for number, (text, full) in enumerate(zip(texts, expected, strict=True)):
        assert torch.equal(text, full), f"model {number}: {_first_difference(text, full)}"
        caches[number].check_integrity()
        arkcache.detach(models[number])
    card.note(tokens_equal=2 * 2 * new_tokens)
