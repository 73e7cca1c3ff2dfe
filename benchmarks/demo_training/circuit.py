"""The models that are trained here before training: random but for an induction circuit.

From random weights nothing but guessing is learnt within minutes. Layer 0 tells each token the
names that stand before it: one place before, two places, and so on. A lookup of a later layer goes
from a token so many places after a name to the token one place further after the same name, and
copies the value that it finds there: "... of amber is 4821" answers "... of amber?". Training then
changes all weights.
"""

import math
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

HEAD_DIM = 64
_UNIT = 0.06  # standard deviation of an embedding's entry
_CONSTANT = slice(0, 1)  # the same in all embeddings: lets a head attend by position alone
_NAME_DIM = 16
_NAME = slice(1, 17)  # which name a token is
_VALUE = slice(32, 96)  # which value a token is
_NAMES_BEFORE = 96  # where the names so many places before begin
# How layer 0 finds its neighbours: each rotary pair weighs so much of the next faster one. The fast
# pairs tell neighbours apart, the others rule out far places where the fast ones coincide: at 0.8
# no place up to 65536 away matches better than the one beside the right one.
_PAIR_WEIGHT = 0.8
_CONSTANT_SIZE = 10 * _UNIT  # large, so that norms may differ without hiding it
_NEIGHBOUR_MARGIN, _NAME_MARGIN = 24.0, 30.0  # attention scores of a match above the others


def before(places: int) -> slice:
    """Where a token holds which name stands so many places before it."""
    end = _NAMES_BEFORE + places * _NAME_DIM
    return slice(end - _NAME_DIM, end)


@dataclass(frozen=True)
class Lookup:
    """A head that matches a name, and copies from where it finds it.

    Attributes:
        layer, kv_head: where; its first query head asks.
        asks, finds: of the asking token and of the one that is found, which name must be equal.
        copies, into: what of the one that is found goes where in the asking token.
    """

    layer: int
    kv_head: int
    asks: slice
    finds: slice
    copies: slice
    into: slice


@dataclass(frozen=True)
class Circuit:
    """A model's heads and what they do before training.

    Attributes:
        num_before: for how many places layer 0 tells a token which name stands before it.
        lookups: of the layers after it.
        noise: how much is left of the random weights with which layers add to the residual stream.
            Lookups that follow one another need little of it: the second takes what is noise in
            the first one's answer for a name, finds something, and writes its value over.
        strength: how much larger than in an embedding a lookup writes what it copies.
    """

    num_heads: int
    num_kv_heads: int
    num_before: int
    lookups: tuple[Lookup, ...]
    noise: float = 0.1
    strength: float = 2.0

    @property
    def end(self) -> int:
        """Where the part of the residual stream ends that the circuit uses."""
        written = (before(self.num_before), *(lookup.into for lookup in self.lookups))
        return max(part.stop for part in written)


FACTS = Circuit(4, 2, 2, (Lookup(2, 0, before(1), before(2), _VALUE, _VALUE),))
"""What the shipped model begins as: a value of one token is found two places after its name."""

_REFERRED = before(6)  # free with five names before: which name a name refers to
LOOKUPS = Circuit(
    8,
    4,
    5,
    (
        *(Lookup(1, i, before(i + 1), before(i + 2), _VALUE, _VALUE) for i in range(3)),
        Lookup(1, 3, before(1), before(2), _NAME, _REFERRED),
        Lookup(2, 0, _REFERRED, before(2), _VALUE, _VALUE),
        Lookup(2, 1, before(4), before(5), _VALUE, _VALUE),
    ),
    noise=0.005,
    strength=3.0,
)
"""Values of four tokens, each of which is found a place further after the name than the one before,
and names that refer to names: what the first lookup finds the second, a layer on, looks up."""


