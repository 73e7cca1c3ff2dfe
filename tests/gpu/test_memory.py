"""Memory of caches on the GPU: what they take is what they say, and `reset` gives it back."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import torch

from tests.gpu.card import Card
from tests.gpu.decoder import Decoder
from tests.gpu.outcome import Skipped
from tests.gpu.test_manager import QUANTISED
from tests.twins import Twins, small_config

MAX_OVER_SAID = 1.1
"""Bytes that torch has allocated for a cache over those that it says it takes."""


def test_memory(card: Card) -> None:
    """What torch has allocated for a cache, against what the cache says, prompt and steps over."""
    if card.rehearsing:
        raise Skipped("a CPU's memory is not torch's to count")
    from arkcache.tiering.backup import backup_engine_of

    torch.ones((8, 8), device=card.device) @ torch.ones((8, 8), device=card.device)  # workspaces
    card.release()
    before = torch.cuda.memory_allocated(card.device)
    staged = backup_engine_of(card.device).staging_bytes
    torch.cuda.reset_peak_memory_stats(card.device)
    decoder = Decoder(card, budget_tokens=4096, device_pool_factor=2.0)
    for _ in range(8):
        decoder.step(*decoder.tokens(4096))
    decoder.steps(40)
    card.synchronize()
    stats = decoder.manager.stats()
    peak = torch.cuda.max_memory_allocated(card.device) - before
    held = torch.cuda.memory_allocated(card.device) - before
    staging = backup_engine_of(card.device).staging_bytes - staged
    said = stats.device_bytes + stats.digest_bytes + staging
    sizes = {"held": held, "said": said, "peak": peak, "staging": staging}
    card.note(**{f"{name}_mib": round(n / 2**20, 1) for name, n in sizes.items()})
    assert held <= MAX_OVER_SAID * said, f"{held} bytes are allocated, stats say {said}"


def test_two_managers(card: Card) -> None:
    """Two caches step in turn, each against its oracle; `reset` gives the pinned memory back."""
    first = Twins(small_config(backend="triton"), device=card.device, seed=1)
    shape = {"num_kv_heads": 3, "head_dim": 16, "group": 4, "batch": 1}
    settings = QUANTISED | {"device_pool_factor": 2.0}
    second = Twins(small_config(backend="triton", **settings), device=card.device, **shape)
    for twins, prompt in ((first, 45), (second, 80)):
        twins.append(prompt)
    for _ in range(card.pick(20, 2)):
        for twins in (first, second):
            twins.append(1)
            twins.attend()
    for twins in (first, second):
        twins.check()
    _check_pinned_and_freed(card)


def _check_pinned_and_freed(card: Card) -> None:
    """Resident memory of this process with a cache of some size, and after `reset`."""
    gc.collect()
    before = _resident_bytes()
    decoder = Decoder(card)
    for _ in range(card.pick(24, 1)):
        key, value, _query = decoder.tokens(card.pick(8192, 64))
        for layer in range(decoder.num_layers):
            decoder.manager.append(layer, key[layer], value[layer])
    host = decoder.manager._host
    assert host is not None
    held, pinned = decoder.manager.stats().host_bytes, host._pinning.nbytes
    with_it = _resident_bytes()
    decoder.manager.reset()
    assert host.num_pieces == 0, "reset left pieces in the host tier"
    del host
    gc.collect()
    after = _resident_bytes()
    sizes = {"held": held, "pinned": pinned, "resident_more": with_it - before}
    sizes["resident_left"] = after - before
    card.note(**{f"{name}_mib": round(size / 2**20, 1) for name, size in sizes.items()})
    if not card.rehearsing:
        assert pinned >= held, f"{held} bytes are held, {pinned} are pinned"
        assert after - before < held / 2, f"reset left {after - before} of {held} bytes resident"


def _resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return sum(int(kib) << 10 for kib in re.findall(r"^Vm(?:RSS|Pin):\s+(\d+) kB", status, re.M))
