"""One case of every kernel: what shows at once whether anything works, and is compiled first."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.gpu import test_attention, test_bytes, test_numeric
from tests.gpu.card import Card
from tests.gpu.compare import Case, attempt_all, one_of_each, run_cases

KERNELS: dict[str, Callable[[Card], list[Case]]] = {
    "append": test_bytes.append_cases,
    "seal": test_bytes.seal_cases,
    "copy": test_bytes.copy_cases,
    "score": test_numeric.score_cases,
    "select": test_numeric.select_cases,
    "attention": test_attention.attention_cases,
}


def smoke(card: Card, kernel: str) -> None:
    """One case of each kind of a kernel."""
    run_cases(card, one_of_each(KERNELS[kernel](card)))


def compile_kernels(card: Card) -> None:
    """All of them at once, so that none waits for the compiler alone.

    Compiled kernels are on disk, so that they serve the processes that come after this one too.
    What comes of the cases is for the smoke tests to say.
    """
    cases = [case for cases_of in KERNELS.values() for case in one_of_each(cases_of(card))]
    start = time.perf_counter()
    results = attempt_all(card, cases)
    failed = [c.name for c, r in zip(cases, results, strict=True) if isinstance(r, str)]
    seconds = round(time.perf_counter() - start, 1)
    card.note(kernels=len(cases), threads=card.threads, seconds=seconds, failed=failed)
