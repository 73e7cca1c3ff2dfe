"""StreamingLLM: the first tokens and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from arkcache.methods.retention import Fates, Retention, Seen, keep_best


@dataclass(frozen=True)
class StreamingLLM(Retention):
    """Keeps attention sinks and the most recent tokens, as many as the budget holds.

    Xiao et al. 2024, "Efficient Streaming Language Models with Attention Sinks", section 3.2. The
    sinks are `CacheConfig.num_sink_tokens`, 4 as in the paper. Keys keep the positions that they
    were rotated to; the paper counts positions within the cache.
    """

    def fates(self, seen: Seen, fates: Fates) -> Fates:
        """See `Retention`."""
        return keep_best(seen, fates, np.broadcast_to(np.arange(fates.shape[1]), fates.shape))
