"""PyramidKV: SnapKV with budgets that fall from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from arkcache.errors import ConfigError
from arkcache.methods.retention import check_positive
from arkcache.methods.snapkv import SnapKV

STEEPNESS = 20
"""The paper's beta."""


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """`SnapKV` with more budget for the first layers than for the last.

    Cai et al. 2024, "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information
    Funneling", section 4.2: see `pyramid_budgets`. Budgets that are given layer by layer stay as
    they are. They are shared out before a prompt is known, so that what the first layers have no
    use for in a short prompt goes to no other.

    Args:
        steepness: how much less than the mean the last layer gets.
    """

    shares_out: ClassVar[bool] = True

    steepness: int = STEEPNESS

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(steepness=self.steepness)

    def budgets(self, budget_tokens: int, num_layers: int, least: int) -> tuple[int, ...]:
        """See `Retention`."""
        window = min(max(self.window, least), budget_tokens)
        return pyramid_budgets(budget_tokens, num_layers, window=window, steepness=self.steepness)


def pyramid_budgets(
    budget_tokens: int,
    num_layers: int,
    *,
    window: int = 64,
    steepness: int = STEEPNESS,
    prompt_tokens: int | None = None,
) -> tuple[int, ...]:
    """Budgets that fall evenly from the first layer to the last, `budget_tokens` on average.

    For `CacheConfig(budget_tokens=...)`: without a retention, nothing is lost. Beyond `window`,
    which every layer gets, the last layer gets 1/`steepness` of the mean, and the first as much
    more than the mean.

    Args:
        budget_tokens: of a layer, on average.
        window: tokens that every layer attends anyhow: sinks, recent window, a page at least.
        prompt_tokens: of the prompt, where it is known: no layer gets more than that, the last
            layers get what is left.

    Raises `ConfigError` for a budget below the window.
    """
    if budget_tokens < window:
        raise ConfigError(
            f"budget_tokens={budget_tokens}: expected at least the {window} tokens of the window"
        )
    beyond = budget_tokens - window
    longest = None if prompt_tokens is None else prompt_tokens - window
    shares = pyramid(beyond, num_layers, steepness, longest)
    edges = [round(sum(shares[:layer])) for layer in range(num_layers + 1)]
    # Rounded so that the sum is kept, then back in order: a step of rounding may break it.
    parts = sorted((b - a for a, b in pairwise(edges)), reverse=True)
    return tuple(window + part for part in parts)


def pyramid(
    mean: float, num_layers: int, steepness: int = STEEPNESS, longest: int | None = None
) -> list[float]:
    """The share of each layer: high - l (high - low) / (L - 1), `mean` on average."""
    low = mean / steepness
    high = 2 * mean - low
    if longest is not None and high > longest >= mean:
        high, low = longest, 2 * mean - longest
    if num_layers == 1:
        return [mean]
    return [high - layer * (high - low) / (num_layers - 1) for layer in range(num_layers)]
