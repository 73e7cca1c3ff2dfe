"""ArkCache: the KV cache of long contexts in two tiers, with recallable eviction.

Importing this module touches neither CUDA nor transformers; `ArkCache`, `detach`,
`generate_graphed` and `Session` load the Hugging Face integration when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from arkcache.config import CacheConfig
from arkcache.errors import (
    ArkCacheError,
    ConfigError,
    HostTierFullError,
    InputError,
    IntegrityError,
    SessionError,
    TransferError,
    UnconsumedStepError,
    UnsupportedModelError,
)
from arkcache.manager import KVCacheManager
from arkcache.stats import CacheStats

if TYPE_CHECKING:
    from arkcache.chat.session import Session
    from arkcache.huggingface import ArkCache, detach, generate_graphed

__version__ = "0.1.0"

__all__ = [
    "ArkCache",
    "ArkCacheError",
    "CacheConfig",
    "CacheStats",
    "ConfigError",
    "HostTierFullError",
    "InputError",
    "IntegrityError",
    "KVCacheManager",
    "Session",
    "SessionError",
    "TransferError",
    "UnconsumedStepError",
    "UnsupportedModelError",
    "__version__",
    "detach",
    "generate_graphed",
]


def __getattr__(name: str) -> Any:
    if name in ("ArkCache", "detach", "generate_graphed"):
        from arkcache import huggingface

        return getattr(huggingface, name)
    if name == "Session":
        from arkcache.chat.session import Session

        return Session
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
