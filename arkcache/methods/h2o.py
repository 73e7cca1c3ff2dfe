"""H2O: the most recent tokens, and those that received the most attention so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from arkcache.errors import ConfigError
from arkcache.methods.retention import Fates, Retention, Seen, keep_best


@dataclass(frozen=True)
class H2O(Retention):
    """Keeps recent tokens and heavy hitters.

    Zhang et al. 2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large
    Language Models", algorithm 1: at every step the token goes whose attention probabilities,
    summed over all queries so far, are the least, the newest ones excepted. All queries of a prompt
    are looked at, which reads the context twice more for every chunk of it.

    Args:
        recent_share: of the budget that goes to the newest tokens; the rest goes to heavy hitters.
    """

    recent_share: float = 0.5

    observes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.recent_share <= 1:
            raise ConfigError(f"recent_share={self.recent_share!r}: expected 0 to 1")

    @property
    def num_queries(self) -> None:
        """See `Retention`."""
        return None

    def fates(self, seen: Seen, fates: Fates) -> Fates:
        """See `Retention`."""
        recent = np.maximum((seen.budget * self.recent_share).astype(np.int64), 1)
        score = np.where(seen.newest(fates, recent), np.inf, seen.mass)
        return keep_best(seen, fates, score)
