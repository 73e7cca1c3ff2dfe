"""Launchers beside their references: the same arguments for both, on the device and on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from gpu_common import Bench, Outcome, poisoned
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One way to call a launcher.

    Attributes:
        name: for the list of failures.
        run: raises `AssertionError` where they differ; the number that it returns, if any, is the
            error in multiples of the bound.
    """

    name: str
    run: Callable[[], float | None]


def run_cases(bench: Bench, cases: Sequence[Case]) -> Outcome:
    """All cases with poisoned memory. Raises `AssertionError` with those that failed."""
    if bench.rehearsing:
        cases = cases[::4]  # the interpreter is slow
    # Side by side for the sake of the compiler: nearly each case is a kernel of its own.
    with poisoned(), ThreadPoolExecutor(bench.threads) as pool:
        results = list(pool.map(lambda case: _attempt(case), cases))
    bench.synchronize()
    failures = [
        f"{case.name}: {result}"
        for case, result in zip(cases, results, strict=True)
        if isinstance(result, str)
    ]
    errors = [result for result in results if isinstance(result, float)]
    if failures:
        raise AssertionError(f"{len(failures)} of {len(cases)} cases: " + "; ".join(failures))
    details = {"cases": len(cases)} | ({"worst_error": round(max(errors), 3)} if errors else {})
    return Outcome(max(errors, default=None), details=details)


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
        """Fail unless these are equal to the bit."""
        for name in names:
            mine, other = self.actual[name], self.expected[name]
            if not torch.equal(mine, other):
                wrong = (mine != other).nonzero()
                raise AssertionError(
                    f"{name} differs in {len(wrong)} of {other.numel()} elements, first at "
                    f"{wrong[:1].tolist()}"
                )

    def check_close(self, name: str, bound: Tensor | float) -> float:
        """Fail unless the error is within the bound everywhere; returns error / bound."""
        mine, other = self.actual[name].float(), self.expected[name].float()
        return error_share(name, mine, other, bound)


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
    bench: Bench,
    launch: Callable[..., Any],
    reference: Callable[..., Any],
    pinned: Sequence[str] = (),
    **arguments: Any,
) -> Pair:
    """Call both with copies of the arguments; those named in `pinned` stay host memory."""
    theirs = {name: _copied(value) for name, value in arguments.items()}
    mine = {name: _on(bench, value, name in pinned) for name, value in arguments.items()}
    expected = reference(**theirs)
    actual = launch(**mine)
    bench.synchronize()
    return Pair(
        {name: _on_host(value) for name, value in mine.items()} | {"returned": _on_host(actual)},
        theirs | {"returned": expected},
    )


def _copied(value: Any) -> Any:
    return _copy(value, torch.device("cpu")) if isinstance(value, Tensor) else value


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    """With all of its storage, so that strides and what lies between are the same."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage = tensor.as_strided((size,), (1,), 0).to(device, copy=True)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _on(bench: Bench, value: Any, stays: bool) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_on(bench, field, stays) for field in value))
    if not isinstance(value, Tensor):
        return value
    if not stays:
        return _copy(value, bench.device)
    return value.clone() if bench.rehearsing else value.pin_memory()


def _on_host(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_on_host, value))
    return value.cpu() if isinstance(value, Tensor) else value
