"""The evaluation with the shipped model: orderings, intervals, seeds, interrupts, methods."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel

from arkcache import CacheConfig, KVCacheManager
from arkcache.demo import run as demo
from arkcache.demo.baselines import FullLayer, attention_received, held
from arkcache.demo.models import load_model
from arkcache.errors import ConfigError, InputError
from arkcache.evaluation import run as evaluation
from arkcache.evaluation.decoding import Bookmark, Decoder
from arkcache.evaluation.figures import Interval, bootstrap, language_rows, task_rows, wilson
from arkcache.evaluation.methods import Reading, parse_method
from arkcache.evaluation.ratings import OracleIndex, RandomIndex
from arkcache.evaluation.records import Asked, Budget, Case, Cost, Predicted, Result
from arkcache.evaluation.run import Settings
from arkcache.evaluation.scissorhands import ScissorhandsLayer, attended_little
from arkcache.evaluation.snapkv import WINDOW_TOKENS, pyramid_budgets
from arkcache.evaluation.table import render
from arkcache.huggingface import ArkCache
from arkcache.kernels.torch_token_rows import TokenRows
from arkcache.layers.paged import PagedLayer

METHODS = ("ark:num_dense_layers=0,index=tokens", "oracle:num_dense_layers=0", "random", "sinks")
SMALL = Settings(
    tasks=("facts", "language"),
    lengths=(1024,),
    budgets=("256",),
    methods=METHODS,
    num_questions=6,
    num_passages=2,
    num_steps=6,
)
TINY = dataclasses.replace(SMALL, tasks=("facts",), lengths=(384,), num_questions=2)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with demo.threads(1):
        yield


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_model(None, torch.device("cpu"), "auto")[0]


@pytest.fixture(scope="module")
def result() -> Result:
    return evaluation.run(SMALL)


def figures(result: Result) -> dict[str, object]:
    """All but what time alone decides."""
    values = json.loads(json.dumps(result.to_dict()))
    del values["seconds"]
    for cost in values["costs"]:
        del cost["ms_per_token"]
    return values


# -- what is measured -----------------------------------------------------------------------------


def test_pages_that_matter_keep_what_others_lose(result: Result) -> None:
    rows = {row.case.method: row for row in task_rows(result)}
    full, ark, oracle, random, sinks = (rows[name] for name in ("full", *METHODS))
    assert full.num_right == full.num_full_right == full.num_asked == 6
    assert full.claimed
    assert full.retention == Interval(1, 1, 1)
    for best in (ark, oracle):
        for worst in (random, sinks):
            assert best.accuracy > worst.accuracy
    assert ark.spent.attended_tokens < full.spent.attended_tokens / 3


def test_language_is_predicted_best_by_the_full_cache(result: Result) -> None:
    rows = {row.case.method: row for row in language_rows(result)}
    full, oracle = rows["full"], rows[METHODS[1]]
    assert full.kl == full.nll_difference == Interval(0, 0, 0)
    assert full.agreement == 1
    assert full.num_tokens == 12
    assert all(row.kl.value > 0 for name, row in rows.items() if name != "full")
    assert oracle.kl.low <= oracle.kl.value <= oracle.kl.high
    assert len({one.source for one in result.predicted}) == 2


def test_free_runs_are_the_methods_own(result: Result) -> None:
    rows = {row.case.method: row for row in language_rows(result)}
    full = rows["full"]
    assert full.num_free == 6
    assert full.free_run == Interval(6, 6, 6)
    assert full.free_agreement == 1
    for row in rows.values():
        assert 0 <= row.free_run.value / 6 <= row.free_agreement <= 1
    for one in result.predicted:
        assert len(one.said) == len(one.same) == 6
        # The first token comes after what was read and one token, as it does teacher forced.
        (known,) = (
            other
            for other in result.predicted
            if (other.case.method, other.passage) == ("full", one.passage)
        )
        if one.case.method != "random":  # lots are cast anew
            assert (one.said[0] == known.said[0]) == one.same[0]


def test_a_free_run_ends_at_the_first_difference() -> None:
    """It begins anew nowhere: 3 of 5, and 1 of 5, are 2 on average; 4 and 4 agree."""
    result = Result({}, {}, {})
    said = {"full": [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]], "ark": [[1, 2, 3, 0, 5], [1, 0, 3, 4, 5]]}
    for method, passages in said.items():
        case = Case("language", 384, method, "-" if method == "full" else "1/8")
        result.costs.append(Cost(case, 0, 1.0, 1, 0, 1.0))
        for number, own in enumerate(passages):
            result.predicted.append(Predicted(case, number, "", [0.0], [0.0], [True], own))
    ark = language_rows(result)[1]
    assert (ark.free_run.value, ark.num_free) == (2, 5)
    assert (ark.free_run.low, ark.free_run.high) == (1, 3)
    assert ark.free_agreement == pytest.approx(0.8)
    result.predicted = [dataclasses.replace(one, said=[]) for one in result.predicted]
    ark = language_rows(result)[1]  # measured before there were free runs
    assert np.isnan(ark.free_run.value)
    assert ark.num_free == 0


def test_two_runs_agree_to_the_digit(result: Result) -> None:
    first, again = (evaluation.run(TINY) for _ in range(2))
    other = evaluation.run(dataclasses.replace(TINY, seed=1))
    assert figures(first) == figures(again)
    assert first.asked[0].expected != other.asked[0].expected


def test_an_interrupt_keeps_what_was_measured() -> None:
    def interrupt(stage: str, *_: int) -> None:
        if "random" in stage:
            raise KeyboardInterrupt

    kept: list[int] = []
    before = torch.get_num_threads()
    result = evaluation.run(TINY, interrupt, lambda so_far: kept.append(len(so_far.asked)))
    assert not result.finished
    assert kept == [2, 4, 6]  # the full cache, ark, oracle
    assert {row.case.method for row in task_rows(result)} == {"full", *METHODS[:2]}
    assert torch.get_num_threads() == before
    assert "Interrupted" in text_of(result)


def test_what_does_not_fit_is_said_and_the_rest_goes_on() -> None:
    methods = ("ark:page_size=64,num_recent_tokens=200", "sinks")
    result = evaluation.run(dataclasses.replace(TINY, methods=methods))
    assert result.finished
    assert {row.case.method for row in task_rows(result)} == {"full", "sinks"}
    assert "Not run: ark:page_size=64,num_recent_tokens=200 at 256: budget_tokens=256" in " ".join(
        text_of(result).split()
    )


def test_equal_bytes_are_equal_in_what_is_counted(model: PreTrainedModel) -> None:
    """A share of the full cache's bytes; what cannot be within it is not run, and says why."""
    fits = "ark:num_dense_layers=0,num_sink_tokens=8,num_recent_tokens=16,page_size=8"
    methods = (fits, "ark:num_dense_layers=2", "oracle", "random", "sinks")
    settings = dataclasses.replace(
        TINY, lengths=(1024,), budgets=("1/2B",), methods=methods, num_questions=1
    )
    result = evaluation.run(settings)
    full, *others = result.costs
    assert [cost.case.method for cost in others] == [fits, methods[3], "sinks"]
    sizes = model.config
    per_token = 2 * 4 * sizes.num_hidden_layers * sizes.num_key_value_heads * sizes.head_dim
    assert 0.95 < full.device_bytes / (1024 * per_token) <= 1
    for cost in others:
        assert cost.case.budget == "1/2B"
        assert 0.8 < cost.device_bytes / (1024 * per_token / 2) <= 1
    assert others[-1].attended_tokens == 512
    skipped = {one.case.method: one.reason for one in result.skipped}
    assert set(skipped) == set(methods[1:3])
    assert "dense layers take" in skipped[methods[1]]


