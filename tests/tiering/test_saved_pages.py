"""A saved cache is loaded where it lies: nothing is read before it is needed, and never wrong."""

import copy
import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from arkcache import HostTierFullError, KVCacheManager, SessionError
from arkcache.saving import pages as saving
from arkcache.tiering import file_tier
from tests.quantised import config_of
from tests.twins import Twins, check_references, small_config

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="files without a name get one by Linux's means"
)

BACKENDS = ["torch", "numba"]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each page of a saved file was read, by its offset in pages of `PIECE`."""
    counts: Counter[int] = Counter()
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[Any], offset: int) -> int:
        nbytes = sum(memoryview(one).nbytes for one in buffers)
        counts.update(range(offset // PIECE, (offset + nbytes) // PIECE))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    return counts


PIECE = 2 * 4 * (8 + 8) * 4
"""Bytes of a page of two KV heads, four tokens, keys and values of 8 in fp32."""


def saved_twins(folder: Path, columns: int = 200, **settings: Any) -> Twins:
    """A cache that holds a prompt, saved in `folder`."""
    twins = Twins(small_config(**settings), num_layers=2)
    twins.append(columns)
    twins.manager.save(folder)
    return twins


def load(folder: Path, **settings: Any) -> KVCacheManager:
    return KVCacheManager.load(folder, host_path=str(folder.parent / "tier"), **settings)


def pages_file(folder: Path) -> Path:
    (path,) = folder.glob("*pages0*")
    return path


def flip(path: Path, at: int) -> None:
    """Another bit in the middle of page `at`, in the file itself: it may be mapped."""
    with path.open("r+b") as file:
        file.seek(at * PIECE + PIECE // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))


def where(folder: Path, layer: int, sequence: int, page: int) -> int:
    """The position in its file of a saved page."""
    from safetensors.torch import load_file

    (log,) = folder.glob("*log*")
    (state,) = folder.glob(f"*layer{layer}-*")
    number = int(load_file(state)["pieces"][sequence, 0, page])
    return int(load_file(log)["positions0"][number])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["K16V16", "K4V2"])
@pytest.mark.parametrize("from_memory", [False, True], ids=["linked", "copied"])
def test_what_is_loaded_in_place_is_what_was_saved(
    name: str, backend: str, from_memory: bool, tmp_path: Path
) -> None:
    """Prompts, steps, retries and beams, to the bit; and the saved file is never written to."""
    path = None if from_memory else str(tmp_path / "tier")
    twins = Twins(config_of(name, backend=backend, host_path=path), num_layers=2)
    twins.append(90)
    twins.attend()
    twins.manager.save(tmp_path / "saved")
    before = hashlib.sha256(pages_file(tmp_path / "saved").read_bytes()).hexdigest()
    other = copy.deepcopy(twins)
    twins.manager = load(tmp_path / "saved")
    for one in (twins, other):
        one.attend()
        for new_tokens in (1, 1, 1, 1, 1, 6, 1, 30, 1):
            one.append(new_tokens)
            one.attend(new_tokens)
        one.crop(70)
        one.attend()
        one.keep_sequences([1, 0, 0])
        one.append(1)
    for mine, theirs in zip(twins.attend(), other.attend(), strict=True):
        assert torch.equal(mine, theirs)
    twins.check()
    check_references([twins.manager])
    after = hashlib.sha256(pages_file(tmp_path / "saved").read_bytes()).hexdigest()
    assert after == before or not from_memory  # a tier that lives on goes on in its file
    reloaded = KVCacheManager.load(tmp_path / "saved")
    assert reloaded.num_columns == 90


def test_loading_reads_no_page_and_each_is_compared_once(
    tmp_path: Path, reads: Counter[int]
) -> None:
    twins = saved_twins(tmp_path / "saved", backend="numba")
    twins.manager = load(tmp_path / "saved")
    assert not reads
    assert twins.manager.host is not None
    assert twins.manager.host.has_unread
    twins.attend()
    assert 0 < len(reads) < 2 * 2 * 48  # sinks and what was selected
    for _ in range(5):
        twins.append(1)
        twins.attend()
    twins.attend(20)
    assert set(reads.values()) == {1}
    assert len(reads) == 2 * 2 * 49
    assert not twins.manager.host.has_unread
    before = reads.total()
    twins.append(1)
    twins.attend()
    twins.crop(120)
    twins.attend(5)
    assert reads.total() == before


def test_plain_torch_reads_what_is_resident(tmp_path: Path, reads: Counter[int]) -> None:
    saved_twins(tmp_path / "saved", backend="torch")
    manager = load(tmp_path / "saved")
    assert len(reads) <= 2 * 2 * 6  # sinks and selected pages, of each layer and sequence
    manager.check_integrity()
    assert len(reads) == 2 * 2 * 49


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_page_spoils_who_needs_it_alone(backend: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    twins = saved_twins(saved, backend=backend)
    flip(pages_file(saved), where(saved, layer=1, sequence=0, page=20))
    twins.manager = load(saved)
    message = r"page 20 of layer 1 \(sequence 0\) is damaged.*pages0"
    for _ in range(3):  # again and again: it is never read
        with pytest.raises(SessionError, match=message):
            twins.manager.attend(1, twins.query(5))
    twins.attend_layer(0, twins.query(5))
    with pytest.raises(SessionError, match=message):
        twins.manager.check_integrity()
    with pytest.raises(SessionError, match=message):
        twins.manager.gather(1)
    with pytest.raises(SessionError, match=message):
        twins.crop(82)  # in the middle of that page
    assert twins.manager.num_columns == 200
    spoilt = set()
    for _ in range(40):  # steps choose it or another, and attend what they chose
        for layer in range(2):
            query = twins.query()
            try:
                twins.manager.attend(layer, query)
            except SessionError as error:
                spoilt.add(str(error).partition(" is damaged")[0])
                continue
            twins.attend_layer(layer, query)
    assert spoilt <= {"page 20 of layer 1 (sequence 0)"}
    twins.keep_sequences([1, 1])
    twins.attend(5)
    twins.attend()
    twins.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_page_that_a_step_selects(backend: str, tmp_path: Path) -> None:
    """A budget of everything selects it; with it gone, the rest is attended."""
    saved = tmp_path / "saved"
    twins = saved_twins(saved, backend=backend, budget_tokens=400)
    flip(pages_file(saved), where(saved, layer=0, sequence=1, page=30))
    if backend == "torch":  # what was resident is copied when it is loaded
        with pytest.raises(SessionError, match="page 30 of layer 0"):
            load(saved)
        return
    twins.manager = load(saved)
    for _ in range(2):
        with pytest.raises(SessionError, match=r"page 30 of layer 0 \(sequence 1\)"):
            twins.manager.attend(0, twins.query())
    twins.crop(110)
    twins.attend()
    twins.check()


def test_a_file_that_is_cut_after_the_load(tmp_path: Path) -> None:
    """Before a page is touched it is read, so that what is missing is an error and no signal."""
    twins = saved_twins(tmp_path / "saved", backend="numba", budget_tokens=400)
    twins.manager = load(tmp_path / "saved")
    os.truncate(pages_file(tmp_path / "saved"), 10 * PIECE)
    with pytest.raises(SessionError, match="it ends too early"):
        twins.manager.attend(0, twins.query())


def test_a_disk_that_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = saved_twins(tmp_path / "saved", backend="numba")
    twins.manager = load(tmp_path / "saved")

    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(SessionError, match=r"cannot read .*Input/output error"):
            twins.manager.attend(0, twins.query())
    twins.attend()


def test_saved_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file more each time, none of them copied, until there are many; pages of each are read."""
    monkeypatch.setattr(saving, "MAX_FILES", 3)
    saved = tmp_path / "saved"
    twins = saved_twins(saved, columns=80, host_path=str(tmp_path / "tier"))
    for count in (1, 2, 3, 1, 2):
        files = sorted(saved.glob("*pages0*"))
        assert len(files) == count
        del twins.manager
        twins.manager = load(saved)
        twins.append(60)
        twins.attend()
        twins.crop(twins.oracle.num_columns - 25)
        twins.append(3)
        twins.attend(10)
        twins.manager.save(saved)
        check_references([twins.manager])
    for path in (None, str(tmp_path / "tier")):
        twins.manager = KVCacheManager.load(saved, host_path=path)
        twins.check()
        twins.attend(20)


