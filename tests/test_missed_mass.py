"""A target instead of a budget: what steps miss, by the index and in truth."""

import copy
import pickle
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor

from arkcache import ArkCache, CacheConfig, CacheStats, ConfigError, KVCacheManager, detach
from arkcache.backend import choose_backend
from arkcache.demo.models import load_model
from arkcache.engines.missed import MissedLog
from arkcache.stats import AUDIT_MARGIN, MissedMass
from tests.test_estimation import FORMATS, HOLES, LEFT_PADDED
from tests.twins import Twins, attend_latents, small_config

TARGET: dict[str, Any] = {"index": "tokens", "target_missed_mass": 0.1}
UNROTATED = [name for name in FORMATS if name != "rotated"]
"""A token's code, and with it a page's mass, may hang on the rounding of a rotation."""


def exact_keys(batch: int, columns: int, dim: int) -> Tensor:
    """Keys [batch, 2, columns, dim] that two bits hold to the bit, in pages of four."""
    key = torch.randint(0, 4, (batch, 2, columns, dim)) * 0.5
    key[:, :, 0::4], key[:, :, 1::4] = 0.0, 1.5
    return key


# -- what a step attends --------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.001, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("size", [0.5, 2.0])
def test_a_step_attends_the_fewest_pages(size: float, group: int, target: float) -> None:
    config = small_config(budget_tokens=60, index="tokens", target_missed_mass=target)
    twins = Twins(config, group=group)
    twins.append(100)
    for _ in range(8):
        twins.append(1)
        twins.attend(size=size)
    twins.check()
    missed = twins.manager.stats().missed
    assert missed.num_estimates == 8 * 2 * 2
    assert missed.estimated is not None
    assert missed.capped_share is not None
    if missed.capped_share == 0:
        assert missed.estimated <= missed.estimated_worst <= target


@pytest.mark.parametrize("name", UNROTATED)
@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("estimate_pages", [0, None, 2])
@pytest.mark.parametrize("mask", [None, LEFT_PADDED, HOLES], ids=["plain", "left", "holes"])
def test_formats_paddings_and_pool_sizes(
    name: str, factor: float, mask: Tensor | None, estimate_pages: int | None
) -> None:
    settings = TARGET | FORMATS[name] | {"estimate_pages": estimate_pages, "audit_every": 2}
    twins = Twins(small_config(budget_tokens=((12, 36),), device_pool_factor=factor, **settings))
    for step in range(60):
        twins.append(1, None if mask is None else mask[:, step : step + 1])
        if step % 4 == 3:
            twins.attend(size=2.0)
    twins.check()


@pytest.mark.parametrize("name", ["raw", "packed"])
def test_masks_softcap_and_sinks(name: str) -> None:
    """All of them are part of the mass."""
    twins = Twins(small_config(**TARGET, **FORMATS[name]))
    twins.append(80)
    for shape in ((1, 1), (2, 1), (2, 4)):
        mask = twins.randn(*shape, 1, 80)
        hides = mask > -1
        hides[:, :, :, 20:24] = False
        for given in (mask, hides):
            twins.attend(mask=given, softcap=2.0, sinks=twins.randn(4))
            twins.attend(mask=given, size=3.0)


def test_latents() -> None:
    manager = attend_latents(small_config(**TARGET, audit_every=1), group=2)
    missed = manager.stats().missed
    assert missed.true == pytest.approx(missed.compared, abs=0.1)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_crop_beams_and_copies(duplicate: Any) -> None:
    twins = Twins(small_config(**TARGET, audit_every=1))
    twins.append(90)
    twins.attend()
    twins.crop(41)
    twins.attend()
    twins.keep_sequences([1, 1, 0])
    clone = duplicate(twins)
    for one in (twins, clone):
        one.append(30)
        one.attend()
        one.check()
        assert one.manager.stats().missed.num_audits == 2 * (2 + 2 + 3)


# -- the estimate and the truth -------------------------------------------------------------------


@pytest.mark.parametrize("target", [None, 0.1])
@pytest.mark.parametrize("padding", [None, LEFT_PADDED, HOLES], ids=["plain", "left", "holes"])
def test_an_exact_index_estimates_the_truth(padding: Tensor | None, target: float | None) -> None:
    """To rounding, with whatever else attention has to do."""
    config = small_config(index="tokens", index_bits=2, target_missed_mass=target, audit_every=1)
    for how in (
        {},
        {"softcap": 2.0, "sinks": torch.randn(4), "scale": 0.5},
        {"mask": torch.randn(2, 4, 1, 60) > -1},
        {"mask": torch.randn(2, 1, 1, 60)},
    ):
        manager = KVCacheManager(1, 2, 8, config)
        keys = exact_keys(2, 60, 8)
        if padding is not None:  # pages are made of tokens, not of columns
            for sequence, real in enumerate(padding):
                keys[sequence][:, real] = exact_keys(1, int(real.sum()), 8)[0]
        manager.append(0, keys, torch.randn(2, 2, 60, 8), padding)
        for _ in range(5):
            manager.attend(0, torch.randn(2, 4, 1, 8), **how)  # type: ignore[arg-type]
        ((one, other),) = manager.stats().missed_by_layer
        for head in (one, other):
            assert head.num_audits == head.num_compared == 10
            assert 0.01 < head.true_sum / 10 < 0.9
            assert head.compared_sum == pytest.approx(head.true_sum, rel=1e-4)
            if target is not None:
                assert head.estimated_sum == pytest.approx(head.true_sum, rel=1e-4)
                assert head.estimated_worst == pytest.approx(head.true_worst, rel=1e-4)
        assert manager.stats().missed.num_low == 0


