"""The tier on a disk: the same cache in a file, which goes with it unless it is saved."""

import copy
import ctypes
import errno
import mmap
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arkcache import ConfigError, HostTierFullError, InputError, KVCacheManager
from arkcache.backend import why_not_settings
from arkcache.bench.file_pool import FilePool
from arkcache.tiering import mapped_file
from arkcache.tiering.mapped_file import MappedFile
from tests.quantised import config_of
from tests.twins import Twins, check_references, small_config

pytestmark = pytest.mark.skipif(
    not hasattr(os, "posix_fallocate"), reason="room on a disk is set aside by POSIX's means"
)


def converse(twins: Twins) -> list[Tensor]:
    """A prompt, steps, a retry that gives pages back, beams; all outputs."""
    outputs = []
    for new_tokens in (50, *[1] * 20, 7):
        twins.append(new_tokens)
        outputs += twins.attend(min(new_tokens, 5))
    twins.crop(40)
    outputs += twins.attend()
    twins.keep_sequences([1, 1, 0])
    for _ in range(12):
        twins.append(1)
        outputs += twins.attend()
    twins.check()
    return outputs


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("name", ["K16V16", "K4V2"])
def test_the_same_as_in_memory(name: str, backend: str, tmp_path: Path) -> None:
    twins, others = (
        Twins(config_of(name, backend=backend, host_path=path), num_layers=2)
        for path in (str(tmp_path / "new" / "folder"), None)
    )
    for mine, other in zip(converse(twins), converse(others), strict=True):
        assert torch.equal(mine, other)
    check_references([twins.manager])
    assert [*(tmp_path / "new" / "folder").iterdir()] == []  # a file without a name
    twins.manager.reset()
    assert twins.manager.stats().host_bytes == 0


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_what_is_saved_is_not_copied_and_stays(backend: str, tmp_path: Path) -> None:
    """The file gets a second name; what the conversation does afterwards changes no page of it."""
    config = small_config(backend=backend, host_path=str(tmp_path / "tier"))
    twins = Twins(config, num_layers=2)
    twins.append(80)
    twins.manager.save(tmp_path / "saved")
    expected = [twins.manager.gather(layer) for layer in range(2)]
    pages = next((tmp_path / "saved").glob("*pages0*"))
    assert pages.stat().st_nlink == 1
    inode = pages.stat().st_ino
    twins.crop(10)
    for _ in range(60):
        twins.append(1)
        twins.attend()
    twins.check()
    for path in (str(tmp_path / "tier"), None):
        loaded = KVCacheManager.load(tmp_path / "saved", host_path=path)
        loaded.check_integrity()
        for layer in range(2):
            assert all(map(torch.equal, loaded.gather(layer), expected[layer]))
    twins.manager.save(tmp_path / "saved")
    again = next((tmp_path / "saved").glob("*pages0*"))
    assert (again.name != pages.name, again.stat().st_ino) == (True, inode)
    loaded = KVCacheManager.load(tmp_path / "saved")
    assert all(map(torch.equal, loaded.gather(1), twins.manager.gather(1)))
    check_references([twins.manager])


def test_on_another_disk_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(small_config(host_path=str(tmp_path / "tier")))
    twins.append(60)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", refuse)
    twins.manager.save(tmp_path / "saved")
    loaded = KVCacheManager.load(tmp_path / "saved", host_path=None)
    assert all(map(torch.equal, loaded.gather(0), twins.manager.gather(0)))