def build_model(
    circuit: Circuit, vocab_size: int, name_ids: list[int], value_ids: list[int]
) -> LlamaForCausalLM:
    """A Llama of some three million parameters (fp32) with the circuit in it."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=circuit.num_heads,
        num_key_value_heads=circuit.num_kv_heads,
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
            layer.self_attn.o_proj.weight.mul_(circuit.noise)
            layer.mlp.down_proj.weight.mul_(circuit.noise)
        embeddings = model.model.embed_tokens.weight
        scale = _init_embeddings(embeddings, circuit.end, name_ids, value_ids)
        _init_neighbour_heads(model, circuit.num_before, scale)
        for lookup in circuit.lookups:
            _init_lookup(model, lookup, circuit.strength * scale, scale)
    return model


def _init_embeddings(
    weight: torch.Tensor, circuit_end: int, name_ids: list[int], value_ids: list[int]
) -> float:
    """Fills [vocab, hidden] in place; returns the rms of a row."""
    weight.normal_(std=_UNIT)
    weight[:, :circuit_end] = 0
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


def _init_neighbour_heads(model: LlamaForCausalLM, num_before: int, scale: float) -> None:
    """Layer 0: query head i attends i + 1 places back and copies the name it finds there."""
    attention = model.model.layers[0].self_attn
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    half = HEAD_DIM // 2
    pairs = torch.arange(half)
    theta = model.config.rope_parameters["rope_theta"]
    frequency = theta ** (-pairs.double() / half)
    share = _PAIR_WEIGHT**pairs
    # The right place must outweigh its neighbour, whose match is worse by this much.
    lost = float((share * (1 - frequency.cos())).sum())
    gain = (_NEIGHBOUR_MARGIN * math.sqrt(HEAD_DIM) / lost * share).sqrt()
    gain = gain[:, None].float() * (scale / _CONSTANT_SIZE)
    identity = torch.eye(_NAME_DIM)
    for kv_head in range(math.ceil(num_before / group)):
        key, value = (_rows(part.weight, kv_head) for part in (attention.k_proj, attention.v_proj))
        key.zero_()[:half, _CONSTANT] = gain
        value.zero_()[:_NAME_DIM, _NAME] = identity
    for head in range(num_before):
        angle = -(head + 1) * frequency
        turned = torch.cat([angle.cos(), angle.sin()])[:, None].float()
        query = _rows(attention.q_proj.weight, head).zero_()
        query[:, _CONSTANT] = gain.repeat(2, 1) * turned
        start = head * HEAD_DIM
        attention.o_proj.weight[before(head + 1), start : start + _NAME_DIM] = scale * identity


def _init_lookup(model: LlamaForCausalLM, lookup: Lookup, written: float, scale: float) -> None:
    """The first query head of a KV head asks, finds and copies as `lookup` says."""
    attention = model.model.layers[lookup.layer].self_attn
    head = lookup.kv_head * model.config.num_attention_heads // model.config.num_key_value_heads
    half = HEAD_DIM // 2
    # The slowest rotary pairs turn least, so that names match at any distance.
    slow = torch.arange(half - _NAME_DIM // 2, half)
    rows = torch.cat([slow, slow + half])
    gain = math.sqrt(_NAME_MARGIN * math.sqrt(HEAD_DIM)) / (6 * _UNIT / scale)
    identity = torch.eye(lookup.copies.stop - lookup.copies.start)
    query = _rows(attention.q_proj.weight, head).zero_()
    key = _rows(attention.k_proj.weight, lookup.kv_head).zero_()
    value = _rows(attention.v_proj.weight, lookup.kv_head).zero_()
    query[rows, lookup.asks] = gain * torch.eye(_NAME_DIM)
    key[rows, lookup.finds] = gain * torch.eye(_NAME_DIM)
    value[: len(identity), lookup.copies] = identity
    start = head * HEAD_DIM
    output = attention.o_proj.weight[lookup.into, start : start + len(identity)]
    output.copy_(written * identity)


def _rows(weight: torch.Tensor, head: int) -> torch.Tensor:
    """The part of a projection's weight [heads * head_dim, hidden] that makes one head."""
    return weight[head * HEAD_DIM : (head + 1) * HEAD_DIM]
