"""Sizes that launchers compute: Triton's own `cdiv` and `next_power_of_2` cost the host more each
than an allocation does, as they are also called where kernels are compiled.
"""

from __future__ import annotations


def cdiv(number: int, divisor: int) -> int:
    """number / divisor, rounded up."""
    return -(-number // divisor)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`, and 1 at least."""
    return 1 << max(0, number - 1).bit_length()


def aligned(number: int) -> int:
    """`number` of 4-byte elements, rounded up so that what comes next lies at 64 bytes."""
    return -(-number // 16) * 16
