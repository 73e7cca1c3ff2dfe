"""What a run measures, as plain values: one record for each question and each passage."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

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
    """A passage predicted token by token; see `language.Predictions`.

    Attributes:
        said: the method's own greedy continuation, as token ids; as many as were predicted.
    """

    case: Case
    passage: int
    source: str
    kl: list[float]
    nll: list[float]
    same: list[bool]
    said: list[int] = field(default_factory=list)


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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Result:
        """What `to_dict` gave, whatever else is beside it."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        built: Result = _built(cls, known)
        return built


def _built(kind: Any, value: Any) -> Any:
    """A value of JSON as what a field of this type holds."""
    if isinstance(kind, type) and is_dataclass(kind):
        kinds = get_type_hints(kind)
        return kind(**{name: _built(kinds[name], own) for name, own in value.items()})
    if get_origin(kind) is list:
        return [_built(get_args(kind)[0], own) for own in value]
    return value


def load(path: Path) -> Result:
    """What an earlier run wrote. Raises `InputError` where it did not."""
    try:
        return Result.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path}: expected what `arkcache eval --output` wrote "
            f"({type(error).__name__}: {error})"
        ) from None


@dataclass(frozen=True)
class Budget:
    """A budget as it is given: "512", "1/8" of the length, "1/8B" of the bytes, or "none".

    A share of the bytes is of what the full cache takes on the device at the length.

    Raises `InputError` for anything else.
    """

    given: str

    def __post_init__(self) -> None:
        form = re.fullmatch(r"([0-9]+)(?:/([0-9]+)B?)?", self.given)
        if self.given != "none" and not (form and int(form[1]) > 0 and int(form[2] or 1) > 0):
            raise InputError(
                f"budget {self.given!r}: expected tokens as in 512, a share of them as in 1/8, of "
                "the bytes as in 1/8B, or none"
            )

    @property
    def is_of_bytes(self) -> bool:
        """Whether it is a share of the full cache's bytes on the device."""
        return self.given.endswith("B")

    def tokens(self, length: int) -> int | None:
        """Tokens for a passage of so many; None is all. Of a share of the bytes, what a method
        holds that keeps tokens and nothing else."""
        if self.given == "none":
            return None
        above, found, below = self.given.removesuffix("B").partition("/")
        return int(above) * length // int(below) if found else int(above)
