"""The demonstration model before training: random but for an induction circuit.

From random weights nothing but guessing is learnt within minutes. The circuit spans three layers:
layer 0 tells each token the names one and two places before it; layer 2 looks, from a token that
follows a name, for the token two places after the same name, and copies the value it finds there
("... of amber is 4821" answers "... of amber?"). Training then changes all weights.
"""

import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM

HEAD_DIM = 64
_UNIT = 0.06  # standard deviation of an embedding's entry
_CONSTANT = slice(0, 1)  # the same in all embeddings: lets a head attend by position alone
_NAME_DIM = 16
_NAME = slice(1, 17)  # which name a token is
_VALUE = slice(32, 96)  # which value a token is
_NAME_BEFORE = (slice(96, 112), slice(112, 128))  # the name one place before, two places before
# How layer 0 finds its neighbours: each rotary pair weighs so much of the next faster one. The fast
# pairs tell neighbours apart, the others rule out far places where the fast ones coincide: at 0.8
# no place up to 65536 away matches better than the one beside the right one.
_PAIR_WEIGHT = 0.8
_CONSTANT_SIZE = 10 * _UNIT  # large, so that norms may differ without hiding it
_NEIGHBOUR_MARGIN, _NAME_MARGIN = 24.0, 30.0  # attention scores of a match above the others
_RETRIEVAL_LAYER = 2


def build_model(vocab_size: int, name_ids: list[int], value_ids: list[int]) -> LlamaForCausalLM:
    """A Llama of 2.8 million parameters (fp32) with the circuit in layers 0 and 2."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            # The embeddings are small: what layers add to them must begin smaller.
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
        scale = _init_embeddings(model.model.embed_tokens.weight, name_ids, value_ids)
        _init_neighbour_heads(model, scale)
        _init_retrieval_head(model, scale)
    return model


def _init_embeddings(weight: torch.Tensor, name_ids: list[int], value_ids: list[int]) -> float:
    """Fills [vocab, hidden] in place; returns the rms of a row."""
    weight.normal_(std=_UNIT)
    weight[:, : _NAME_BEFORE[1].stop] = 0
    codes = _spread_codes(len(name_ids), _NAME_DIM)
    weight[name_ids, _NAME] = 6 * _UNIT * codes
    weight[value_ids, _VALUE] = torch.randn(len(value_ids), HEAD_DIM) * _UNIT
    # Equal norms: the constant must stay constant when the first layer normalises its input.
    scale = float(weight.square().mean().sqrt())
    weight.mul_(scale / weight.square().mean(-1, keepdim=True).sqrt())
    weight[:, _CONSTANT] = _CONSTANT_SIZE
    return float(weight.square().mean().sqrt())


def _spread_codes(num_codes: int, dim: int, num_rounds: int = 200) -> torch.Tensor:
    """Unit vectors [num_codes, dim] that keep away from each other."""
    codes = torch.nn.functional.normalize(torch.randn(num_codes, dim), dim=-1)
    for _ in range(num_rounds):
        push = torch.exp(10 * (codes @ codes.T - 1)).fill_diagonal_(0)
        codes = torch.nn.functional.normalize(codes - 0.3 * push @ codes, dim=-1)
    return codes


def _init_neighbour_heads(model: LlamaForCausalLM, scale: float) -> None:
    """Layer 0: query heads 0 and 1 (one KV head) attend one and two places back, copy names."""
    attention = model.model.layers[0].self_attn
    half = HEAD_DIM // 2
    pairs = torch.arange(half)
    theta = model.config.rope_parameters["rope_theta"]
    frequency = theta ** (-pairs.double() / half)
    share = _PAIR_WEIGHT**pairs
    # The right place must outweigh its neighbour, whose match is worse by this much.
    lost = float((share * (1 - frequency.cos())).sum())
    gain = (_NEIGHBOUR_MARGIN * math.sqrt(HEAD_DIM) / lost * share).sqrt()
    gain = gain[:, None].float() * (scale / _CONSTANT_SIZE)
    attention.k_proj.weight[:HEAD_DIM] = 0
    attention.k_proj.weight[:half, _CONSTANT] = gain
    attention.q_proj.weight[: 2 * HEAD_DIM] = 0
    for head, output in enumerate(_NAME_BEFORE):
        angle = -(head + 1) * frequency
        start = head * HEAD_DIM
        turned = torch.cat([angle.cos(), angle.sin()])[:, None].float()
        query = attention.q_proj.weight[start : start + HEAD_DIM]
        query[:, _CONSTANT] = gain.repeat(2, 1) * turned
        identity = torch.eye(_NAME_DIM)
        attention.o_proj.weight[output, start : start + _NAME_DIM] = scale * identity
    attention.v_proj.weight[:HEAD_DIM] = 0
    attention.v_proj.weight[:_NAME_DIM, _NAME] = torch.eye(_NAME_DIM)


def _init_retrieval_head(model: LlamaForCausalLM, scale: float) -> None:
    """Layer 2, head 0: the name one place back asks for the same name two places back."""
    attention = model.model.layers[_RETRIEVAL_LAYER].self_attn
    half = HEAD_DIM // 2
    # The slowest rotary pairs turn least, so that names match at any distance.
    slow = torch.arange(half - _NAME_DIM // 2, half)
    rows = torch.cat([slow, slow + half])
    gain = math.sqrt(_NAME_MARGIN * math.sqrt(HEAD_DIM)) / (6 * _UNIT / scale)
    for weight in (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight):
        weight[:HEAD_DIM] = 0
    attention.q_proj.weight[rows, _NAME_BEFORE[0]] = gain * torch.eye(_NAME_DIM)
    attention.k_proj.weight[rows, _NAME_BEFORE[1]] = gain * torch.eye(_NAME_DIM)
    attention.v_proj.weight[:HEAD_DIM, _VALUE] = torch.eye(HEAD_DIM)
    attention.o_proj.weight[_VALUE, :HEAD_DIM] = 2 * scale * torch.eye(HEAD_DIM)
