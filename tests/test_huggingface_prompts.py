"""A prompt is attended exactly, however it is cut: with a budget far below its length."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from arkcache import ArkCache
from tests.marks import needs_interpreter
from tests.test_huggingface import SMALL, make_model, prompt

CHUNK = 16
SPARSE: dict[str, Any] = SMALL | {"budget_tokens": 24}
ENGINES = [
    {},
    pytest.param({"backend": "triton", "stream_block_tokens": 16}, marks=needs_interpreter),
]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model(num_hidden_layers=2)


@torch.no_grad()
def full_logits(model: LlamaForCausalLM, ids: Tensor, **inputs: Tensor) -> Tensor:
    """Of the last token, with a full cache."""
    result = model(ids, past_key_values=DynamicCache(config=model.config), **inputs)
    return result.logits[:, -1]


@torch.no_grad()
def read(model: LlamaForCausalLM, cache: ArkCache, chunks: Any) -> Tensor:
    """Logits of the last token of chunks that are read by hand."""
    for ids in chunks:
        logits = model(ids, past_key_values=cache).logits[:, -1]
    return logits


def attended(cache: ArkCache) -> float:
    """Tokens attended by the last step, as a share of all."""
    stats = cache.stats()
    return stats.attended_tokens / stats.total_tokens


@pytest.mark.parametrize("remainder", range(1, CHUNK + 1))
def test_chunks_read_by_hand(model: LlamaForCausalLM, remainder: int) -> None:
    ids = prompt(4 * CHUNK + remainder)
    cache = ArkCache(model, **SPARSE)
    logits = read(model, cache, ids.split(CHUNK, dim=1))
    torch.testing.assert_close(logits, full_logits(model, ids), rtol=1e-4, atol=1e-4)
    assert attended(cache) == 1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("remainder", [1, 2])
def test_chunks_read_by_generate(
    model: LlamaForCausalLM, remainder: int, engine: dict[str, Any]
) -> None:
    ids = prompt(4 * CHUNK + remainder)
    cache = ArkCache(model, **SPARSE | engine)
    result = model.generate(
        ids,
        past_key_values=cache,
        prefill_chunk_size=CHUNK,
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    torch.testing.assert_close(result.logits[0], full_logits(model, ids), rtol=1e-4, atol=1e-4)


def test_a_batch_padded_on_the_left(model: LlamaForCausalLM) -> None:
    ids = prompt(4 * CHUNK + 1, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :21] = 0
    cache = ArkCache(model, **SPARSE)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for start in range(0, ids.shape[1], CHUNK):
            stop = min(start + CHUNK, ids.shape[1])
            logits = model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
            ).logits[:, -1]
    expected = full_logits(model, ids, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_prompt_read_token_by_token(model: LlamaForCausalLM) -> None:
    ids = prompt(70)
    tokens = ids.split(1, dim=1)
    expected = full_logits(model, ids)
    cache = ArkCache(model, **SPARSE)
    with cache.exact():
        logits = read(model, cache, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    sparse = read(model, ArkCache(model, **SPARSE), tokens)
    assert (sparse - expected).abs().max() > 0.01  # nobody said that it was a prompt


def test_only_the_first_token_after_a_prompt_is_exact(model: LlamaForCausalLM) -> None:
    cache, ids = ArkCache(model, **SPARSE), prompt(70)
    read(model, cache, [ids])
    shares = []
    for _ in range(3):
        read(model, cache, [ids[:, :1]])
        shares.append(attended(cache))
    assert shares[0] == 1
    assert max(shares[1:]) < 0.5


@pytest.mark.parametrize("end", ["said", "cropped", "reset"])
def test_a_prompt_ends(model: LlamaForCausalLM, end: str) -> None:
    cache, ids = ArkCache(model, **SPARSE), prompt(70)
    read(model, cache, [ids])
    assert cache.next_is_exact
    if end == "said":
        cache.end_prompt()
    elif end == "cropped":
        cache.crop(-3)
    else:
        cache.reset()
    assert not cache.next_is_exact
    if end != "reset":
        read(model, cache, [ids[:, :1]])
        assert attended(cache) < 0.5


def test_steps_after_exact_ones_are_sparse_again(model: LlamaForCausalLM) -> None:
    cache, ids = ArkCache(model, **SPARSE), prompt(70)
    with cache.exact():
        read(model, cache, ids.split(1, dim=1))
        assert attended(cache) == 1
    with pytest.raises(IndexError), cache.exact():
        model(torch.full((1, 1), 128), past_key_values=cache)  # no such token
    read(model, cache, [ids[:, :1]])
    assert attended(cache) < 0.5


def test_a_turn_of_chunks(model: LlamaForCausalLM) -> None:
    """Generate, then a next turn whose remainder is one token."""
    ids = prompt(60)
    cache = ArkCache(model, **SPARSE | {"budget_tokens": 4096})
    held = model.generate(ids, past_key_values=cache, max_new_tokens=9, do_sample=False)
    turn = torch.cat((held, prompt(CHUNK + 1)), dim=1)
    unread = turn[:, cache.get_seq_length() :]
    sizes = [CHUNK, unread.shape[1] - CHUNK - 1, 1]
    logits = read(model, cache, unread.split(sizes, dim=1))
    torch.testing.assert_close(logits, full_logits(model, turn), rtol=1e-4, atol=1e-4)
    assert cache.next_is_exact is False