def test_bytes_twice_are_refused(model: PreTrainedModel, reading: Reading) -> None:
    method = parse_method("ark:device_bytes=1000000")
    with pytest.raises(ConfigError, match="device_bytes=1000000 beside a share of the bytes"):
        method.within(256, reading, 700)
    snapkv = parse_method("snapkv")
    assert snapkv.within(256, reading, 700) is snapkv


def test_budgets_are_read_as_they_are_spelled() -> None:
    for given, tokens, is_of_bytes in (
        ("512", 512, False),
        ("1/8", 128, False),
        ("3/8B", 384, True),
        ("none", None, False),
    ):
        budget = Budget(given)
        assert (budget.tokens(1024), budget.is_of_bytes) == (tokens, is_of_bytes)
    for given in ("", "0", "1/0", "0/8B", "512B", "1/8 B", "1/8b", "-1", "1/", "²", "some"):
        with pytest.raises(InputError, match="expected tokens as in 512"):
            Budget(given)


def test_own_output_is_decoded_before_any_question() -> None:
    settings = dataclasses.replace(
        TINY, tasks=("own_output",), lengths=(640,), num_questions=1, methods=("ark",)
    )
    result = evaluation.run(settings)
    full, ark = result.costs
    assert full.attended_tokens > 640  # what was read, what was said, the question
    assert ark.attended_tokens < full.attended_tokens
    assert [one.depth for one in result.asked] == [None, None]


