"""What a cache did and what it holds, as plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import distributed

AUDIT_MARGIN = 0.01
"""An estimate of missed mass is low where the truth exceeds it by more than this."""


@dataclass(frozen=True)
class MissedMass:
    """How much of their attention decode steps left out, as shares from 0 to 1.

    One entry is one step of one sequence and KV head, the mean over its query heads. Those of
    several heads or layers add up by `+`. Estimated pseudo tokens (`estimate_pages`) do not count
    as attended.

    Attributes:
        num_estimates: entries that the index rated; of every step with `target_missed_mass`.
        estimated_sum, estimated_worst: what they missed by the index.
        num_capped: those of them that missed more than the target when all places were taken.
        num_audits: entries for which all keys were read (`audit_every`).
        true_sum, true_worst: what these really missed.
        num_compared: audits of an index that rates mass, compared with its estimates.
        compared_sum: what these missed by the index.
        num_low: those whose estimate is below the truth by more than `AUDIT_MARGIN`.
    """

    num_estimates: int = 0
    estimated_sum: float = 0.0
    estimated_worst: float = 0.0
    num_capped: int = 0
    num_audits: int = 0
    true_sum: float = 0.0
    true_worst: float = 0.0
    num_compared: int = 0
    compared_sum: float = 0.0
    num_low: int = 0

    @property
    def estimated(self) -> float | None:
        """Mean estimate over all entries; None without any."""
        return _ratio(self.estimated_sum, self.num_estimates)

    @property
    def capped_share(self) -> float | None:
        """Share of entries that missed the target for want of places; None without any."""
        return _ratio(self.num_capped, self.num_estimates)

    @property
    def true(self) -> float | None:
        """Mean truth over the audits; None without any."""
        return _ratio(self.true_sum, self.num_audits)

    @property
    def compared(self) -> float | None:
        """Mean estimate over the audits, to be held against `true`; None without any."""
        return _ratio(self.compared_sum, self.num_compared)

    @property
    def low_share(self) -> float | None:
        """Share of the audits whose estimate is low; None without any."""
        return _ratio(self.num_low, self.num_compared)

    def __add__(self, other: MissedMass) -> MissedMass:
        together = {}
        for one in fields(MissedMass):
            mine, its = getattr(self, one.name), getattr(other, one.name)
            together[one.name] = max(mine, its) if one.name.endswith("_worst") else mine + its
        return MissedMass(**together)


def _ratio(total: float, count: int) -> float | None:
    return total / count if count else None


@dataclass(frozen=True)
class CacheStats:
    """A snapshot of a cache's counters and sizes, summed over its layers.

    Token counts are per KV head (the mean over a layer's heads, whose lists may differ in length),
    summed over layers and sequences; padding is never counted. Page counts are pages of one KV
    head. Counters run from the last `reset()`; everything else is the present state.

    Attributes:
        attended_tokens: attended by each layer's latest step.
        total_tokens: held, in all tiers together.
        decode_steps: steps of one token, of each layer; of one that attends another's keys, too,
            but where steps are replayed as graphs.
        host_tokens: those of `total_tokens` that are in the host tier, as sealed pages.
        pages_hit: selected and already in the device tier. On the kernels of a CPU, which read
            pages in the host tier: selected, and read by the step before.
        pages_recalled: selected and copied in from the host tier; on a CPU read anew.
        pages_evicted: dropped from the device tier to make room (the host tier keeps them).
        pages_speculated: recalled by a guess, beside the steps, into spare places.
        speculative_hits: those of `pages_hit` that a guess had brought: recalls that a step was
            spared.
        pages_demoted: rewritten in the coarse format (`coarse_key_bits`, `coarse_value_bits`).
        bytes_recalled: copied from the host tier to the device tier, packed as they are there,
            streamed blocks excluded. On plain torch on a CPU a selection of 16-bit pages that is
            mostly missing is copied whole, hits included; on its kernels, read anew, not copied.
        bytes_streamed: copied to the device tier for steps of several tokens and for audits
            (`audit_every`), block by block.
        bytes_backed_up: copied from the device tier to the host tier.
        device_bytes: the device tier: slots, windows, streaming block and dense layers.
        host_bytes: sealed pages in the host tier; a page shared by several sequences counts once.
            With a grouping, the numbers of their tokens as well.
        host_resident_bytes: what of `host_bytes` this process has in RAM at most: all of it, but
            with `host_path`, where it is in a file on a disk.
        digest_bytes: the page index, on the device, growing with the context; with
            `estimate_pages`, the pages' means as well.
        load_seconds, store_seconds: that copies from and to the host tier took, while they were
            timed (`time_copies`), on a CPU; two stats that differ in them alone are equal.
        pages_lost: pages of one KV head that `retention` gave up for good; they count neither as
            `total_tokens` nor as `host_tokens`.
        missed_by_layer: with `target_missed_mass` or `audit_every`, for each layer that is not
            dense and each of its KV heads what its steps missed; sums list all layers, in order.
    """

    attended_tokens: int = 0
    total_tokens: int = 0
    decode_steps: int = 0
    host_tokens: int = 0
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
    host_resident_bytes: int = 0
    digest_bytes: int = 0
    load_seconds: float = field(default=0.0, compare=False)
    store_seconds: float = field(default=0.0, compare=False)
    missed_by_layer: tuple[tuple[MissedMass, ...], ...] = ()
    pages_lost: int = 0

    @property
    def missed(self) -> MissedMass:
        """What the steps of all layers and KV heads missed, together."""
        return sum((head for layer in self.missed_by_layer for head in layer), MissedMass())

    @property
    def hit_rate(self) -> float:
        """Share of selected pages that were already in the device tier; 1.0 before any step."""
        selected = self.pages_hit + self.pages_recalled
        return self.pages_hit / selected if selected else 1.0

    def over_ranks(self, group: distributed.ProcessGroup | None = None) -> CacheStats:
        """What the caches of all processes of a group did and hold together, on each of them.

        For tensor parallelism, whose ranks keep a share of the KV heads each: every rank must call
        it, as often as the others. Bytes, pages and what was missed are of all ranks together;
        steps, and tokens, which are counted per KV head, are the mean. Without process groups,
        `self`.

        group: None is the default group.
        """
        from torch import distributed  # without it, torch need not be there to look at figures

        if not (distributed.is_available() and distributed.is_initialized()):
            return self
        parts: list[CacheStats] = [self] * distributed.get_world_size(group)
        distributed.all_gather_object(parts, self, group)
        return CacheStats.of_ranks(parts)

    @classmethod
    def of_ranks(cls, parts: Sequence[CacheStats]) -> CacheStats:
        """See `over_ranks`: parts are the ranks', at least one."""
        together = {
            field.name: [getattr(part, field.name) for part in parts] for field in fields(cls)
        }
        heads = zip(*together.pop("missed_by_layer"), strict=True)
        tokens = {
            name: round(sum(together.pop(name)) / len(parts))
            for name in ("attended_tokens", "total_tokens", "host_tokens", "decode_steps")
        }
        return cls(
            **tokens,
            **{name: sum(values) for name, values in together.items()},
            missed_by_layer=tuple(tuple(chain(*layer)) for layer in heads),
        )

    def __add__(self, other: CacheStats) -> CacheStats:
        return CacheStats(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(CacheStats))
        )