@pytest.mark.parametrize("index", ["cuboid-mean", "tokens"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_truth_is_full_attentions(name: str, index: str) -> None:
    """With values that name their columns a full cache's output is the mass of each."""
    config = small_config(index=index, audit_every=1, **FORMATS[name] | {"group_size": 1})
    manager = KVCacheManager(1, 2, 8, config)
    full = KVCacheManager(1, 2, 8, small_config(budget_tokens=None, **FORMATS["raw"]))
    states = torch.randn(2, 2, 2, 100, 8)
    manager.append(0, *states)
    key, _ = manager.gather(0)
    full.append(0, key, states[1])
    query = torch.randn(2, 4, 1, 8)
    manager.attend(0, query)
    layer: Any = manager._layers[0]
    logits = query.unflatten(1, (2, 2)).squeeze(3) @ key.transpose(-1, -2) * 8**-0.5
    share = logits.softmax(dim=-1).mean(dim=2).flatten(0, 1)
    share = share.unflatten(1, (25, 4)).sum(dim=2)
    expected = []
    for row, pages in enumerate(layer.engine.places.page_of):
        out = sorted(set(range(1, 24)) - set(pages.tolist()))
        expected.append(float(share[row, out].sum()))
    missed = manager.stats().missed
    assert missed.true_sum == pytest.approx(sum(expected), rel=1e-4)
    assert missed.true_worst == pytest.approx(max(expected), rel=1e-4)
    assert missed.num_compared == (4 if index == "tokens" else 0)


def test_a_low_estimate_is_counted() -> None:
    """One bit away from the truth by more than the margin, and not below it."""
    truth = torch.tensor([0.5, 0.5, 0.5, 0.5]).numpy()
    log = MissedLog(2, None, 0, 1)
    log.audit(truth, truth - [0.0, 2 * AUDIT_MARGIN, AUDIT_MARGIN / 2, -0.3])
    assert [head.num_low for head in log.heads] == [0, 1]
    total = sum(log.heads, MissedMass())
    assert (total.num_audits, total.low_share) == (4, 0.25)


def test_estimates_hold_on_a_trained_model() -> None:
    """Of text that it reads, at most 1 % of the estimates are low."""
    model, tokenizer = load_model(None, torch.device("cpu"), "auto")
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :1500]
    settings = TARGET | {"num_dense_layers": 0, "budget_tokens": 512, "audit_every": 1}
    cache = ArkCache(model, CacheConfig(**settings))
    model.generate(ids, past_key_values=cache, max_new_tokens=64, do_sample=False)
    missed = cache.stats().missed
    detach(model)
    assert missed.num_compared >= 100
    assert missed.low_share is not None
    assert missed.low_share <= 0.01


# -- metadata -------------------------------------------------------------------------------------


def test_layers_take_turns() -> None:
    """One layer in three steps is audited; what it reads is streamed, and nothing else changes."""
    twins = Twins(small_config(audit_every=3), num_layers=4, batch=1)
    plain = Twins(small_config(backend="torch"), num_layers=4, batch=1)
    for one in (twins, plain):
        one.append(100)
    seen = []
    for _ in range(13):
        for mine, other in zip(twins.attend(), plain.attend(), strict=True):
            assert torch.equal(mine, other)
        seen.append([layer[0].num_audits for layer in twins.manager.stats().missed_by_layer])
    assert seen[0] == [1, 0, 0, 0]
    assert seen[2] == [1, 0, 0, 0]
    assert seen[3] == [1, 1, 0, 0]
    assert seen[11] == [1, 1, 1, 1]
    assert seen[12] == [2, 1, 1, 1]
    mine, other = twins.manager.stats(), plain.manager.stats()
    assert mine.attended_tokens == other.attended_tokens
    assert mine.bytes_streamed == 5 * 24 * twins.whole_page_bytes
    assert other.missed_by_layer == ()
    assert mine.missed.num_estimates == 0
    assert mine.missed.estimated is None


def test_what_is_summed_and_what_is_not() -> None:
    one = MissedMass(num_estimates=2, estimated_sum=0.5, estimated_worst=0.4, num_capped=1)
    two = MissedMass(num_estimates=2, estimated_sum=0.1, estimated_worst=0.1)
    both = CacheStats(missed_by_layer=((one,),)) + CacheStats(missed_by_layer=((two, one),))
    assert both.missed_by_layer == ((one,), (two, one))
    missed = both.missed
    assert (missed.num_estimates, missed.estimated_worst) == (6, 0.4)
    assert missed.estimated == pytest.approx(1.1 / 6)
    assert missed.capped_share == pytest.approx(2 / 6)
    assert CacheStats().missed == MissedMass()


def test_a_context_that_places_hold_is_pruned_too() -> None:
    """The target decides, not the length: keys that stand out need few pages."""
    manager = KVCacheManager(1, 1, 8, small_config(budget_tokens=200, **TARGET))
    key = torch.zeros(1, 1, 100, 8)
    key[:, :, 40:44] = 5.0
    manager.append(0, key, torch.randn(1, 1, 100, 8))
    manager.attend(0, torch.ones(1, 1, 1, 8), scale=1.0)
    stats = manager.stats()
    assert stats.attended_tokens == 4 + 4 + 4
    assert stats.missed.estimated_worst < 1e-6


def test_the_kernels_refuse_audits_by_name(caplog: pytest.LogCaptureFixture) -> None:
    cuda, config = torch.device("cuda"), CacheConfig(**TARGET, audit_every=5)
    with caplog.at_level("INFO", logger="arkcache"):
        assert choose_backend(config, cuda, torch.half, latent=False) == "torch"
    assert "audit_every" in caplog.text
    with pytest.raises(ConfigError, match=r"audit_every.*backend='auto'"):
        KVCacheManager(4, 2, 8, CacheConfig(**TARGET, audit_every=5, backend="triton"))
