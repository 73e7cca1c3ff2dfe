"""What a cache has lent of its device tier: it is smaller meanwhile, and whole again afterwards.

Knows sizes only; the cache itself makes the smaller tier and the larger one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from arkcache.config import CacheConfig
from arkcache.errors import ConfigError, InputError


class Resizable(Protocol):
    """A cache whose device tier may change in size."""

    @property
    def config(self) -> CacheConfig:
        """Its settings, with the present `device_bytes`."""

    @property
    def tier_bytes(self) -> int | None:
        """Bytes of its device tier; while nothing is held its limit, None where there is none."""

    def change_size(self, device_bytes: int | None) -> None:
        """Have a device tier within so many bytes, or of any size.

        Raises `ConfigError`, before anything has changed, where too little would fit.
        """


class Loans:
    """What one cache has lent at present. A copy of the cache keeps its size, and has lent nothing.

    Loans end in any order: what the cache may take is always what it took before the first of them,
    less those that last.
    """

    def __init__(self) -> None:
        self._lent: list[int] = []
        self._limit: int | None = None
        self._whole = 0

    def __reduce__(self) -> tuple[type[Loans], tuple[()]]:
        return Loans, ()

    def check_none(self, what: str) -> None:
        """Raise `InputError` while something is lent."""
        if self._lent:
            raise InputError(
                f"{what} while {sum(self._lent)} bytes of the device tier are lent: leave the "
                "lend() block first"
            )

    @contextmanager
    def lend(self, cache: Resizable, num_bytes: Any) -> Iterator[None]:
        """Within it, the device tier of `cache` is at least `num_bytes` smaller than it is now."""
        size = _checked_size(cache, num_bytes)
        limit, before = max(1, size - num_bytes), cache.config.device_bytes
        try:
            cache.change_size(limit)
        except ConfigError as error:
            raise InputError(
                f"lend({num_bytes}): the device tier of {size} bytes cannot spare so many ({error})"
            ) from error
        if not self._lent:
            self._limit, self._whole = before, size
        # From the limit, not from the tier: whole pages may have left some of it unused.
        amount = self._whole - sum(self._lent) - limit
        self._lent.append(amount)
        try:
            yield
        finally:
            self._lent.remove(amount)
            cache.change_size(self._whole - sum(self._lent) if self._lent else self._limit)


def _checked_size(cache: Resizable, num_bytes: Any) -> int:
    """Bytes that can be lent from; raises `InputError` where `num_bytes` are not among them."""
    if isinstance(num_bytes, bool) or not isinstance(num_bytes, int) or num_bytes < 1:
        raise InputError(f"lend({num_bytes!r}): expected a number of bytes of at least 1")
    size = cache.tier_bytes
    if size is None:
        raise InputError(
            f"lend({num_bytes}): nothing is held and device_bytes is None, so there is no device "
            "tier to lend from; give device_bytes, or lend when tokens are held"
        )
    if num_bytes > size:
        why = "" if size else "; kernels of a CPU and layers that attend everything have none"
        raise InputError(f"lend({num_bytes}): the device tier of pages has {size} bytes{why}")
    return size
