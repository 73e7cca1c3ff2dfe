"""ArkCache: the KV cache of long contexts in two tiers, with recallable eviction.

Importing this module imports neither torch nor transformers: `KVCacheManager` loads torch, and
`ArkCache` and whatever else is for transformers its integration, when they are first used.
"""

from __future__ import annotations

from importlib import import_module
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
from arkcache.settings import load_config
from arkcache.stats import CacheStats

if TYPE_CHECKING:
    from arkcache.chat.session import Session
    from arkcache.huggingface import ArkCache, PrefixCache, detach, generate_graphed
    from arkcache.manager import KVCacheManager

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
    "PrefixCache",
    "Session",
    "SessionError",
    "TransferError",
    "UnconsumedStepError",
    "UnsupportedModelError",
    "__version__",
    "detach",
    "generate_graphed",
    "load_config",
]


_WHERE = {
    "ArkCache": "arkcache.huggingface",
    "KVCacheManager": "arkcache.manager",
    "PrefixCache": "arkcache.huggingface",
    "Session": "arkcache.chat.session",
    "detach": "arkcache.huggingface",
    "generate_graphed": "arkcache.huggingface",
}
"""The modules of what is heavy."""


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_WHERE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
