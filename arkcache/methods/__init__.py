"""Published methods as settings: each is one small frozen dataclass in a file of its own."""

from arkcache.methods.h2o import H2O
from arkcache.methods.pyramidkv import PyramidKV, pyramid_budgets
from arkcache.methods.retention import Retention, Seen, keep_best
from arkcache.methods.scissorhands import Scissorhands
from arkcache.methods.snapkv import SnapKV
from arkcache.methods.streamingllm import StreamingLLM

RETENTIONS: dict[str, type[Retention]] = {
    "h2o": H2O,
    "pyramidkv": PyramidKV,
    "scissorhands": Scissorhands,
    "snapkv": SnapKV,
    "streamingllm": StreamingLLM,
}
"""What `CacheConfig(retention=...)` takes by name."""

__all__ = [
    "H2O",
    "RETENTIONS",
    "PyramidKV",
    "Retention",
    "Scissorhands",
    "Seen",
    "SnapKV",
    "StreamingLLM",
    "keep_best",
    "pyramid_budgets",
]
