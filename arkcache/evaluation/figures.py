"""Figures from what was measured: retention and divergence with intervals, the worst task first.

An interval is a paired bootstrap (Efron and Tibshirani 1993, chapter 13): questions, or predicted
tokens, are drawn anew with replacement, the full cache's outcome of each along with the method's,
and the middle 95 % of the figure over all draws is given. Seeded, so that it is always the same.
What is kept is a plain share of questions, mostly of nearly all of them: there the bootstrap has
nothing to draw from, and the interval is Wilson's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arkcache.evaluation.attention_figures import attention_dict
from arkcache.evaluation.records import Asked, Case, Cost, Predicted, Result

CLAIMED_FROM = 0.95
"""A task that full attention answers worse than this says little about a cache."""

FULL = "full"
_NUM_DRAWS = 2000
_NORMAL_95 = 1.959964
"""Standard deviations that 95 % of a normal distribution lie within."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure and its interval of 95 %; NaN where there is none."""

    value: float
    low: float
    high: float


_NONE = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Spent:
    """What a case took: means over its passages, bytes the largest."""

    attended_tokens: float
    device_bytes: int
    host_bytes: int
    ms_per_token: float


@dataclass(frozen=True)
class TaskRow:
    """A task with one method.

    Attributes:
        num_right: questions answered in full.
        accuracy: the mean score; a question may be answered in part.
        kept: of the questions that the full cache answers in full, the share that the method
            answers in full as well.
        retention: accuracy as a share of the full cache's.
        claimed: whether the full cache answers the task well enough to say something.
    """

    case: Case
    num_right: int
    num_full_right: int
    num_asked: int
    accuracy: float
    full_accuracy: float
    kept: Interval
    retention: Interval
    claimed: bool
    spent: Spent


@dataclass(frozen=True)
class LanguageRow:
    """Real texts with one method.

    Attributes:
        kl: to the full cache, nats for each token, the mean.
        nll_difference: how much less likely (in nats) what really follows became.
        agreement: how often the most likely token is the full cache's.
        num_free: tokens of each greedy continuation; 0 where there is none.
        free_run: how many of them are the full cache's own until the first that is not, the mean
            over passages.
        free_agreement: how many are the full cache's own at the same place, the share.
    """

    case: Case
    num_tokens: int
    kl: Interval
    nll_difference: Interval
    agreement: float
    num_free: int
    free_run: Interval
    free_agreement: float
    spent: Spent


def task_rows(result: Result) -> list[TaskRow]:
    """One row for each case that was asked, by length, the worst task first: by what is kept of
    it, or by retention where the full cache answers nothing in full."""
    rows = [_task_row(result, case, asked) for case, asked in _by_case(result.asked).items()]
    worst: dict[tuple[int, str], float] = {}
    for row in rows:
        key = (row.case.length, row.case.task)
        value = row.retention.value if math.isnan(row.kept.value) else row.kept.value
        worst[key] = min(worst.get(key, math.inf), math.inf if math.isnan(value) else value)

    def order(row: TaskRow) -> tuple[int, bool, float, str]:
        key = (row.case.length, row.case.task)
        return row.case.length, not row.claimed, worst[key], row.case.task

    return sorted(rows, key=order)


def language_rows(result: Result) -> list[LanguageRow]:
    """One row for each case that predicted, by length."""
    cases = _by_case(result.predicted)
    rows = [_language_row(result, case, predicted) for case, predicted in cases.items()]
    return sorted(rows, key=lambda row: row.case.length)


def to_dict(result: Result) -> dict[str, Any]:
    """The rows of all tables as plain values, for JSON; a figure that there is none of is None."""
    return {
        "tasks": [_plain(asdict(row)) for row in task_rows(result)],
        "language": [_plain(asdict(row)) for row in language_rows(result)],
        "attention": attention_dict(result),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def bootstrap(figure: Callable[[Floats], Floats], outcomes: Floats) -> Interval:
    """A figure of outcomes [items, ...] with its interval.

    figure: of draws [draws, items, ...], one number for each.
    """
    draws = np.random.default_rng(0).integers(0, len(outcomes), (_NUM_DRAWS, len(outcomes)))
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(figure(outcomes[None])[0])
        drawn = figure(outcomes[draws])
    drawn = drawn[np.isfinite(drawn)]
    if not math.isfinite(value) or not len(drawn):
        return _NONE
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Interval(value, float(low), float(high))


def wilson(num_kept: int, num_all: int) -> Interval:
    """A share with the score interval of Wilson (1927), which is one where all are kept, too."""
    if num_all == 0:
        return _NONE
    share, square = num_kept / num_all, _NORMAL_95**2
    middle = (share + square / (2 * num_all)) / (1 + square / num_all)
    spread = math.sqrt(share * (1 - share) / num_all + square / (4 * num_all**2))
    half = _NORMAL_95 * spread / (1 + square / num_all)
    # At the ends the bound is the share itself, but for rounding.
    return Interval(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))


def _by_case(records: list[Asked] | list[Predicted]) -> dict[Case, list]:  # type: ignore[type-arg]
    found: dict[Case, list] = {}  # type: ignore[type-arg]
    for record in records:
        found.setdefault(record.case, []).append(record)
    return found


def _task_row(result: Result, case: Case, asked: list[Asked]) -> TaskRow:
    known = {
        (other.passage, other.question): other.score
        for other in result.asked
        if other.case == _full(case)
    }
    full = np.array([known[one.passage, one.question] for one in asked])
    own = np.array([one.score for one in asked])
    known_right = int((full == 1).sum())
    kept = wilson(int(((own == 1) & (full == 1)).sum()), known_right)
    if known_right and case == _full(case):
        kept = Interval(1.0, 1.0, 1.0)  # by definition, not by luck
    retention = bootstrap(
        lambda drawn: drawn[..., 0].mean(axis=1) / drawn[..., 1].mean(axis=1),
        np.stack((own, full), axis=1),
    )
    return TaskRow(
        case,
        int((own == 1).sum()),
        known_right,
        len(asked),
        float(own.mean()),
        float(full.mean()),
        kept,
        retention,
        bool(full.mean() >= CLAIMED_FROM),
        _spent(result.costs, case),
    )


def _language_row(result: Result, case: Case, predicted: list[Predicted]) -> LanguageRow:
    known = {other.passage: other for other in result.predicted if other.case == _full(case)}
    more = [np.array(one.nll) - np.array(known[one.passage].nll) for one in predicted]
    said = [np.equal(one.said, known[one.passage].said) for one in predicted if one.said]
    alike = [np.cumprod(same).sum() for same in said]
    kl = np.concatenate([one.kl for one in predicted])
    return LanguageRow(
        case,
        len(kl),
        bootstrap(lambda drawn: drawn.mean(axis=1), kl),
        bootstrap(lambda drawn: drawn.mean(axis=1), np.concatenate(more)),
        float(np.concatenate([one.same for one in predicted]).mean()),
        len(said[0]) if said else 0,
        bootstrap(lambda drawn: drawn.mean(axis=1), np.array(alike)) if alike else _NONE,
        float(np.concatenate(said).mean()) if said else math.nan,
        _spent(result.costs, case),
    )


def _full(case: Case) -> Case:
    return Case(case.task, case.length, FULL, "-")


def _spent(costs: list[Cost], case: Case) -> Spent:
    own = [cost for cost in costs if cost.case == case]
    return Spent(
        float(np.mean([cost.attended_tokens for cost in own])),
        max(cost.device_bytes for cost in own),
        max(cost.host_bytes for cost in own),
        float(np.mean([cost.ms_per_token for cost in own])),
    )
