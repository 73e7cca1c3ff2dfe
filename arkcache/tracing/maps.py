"""What a trace's page draws by page: which pages steps attended, and what attention they got."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arkcache.tracing.trace import Trace

MOST_COLUMNS, MOST_ROWS, MOST_CELLS = 240, 96, 900_000
"""Of a map, and of the maps of all layers: a page is to stay below 2 MB."""

LEVELS = 15


@dataclass(frozen=True)
class Maps:
    """Steps in columns, pages in rows: the pages of `pages_per_row` numbers, of the layer's all
    rows (sequences and KV heads).

    Attributes:
        steps_per_column, pages_per_row: what one cell stands for.
        cells: uint8 [layers + 1, columns, rows], the mean over all layers first. The high four bits
            say which share of a cell's pages was attended, the low ones which share of these had to
            be recalled, in steps of 1/15; what is not nothing is not 0.
    """

    steps_per_column: int
    pages_per_row: int
    cells: NDArray[np.uint8]


def num_pages(trace: Trace) -> int:
    """Pages that a row of any layer had in the end, at least one."""
    rows = np.maximum((trace.counts >= 0).sum(axis=2), 1)
    sealed = -(-trace.layer("sealed_pages") // rows)
    return max(int(sealed.max(initial=0)), int(trace.pages.max(initial=0)) + 1)


def maps_of(trace: Trace) -> Maps:
    """The maps of a trace."""
    num_steps, num_layers, _ = trace.counts.shape
    pages_per_row = -(-num_pages(trace) // MOST_ROWS)
    rows = -(-num_pages(trace) // pages_per_row)
    most = max(1, min(MOST_COLUMNS, MOST_CELLS // ((num_layers + 1) * rows)))
    steps_per_column = max(1, -(-num_steps // most))
    columns = -(-num_steps // steps_per_column)
    attended, recalled, there = (np.zeros((columns, num_layers, rows)) for _ in range(3))
    start = 0
    for step in range(num_steps):
        sizes = np.maximum(trace.counts[step], 0).sum(axis=1)
        own = slice(start, start := start + int(sizes.sum()))
        cell = np.repeat(np.arange(num_layers) * rows, sizes) + trace.pages[own] // pages_per_row
        size, column = num_layers * rows, step // steps_per_column
        both = np.bincount(cell, minlength=size), np.bincount(cell[trace.recalled[own]], None, size)
        exist, sinks = _fixed(trace, step, rows, pages_per_row)
        attended[column] += both[0].reshape(num_layers, rows) + sinks
        recalled[column] += both[1].reshape(num_layers, rows)
        there[column] += exist
    own_maps = _levels(attended, recalled, there).transpose(1, 0, 2)
    mean = _levels(attended.sum(axis=1), recalled.sum(axis=1), there.sum(axis=1))
    return Maps(steps_per_column, pages_per_row, np.concatenate((mean[None], own_maps)))


def _fixed(
    trace: Trace, step: int, rows: int, pages_per_row: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pages that there are in each row of the map, and those of the sinks, of all KV heads and
    sequences [layers, rows]; sequences count with their mean length."""
    heads = (trace.counts[step] >= 0).sum(axis=1)
    sealed = trace.layer("sealed_pages")[step] / np.maximum(heads, 1)
    begin = np.arange(rows) * pages_per_row
    exist = np.clip(sealed[:, None] - begin, 0, pages_per_row) * heads[:, None]
    sinks = np.minimum(sealed, trace.about["num_sink_pages"])
    return exist, np.clip(sinks[:, None] - begin, 0, pages_per_row) * heads[:, None]


def _levels(
    attended: NDArray[np.float64], recalled: NDArray[np.float64], there: NDArray[np.float64]
) -> NDArray[np.uint8]:
    levels = []
    for part, whole in ((attended, there), (recalled, attended)):
        share = np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
        level = np.clip(np.rint(share * LEVELS), 0, LEVELS)
        levels.append(np.where((part > 0) & (level == 0), 1, level).astype(np.uint8))
    packed: NDArray[np.uint8] = (levels[0] << np.uint8(4)) | levels[1]
    return packed


@dataclass(frozen=True)
class Mass:
    """Which share of attention what received, the mean over a layer's samples and rows.

    Attributes:
        num_samples: of the layer.
        sinks, window: of the sink pages together, and of the recent window.
        pages: of the selected pages in each row of the maps.
    """

    num_samples: int
    sinks: float
    window: float
    pages: list[float]


def mass_of(trace: Trace, pages_per_row: int, rows: int) -> list[Mass | None]:
    """The attention mass of every layer; None for one without a sample."""
    num_sink_pages = int(trace.about["num_sink_pages"])
    num_layers, starts, at = trace.counts.shape[1], trace.starts, 0
    sums = np.zeros((num_layers, rows + 2))
    num_rows, num_samples = np.zeros(num_layers), np.zeros(num_layers, np.int64)
    for step, layer in trace.mass_of.tolist():
        num_samples[layer] += 1
        for row, count in enumerate(trace.counts[step, layer].tolist()):
            if count < 0:
                continue
            fixed = trace.mass[at : at + num_sink_pages + 1]
            own = trace.mass[at + num_sink_pages + 1 : (at := at + num_sink_pages + 1 + count)]
            first = int(starts[step, layer, row])
            cell = trace.pages[first : first + count] // pages_per_row
            sums[layer, :rows] += np.bincount(cell, own, rows)
            sums[layer, rows:] += float(fixed[:-1].sum()), float(fixed[-1])
            num_rows[layer] += 1
    means = sums / np.maximum(num_rows, 1)[:, None]
    return [
        Mass(count, float(mean[rows]), float(mean[rows + 1]), [round(m, 7) for m in mean[:rows]])
        if count
        else None
        for count, mean in zip(num_samples.tolist(), means, strict=True)
    ]