def test_impossible_runs_are_refused() -> None:
    for changes, error, message in (
        ({"methods": ("magic",)}, InputError, "method 'magic': expected one of full, ark"),
        ({"methods": ("ark:pages=3",)}, ConfigError, "unknown setting 'pages'"),
        ({"methods": ("ark:tokens",)}, InputError, "setting 'tokens': expected name=value"),
        ({"methods": ("sinks:page_size=8",)}, InputError, "sinks takes no settings"),
        ({"budgets": ("lots",)}, InputError, "budget 'lots'"),
        ({"lengths": (64,)}, InputError, "length 64: expected more than 64"),
        ({"num_questions": 0}, InputError, "num_questions=0"),
        ({"lengths": (100,), "num_questions": 16}, InputError, "passage of 100 tokens is too"),
    ):
        with pytest.raises(error, match=message):
            evaluation.run(dataclasses.replace(TINY, **changes))


def text_of(result: Result) -> str:
    out = io.StringIO()
    Console(file=out, width=80).print(render(result))
    return out.getvalue()


def test_tables_name_everything(result: Result) -> None:
    text = text_of(result)
    for part in ("facts, 1,024", "language, 1,024", "sinks", "kept", "retention", "±"):
        assert part in text
    for part in ("100% (100-100)", "100% (61-100)"):
        assert part in text
    assert "…" not in text
    assert text.count("ms per") == text.count("attended ") == 2  # no column is cut off
    assert "Dropped" not in text


def test_a_task_that_the_full_cache_fails_is_marked(result: Result) -> None:
    worse = [
        dataclasses.replace(one, score=0.0 if one.case.method == "full" and i == 0 else one.score)
        for i, one in enumerate(result.asked)
    ]
    marked = dataclasses.replace(result, asked=worse)
    assert not any(row.claimed for row in task_rows(marked))
    assert "facts at 1024 (83%)" in text_of(marked)
    assert "(dropped)" in text_of(marked)


# -- figures --------------------------------------------------------------------------------------


def test_the_interval_is_of_pairs() -> None:
    """Where a method is right on just what the full cache is right on, nothing is uncertain."""
    full = np.array([1.0, 0, 1, 1, 0, 1, 0, 1])

    def ratio(drawn: np.ndarray) -> np.ndarray:
        return drawn[..., 0].mean(axis=1) / drawn[..., 1].mean(axis=1)

    alike = bootstrap(ratio, np.stack((full, full), axis=1))
    assert alike == Interval(1, 1, 1)
    half = bootstrap(ratio, np.stack((full * [1, 1, 0, 1, 1, 0, 1, 1], full), axis=1))
    assert half == bootstrap(ratio, np.stack((full * [1, 1, 0, 1, 1, 0, 1, 1], full), axis=1))
    assert half.low < half.value < half.high
    assert half.value == pytest.approx(0.6)
    assert np.isnan(bootstrap(ratio, np.zeros((4, 2))).value)


def scored(scores: dict[str, list[float]]) -> Result:
    """A result of one task, in which methods have these scores."""
    result = Result({}, {}, {})
    for method, own in scores.items():
        case = Case("magic", 384, method, "-" if method == "full" else "1/8")
        result.costs.append(Cost(case, 0, 1.0, 1, 0, 1.0))
        result.asked += [
            Asked(case, 0, f"question {i}", ["7"], "", score, None) for i, score in enumerate(own)
        ]
    return result


def test_kept_is_of_what_the_full_cache_answers_in_full() -> None:
    """Lucky guesses and halves count for nothing; two of three is what is kept."""
    full, half = task_rows(scored({"full": [1, 1, 1, 0, 0.5], "half": [1, 0.5, 1, 1, 1]}))
    assert full.kept == Interval(1, 1, 1)
    assert half.kept == wilson(2, 3)
    assert half.num_right == 4
    assert half.retention.value > 1


