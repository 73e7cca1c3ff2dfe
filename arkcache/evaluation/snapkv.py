"""SnapKV and PyramidKV: what of a prompt is kept for good is decided by its last queries.

SnapKV (Li et al. 2024, section 4 and its `snapkv_utils.py`): the attention of the last
`WINDOW_TOKENS` queries, added up over them and over a KV head's query heads, is pooled along the
tokens; the best `budget - WINDOW_TOKENS` tokens and the window are kept, and everything after the
prompt. PyramidKV (Cai et al. 2024, section 4.2) is the same with budgets that fall from layer to
layer. A question that comes after the prompt was cut finds what the prompt's end thought worth it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arkcache.demo.baselines import EvictingLayer, FullLayer, appended, held

WINDOW_TOKENS = 64
POOL_TOKENS = 5
_STEEPNESS = 20
"""PyramidKV's beta: the last layer gets this share (1/20) of the mean budget."""


class SnapLayer(EvictingLayer):
    """What SnapKV keeps of a text, and every token after it.

    Args:
        full: the layer that the text was read into.
        budget: tokens of the text that are kept.
        observed: attention that the text received from its last `WINDOW_TOKENS` queries
            [num_kv_heads, tokens].
    """

    def __init__(self, full: FullLayer, budget: int, observed: Tensor) -> None:
        super().__init__(full, budget)
        self.keys, self.values = self._kept(*held(full), observed)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what the next query attends."""
        return self.num_kept + query_length, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens [1, kv_heads, new, dim]; what is kept."""
        self.seen += key_states.shape[2]
        self.keys, self.values = appended(self, key_states, value_states)
        return self.keys, self.values

    def _kept(self, key: Tensor, value: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        num_tokens = key.shape[2]
        if num_tokens <= self.budget:
            return key, value
        window = min(WINDOW_TOKENS, self.budget // 2)
        pooled = torch.nn.functional.avg_pool1d(
            observed[:, : num_tokens - window], POOL_TOKENS, stride=1, padding=POOL_TOKENS // 2
        )
        best = pooled.topk(self.budget - window, dim=-1).indices.sort().values
        recent = torch.arange(num_tokens - window, num_tokens, device=best.device)
        kept = torch.cat((best, recent.expand(len(best), -1)), dim=1)[None, :, :, None]
        return key.gather(2, kept.expand(-1, -1, -1, key.shape[3])), value.gather(
            2, kept.expand(-1, -1, -1, value.shape[3])
        )


def pyramid_budgets(budget: int, num_layers: int) -> list[int]:
    """PyramidKV's budgets: falling evenly from layer to layer, `budget` on average."""
    beyond = max(0, budget - WINDOW_TOKENS)
    least = beyond / _STEEPNESS
    most = 2 * beyond - least
    steps = max(1, num_layers - 1)
    fixed = budget - beyond
    return [fixed + round(most - (most - least) * layer / steps) for layer in range(num_layers)]
