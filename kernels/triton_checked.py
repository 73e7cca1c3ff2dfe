"""What launchers have checked already, so that a step checks nothing twice.

Checking a dozen tensors by name costs the host several times what a look at them does; what the
checks look at (shapes, dtypes, strides, devices) is the same in every layer and from step to step.
Worth it where there are many tensors: with less, checking is as cheap as remembering.
"""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor

MOST_SIGNATURES = 4096
"""Beyond, all are forgotten: shapes that grow must not fill the host's memory."""


def signature(*tensors: Tensor | None) -> Hashable:
    """All of tensors that a launcher may refuse."""
    return tuple(
        None if each is None else (each.shape, each.dtype, each.stride(), each.device)
        for each in tensors
    )


class Checked:
    """The signatures that passed."""

    def __init__(self) -> None:
        self._passed: set[Hashable] = set()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._passed

    def add(self, key: Hashable) -> None:
        """Remember that what has this signature was checked and is right."""
        if len(self._passed) >= MOST_SIGNATURES:
            self._passed.clear()
        self._passed.add(key)
