"""SnapKV: what of a prompt is kept for good is decided by its last queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arkcache.errors import ConfigError
from arkcache.methods.retention import Fates, Retention, Seen, check_positive, keep_best


@dataclass(frozen=True)
class SnapKV(Retention):
    """Keeps the end of a prompt and what it attends, and every token after the prompt.

    Li et al. 2024, "SnapKV: LLM Knows What You are Looking for Before Generation", section 4 and
    the authors' `snapkv_utils.py`: the attention that tokens receive from the last `window`
    queries, the mean over a KV head's query heads, is pooled along the tokens (average, stride 1,
    zeros outside); the best are kept beside the window, as many as the budget holds. Where all that
    is kept is more than the budget, because tokens were generated since, a step attends the best by
    the page index.

    Args:
        window: queries of the prompt that decide, and tokens that are kept with them; where the
            budget is less than twice as many, half of the budget is kept of them.
        pool: tokens that are pooled, an odd number.
    """

    window: int = 64
    pool: int = 5

    def __post_init__(self) -> None:
        check_positive(window=self.window, pool=self.pool)
        if self.pool % 2 == 0:
            raise ConfigError(f"pool={self.pool}: expected an odd number, to be centred on a token")

    @property
    def num_queries(self) -> int:
        """See `Retention`."""
        return self.window

    def fates(self, seen: Seen, fates: Fates) -> Fates:
        """See `Retention`."""
        if seen.probe is None:
            return fates
        begin = seen.prompt_lengths - np.minimum(self.window, seen.budget // 2)
        before = np.arange(seen.probe.shape[1]) < begin[:, None]
        pooled = np.where(before, pooled_mass(np.where(before, seen.probe, 0), self.pool), 0)
        num_pages, size = fates.shape[1], seen.page_size
        pages = pooled[:, : num_pages * size].reshape(len(fates), num_pages, size).mean(axis=2)
        in_window = (np.arange(num_pages) + 1) * size > begin[:, None]
        return keep_best(seen, fates, np.where(in_window, np.inf, pages))


def pooled_mass(mass: NDArray[np.float32], pool: int) -> NDArray[np.float32]:
    """The mean of each `pool` neighbours [rows, tokens], zeros beyond both ends."""
    padded = np.pad(mass, ((0, 0), (pool // 2, pool // 2)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, pool, axis=1)
    mean: NDArray[np.float32] = windows.mean(axis=2)
    return mean