def test_nothing_is_kept_of_nothing() -> None:
    for row in task_rows(scored({"full": [0, 0.5], "half": [1, 0.5]})):
        assert np.isnan(row.kept.value)
        assert not np.isnan(row.retention.value)


def test_an_interval_where_all_is_kept() -> None:
    """Against the score interval's published values (Newcombe 1998, table I)."""
    for kept, asked, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson(kept, asked)
        assert (found.low, found.high) == (
            pytest.approx(low, abs=5e-5),
            pytest.approx(high, abs=5e-5),
        )
        assert found.low <= found.value <= found.high
    everything = wilson(16, 16)
    assert everything.value == everything.high == 1
    assert 0.8 < everything.low < 0.82


def test_the_worst_task_comes_first(result: Result) -> None:
    other = [
        dataclasses.replace(
            one,
            case=dataclasses.replace(one.case, task="easy"),
            score=1.0,
        )
        for one in result.asked
    ]
    costs = [
        dataclasses.replace(cost, case=dataclasses.replace(cost.case, task="easy"))
        for cost in result.costs
    ]
    both = dataclasses.replace(result, asked=other + result.asked, costs=costs + result.costs)
    names = [row.case.task for row in task_rows(both)]
    assert names == ["facts"] * 5 + ["easy"] * 5


# -- methods --------------------------------------------------------------------------------------


def bench(model: PreTrainedModel, *specs: str) -> evaluation.Bench:
    settings = dataclasses.replace(SMALL, methods=specs)
    tokenizer = load_model(None, torch.device("cpu"), "auto")[1]
    methods = [parse_method(spec) for spec in specs]
    return evaluation.Bench(settings, model, tokenizer, methods, [], Result({}, {}, {}))


