"""Rows of the attention task: means over layers that do not attend everything, and the worst."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arkcache.evaluation.records import Attended, AttendedLayer, Case, Result


@dataclass(frozen=True)
class Spread:
    """The mean over layers, and the worst of them with its number in the model."""

    value: float
    worst: float
    worst_layer: int


@dataclass(frozen=True)
class AttentionRow:
    """The attention of one method on real texts: means over passages, steps, KV heads and layers.

    Layers that attend everything are left out, unless all do.

    Attributes:
        num_steps: looked at, in all passages.
        num_pages, ladder: as in `Attended`.
        recall, recall_alone, recall_peak: as in `AttendedLayer`, for every k of `ladder`; empty
            where no pages are rated.
        missed, error: likewise.
        estimated, low: the means alone; None where the index does not rate mass.
    """

    case: Case
    num_steps: int
    num_pages: int
    ladder: list[int]
    recall: list[Spread]
    recall_alone: list[Spread]
    recall_peak: list[Spread]
    missed: Spread
    estimated: float | None
    low: float | None
    error: Spread


def attention_rows(result: Result) -> list[AttentionRow]:
    """One row for each case, by length."""
    cases: dict[Case, list[Attended]] = {}
    for record in result.attended:
        cases.setdefault(record.case, []).append(record)
    rows = [_row(case, records) for case, records in cases.items()]
    return sorted(rows, key=lambda row: row.case.length)


def attention_dict(result: Result) -> list[dict[str, Any]]:
    """The rows as plain values, for JSON."""
    return [asdict(row) for row in attention_rows(result)]


def _row(case: Case, records: list[Attended]) -> AttentionRow:
    layers = [_selecting(record) for record in records]
    numbers = [layer.layer for layer in layers[0]]

    def by_layer(name: str) -> NDArray[np.float64]:
        """Means over passages and KV heads [layers, ...]."""
        heads = [[np.mean(getattr(layer, name), axis=0) for layer in own] for own in layers]
        mean: NDArray[np.float64] = np.mean(heads, axis=0)
        return mean

    def recalls(name: str) -> list[Spread]:
        if not records[0].ladder:
            return []
        return [_spread(at_k, numbers, int(at_k.argmin())) for at_k in by_layer(name).T]

    def most(name: str) -> Spread:
        return _spread(by_layer(name), numbers, int(by_layer(name).argmax()))

    rates_mass = all(layer.estimated is not None for own in layers for layer in own)
    return AttentionRow(
        case,
        sum(record.num_steps for record in records),
        records[0].num_pages,
        records[0].ladder,
        recalls("recall"),
        recalls("recall_alone"),
        recalls("recall_peak"),
        most("missed"),
        float(by_layer("estimated").mean()) if rates_mass else None,
        float(by_layer("low").mean()) if rates_mass else None,
        most("error"),
    )


def _selecting(record: Attended) -> list[AttendedLayer]:
    return [layer for layer in record.layers if not layer.is_dense] or record.layers


def _spread(by_layer: NDArray[np.float64], numbers: list[int], worst: int) -> Spread:
    return Spread(float(by_layer.mean()), float(by_layer[worst]), numbers[worst])
