"""How much more memory the host tiers of this process may take.

A tier without a limit of its own grows while the system has memory to spare. It asks before it
grows, some memory at a time, so that few steps have to look. What other tiers were granted and have
not touched yet is spoken for: caches that grow in turn share what is there, however many they are.
"""

from __future__ import annotations

import weakref

from arkcache.errors import HostTierFullError
from arkcache.tiering.system_memory import available_memory_bytes

MIN_GRANT_BYTES = 1 << 20
MAX_GRANT_BYTES = 64 << 20
"""Between these, and an eighth of what a tier needs, is what it is granted beyond that."""

_all: weakref.WeakValueDictionary[int, Allowance] = weakref.WeakValueDictionary()


class Allowance:
    """What one tier may touch, and what it has touched: bytes from the start of each side."""

    def __init__(self) -> None:
        self._granted = self._touched = 0
        _all[id(self)] = self

    def require(self, nbytes: int) -> None:
        """Make sure that the tier may touch so many bytes in all.

        Raises `HostTierFullError` where the system has too little to spare.
        """
        if not self.covers(nbytes):
            raise HostTierFullError(
                f"the host tier has touched {self._touched} bytes and needs {nbytes}, and the "
                f"system has only {self._to_spare()} to spare (what is available to this process "
                "and its control groups, less a margin): shorten the context, release another "
                "cache with reset(), or set host_bytes to what the tier may take regardless"
            )

    def covers(self, nbytes: int) -> bool:
        """Whether the tier may touch so many bytes in all: what was granted, or is now."""
        if nbytes <= self._granted:
            return True
        most = self._touched + self._to_spare()
        if nbytes > most:
            return False
        extra = min(max(nbytes // 8, MIN_GRANT_BYTES), MAX_GRANT_BYTES)
        self._granted = min(nbytes + extra, most)
        return True

    def touch(self, nbytes: int) -> None:
        """Note that the tier has touched so many bytes in all."""
        self._touched = max(self._touched, nbytes)
        self._granted = max(self._granted, self._touched)

    def give_back(self, nbytes: int) -> None:
        """Note that the tier has given back all but so many bytes."""
        self._granted = self._touched = nbytes

    def _to_spare(self) -> int:
        every = [one for ref in _all.valuerefs() if (one := ref()) is not None]
        spoken_for = sum(one._granted - one._touched for one in every if one is not self)
        return max(0, available_memory_bytes() - spoken_for)
