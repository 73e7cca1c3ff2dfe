"""Pages that are not attended are estimated: against full attention, by hand, and bit for bit."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arkcache import CacheConfig, KVCacheManager
from arkcache.config import GROUP_REDUCTIONS, INDEXES, SHARE_MEAN
from arkcache.engines.step import Step
from arkcache.engines.views import page_bias
from arkcache.kernels import reference
from arkcache.pages.bookkeeping import Ids
from tests.twins import Twins, attend_latents, small_config

FORMATS: dict[str, dict[str, Any]] = {
    "raw": {},
    "unpacked": {"key_bits": 8, "value_bits": 4, "group_size": 8},
    "packed": {"key_bits": 4, "value_bits": 4, "group_size": 8, "packed_slots": True},
    "rotated": {"key_bits": 4, "value_bits": 2, "group_size": 8, "rotation": "both"},
    "two": {
        "key_bits": 8,
        "value_bits": 8,
        "coarse_value_bits": 2,
        "group_size": 8,
        "demote_after": 0,
        "demote_below": 1.0,
    },
}
LEFT_PADDED = torch.arange(60) >= torch.tensor([[0], [25]])
HOLES = torch.rand(2, 60, generator=torch.Generator().manual_seed(5)) < 0.5


def in_equal_pages(columns: int, dim: int, page_size: int = 4) -> Tensor:
    """Keys [2, 2, columns, dim] that are equal within each page."""
    pages = torch.randn(2, 2, -(-columns // page_size), dim)
    return pages.repeat_interleave(page_size, dim=2)[:, :, :columns].contiguous()


# -- what must hold -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"softcap": 1.5}, {"sinks": torch.tensor([0.5, 2, -1, 0])}])
@pytest.mark.parametrize("budget", [12, 16, 32, ((12, 40),)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_keys_in_a_page_are_full_attention(
    dtype: torch.dtype, budget: Any, how: dict[str, Any]
) -> None:
    """At any budget, one that selects nothing included."""
    config = small_config(budget_tokens=budget, estimate_pages=None)
    manager = KVCacheManager(1, 2, 16, config, dtype=dtype)
    key, value = in_equal_pages(100, 16).to(dtype), torch.randn(2, 2, 100, 16).to(dtype)
    query = 2 * torch.randn(2, 4, 1, 16).to(dtype)
    manager.append(0, key, value)
    output = manager.attend(0, query, **how)
    dense = {"sink_logits" if name == "sinks" else name: given for name, given in how.items()}
    expected = reference.attention(query, key, value, scale=0.25, **dense)
    # Logits, means and ln n are rounded to the dtype.
    bound = 8 * torch.finfo(dtype).eps
    assert float((output - expected).abs().max()) < bound
    without = KVCacheManager(1, 2, 16, small_config(budget_tokens=budget), dtype=dtype)
    without.append(0, key, value)
    assert float((without.attend(0, query, **how) - expected).abs().max()) > 2 * bound


def test_a_page_of_unlike_keys_by_hand() -> None:
    """Logits 0 and ln 3 in one page weigh 1 + 3 = 4; its pseudo token weighs 2 sqrt(3)."""
    config = CacheConfig(
        page_size=2,
        budget_tokens=3,
        num_sink_tokens=0,
        num_recent_tokens=1,
        num_dense_layers=0,
        estimate_pages=None,
    )
    manager = KVCacheManager(1, 1, 1, config)
    key = torch.tensor([0.0, math.log(3), 0.0])
    value = torch.tensor([5.0, 7.0, 0.0])  # the mean value of the page: 6
    manager.append(0, key.view(1, 1, 3, 1), value.view(1, 1, 3, 1))
    output = manager.attend(0, torch.ones(1, 1, 1, 1), scale=1.0)
    weight = 2 * math.sqrt(3)
    assert weight == pytest.approx(3.464, abs=1e-3)
    assert output.item() == pytest.approx(6 * weight / (weight + 1), rel=1e-6)
    assert manager.stats().attended_tokens == 1


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("columns", [1, 8, 30, 31])
def test_all_selected_is_bit_equal_to_without(name: str, columns: int) -> None:
    outputs = []
    for estimate_pages in (0, None, 2):
        formats = {"backend": "torch"} | FORMATS[name]
        config = small_config(estimate_pages=estimate_pages, **formats)
        manager = KVCacheManager(1, 2, 8, config)
        torch.manual_seed(1)
        manager.append(0, *torch.randn(2, 2, 2, columns, 8))
        query = torch.randn(2, 4, 1, 8)
        mask = torch.randn(2, 4, 1, columns) > -1
        mask[..., -1] = True
        outputs.append([manager.attend(0, query), manager.attend(0, query, mask=mask)])
    for others in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], others, strict=True))


def test_pages_of_one_token_lose_nothing() -> None:
    config = small_config(page_size=1, estimate_pages=None, stream_block_tokens=16)
    twins = Twins(config)
    twins.append(100)
    query = twins.query()
    output = twins.manager.attend(0, query)
    full = twins.oracle.attend_many(0, query)
    torch.testing.assert_close(output, full, rtol=1e-5, atol=1e-5)


def test_the_best_pages_are_estimated_first() -> None:
    """Of three pages that are left out the two with more attention count, the third does not."""
    config = small_config(budget_tokens=12, index="tokens", index_bits=8, estimate_pages=2)
    manager = KVCacheManager(1, 1, 8, config)
    key = torch.zeros(1, 1, 21, 8)
    for page, size in enumerate((0.0, 2.0, 1.0, 3.0)):
        key[:, :, 4 * page : 4 * page + 4, 0] = size
    value = torch.zeros(1, 1, 21, 8)
    for page in range(4):
        value[:, :, 4 * page : 4 * page + 4, page] = 1.0
    manager.append(0, key, value)
    query = torch.eye(8)[:1].view(1, 1, 1, 8)
    output = manager.attend(0, query, scale=1.0)[0, 0, 0]
    weights = [4 * math.exp(size) for size in (0.0, 2.0, 3.0)]
    expected = torch.tensor([weights[0], weights[1], 0.0, weights[2]]) / (sum(weights) + 5)
    torch.testing.assert_close(output[:4], expected)


# -- with everything else -------------------------------------------------------------------------


@pytest.mark.parametrize("estimate_pages", [None, 1, 4])
@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("reduction", [SHARE_MEAN, *GROUP_REDUCTIONS])
def test_decoding(index: str, reduction: str, estimate_pages: int | None) -> None:
    settings = {"index": index, "group_reduction": reduction, "estimate_pages": estimate_pages}
    twins = Twins(small_config(**settings))
    twins.append(50)
    for _ in range(12):
        twins.append(1)
        twins.attend()
    twins.check()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("mask", [None, LEFT_PADDED, HOLES], ids=["plain", "left", "holes"])
def test_formats_paddings_and_pool_sizes(name: str, factor: float, mask: Tensor | None) -> None:
    config = small_config(
        budget_tokens=((16, 28),), device_pool_factor=factor, estimate_pages=None, **FORMATS[name]
    )
    twins = Twins(config)
    for step in range(60):
        twins.append(1, None if mask is None else mask[:, step : step + 1])
        if step % 4 == 3:
            twins.attend()
    twins.check()


@pytest.mark.parametrize("estimate_pages", [None, 2])
@pytest.mark.parametrize("name", ["raw", "packed"])
def test_masks_softcap_and_sinks(name: str, estimate_pages: int | None) -> None:
    """Pages that a mask hides, in part, for some query heads, or shifts."""
    twins = Twins(small_config(estimate_pages=estimate_pages, **FORMATS[name]))
    twins.append(80)
    for shape in ((1, 1), (2, 1), (2, 4)):
        mask = twins.randn(*shape, 1, 80)
        hides = mask > -1
        hides[:, :, :, 20:24] = False
        for given in (mask, hides, mask.masked_fill(~hides, torch.finfo(mask.dtype).min)):
            twins.attend(mask=given, softcap=2.0, sinks=twins.randn(4))
            twins.attend(mask=given)


def test_a_page_that_is_hidden_in_part_is_not_estimated() -> None:
    """By -inf, or as some models do by the most negative number; other masks add their mean."""
    mask = torch.tensor([1.0, 2, 3, 6] * 3)
    mask[5], mask[10] = torch.finfo(mask.dtype).min, -math.inf

    def bias(tokens: Ids) -> Tensor:
        return mask[torch.from_numpy(tokens)][:, :, None, None]

    query = torch.zeros(1, 1, 1, 8)
    step = Step(query, 1.0, query, bias=bias)
    mean = page_bias(step, small_config(), np.arange(3).reshape(1, 1, 3))
    assert mean.flatten().tolist() == [3.0, -math.inf, -math.inf]


def test_latents_are_expanded() -> None:
    """Mean latents expand to what the mean of expanded latents is."""
    attend_latents(small_config(estimate_pages=None))


def test_crop_and_seal_again() -> None:
    """A page that is sealed anew is estimated by what it holds then."""
    twins = Twins(small_config(estimate_pages=None))
    twins.append(90)
    twins.crop(41)
    twins.attend()
    twins.append(60)
    twins.attend()
    twins.check()


@pytest.mark.parametrize("index", [[1, 0], [1, 1, 0], [1]])
def test_keep_sequences(index: list[int]) -> None:
    twins = Twins(small_config(estimate_pages=None), batch=2)
    twins.append(70)
    twins.keep_sequences(index)
    twins.attend()
    twins.append(9)
    twins.attend()
    twins.check()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_lives_its_own_life(duplicate: Any) -> None:
    twins = Twins(small_config(estimate_pages=None))
    twins.append(70)
    clone = duplicate(twins)
    twins.crop(30)
    twins.append(50)
    for one in (twins, clone):
        one.attend()
        one.append(8)
        one.attend()
        one.check()


def test_estimates_are_no_pages_to_importance() -> None:
    """What pages receive in a step is their share of all that is attended, estimates included."""
    config = small_config(estimate_pages=None, **FORMATS["two"] | {"demote_after": 1000})
    manager = KVCacheManager(1, 1, 8, config)
    key, value = in_equal_pages(100, 8)[:1, :1], torch.randn(1, 1, 100, 8)
    query = torch.randn(1, 1, 1, 8)
    manager.append(0, key, value)
    manager.attend(0, query, scale=1.0)
    layer: Any = manager._layers[0]
    share = (query[0, 0] @ key[0, 0].T).softmax(dim=1).unflatten(1, (25, 4)).sum(dim=2)[0]
    held = layer.engine.places.page_of[0]
    received = torch.zeros(25)
    received[held] = share[held]
    # 8-bit keys are a little off.
    mass = torch.from_numpy(layer.engine._importance.mass[0, :25])
    torch.testing.assert_close(mass, received, rtol=0.05, atol=1e-3)


# -- what it takes ---------------------------------------------------------------------------------


def test_means_count_as_digests() -> None:
    plain, estimating = (
        Twins(small_config(estimate_pages=n, backend="torch"), value_dim=4) for n in (0, None)
    )
    for twins in (plain, estimating):
        twins.append(2000)
    means = estimating.manager.stats().digest_bytes - plain.manager.stats().digest_bytes
    layer: Any = estimating.manager._layers[0]
    assert means == layer.engine._summaries.nbytes
    per_page = 2 * 2 * (8 + 4) * 4  # sequences, heads, dims, bytes
    assert 499 * per_page <= means <= 1.125 * 499 * per_page
