"""Formats and small caches that the tests of quantised pages share."""

from typing import Any

from torch import Tensor

from arkcache import CacheConfig
from tests.twins import SMALL, Twins

FORMATS = ["K8V4", "K4V4", "K4V2", "K2V2", "K4V16", "K16V4"]
MIXED = ["K8V4+K4V2", "K16V16+K2V2", "K8V8+K8V2"]
ROTATIONS = ["none", "keys", "values", "both"]


def bits_of(name: str) -> dict[str, int]:
    """The settings that "K4V2" or "K8V4+K4V2" stands for."""
    settings = {}
    for prefix, part in zip(("", "coarse_"), name.split("+"), strict=False):
        key_bits, value_bits = part[1:].split("V")
        settings |= {f"{prefix}key_bits": int(key_bits), f"{prefix}value_bits": int(value_bits)}
    return settings


def config_of(name: str, **settings: Any) -> CacheConfig:
    """Small sizes, and demotions that a dozen steps bring about."""
    mixed = {"demote_after": 4, "demote_below": 0.9} if "+" in name else {}
    return CacheConfig(**(SMALL | {"group_size": 4} | bits_of(name) | mixed | settings))


def converse(twins: Twins, mask: Tensor | None = None, **how: Any) -> list[Tensor]:
    """A prompt in chunks, steps of one and of several tokens, retries, beams; all outputs."""
    outputs = []
    for new_tokens in (23, 14, *[1] * 9, 5, 1, 1):
        columns = twins.oracle.num_columns
        twins.append(new_tokens, None if mask is None else mask[:, columns : columns + new_tokens])
        outputs += twins.attend(min(new_tokens, 6), **how)
    twins.check()
    for columns in (twins.oracle.num_columns - 2, 30):  # the second gives pages back
        twins.crop(columns)
        outputs += twins.attend(**how)
        twins.check()
        twins.append(7)
        outputs += twins.attend(**how)
    for order in ([1, 0], [0, 1, 1], [2]):
        twins.keep_sequences(order)
        for _ in range(3):
            twins.append(1)
            outputs += twins.attend(**how)
        twins.check()
    return outputs
