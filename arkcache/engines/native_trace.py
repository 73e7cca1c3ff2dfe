"""What a CPU's engine notes of a traced step, at once and afterwards."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from arkcache.pages.bookkeeping import Ids
from arkcache.tracing.recorder import Counted, Told
from arkcache.tracing.recorder import Ids as AnyIds


class StepNote(NamedTuple):
    """What is noted of a traced step; the rest can wait.

    sizes: KV heads, sink pages, tokens and bytes of a page. num_pages, lengths, sealed: by row, and
    by sequence. counters: the rows' before the step and after it. before: lists of what was read
    before, where it is to be told.
    """

    sizes: tuple[int, int, int, int]
    pages: NDArray[np.int32]
    num_pages: list[int]
    counters: tuple[list[list[int]], list[list[int]]]
    lengths: list[int]
    sealed: list[int]
    before: tuple[Ids, Ids] | None
    mass: NDArray[np.float32] | None = None

    @property
    def nbytes(self) -> int:
        """What it takes, small arrays apart."""
        mass = 0 if self.mass is None else self.mass.nbytes
        return self.pages.nbytes + mass + (0 if self.before is None else self.before[0].nbytes)

    def told(self) -> Told:
        """In full."""
        heads, sinks, page_size, page_bytes = self.sizes
        earlier, later = map(np.array, self.counters)
        _, hit, recalled, evicted = (later - earlier).sum(axis=0).tolist()
        held, sealed, num_pages = sum(self.lengths), sum(self.sealed), sum(self.num_pages)
        attended = round(num_pages * page_size / heads) + held - sealed * page_size
        counted = Counted(
            attended,
            held,
            num_pages,
            sealed * heads,
            hit,
            recalled,
            evicted,
            recalled * page_bytes,
        )
        pages = _listed(self.pages, np.array(self.num_pages), sinks)
        before = None if self.before is None else _listed(*self.before, sinks)
        return Told(counted, pages, before, self.mass)


def _listed(pages: AnyIds, num_pages: Ids, sinks: int) -> NDArray[np.int32]:
    """What lists that end after `num_pages` have behind the sinks [rows, any]; -1 for none."""
    selected = pages[:, sinks : int(num_pages.max())].astype(np.int32)
    selected[np.arange(sinks, sinks + selected.shape[1]) >= num_pages[:, None]] = -1
    return selected
