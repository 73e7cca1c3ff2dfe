"""How much attention each page has received, and which pages may be kept in a coarser format.

LeanKV (section 4.1) and ZipCache give more bits to what is attended more. Here the unit is a page
of one KV head: it is sealed in the finer format and demoted when, over the decode steps that it has
been through, it received less than a threshold's multiple of an even share. Integers and numpy
only; a row is a (sequence, KV head) pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arkcache.pages.bookkeeping import Ids


def demotable(
    mass: NDArray[np.floating[Any]],
    steps: Ids,
    fine: NDArray[np.bool_],
    below: float,
    after: int,
) -> NDArray[np.bool_]:
    """Which pages to demote.

    Args:
        mass: attention that each page received so far [rows, pages].
        steps: decode steps since it was sealed, broadcast to [rows, pages]; negative where there
            is no page, which counts for nothing.
        fine: whether it is still in the finer format [rows, pages]; others are never chosen.
        below: multiple of an even share (LeanKV's thresholds are multiples of 1/N, too).
        after: steps that a page must have been through.
    """
    judged = np.broadcast_to(steps >= max(1, after), mass.shape)
    rate = np.where(judged, mass / np.maximum(steps, 1), 0.0)
    even = rate.sum(axis=1, keepdims=True) / np.maximum(judged.sum(axis=1, keepdims=True), 1)
    demoted: NDArray[np.bool_] = fine & judged & (rate < below * even)
    return demoted


_NEVER = np.iinfo(np.int64).max
"""When a page is sealed that does not exist."""


class Importance:
    """Attention received per row and page, and for how many steps.

    Args:
        num_rows: sequences times KV heads.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_steps = 0
        self.mass = np.zeros((num_rows, 64), dtype=np.float32)
        self._sealed_at = np.full((num_rows, 64), _NEVER)

    def seal(self, rows: slice, first: int, last: int) -> None:
        """Pages first..last were sealed now."""
        width = self.mass.shape[1]
        if width < last:
            more = ((0, 0), (0, max(last, 2 * width) - width))
            self.mass = np.pad(self.mass, more)
            self._sealed_at = np.pad(self._sealed_at, more, constant_values=_NEVER)
        self.mass[rows, first:last] = 0
        self._sealed_at[rows, first:last] = self.num_steps

    def unseal(self, rows: slice, first: int) -> None:
        """The pages from `first` on exist no longer."""
        self._sealed_at[rows, first:] = _NEVER

    def observe(self, pages: Ids, received: NDArray[np.float32]) -> None:
        """One decode step: row r's page `pages[r, i]` received `received[r, i]`; -1 is no page."""
        self.num_steps += 1
        rows, places = np.nonzero(pages >= 0)
        self.mass[rows, pages[rows, places]] += received[rows, places]

    def demotable(
        self, first: int, fine: NDArray[np.bool_], below: float, after: int
    ) -> NDArray[np.bool_]:
        """`demotable` of the pages from `first` on; fine [rows, pages from first on]."""
        pages = slice(first, first + fine.shape[1])
        steps = self.num_steps - self._sealed_at[:, pages]
        return demotable(self.mass[:, pages], steps, fine, below, after)

    def state(self, num_pages: int) -> dict[str, NDArray[Any]]:
        """What is held of the first pages."""
        return {
            "importance": self.mass[:, :num_pages],
            "importance_sealed_at": self._sealed_at[:, :num_pages],
            "importance_steps": np.array(self.num_steps),
        }

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Hold what `state` gave."""
        self.num_steps, num_pages = int(state["importance_steps"]), state["importance"].shape[1]
        self.seal(slice(None), 0, num_pages)
        self.mass[:, :num_pages] = state["importance"]
        self._sealed_at[:, :num_pages] = state["importance_sealed_at"]

    def keep_rows(self, rows: Ids) -> None:
        """Make row i what row `rows[i]` was."""
        self.mass, self._sealed_at = self.mass[rows], self._sealed_at[rows]
