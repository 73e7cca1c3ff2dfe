"""The reference against numbers worked out by hand and against PyTorch's own attention."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from arkcache.kernels import reference

PAGE = torch.tensor([[[0.0, 0.0], [4.0, 0.0], [1.0, 2.0]]])
"""One page of three keys; its box is [0, 4] x [0, 2], its center (2, 1)."""


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("centroid", [5 / 3, 2 / 3]),
        ("cuboid-max", [2.0, 1.0, 2.0, 1.0]),
        ("cuboid-mean", [2, 1, 5 / 3, 1]),
        ("cuboid-center", [2, 1, 1.5, 1]),
        ("sphere-max", [2, 1, math.sqrt(5)]),
        ("sphere-mean", [2, 1, (2 * math.sqrt(5) + math.sqrt(2)) / 3]),
        ("sphere-center", [2, 1, (math.sqrt(5) + math.sqrt(2)) / 2]),
    ],
)
def test_volumes_by_hand(kind: str, expected: list[float]) -> None:
    digest = reference.bounding_volume(PAGE, kind)
    torch.testing.assert_close(digest, torch.tensor([expected]))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("centroid", 2 * 5 / 3 - 2 * 2 / 3),
        ("cuboid-max", (2.0 * 2 - 2 * 1) + (2 * 2 + 2 * 1)),
        ("sphere-max", (2 * 2 - 2 * 1) + math.sqrt(8) * math.sqrt(5)),
    ],
)
def test_scores_by_hand(kind: str, expected: float) -> None:
    digest = reference.bounding_volume(PAGE[None], kind)
    score = reference.volume_score(torch.tensor([[[2.0, -2.0]]]), digest, kind)
    torch.testing.assert_close(score, torch.tensor([[[expected]]]))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantised_keys_are_within_half_a_step(bits: int) -> None:
    key = torch.randn(3, 16, 5)
    codes, scale, zero = reference.quantize_page(key, bits)
    assert codes.min() == 0
    assert codes.max() == 2**bits - 1
    assert ((codes * scale + zero - key).abs() <= scale / 2 * 1.0001).all()


def test_token_score_is_the_log_of_the_softmax_mass() -> None:
    key, query = torch.randn(1, 4, 8, 6), torch.randn(1, 2, 6)
    score = reference.token_score(query, key, torch.ones(1, 4, 1, 6), torch.zeros(1, 4, 1, 6))
    mass = torch.softmax(torch.einsum("rgd,rptd->rgpt", query, key).flatten(2), dim=-1)
    torch.testing.assert_close(score.softmax(-1), mass.unflatten(2, (4, 8)).sum(-1))


@pytest.mark.parametrize("group", [1, 3])
def test_attention_is_pytorchs(group: int) -> None:
    query, key = torch.randn(2, 2 * group, 5, 8), torch.randn(2, 2, 9, 8)
    value, mask = torch.randn(2, 2, 9, 4), torch.rand(2, 1, 5, 9) < 0.7
    output = reference.attention(query, key, value, scale=0.3, mask=mask)
    expected = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(output, expected)


def test_attention_softcap_and_sinks_by_hand() -> None:
    query = torch.tensor([[[[1.0]]]])
    key, value = torch.tensor([[[[2.0], [0.0]]]]), torch.tensor([[[[1.0], [10.0]]]])
    output = reference.attention(query, key, value, scale=1.0, softcap=1.0)
    weight = math.exp(math.tanh(2.0))
    assert output.item() == pytest.approx((weight + 10) / (weight + 1))
    output = reference.attention(query, key, value, scale=1.0, sink_logits=torch.tensor([3.0]))
    weight, extra = math.exp(2.0), math.exp(3.0)
    assert output.item() == pytest.approx((weight + 10) / (weight + 1 + extra))


def test_a_query_that_may_attend_nothing_gets_zeros() -> None:
    query, key, value = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    mask = torch.tensor([[True, True, True], [False, False, False]])
    output = reference.attention(query, key, value, scale=1.0, mask=mask)
    assert output[0, 0, 0].any()
    assert not output[0, 0, 1].any()
