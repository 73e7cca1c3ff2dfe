"""The settings of a cache: one frozen dataclass, checked when it is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import inf
from typing import Any

from arkcache.errors import ConfigError

INDEXES = (
    "cuboid-mean",
    "cuboid-max",
    "cuboid-center",
    "sphere-mean",
    "sphere-max",
    "sphere-center",
    "centroid",
    "tokens",
)
"""Page indexes by name: ArkVale's bounding volumes (section 5.2) and the low-bit token index."""

GROUP_REDUCTIONS = ("softmax-mean", "raw-mean")
"""How the query heads of one KV head agree on pages; "raw-mean" is ArkVale's released code."""

Budget = int | tuple[int | tuple[int, ...] | None, ...] | None


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What a cache keeps where, and how much of it a decode step attends.

    All sizes are in tokens unless the name says bytes. Raises `ConfigError` (a `ValueError`) for
    a value that is impossible and for an unknown name.

    Args:
        page_size: tokens per page, the unit of selection, recall and eviction (ArkVale uses 32).
        budget_tokens: tokens that each KV head attends in a decode step, sinks and recent window
            included. None is unlimited: everything is attended and stays in the device tier. A
            tuple gives one budget per layer; a tuple of tuples one per layer and KV head. The
            window grows by up to a page before it seals, so a budget below sinks + recent + two
            pages selects nothing.
        num_sink_tokens: the first tokens, always attended; rounded up to whole pages.
        num_recent_tokens: the newest tokens, always attended, never digested or quantised.
        num_dense_layers: the first layers that attend everything and stay in the device tier.
        device_pool_factor: slots for selected pages in the device tier, as a multiple of what one
            step selects. Above 1, pages that were selected a while ago need not be recalled.
        key_bits, value_bits: bits per element of sealed pages; 16 is the model's dtype, untouched.
        index: how pages are rated, one of `INDEXES`.
        index_bits: bits per key element of the token index (`index="tokens"`): 2, 4 or 8. Scales
            add 32 bits per channel and page; on a CPU the index is kept unpacked, in fp32.
        group_reduction: one of `GROUP_REDUCTIONS`.
        host_bytes: bytes that the host tier of one manager may hold (an `ArkCache` has one manager
            for all layers of the same shape). None: the memory that this process may use.
        stream_block_tokens: how many tokens of the past are in the device tier at a time while
            several new tokens attend all of it (chunked prefill, a next turn, drafted tokens).
    """

    page_size: int = 32
    budget_tokens: Budget = 2048
    num_sink_tokens: int = 32
    num_recent_tokens: int = 128
    num_dense_layers: int = 2
    device_pool_factor: float = 1.0
    key_bits: int = 16
    value_bits: int = 16
    index: str = "cuboid-mean"
    index_bits: int = 2
    group_reduction: str = "softmax-mean"
    host_bytes: int | None = None
    stream_block_tokens: int = 1024

    def __new__(cls, **settings: Any) -> CacheConfig:
        """Refuse unknown names."""
        # The generated __init__ would answer an unknown name with a bare TypeError.
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}: expected one of {', '.join(known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._check_integers()
        self._check_choices()
        for budget in _flatten(self.budget_tokens, depth=2):
            self._check_budget(budget)
        layers = self.budget_tokens if isinstance(self.budget_tokens, Sequence) else ()
        if any(isinstance(layer, Sequence) and None in layer for layer in layers):
            raise ConfigError(
                f"budget_tokens={self.budget_tokens!r}: a layer is unlimited as a whole (None in "
                "place of its tuple), not one of its KV heads"
            )
        if isinstance(self.budget_tokens, Sequence):
            object.__setattr__(self, "budget_tokens", _as_tuple(self.budget_tokens))

    @property
    def num_sink_pages(self) -> int:
        """Pages that hold the sinks: `num_sink_tokens` rounded up to whole pages."""
        return -(-self.num_sink_tokens // self.page_size)

    @property
    def window_tokens(self) -> int:
        """Capacity of the recent window: it seals a page when it holds this many tokens."""
        return self.num_recent_tokens + self.page_size

    def budget_of(self, layer: int, kv_head: int = 0) -> int | None:
        """Tokens that this KV head of this layer attends in a step; None is all of them."""
        if layer < self.num_dense_layers or self.budget_tokens is None:
            return None
        budget: Any = self.budget_tokens
        if isinstance(budget, tuple):
            budget = budget[layer]
        if isinstance(budget, tuple):
            budget = budget[kv_head]
        return None if budget is None else int(budget)

    def selected_pages(self, layer: int, kv_head: int = 0) -> int:
        """Pages that a step may select beside the sinks and the recent window.

        The window holds up to `window_tokens - 1` tokens when it is attended; what the budget
        has left beside that and the sinks is filled with whole pages, so that a step never
        attends more than the budget.
        """
        budget = self.budget_of(layer, kv_head)
        if budget is None:
            raise ConfigError(f"layer {layer} attends everything: it selects no pages")
        fixed = self.num_sink_pages * self.page_size + self.window_tokens - 1
        return max(0, (budget - fixed) // self.page_size)

    def check_layers(self, num_layers: int, num_kv_heads: int) -> None:
        """Raise `ConfigError` unless tuple budgets have one entry per layer (and KV head)."""
        budget = self.budget_tokens
        if not isinstance(budget, tuple):
            return
        if len(budget) != num_layers:
            raise ConfigError(
                f"budget_tokens has {len(budget)} entries: expected {num_layers} layers"
            )
        for entry in budget:
            if isinstance(entry, tuple) and len(entry) != num_kv_heads:
                raise ConfigError(
                    f"budget_tokens has {len(entry)} entries in a layer: expected {num_kv_heads} "
                    "KV heads"
                )

    def _check_integers(self) -> None:
        minima = {
            "page_size": 1,
            "num_sink_tokens": 0,
            "num_recent_tokens": 1,
            "num_dense_layers": 0,
            "stream_block_tokens": self.page_size if isinstance(self.page_size, int) else 1,
            "host_bytes": 1,
        }
        for name, minimum in minima.items():
            value = getattr(self, name)
            if name == "host_bytes" and value is None:
                continue
            if not _is_int(value) or value < minimum:
                raise ConfigError(f"{name}={value!r}: expected an integer of at least {minimum}")
        factor = self.device_pool_factor
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor < inf:
            raise ConfigError(f"device_pool_factor={factor!r}: expected a number of at least 1")

    def _check_choices(self) -> None:
        for name, choices in (
            ("key_bits", (16,)),
            ("value_bits", (16,)),
            ("index_bits", (2, 4, 8)),
            ("index", INDEXES),
            ("group_reduction", GROUP_REDUCTIONS),
        ):
            value = getattr(self, name)
            if type(value) is not type(choices[0]) or value not in choices:
                expected = ", ".join(map(repr, choices))
                raise ConfigError(f"{name}={value!r}: expected one of {expected}")

    def _check_budget(self, budget: Any) -> None:
        if budget is None:
            return
        if not _is_int(budget):
            raise ConfigError(
                f"budget_tokens={self.budget_tokens!r}: expected an integer, None (unlimited), "
                "or a tuple of integers per layer (and per KV head)"
            )
        sinks = self.num_sink_pages * self.page_size
        least = sinks + self.num_recent_tokens + self.page_size
        if budget < least:
            raise ConfigError(
                f"budget_tokens={budget}: the {sinks} sink tokens, {self.num_recent_tokens} "
                f"recent tokens and one page of {self.page_size} need {least}; "
                f"raise the budget or lower the other sizes"
            )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _flatten(budget: Any, depth: int) -> list[Any]:
    """The entries of a budget: per layer, then per KV head."""
    if depth and budget and isinstance(budget, Sequence) and not isinstance(budget, str):
        return [leaf for item in budget for leaf in _flatten(item, depth - 1)]
    return [budget]


def _as_tuple(budget: Any) -> Any:
    if isinstance(budget, Sequence):
        return tuple(_as_tuple(item) for item in budget)
    return budget