@pytest.fixture(scope="module")
def reading(model: PreTrainedModel) -> Reading:
    ids = torch.randint(0, 1000, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        return bench(model, "snapkv").read(ids, "text")


SPECS = (
    "full",
    *METHODS,
    "h2o",
    "scissorhands",
    "snapkv",
    "pyramidkv",
    "ark:index=cuboid-max,page_size=8",
    "ark:retention=h2o,page_size=1",
    "ark:retention=snapkv",
)


@pytest.mark.parametrize("spec", SPECS)
@torch.inference_mode()
def test_a_bookmark_brings_everything_back(
    spec: str, model: PreTrainedModel, reading: Reading
) -> None:
    """Far enough to seal pages, and to evict what the next question would need."""
    with parse_method(spec).cache(model, reading, 256, seed=0) as cache:
        decoder, mark = Decoder(model, cache), Bookmark(cache)
        first = decoder.feed([5, 6, 7])
        assert len(decoder.seconds) == 3
        mark.restore()
        decoder.feed(list(range(70)))
        mark.restore()
        assert cache.get_seq_length() == 700
        again = decoder.feed([5, 6, 7])
    if spec == "random":  # lots are cast anew
        return
    torch.testing.assert_close(again, first, rtol=0, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


@torch.inference_mode()
def test_questions_are_decode_steps(model: PreTrainedModel, reading: Reading) -> None:
    """From the first token on: no step of several, nothing exact after the text."""
    with parse_method("ark:num_dense_layers=0").cache(model, reading, 256, seed=0) as cache:
        assert isinstance(cache, ArkCache)
        Decoder(model, cache).feed([5])
        assert cache.stats().attended_tokens <= 256 * len(cache.layers)
        assert cache.stats().bytes_streamed == 0


@torch.inference_mode()
def test_unlimited_is_the_full_cache(model: PreTrainedModel, reading: Reading) -> None:
    outputs = []
    for spec in (
        "full",
        "ark:budget_tokens=None",
        "sinks",
        "snapkv",
        "h2o",
        "pyramidkv",
        "scissorhands",
        "ark:retention=snapkv",
    ):
        with parse_method(spec).cache(model, reading, 16384, seed=0) as cache:
            outputs.append(Decoder(model, cache).feed([5, 6, 7]))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=1e-4)


@torch.inference_mode()
def test_what_the_last_queries_attend_is_observed(model: PreTrainedModel, reading: Reading) -> None:
    for layer, observed in reading.observed.items():
        full = reading.cache.layers[layer]
        assert isinstance(full, FullLayer)
        assert observed.shape == (held(full)[0].shape[1], 700)
        group = model.config.num_attention_heads // len(observed)
        per_head = observed.sum(dim=1)
        torch.testing.assert_close(
            per_head, torch.full_like(per_head, group * WINDOW_TOKENS), rtol=1e-3, atol=0
        )


@torch.inference_mode()
def test_a_retention_keeps_what_the_evicting_layer_keeps(
    model: PreTrainedModel, reading: Reading
) -> None:
    """SnapKV in an `ArkCache` that reads the text itself, but for the token that has come since."""
    spec = "ark:retention=snapkv,page_size=1,num_sink_tokens=0,num_recent_tokens=8"
    with parse_method("snapkv").cache(model, reading, 256, seed=0) as evicting:
        kept = [held(layer)[0][0] for layer in evicting.layers]
    with parse_method(spec).cache(model, reading, 256, seed=0) as cache:
        assert isinstance(cache, ArkCache)
        Decoder(model, cache).feed([5])
        # The first layer gives hundreds of tokens exactly nothing: which of them stay is open.
        for number in range(1, len(kept)):
            layer, full = cache.layers[number], reading.cache.layers[number]
            assert isinstance(full, FullLayer)
            assert isinstance(layer.manager._layers[layer.index], PagedLayer)
            gone = layer.manager._layers[layer.index].parts.store.gone(693)
            for head, own in enumerate(kept[number]):
                alike = (own[:, None] == held(full)[0][0, head]).all(dim=-1)
                expected = {*alike.nonzero()[:, 1].tolist()}
                mine = {*range(700)} - {*np.flatnonzero(gone[head]).tolist()}
                assert (len(mine), len(expected)) == (255, 256)
                assert mine < expected


@torch.inference_mode()
def test_another_index_is_as_if_it_had_been_there(model: PreTrainedModel, reading: Reading) -> None:
    outputs: list[torch.Tensor] = []
    head_dim = model.config.head_dim
    for spec in ("tokens", "cuboid-mean", "cuboid-mean"):
        method = parse_method(
            f"ark:index={spec},page_size=16,group_reduction=softmax-mean,backend=torch"
        )
        with method.cache(model, reading, 256, seed=0) as cache:
            assert isinstance(cache, ArkCache)
            if len(outputs) == 2:
                (manager,) = cache.managers
                manager.rate_with(lambda: TokenRows(16, head_dim))
            outputs.append(Decoder(model, cache).feed(list(range(40))))
            cache.check_integrity()
    assert torch.equal(outputs[2], outputs[0])
    assert not torch.equal(outputs[2], outputs[1])


def test_another_index_is_not_for_the_kernels() -> None:
    config = CacheConfig(backend="triton", budget_tokens=256)
    manager = KVCacheManager(1, 1, 16, config, device="cpu", dtype=torch.float32)
    with pytest.raises(InputError, match='expected backend="torch"'):
        manager.rate_with(lambda: OracleIndex())
    assert parse_method("oracle").config(256).backend == "torch"
    assert parse_method("ark").config(256).backend == "auto"


def test_the_oracle_rates_by_true_mass() -> None:
    key, query = torch.randn(1, 2, 6, 8, 16), torch.randn(2, 3, 16)
    index = OracleIndex()
    score = index.score(query, index.digest(key).flatten(0, 1))
    received = attention_received(query.reshape(1, 6, 1, 16), key.flatten(2, 3), 1.0)
    mass = score.softmax(-1).sum(dim=1)
    torch.testing.assert_close(mass, received.unflatten(1, (6, 8)).sum(-1))


def test_lots_are_seeded_and_differ() -> None:
    key, query = torch.randn(1, 2, 6, 8, 16), torch.randn(2, 3, 16)
    first, again, other = RandomIndex(0), RandomIndex(0), RandomIndex(1)
    digests = first.digest(key).flatten(0, 1)
    score = first.score(query, digests)
    assert score.shape == (2, 3, 6)
    assert torch.equal(score, again.score(query, digests))
    assert not torch.equal(score, other.score(query, digests))
    assert not torch.equal(score, first.score(query, digests))


def watched_layer(weights: list[float]) -> FullLayer:
    """One KV head of two query heads, which tokens attend in proportion to these weights."""
    layer = FullLayer()
    for weight in weights:
        key = torch.tensor(weight).log().expand(1, 1, 1, 1)
        key, _ = layer.update(key, key)
        layer.see(torch.ones(1, 2, 1, 1), key, 1.0)
    return layer


def test_scissorhands_by_hand() -> None:
    """A history of four steps, the newest token exempt, a budget of five: two or three go.

    Counters after six tokens: 0 4 2 3 2 and the newest; of the equal ones the older goes.
    """
    layer = ScissorhandsLayer(watched_layer([6, 1, 3, 1, 2, 7]), 5, history=4, num_recent=1)
    weights = {0: 6, 4: 2, 5: 7}

    def held_weights() -> list[float]:
        return held(layer)[0].exp().flatten().tolist()

    assert held_weights() == pytest.approx([6, 2, 7])
    assert layer.little.int().sum(1).tolist() == [[0, 2, 0]]
    for token, weight, counters in ((6, 5.0, [0, 3, 0, 0]), (7, 1.0, [0, 4, 0, 0, 1])):
        assert layer.get_mask_sizes(1) == (len(weights) + 1, 0)
        weights[token] = weight
        key, _ = layer.update(*[torch.tensor(weight).log().expand(1, 1, 1, 1)] * 2)
        layer.see(torch.ones(1, 2, 1, 1), key, 1.0)
        assert layer.little.int().sum(1).tolist() == [counters]
    assert layer.get_mask_sizes(1) == (3, 0)
    layer.update(*[torch.tensor(9.0).log().expand(1, 1, 1, 1)] * 2)
    assert held_weights() == pytest.approx([7, 5, 9])  # tokens 5, 6 and 8
    assert layer.get_seq_length() == 9
    assert layer.state_bytes == 2  # 12 bits


def test_little_is_below_the_mean_of_what_was_there() -> None:
    """By a group's mean; a query says nothing of tokens after it, also where some are evicted."""
    probabilities = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]])  # mean .3 .45 .25
    key = torch.eye(3)[None, None]
    found = attended_little(probabilities.log()[:, :, None], key, 1.0, num_seen=3)
    assert found.tolist() == [[[True, False, True]]]
    found = attended_little(probabilities.log()[:, :, None], key, 1.0, num_seen=5)
    assert found.tolist() == [[[False, False, False]]]
    two = torch.zeros(1, 2, 2, 3)
    two[..., 0] = 1.0
    found = attended_little(two, key, 1.0, num_seen=3)
    assert found.tolist() == [[[False, True, False], [False, True, True]]]


