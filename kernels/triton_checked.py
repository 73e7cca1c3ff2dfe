"""The check of a launcher's tensors, and what has passed it, so that a step checks nothing twice.

Checking a dozen tensors by name costs the host several times what a look at them does; what the
checks look at (shapes, dtypes, strides, devices) is the same in every layer and from step to step.
Worth it where there are many tensors: with less, checking is as cheap as remembering.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal

import torch
from torch import Tensor

from arkcache.errors import InputError

Strides = Literal["contiguous", "last stride 1", "any strides"]

MAX_SIGNATURES = 4096
"""Beyond, all are forgotten: shapes that grow must not fill the host's memory."""


def check(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    *dtypes: torch.dtype,
    strides: Strides = "contiguous",
    device: torch.device | None = None,
) -> torch.Size:
    """The sizes of a tensor. Raises `InputError` unless it is what a kernel reads.

    Args:
        name: of the argument, for the message; "window.key" for a field.
        shape: None stands for any size.
        dtypes: those that are read.
        strides: how it lies in memory.
        device: where it lies; None is anywhere.
    """
    sizes = tensor.shape
    if (
        (sizes == shape or _fits(sizes, shape))
        and tensor.dtype in dtypes
        and (
            tensor.is_contiguous()
            if strides == "contiguous"
            else strides == "any strides" or tensor.stride()[-1] == 1
        )
        and (device is None or tensor.device == device)
    ):
        return sizes
    expected = ", ".join("any" if size is None else str(size) for size in shape)
    raise InputError(
        f"{name} is {tensor.dtype} {list(sizes)} on {tensor.device} with strides "
        f"{tensor.stride()}: expected {' or '.join(map(str, dtypes))} [{expected}]"
        f"{'' if device is None else f' on {device}'}, {strides}"
    )


def _fits(sizes: torch.Size, shape: tuple[int | None, ...]) -> bool:
    if len(sizes) != len(shape):
        return False
    fits = True
    for axis, size in enumerate(shape):  # `all` over pairs takes the host twice as long
        fits &= size is None or sizes[axis] == size
    return fits


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
        if len(self._passed) >= MAX_SIGNATURES:
            self._passed.clear()
        self._passed.add(key)