def test_a_full_disk_has_changed_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are refused before they are written: no signal, and the cache goes on with room."""
    twins = Twins(small_config(host_path=str(tmp_path)))
    twins.append(60)
    reserve, asked = os.posix_fallocate, []

    def full(descriptor: int, start: int, size: int) -> None:
        asked.append(size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mapped_file, "STEP_BYTES", mmap.PAGESIZE)
    state = twins.manager._host
    assert state is not None
    assert state._file is not None
    state._file.nbytes = state.used_bytes  # nothing ahead
    monkeypatch.setattr(os, "posix_fallocate", full)
    key = torch.randn(2, 2, 40, 8)
    with pytest.raises(HostTierFullError, match=r"has no room for .*No space left"):
        twins.manager.append(0, key, key)
    assert asked
    assert twins.manager.num_columns == 60
    monkeypatch.setattr(os, "posix_fallocate", reserve)
    twins.append(40)
    twins.attend()
    twins.check()


def test_room_ahead_is_only_taken_where_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = os.posix_fallocate

    def small_disk(descriptor: int, start: int, size: int) -> None:
        if start + size > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(descriptor, start, size)

    monkeypatch.setattr(os, "posix_fallocate", small_disk)
    file = MappedFile(tmp_path, 1 << 30)
    file.reserve(60_000)
    file.reserve(100_000)
    file.mapping[99_999] = 7
    with pytest.raises(HostTierFullError):
        file.reserve(100_001)
    assert file.nbytes == 100_000


def test_what_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    manager = KVCacheManager(1, 2, 8, small_config(host_path=str(tmp_path / "file")))
    with pytest.raises(ConfigError, match="no file can be made there"):
        manager.append(0, *torch.randn(2, 1, 2, 60, 8))
    assert manager.num_columns == 0
    for settings in ({"host_path": ""}, {"host_path": 3}):
        with pytest.raises(ConfigError, match="expected the name of a folder"):
            small_config(**settings)
    with pytest.raises(ConfigError, match="second format"):
        config_of("K8V4+K4V2", host_path=str(tmp_path))
    reason = why_not_settings(small_config(host_path=str(tmp_path)), torch.float32, False)
    assert reason == "a host tier in a file cannot be pinned"


def test_a_fork_cannot_write_to_the_file_of_its_parent(tmp_path: Path) -> None:
    file = MappedFile(tmp_path, 1 << 20)
    file.reserve(1000)
    child = os.fork()
    if child == 0:
        try:
            file.reserve(2000)
        except InputError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    file.reserve(2000)


def test_a_tier_that_is_linked_needs_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = Twins(small_config(host_path=str(tmp_path / "tier"), num_recent_tokens=1), head_dim=64)
    twins.append(3000)
    usage = shutil.disk_usage(tmp_path)._replace(free=(1 << 20) + (1 << 20))
    assert twins.manager.stats().host_bytes > 5 << 20
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    twins.manager.save(tmp_path / "saved")


def test_copies_share_the_file_and_pickles_are_refused(tmp_path: Path) -> None:
    twins = Twins(small_config(host_path=str(tmp_path)))
    twins.append(60)
    other = copy.deepcopy(twins.manager)
    query = twins.query()
    assert torch.equal(other.attend(0, query), twins.manager.attend(0, query))
    check_references([twins.manager, other])
    with pytest.raises(InputError, match=r"use save\(folder\)"):
        pickle.dumps(twins.manager)
    twins.check()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says what is resident")
@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("is_set", [False, True])
def test_what_is_resident_is_bounded(
    is_set: bool, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound that is set is one of the page cache too."""
    most = None
    if is_set:
        most = 1 << 20
    else:
        monkeypatch.setattr(mapped_file, "RESIDENT_BYTES", 1 << 20)
    config = small_config(
        host_path=str(tmp_path), budget_tokens=128, backend=backend, host_resident_bytes=most
    )
    manager = KVCacheManager(1, 2, 64, config)
    for _ in range(40):
        manager.append(0, *torch.randn(2, 1, 2, 400, 64))
    query = torch.randn(1, 4, 1, 64)
    for _ in range(40):
        manager.append(0, *torch.randn(2, 1, 2, 1, 64))
        manager.attend(0, torch.randn(1, 4, 1, 64))
    stats = manager.stats()
    assert stats.host_bytes > 15 << 20
    assert stats.host_resident_bytes <= 1 << 20
    assert resident(tmp_path) < 4 << 20
    if is_set and can_drop(tmp_path):
        assert in_page_cache(manager) < 6 << 20
    assert manager.attend(0, query).isfinite().all()


def can_drop(folder: Path) -> bool:
    """Whether files there can be dropped from memory: not those of a file system in memory."""
    with FilePool(folder, 1 << 20) as pool:
        return pool.why_never_cold() is None


def in_page_cache(manager: KVCacheManager) -> int:
    """Bytes of the pages that the system has in memory."""
    assert manager.host is not None
    pieces = manager.host.pieces()
    count = -(-manager.stats().host_bytes // mmap.PAGESIZE)
    found = np.zeros(count, np.uint8)
    address = ctypes.c_void_p(pieces.data_ptr())
    size = ctypes.c_size_t(count * mmap.PAGESIZE)
    assert not ctypes.CDLL(None).mincore(address, size, ctypes.c_void_p(found.ctypes.data))
    return int((found & 1).sum()) * mmap.PAGESIZE


def resident(folder: Path) -> int:
    """Bytes of files without a name in this folder that the process has in RAM."""
    text = Path("/proc/self/smaps").read_text()
    mine = rf"{re.escape(str(folder))}/.*\(deleted\)\n(?:.*\n)*?Rss:\s+(\d+) kB"
    return sum(map(int, re.findall(mine, text))) << 10