def test_a_pyramid_is_as_large_as_its_mean() -> None:
    assert pyramid_budgets(100 + WINDOW_TOKENS, 4) == [
        WINDOW_TOKENS + more for more in (195, 132, 68, 5)
    ]
    assert pyramid_budgets(32, 3) == [32, 32, 32]


def test_settings_of_a_spec() -> None:
    method = parse_method("ark:index=tokens,budget_tokens=(256,512),page_size=8")
    assert method.settings == {"index": "tokens", "budget_tokens": (256, 512), "page_size": 8}
    assert method.has_own_budget
    assert parse_method("ark").config(512).budget_tokens == 512
    # A target needs a budget, which is the run's.
    target = parse_method("ark:index=tokens,target_missed_mass=0.1")
    assert target.config(512).target_missed_mass == 0.1
    for spec in ("target_missed_mass=0.01,index=tokens", "device_bytes=4096", "coarse_key_bits=2"):
        assert parse_method(f"ark:{spec}").spec.endswith(spec)  # beside the budgets of the run


def test_cases_come_once(model: PreTrainedModel) -> None:
    measured = evaluation.run(
        dataclasses.replace(
            TINY, budgets=("256", "1/2"), methods=("sinks", "ark:budget_tokens=None")
        )
    )
    cases = list(dict.fromkeys(one.case for one in measured.asked))
    assert [(case.method, case.budget) for case in cases] == [
        ("full", "-"),
        ("sinks", "256"),
        ("sinks", "1/2"),
        ("ark:budget_tokens=None", "-"),
    ]
    assert cases[0] == Case("facts", 384, "full", "-")
