"""The fused attention against the reference, and blocks through it against blocks through tiles."""

import math

import pytest
import torch
from torch import Tensor

from arkcache.kernels import reference, torch_attention
from arkcache.kernels.torch_attention import TILE_TOKENS, Block, block_attention
from arkcache.kernels.torch_flash import CPU_DTYPES, flash_attention, has_flash

KV_HEADS = 2
HALVES = [torch.bfloat16, torch.float16]


def inputs(group: int, new: int, tokens: int, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(2, KV_HEADS, group, new, dim)
    return query, torch.randn(2, KV_HEADS, tokens, dim), torch.randn(2, KV_HEADS, tokens, dim)


def hidden_after(positions: Tensor, tokens: int) -> Tensor:
    """The additive mask [new, tokens] of queries at these positions."""
    hidden = torch.arange(tokens) > positions[:, None]
    return torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)


@pytest.fixture(params=["fused", "tiles"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "tiles":
        monkeypatch.setattr(torch_attention, "has_flash", lambda *_: False)
    return str(request.param)


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of the fused attention was causal."""
    calls: list[bool] = []

    def spy(*args: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        calls.append(causal)
        return flash_attention(*args, scale=scale, causal=causal)

    monkeypatch.setattr(torch_attention, "flash_attention", spy)
    return calls


@pytest.mark.parametrize("dim", [1, 33, 64, 80, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group", [1, 3, 16])
def test_output_and_log_sum_exp(group: int, causal: bool, dim: int) -> None:
    new, tokens = 9, 9 if causal else 700
    query, key, value = inputs(group, new, tokens, dim)
    mask = hidden_after(torch.arange(new), tokens) if causal else None
    output, log_mass = flash_attention(query.flatten(1, 2), key, value, scale=0.2, causal=causal)
    expected = reference.attention(query.flatten(1, 2), key, value, scale=0.2, mask=mask)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    logits = query @ key[:, :, None].transpose(-1, -2) * 0.2
    logits = logits if mask is None else logits + mask
    torch.testing.assert_close(log_mass, logits.logsumexp(-1).flatten(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_every_dtype_on_a_cpu(dtype: torch.dtype) -> None:
    query, key, value = (tensor.to(dtype) for tensor in inputs(3, 5, 40))
    assert has_flash(query.flatten(1, 2), key, value)
    output, log_mass = flash_attention(query.flatten(1, 2), key, value, scale=0.25, causal=False)
    assert (output.dtype, log_mass.dtype) == (dtype, torch.float32)


def test_what_it_does_not_serve() -> None:
    query, key, value = inputs(1, 5, 40)
    assert not has_flash(query[:, :, 0], key, value[..., :8])  # values of another width
    assert not has_flash(query[:, :, 0], key.mT.contiguous().mT, value)


@pytest.mark.parametrize("seen_from", [0, 3, TILE_TOKENS, TILE_TOKENS + 5])
@pytest.mark.parametrize("group", [1, 3])
def test_causal_blocks(group: int, seen_from: int, path: str) -> None:
    """Past, then tokens attended one by one, in blocks of uneven sizes."""
    own = 40
    query, key, value = inputs(group, seen_from + own, 100 + own)
    blocks = [Block(key[:, :, :100], value[:, :, :100])]
    for start, stop in ((0, 1), (1, 17), (17, own)):
        tokens = slice(100 + start, 100 + stop)
        part = Block(key[:, :, tokens], value[:, :, tokens], seen_from + start, causal=True)
        blocks.append(part)
    output = block_attention(query, blocks, scale=0.3)
    positions = torch.arange(seen_from + own) - seen_from + 100
    mask = hidden_after(positions.clamp(min=99), 100 + own)
    expected = reference.attention(query.flatten(1, 2), key, value, scale=0.3, mask=mask)
    torch.testing.assert_close(output.flatten(1, 2), expected, rtol=1e-5, atol=1e-5)


def test_blocks_of_one_sequence(path: str) -> None:
    query, key, value = inputs(3, 6, 50)
    blocks = [
        Block(key[:1, :, :50], value[:1, :, :50], seqs=slice(0, 1)),
        Block(key[1:, :, :20], value[1:, :, :20], seqs=slice(1, 2)),
    ]
    output = block_attention(query, blocks, scale=0.3).flatten(1, 2)
    for sequence, tokens in enumerate((50, 20)):
        own = slice(sequence, sequence + 1)
        expected = reference.attention(
            query[own].flatten(1, 2), key[own, :, :tokens], value[own, :, :tokens], scale=0.3
        )
        torch.testing.assert_close(output[own], expected, rtol=1e-5, atol=1e-5)


def test_queries_before_the_first_token_get_zeros(path: str) -> None:
    query, key, value = inputs(2, 7, 4)
    output = block_attention(query, [Block(key, value, 3, causal=True)], scale=0.3)
    assert not output[:, :, :, :3].any()
    assert output[:, :, :, 3:].abs().min() > 0


def test_sinks_after_fused_blocks(path: str) -> None:
    query, key, value = inputs(3, 6, 50)
    sink_logits = torch.randn(KV_HEADS, 3)
    blocks = [Block(key[:, :, part], value[:, :, part]) for part in (slice(0, 30), slice(30, 50))]
    output = block_attention(query, blocks, scale=0.3, sink_logits=sink_logits)
    expected = reference.attention(
        query.flatten(1, 2), key, value, scale=0.3, sink_logits=sink_logits.flatten()
    )
    torch.testing.assert_close(output.flatten(1, 2), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_many_blocks_in_half_precision(dtype: torch.dtype, fused_calls: list[bool]) -> None:
    """Every block's output is rounded to the dtype: the sum is to be no worse than plain torch."""
    query, key, value = (tensor.to(dtype) for tensor in inputs(3, 8, 960, dim=64))
    blocks = [Block(key[:, :, s : s + 96], value[:, :, s : s + 96]) for s in range(0, 960, 96)]
    output = block_attention(query, blocks, scale=0.125)
    assert fused_calls == [False] * 10
    flat = query.flatten(1, 2)
    truth = reference.attention(flat, key, value, scale=0.125)
    repeated = (states.repeat_interleave(3, dim=1) for states in (key, value))
    plain_key, plain_value = repeated
    plain = (flat @ plain_key.mT * 0.125).softmax(-1) @ plain_value
    error = (output.flatten(1, 2).float() - truth).abs().max()
    assert error <= 2 * (plain.float() - truth).abs().max()


def test_masks_and_softcap_take_the_tiles(fused_calls: list[bool]) -> None:
    query, key, value = inputs(3, 6, 50)
    mask = torch.zeros(1, 1, 1, 6, 50)
    block_attention(query, [Block(key, value, mask=lambda a, b: mask[..., a:b, :])], scale=0.3)
    block_attention(query, [Block(key, value)], scale=0.3, softcap=4.0)
    assert not fused_calls
    block_attention(query, [Block(key, value, 2, causal=True)], scale=0.3)
    assert fused_calls == [True]  # new tokens 2..5 over tokens 0..3, the rest of the block unseen
