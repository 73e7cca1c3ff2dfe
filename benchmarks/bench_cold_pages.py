"""How long a step takes whose pages are in no memory: read where they are touched, and announced.

    python benchmarks/bench_cold_pages.py FOLDER

FOLDER is on the disk to be measured, which takes 1 GiB for it. One thread, two layers of 4 KV heads
of 64, fp32, 262,144 tokens, the default budget; before each step the file is dropped from memory.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from arkcache import CacheConfig, KVCacheManager
from arkcache.tiering.file_tier import FileTier

LAYERS, HEADS, DIM, TOKENS, ROUNDS = 2, 4, 64, 1 << 18, 7


def read_bytes() -> int:
    """What this process has read from disks so far."""
    words = Path("/proc/self/io").read_text().split()
    return int(words[words.index("read_bytes:") + 1])


def time_steps(manager: KVCacheManager) -> tuple[float, float]:
    """Milliseconds of a cold step and MiB that it read from the disk: medians."""
    file = manager.host._file  # type: ignore[union-attr]
    assert file is not None
    seconds, read = [], []
    torch.manual_seed(1)
    for _ in range(ROUNDS):
        query = torch.randn(1, HEADS, 1, DIM)
        file.touch(1, file.resident_bytes)  # which drops it
        before, start = read_bytes(), perf_counter()
        for layer in range(LAYERS):
            manager.attend(layer, query)
        seconds.append(perf_counter() - start)
        read.append(read_bytes() - before)
    return 1e3 * median(seconds), median(read) / (1 << 20)


def main() -> None:
    """Fill a cache in a file, and time its steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="on the disk to be measured; it takes 1 GiB")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        config = CacheConfig(host_path=folder, host_resident_bytes=256 << 20)
        manager = KVCacheManager(LAYERS, HEADS, DIM, config)
        for _ in range(0, TOKENS, 4096):
            for layer in range(LAYERS):
                states = torch.randn(1, HEADS, 4096, DIM)
                manager.append(layer, states, states)
        print(f"{manager.stats().host_bytes >> 20} MiB of pages, {manager.planner.backend}")
        announced = FileTier.wants_ready
        for name, wants in (("where touched", property(lambda _: False)), ("announced", announced)):
            FileTier.wants_ready = wants  # type: ignore[assignment,method-assign]
            millis, read = time_steps(manager)
            print(f"{name}: {millis:.0f} ms a step, {read:.0f} MiB read")


if __name__ == "__main__":
    main()
