"""What a run measures, as plain values: one record for each question and each passage."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from arkcache.errors import InputError


@dataclass(frozen=True)
class Case:
    """What a measurement is of: a task at a length, and a method at a budget.

    Attributes:
        length: tokens that are read.
        budget: as it was given; "-" for a method to which budgets do not matter.
    """

    task: str
    length: int
    method: str
    budget: str


@dataclass(frozen=True)
class Asked:
    """One question's outcome.

    Attributes:
        passage: its number within task and length.
        score: share of what is expected that the answer holds.
        depth: where in the passage the answer is, 0 to 1; None where it stands nowhere.
    """

    case: Case
    passage: int
    question: str
    expected: list[str]
    answer: str
    score: float
    depth: float | None


@dataclass(frozen=True)
class Predicted:
    """A passage predicted token by token; see `language.Predictions`."""

    case: Case
    passage: int
    source: str
    kl: list[float]
    nll: list[float]
    same: list[bool]


@dataclass(frozen=True)
class Cost:
    """What a method took on one passage.

    Attributes:
        attended_tokens: per step, layer and KV head, in the last step of each question; the mean.
        device_bytes: keys and values on the device with what they are looked up by.
        ms_per_token: median time of a one-token step.
    """

    case: Case
    passage: int
    attended_tokens: float
    device_bytes: int
    host_bytes: int
    ms_per_token: float


@dataclass(frozen=True)
class Attended:
    """What the attention of a passage's decode steps came to; see `attention.py`.

    Attributes:
        num_steps: that were looked at.
        num_pages: to select from, per KV head; 0 where no pages are rated.
        ladder: the k of every recall.
        layers: those that attend their whole past in the model, by number.
    """

    case: Case
    passage: int
    source: str
    num_steps: int
    num_pages: int
    ladder: list[int]
    layers: list[AttendedLayer]


@dataclass(frozen=True)
class AttendedLayer:
    """Means over the steps of one layer, by KV head; recalls [KV heads][k], empty without ratings.

    Attributes:
        is_dense: whether it attends everything.
        recall: of the pages that hold the most of the attention, as they are selected: for a
            group's query heads together.
        recall_alone: the same for each query head as if it were alone, the mean over a group.
        recall_peak: likewise, of the pages with the highest logit.
        missed: the share of attention of what is not attended.
        estimated: what the index makes of it; None where it does not rate mass.
        low: share of steps whose estimate is below the truth by more than 0.01; None likewise.
        error: norm of the output's difference to full attention's, as a share of that one's norm.
    """

    layer: int
    is_dense: bool
    recall: list[list[float]]
    recall_alone: list[list[float]]
    recall_peak: list[list[float]]
    missed: list[float]
    estimated: list[float] | None
    low: list[float] | None
    error: list[float]


@dataclass(frozen=True)
class Skipped:
    """A case that was not run, and why."""

    case: Case
    reason: str


@dataclass
class Result:
    """All that was measured so far.

    Attributes:
        finished: whether nothing was left to do.
    """

    settings: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    asked: list[Asked] = field(default_factory=list)
    predicted: list[Predicted] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    attended: list[Attended] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Budget:
    """A budget as it is given: "512", "1/8" of the length, or "none".

    Raises `InputError` for anything else.
    """

    given: str

    def __post_init__(self) -> None:
        above, found, below = self.given.partition("/")
        digits = above.isdecimal() and (below.isdecimal() if found else True)
        if self.given != "none" and not (digits and int(above) > 0 and int(below or 1) > 0):
            raise InputError(
                f"budget {self.given!r}: expected tokens as in 512, a share as in 1/8, or none"
            )

    def tokens(self, length: int) -> int | None:
        """Tokens for a passage of so many; None is all."""
        if self.given == "none":
            return None
        above, found, below = self.given.partition("/")
        return int(above) * length // int(below) if found else int(above)
