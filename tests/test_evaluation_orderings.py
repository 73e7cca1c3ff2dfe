"""The evaluation in small, with the shipped model: who is ahead of whom, never by how much to the
digit. What it says of a real model is in docs/fidelity.md."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from arkcache.demo import run as demo
from arkcache.evaluation import run as evaluation
from arkcache.evaluation.figures import LanguageRow, TaskRow, language_rows, task_rows
from arkcache.evaluation.run import Settings

SMALL = "num_dense_layers=0,num_sink_tokens=8,num_recent_tokens=32,page_size=8"
ARK = f"ark:index=tokens,{SMALL}"
EVICTORS = ("h2o", "scissorhands", "snapkv", "pyramidkv")
LESS, MORE = "80", "320"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with demo.threads(1):
        yield


@pytest.fixture(scope="module")
def asked() -> dict[str, TaskRow]:
    """Sixteen facts in 1,024 tokens, asked for when everything was read, by method."""
    settings = Settings(
        tasks=("facts",), lengths=(1024,), budgets=(LESS,), methods=(ARK, "sinks", *EVICTORS)
    )
    return {row.case.method: row for row in task_rows(evaluation.run(settings))}


@pytest.fixture(scope="module")
def predicted() -> dict[tuple[str, str], LanguageRow]:
    """A real text, by method and budget."""
    settings = Settings(
        tasks=("language",),
        lengths=(1024,),
        budgets=(LESS, MORE),
        methods=(ARK, "sinks"),
        num_passages=1,
        num_steps=12,
    )
    rows = language_rows(evaluation.run(settings))
    return {(row.case.method, row.case.budget): row for row in rows}


def test_full_is_ahead_of_tokens_and_tokens_of_sinks(asked: dict[str, TaskRow]) -> None:
    full, ark, sinks = asked["full"], asked[ARK], asked["sinks"]
    assert full.claimed
    assert full.num_right >= ark.num_right > sinks.num_right
    assert ark.kept.low > sinks.kept.high  # by more than luck


@pytest.mark.parametrize("evictor", EVICTORS)
def test_what_is_evicted_for_good_is_missed_later(evictor: str, asked: dict[str, TaskRow]) -> None:
    """At the same budget, far apart: otherwise the questions would be too easy."""
    ark, lost = asked[ARK], asked[evictor]
    assert ark.kept.low > lost.kept.high
    assert ark.spent.attended_tokens <= int(LESS) < asked["full"].spent.attended_tokens / 10


@pytest.mark.parametrize("method", [ARK, "sinks"])
def test_more_budget_diverges_less(
    method: str, predicted: dict[tuple[str, str], LanguageRow]
) -> None:
    less, more = predicted[method, LESS], predicted[method, MORE]
    assert 0 < more.kl.value < less.kl.value
    assert predicted["full", "-"].kl.value == 0
