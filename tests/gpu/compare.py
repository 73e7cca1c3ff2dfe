"""Launchers beside their references: the same arguments for both, on the device and on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from tests.gpu.card import Card, poisoned


@dataclass(frozen=True)
class Case:
    """One way to call a launcher.

    Attributes:
        name: for the list of failures; its first word is what is tested.
        run: raises `AssertionError` where they differ; the number that it returns, if any, is the
            error in multiples of the bound.
    """

    name: str
    run: Callable[[], float | None]


def run_cases(card: Card, cases: Sequence[Case]) -> None:
    """All cases with poisoned memory. Raises `AssertionError` with those that failed."""
    results = attempt_all(card, cases)
    failures = [
        f"{case.name}: {result}"
        for case, result in zip(cases, results, strict=True)
        if isinstance(result, str)
    ]
    errors = [result for result in results if isinstance(result, float)]
    if failures:
        raise AssertionError(f"{len(failures)} of {len(cases)} cases: " + "; ".join(failures))
    card.note(cases=len(cases), **({"worst_error": round(max(errors), 3)} if errors else {}))


def some(card: Card, cases: Sequence[Case]) -> Sequence[Case]:
    """All cases, or in a rehearsal every fourth: the interpreter is slow."""
    return card.pick(cases, cases[::4])


def one_of_each(cases: Sequence[Case]) -> list[Case]:
    """The first of each kind: of cases whose names begin with the same word."""
    kinds: dict[str, Case] = {}
    for case in cases:
        kinds.setdefault(case.name.partition(" ")[0], case)
    return list(kinds.values())


def attempt_all(card: Card, cases: Sequence[Case]) -> list[float | str | None]:
    """What came of each case; of one that failed, why."""
    # Side by side for the sake of the compiler: nearly each case is a kernel of its own.
    with poisoned(), ThreadPoolExecutor(card.threads) as pool:
        results = list(pool.map(_attempt, cases))
    card.synchronize()
    return results


def _attempt(case: Case) -> float | str | None:
    try:
        return case.run()
    except Exception as error:  # whatever it is, it belongs to this case; the others go on
        return f"{type(error).__name__}: {str(error)[:300]}"


@dataclass
class Pair:
    """What both made of one call.

    Attributes:
        actual, expected: the arguments afterwards, on the CPU, by name; "returned" is what they
            returned.
    """

    actual: dict[str, Any]
    expected: dict[str, Any]

    def check_equal(self, *names: str) -> None:
        """Fail unless these are equal to the bit; "window.key" is a field of a tuple."""
        for name in names:
            mine, other = _named(self.actual, name), _named(self.expected, name)
            if not torch.equal(mine, other):
                wrong = (mine != other).nonzero()
                raise AssertionError(
                    f"{name} differs in {len(wrong)} of {other.numel()} elements, first at "
                    f"{wrong[:1].tolist()}"
                )

    def check_close(self, name: str, bound: Tensor | float) -> float:
        """Fail unless the error is within the bound everywhere; returns error / bound."""
        mine, other = _named(self.actual, name), _named(self.expected, name)
        return error_share(name, mine.float(), other.float(), bound)


def _named(arguments: dict[str, Any], name: str) -> Tensor:
    first, *fields = name.split(".")
    held: Tensor = reduce(getattr, fields, arguments[first])
    return held


def error_share(name: str, mine: Tensor, other: Tensor, bound: Tensor | float) -> float:
    """The largest error in multiples of its bound; fails above 1, and for NaN."""
    error = (mine - other).abs()
    error = torch.where(mine == other, 0.0, error)  # infinities
    share = float((error / bound).max()) if error.numel() else 0.0
    if not share <= 1:
        raise AssertionError(f"{name} is off by {float(error.max()):.3g}, {share:.3g} of the bound")
    return share


def bound_of(plain: Tensor, exact: Tensor) -> Tensor:
    """Twice the largest error of plain torch, at least 16 roundings of fp32."""
    largest = exact.abs().amax().clamp(min=1.0)
    return (2 * (plain.float() - exact).abs().max()).clamp(min=16 * 1.2e-7 * largest)


def on_both(
    card: Card,
    launch: Callable[..., Any],
    reference: Callable[..., Any],
    pinned: Sequence[str] = (),
    **arguments: Any,
) -> Pair:
    """Call both with copies of the arguments; those named in `pinned` ("host.pieces" for a field of
    a tuple) stay host memory."""
    theirs = _each(lambda _, tensor: _copy(tensor, torch.device("cpu")), arguments)
    mine = _each(lambda name, tensor: _on(card, tensor, name in pinned), arguments)
    expected = reference(**theirs)
    actual = launch(**mine)
    card.synchronize()
    on_host = _each(lambda _, tensor: tensor.cpu(), mine | {"returned": actual})
    return Pair(on_host, theirs | {"returned": expected})


def _each(change: Callable[[str, Tensor], Tensor], arguments: dict[str, Any]) -> dict[str, Any]:
    """The same with another tensor for each, which `change` makes of its name and itself."""

    def changed(name: str, value: Any) -> Any:
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            fields = zip(value._fields, value, strict=True)
            return type(value)(*(changed(f"{name}.{field}", held) for field, held in fields))
        return change(name, value) if isinstance(value, Tensor) else value

    return {name: changed(name, value) for name, value in arguments.items()}


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    """With all of its storage, so that strides and what lies between are the same."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = tensor.as_strided((size,), (1,), 0).to(device, copy=True)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _on(card: Card, tensor: Tensor, stays: bool) -> Tensor:
    if not stays:
        return _copy(tensor, card.device)
    return tensor.clone() if card.rehearsing else tensor.pin_memory()
