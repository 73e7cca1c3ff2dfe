"""Every error that ArkCache raises on purpose, in one tree.

    ArkCacheError
    ├── ConfigError (ValueError)          a setting that is unknown or impossible
    ├── InputError (ValueError)           a tensor or an argument that does not fit the cache
    │   └── UnsupportedModelError         a model without a layer that could be paged
    ├── HostTierFullError (MemoryError)   the host tier may not grow further; nothing was lost
    ├── TransferError (RuntimeError)      a copy between the tiers failed; the page is still held
    ├── SessionError (RuntimeError)       a saved session cannot be written, or is not what it was
    ├── UnconsumedStepError (RuntimeError)  a model stepped past a layer without attending it
    └── IntegrityError (AssertionError)   `check_integrity()` found bad metadata: a bug of ours

A caller's mistake is a `ValueError` too, so that code which knows nothing of ArkCache can catch it.
Every error of the first three kinds is raised before anything in the cache has changed.
"""

from __future__ import annotations


class ArkCacheError(Exception):
    """Base class of every error that ArkCache raises on purpose."""


class ConfigError(ArkCacheError, ValueError):
    """A setting is unknown, of the wrong type, or impossible beside the others."""


class InputError(ArkCacheError, ValueError):
    """A tensor or an argument does not fit: its shape, dtype, device or value."""


class UnsupportedModelError(InputError):
    """The model has no attention layer whose cache could be paged."""


class HostTierFullError(ArkCacheError, MemoryError):
    """The host tier has reached `host_bytes` or, without it, what the system has to spare.

    The tokens that did not fit were not appended.
    """


class TransferError(ArkCacheError, RuntimeError):
    """A copy between the tiers failed, and so did a second attempt; what was to be copied is kept.

    Raised at the step that needs the copy.
    """


class SessionError(ArkCacheError, RuntimeError):
    """A session cannot be saved, or what was saved cannot be loaded: damaged, or of another model,
    version or format. A save that fails leaves the one before it, a load that fails nothing.

    With `host_path` pages are read when they are needed: then a step raises it, that needs a page
    which is damaged, and other sequences go on.
    """


class UnconsumedStepError(ArkCacheError, RuntimeError):
    """The model updated a layer's cache and then attended without ArkCache's attention function."""


class IntegrityError(ArkCacheError, AssertionError):
    """The cache's metadata contradicts itself. Always a bug in ArkCache: please report it."""
