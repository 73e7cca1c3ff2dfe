"""Memory of caches on the GPU: what they take is what they say, and `reset` gives it back."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import torch
from gpu_common import Bench, Outcome, Skipped
from gpu_lanes import Decoder
from gpu_manager import QUANTISED


def memory(bench: Bench) -> Outcome:
    """What torch has allocated for a cache, against what the cache says, prompt and steps over."""
    if bench.rehearsing:
        raise Skipped("a CPU's memory is not torch's to count")
    from arkcache.tiering.backup import backup_engine_of

    torch.ones((8, 8), device=bench.device) @ torch.ones((8, 8), device=bench.device)  # workspaces
    bench.release()
    before = torch.cuda.memory_allocated(bench.device)
    staged = backup_engine_of(bench.device).staging_bytes
    torch.cuda.reset_peak_memory_stats(bench.device)
    decoder = Decoder(bench, budget_tokens=4096, device_pool_factor=2.0)
    for _ in range(8):
        decoder.step(*decoder.tokens(4096))
    decoder.steps(40)
    bench.synchronize()
    stats = decoder.manager.stats()
    peak = torch.cuda.max_memory_allocated(bench.device) - before
    held = torch.cuda.memory_allocated(bench.device) - before
    staging = backup_engine_of(bench.device).staging_bytes - staged
    said = stats.device_bytes + stats.digest_bytes + staging
    sizes = {"held": held, "said": said, "peak": peak, "staging": staging}
    return Outcome(
        held / said, details={f"{name}_mib": round(n / 2**20, 1) for name, n in sizes.items()}
    )


def two_managers(bench: Bench) -> Outcome:
    """Two caches step in turn, each against its oracle; `reset` gives the pinned memory back."""
    from tests.twins import Twins, small_config

    first = Twins(small_config(backend="triton"), device=bench.device, seed=1)
    shape = {"num_kv_heads": 3, "head_dim": 16, "group": 4, "batch": 1}
    settings = QUANTISED | {"device_pool_factor": 2.0}
    second = Twins(small_config(backend="triton", **settings), device=bench.device, **shape)
    for twins, prompt in ((first, 45), (second, 80)):
        twins.append(prompt)
    for _ in range(bench.pick(20, 5)):
        for twins in (first, second):
            twins.append(1)
            twins.attend()
    for twins in (first, second):
        twins.check()
    return Outcome(details=_pinned_and_freed(bench))


def _pinned_and_freed(bench: Bench) -> dict[str, Any]:
    """Resident memory of this process with a cache of some size, and after `reset`."""
    gc.collect()
    before = _resident_bytes()
    decoder = Decoder(bench)
    for _ in range(bench.pick(24, 1)):
        key, value, _query = decoder.tokens(bench.pick(8192, 64))
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
    if not bench.rehearsing:
        assert pinned >= held, f"{held} bytes are held, {pinned} are pinned"
        assert after - before < held / 2, f"reset left {after - before} of {held} bytes resident"
    return {f"{name}_mib": round(size / 2**20, 1) for name, size in sizes.items()}


def _resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return sum(int(kib) << 10 for kib in re.findall(r"^Vm(?:RSS|Pin):\s+(\d+) kB", status, re.M))
