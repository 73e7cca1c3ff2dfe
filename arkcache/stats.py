"""What a cache did and what it holds, as plain integers."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class CacheStats:
    """A snapshot of a cache's counters and sizes, summed over its layers.

    Token counts are per KV head (the mean over a layer's heads, whose lists may differ in length),
    summed over layers and sequences; padding is never counted. Page counts are pages of one KV
    head. Counters run from the last `reset()`; everything else is the present state.

    Attributes:
        attended_tokens: attended by each layer's latest step.
        total_tokens: held, in all tiers together.
        pages_hit: selected and already in the device tier.
        pages_recalled: selected and copied in from the host tier.
        pages_evicted: dropped from the device tier to make room (the host tier keeps them).
        pages_speculated: recalled by a guess, beside the steps, into spare places.
        speculative_hits: those of `pages_hit` that a guess had brought: recalls that a step was
            spared.
        pages_demoted: rewritten in the coarse format (`coarse_key_bits`, `coarse_value_bits`).
        bytes_recalled: copied from the host tier to the device tier, packed as they are there,
            streamed blocks excluded. On a CPU a selection of 16-bit pages that is mostly missing is
            copied whole, hits included.
        bytes_streamed: copied to the device tier for steps of several tokens, block by block.
        bytes_backed_up: copied from the device tier to the host tier.
        device_bytes: the device tier: slots, windows, streaming block and dense layers.
        host_bytes: sealed pages in the host tier; a page shared by several sequences counts once.
        digest_bytes: the page index, on the device, growing with the context; with
            `estimate_pages`, the pages' means as well.
    """

    attended_tokens: int = 0
    total_tokens: int = 0
    pages_hit: int = 0
    pages_recalled: int = 0
    pages_evicted: int = 0
    bytes_recalled: int = 0
    bytes_streamed: int = 0
    bytes_backed_up: int = 0
    pages_demoted: int = 0
    pages_speculated: int = 0
    speculative_hits: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    digest_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of selected pages that were already in the device tier; 1.0 before any step."""
        selected = self.pages_hit + self.pages_recalled
        return self.pages_hit / selected if selected else 1.0

    def __add__(self, other: CacheStats) -> CacheStats:
        return CacheStats(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(CacheStats))
        )