def test_a_last_file_of_which_no_page_is_left(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    twins = saved_twins(saved, columns=80, backend="numba")
    for _ in range(2):
        twins.manager = load(saved)
        twins.append(300)
        twins.manager.save(saved)
    twins.crop(60)
    twins.manager.save(saved)
    assert len([*saved.glob("*pages0*")]) == 3
    twins.manager = load(saved)
    twins.append(300)
    twins.attend(20)
    twins.check()


def test_what_was_loaded_and_not_touched_is_saved_by_links(
    tmp_path: Path, reads: Counter[int]
) -> None:
    twins = saved_twins(tmp_path / "saved", backend="numba")
    twins.manager = load(tmp_path / "saved")
    twins.manager.save(tmp_path / "other")
    assert not reads
    inodes = {pages_file(tmp_path / one).stat().st_ino for one in ("saved", "other")}
    assert len(inodes) == 1


def test_a_copy_that_a_save_must_make_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "saved"
    twins = saved_twins(saved, backend="numba")
    flip(pages_file(saved), where(saved, layer=1, sequence=1, page=7))
    manager = load(saved)
    monkeypatch.setattr(saving, "MAX_FILES", 0)
    with pytest.raises(SessionError, match=r"page 7 of layer 1 \(sequence 1\)"):
        manager.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    twins.manager.save(tmp_path / "other")


def test_on_another_disk_all_is_read(
    tmp_path: Path, reads: Counter[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "saved"
    twins = saved_twins(saved)
    monkeypatch.setattr(file_tier, "disk_of", lambda _: -1)
    twins.manager = load(saved)
    assert len(reads) == 2 * 2 * 49
    twins.check()
    flip(pages_file(saved), 3)
    with pytest.raises(SessionError, match="the checksum of page 3 is another"):
        load(saved)


def test_a_limit_counts_what_is_loaded(tmp_path: Path) -> None:
    held = saved_twins(tmp_path / "saved").manager.stats().host_bytes
    with pytest.raises(HostTierFullError, match="at most 10000"):
        load(tmp_path / "saved", host_bytes=10_000)
    manager = load(tmp_path / "saved", host_bytes=held + 8 * PIECE)
    assert manager.stats().host_bytes == held
    new = torch.randn(2, 2, 2, 8, 8)
    for layer in range(2):
        manager.append(layer, *new)
    with pytest.raises(HostTierFullError):
        manager.append(0, *new)
    manager.check_integrity()


def test_what_is_resident_of_loaded_pages_is_bounded(tmp_path: Path) -> None:
    """What was loaded is dropped as well, and comes back without being compared again."""
    twins = saved_twins(tmp_path / "saved", columns=600, backend="numba")
    twins.manager = load(tmp_path / "saved", host_resident_bytes=2_000_000)
    most = 0
    for new_tokens in (1, 1, 600, 1, 1, 600):
        twins.attend(min(new_tokens, twins.oracle.num_columns))
        twins.append(1)
        most = max(most, twins.manager.stats().host_resident_bytes)
    assert 0 < most <= twins.manager.stats().host_bytes
    assert isinstance(twins.manager.host, file_tier.FileTier)
    assert twins.manager.host.wants_ready
    twins.check()


def test_the_tier_outlives_the_folder_and_copies_share_it(tmp_path: Path) -> None:
    """Another save, or nobody's folder any more: what is open stays."""
    saved = tmp_path / "saved"
    twins = saved_twins(saved)
    twins.manager = load(saved)
    for path in saved.iterdir():
        path.unlink()
    other = copy.deepcopy(twins)
    twins.attend(5)
    other.crop(60)
    other.append(50)
    other.attend(50)
    check_references([twins.manager, other.manager])
    twins.manager.save(tmp_path / "again")  # a name that is gone cannot be given again: a copy
    twins.manager = load(tmp_path / "again")
    twins.check()
    other.check()
    other.reset()
    assert other.manager.stats().host_bytes == 0


def test_positions_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With checksums that are right: two pages in one place."""
    write = saving.write_pages

    def wrong(*given: Any) -> dict[str, torch.Tensor]:
        table = write(*given)
        table["positions0"][1] = table["positions0"][0]
        return table

    monkeypatch.setattr("arkcache.saving.managers.write_pages", wrong)
    saved_twins(tmp_path / "saved")
    with pytest.raises(SessionError, match="share a place"):
        load(tmp_path / "saved")
