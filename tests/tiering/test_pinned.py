"""Pinned arenas: registered as they grow, released on every path, pageable where refused."""

import copy
import gc
import logging
import mmap
import os
import pickle
import random
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arkcache import HostTierFullError, InputError
from arkcache.tiering import host as host_module
from arkcache.tiering import pinned
from arkcache.tiering.host import HostTier
from arkcache.tiering.pinned import runs_of
from tests.tiering.fake_cupy import GPU, FakeCupy, cupy, run_alone
from tests.tiering.test_host import FINE, Model, ids, read, step, write

__all__ = ["cupy"]

CHUNK = 3 * 4096
"""The least common multiple of FINE bytes and a page of memory: 128 pieces."""
PER_CHUNK = CHUNK // FINE

pytestmark = pytest.mark.skipif(mmap.PAGESIZE != 4096, reason="counts pages of 4 KiB")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(pinned, "MAX_AT_ONCE_BYTES", CHUNK)
    monkeypatch.setattr(pinned, "MAX_AHEAD_BYTES", 0)


def make(most: int = 10 * PER_CHUNK) -> HostTier:
    return HostTier([FINE], most * FINE, pin_to=GPU)


def assert_pinned(tier: HostTier, driver: FakeCupy) -> None:
    """What the tier has handed out is registered, from its first byte on, and nothing beyond."""
    start, reached = tier.pieces().data_ptr(), 0
    while start + reached in driver.ranges:
        reached += driver.ranges[start + reached]
    extent = tier._sides[0].extent
    assert extent * FINE <= reached <= tier.pieces().numel()


# -- growing --------------------------------------------------------------------------------------


def test_it_is_pinned_chunk_by_chunk(cupy: FakeCupy) -> None:
    tier = make()
    assert not tier.pinned
    assert cupy.num_calls == 0
    handles = tier.allocate(1)
    assert tier.pinned
    assert tier.why_pageable is None
    assert tier.pieces_per_chunk == PER_CHUNK
    assert cupy.nbytes == CHUNK
    tier.allocate(PER_CHUNK - 1)
    assert cupy.nbytes == CHUNK
    tier.allocate(1)
    assert cupy.nbytes == 2 * CHUNK
    tier.allocate(3 * PER_CHUNK)
    assert sorted(cupy.ranges) == [tier.pieces().data_ptr() + i * CHUNK for i in range(5)]
    assert torch.equal(write(tier, handles), read(tier, handles))


def test_the_last_chunk_ends_with_the_arena(cupy: FakeCupy) -> None:
    tier = make(2 * PER_CHUNK + 5)
    tier.allocate(2 * PER_CHUNK + 5)
    assert sorted(cupy.ranges.values()) == [5 * FINE, CHUNK, CHUNK]
    assert_pinned(tier, cupy)


@pytest.mark.parametrize("most", [1, 7])
def test_an_arena_below_a_chunk(cupy: FakeCupy, most: int) -> None:
    tier = make(most)
    tier.allocate(1)
    assert list(cupy.ranges.values()) == [most * FINE]


def test_holes_need_no_more(cupy: FakeCupy) -> None:
    tier = make()
    handles = tier.allocate(PER_CHUNK)
    tier.release(handles[::2])
    tier.allocate(PER_CHUNK // 2)
    assert cupy.nbytes == CHUNK


def test_room_that_was_checked_is_pinned(cupy: FakeCupy) -> None:
    tier = make()
    tier.check_room([2 * PER_CHUNK])
    assert cupy.nbytes == 2 * CHUNK
    cupy.refuse = {2}
    tier.allocate(2 * PER_CHUNK)
    tier.check_room([])
    with pytest.raises(HostTierFullError, match="pin"):
        tier.check_room([1])


def test_chunks_are_about_256_mib() -> None:
    arena = pinned.PinnedArena(GPU, FINE)
    assert arena.chunk_bytes == CHUNK
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pinned, "CHUNK_BYTES", 256 << 20)
        for piece in (96, 4096, 9920, 100_003):
            size = pinned.PinnedArena(GPU, piece).chunk_bytes
            assert size % piece == size % mmap.PAGESIZE == 0
            assert 128 << 20 < size <= 410 << 20


# -- pageable -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_without_a_gpu_it_is_pageable(device: torch.device | None) -> None:
    tier = HostTier([FINE], 10 * FINE, pin_to=device)
    handles = tier.allocate(3)
    assert not tier.pinned
    assert tier.pieces_per_chunk is None
    assert "no CUDA device" in str(tier.why_pageable)
    assert torch.equal(write(tier, handles), read(tier, handles))


def use(tier: HostTier) -> None:
    """Whatever a tier is for, pinned or not."""
    handles = tier.allocate(5 * PER_CHUNK)
    content = write(tier, handles)
    tier.release(handles[::2])
    tier.compact()
    assert torch.equal(read(tier, handles[1::2]), content[1::2])
    tier.check([handles[1::2]])


def test_without_cupy(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    tier = make()
    with pytest.warns(UserWarning, match=r"pageable \(ModuleNotFound.*arkcache\[gpu-cuda1\d\]"):
        tier.check_room([1])
    assert not tier.pinned
    assert "cupy" in str(tier.why_pageable)
    use(tier)


def test_a_refusal_leaves_it_pageable_and_is_told_once(cupy: FakeCupy) -> None:
    cupy.refuse = {0, 1}
    tiers = [make(), make()]
    with pytest.warns(UserWarning, match=r"out of memory.*plain copies.*ulimit -l") as caught:
        _ = [tier.check_room([1]) for tier in tiers]
    assert len(caught) == 1
    for tier in tiers:
        assert not tier.pinned
        assert "out of memory" in str(tier.why_pageable)
        use(tier)
    assert cupy.num_calls == 2  # and it stays so


def test_a_warning_that_is_an_error_changes_nothing(cupy: FakeCupy) -> None:
    cupy.refuse = {0}
    tier = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="pageable"):
            tier.allocate(1)
    tier.check([])
    use(tier)


@pytest.mark.parametrize("tells", [True, False])
def test_a_device_that_sees_other_addresses(
    cupy: FakeCupy, caplog: pytest.LogCaptureFixture, tells: bool
) -> None:
    """Registered bit by bit, such memory may lie anywhere for the device: it is left alone."""
    cupy.offset, cupy.has_host_addresses = 4096, not tells
    tier = make()
    with (
        caplog.at_level(logging.INFO, "arkcache"),
        pytest.warns(UserWarning, match=r"other addresses.*Nothing can be done"),
    ):
        tier.check_room([1])
    assert not tier.pinned
    assert cupy.ranges == {}
    assert cupy.num_calls == (0 if tells else 1)
    assert "pageable (OtherAddressesError: the device sees host memory at other" in caplog.text
    use(tier)


def test_a_driver_that_does_not_know_the_attribute(cupy: FakeCupy) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(FakeCupy, "cudaDevAttrCanUseHostPointerForRegisteredMem")
        tier = make()
        tier.allocate(1)
    assert tier.pinned


def test_pieces_that_fill_no_chunk(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "MAX_CHUNK_BYTES", CHUNK - 1)
    tier = make()
    with pytest.warns(UserWarning, match="whole number of pieces"):
        tier.allocate(1)
    assert cupy.num_calls == 0


def test_two_sizes_cannot_be_pinned() -> None:
    with pytest.raises(InputError, match=r"pin_to=cuda:1.*\(96, 32\)"):
        HostTier([FINE, 32], 1000, pin_to=GPU)
    HostTier([FINE, 32], 1000, pin_to=torch.device("cpu")).allocate(1, 1)


# -- refused later --------------------------------------------------------------------------------


def test_a_later_refusal_is_an_error_before_anything_changes(cupy: FakeCupy) -> None:
    tier = make()
    handles = tier.allocate(PER_CHUNK)
    content = write(tier, handles)
    cupy.refuse = {3}  # the third that the next call needs
    with pytest.raises(HostTierFullError, match=f"pin.*{CHUNK} bytes are pinned.*ulimit"):
        tier.allocate(4 * PER_CHUNK)
    assert cupy.nbytes == CHUNK
    assert tier.pinned
    tier.check([handles])
    assert torch.equal(read(tier, handles), content)
    more = tier.allocate(4 * PER_CHUNK)  # the limit was raised
    assert_pinned(tier, cupy)
    tier.check([handles, more])


def test_it_serves_again_after_all_was_released(cupy: FakeCupy) -> None:
    tier = make()
    tier.release(tier.allocate(2 * PER_CHUNK))
    assert cupy.ranges == {}
    assert cupy.num_waits == 1  # before the memory goes, whatever reads it is done
    assert tier.pinned
    cupy.refuse = {2}
    with pytest.raises(HostTierFullError, match="pin"):
        tier.allocate(1)
    tier.check([])
    handles = tier.allocate(1)
    assert_pinned(tier, cupy)
    tier.check([handles])


# -- letting go -----------------------------------------------------------------------------------


def test_garbage_collection_unpins(cupy: FakeCupy) -> None:
    tier = make()
    tier.allocate(2 * PER_CHUNK)
    pieces = tier.pieces()
    del tier
    gc.collect()
    assert cupy.ranges == {}
    assert cupy.num_waits == 1
    pieces[0] = 1  # a view keeps the memory, pageable now


def test_a_failed_device_does_not_stop_it(cupy: FakeCupy, caplog: pytest.LogCaptureFixture) -> None:
    tier = make()
    handles = tier.allocate(2 * PER_CHUNK)
    cupy.is_dead = True
    with caplog.at_level(logging.WARNING, "arkcache"):
        tier.release(handles)
    assert [message.count("host memory") for message in caplog.messages] == [1, 1, 1]
    assert cupy.ranges == {}
    tier.check([])


def test_a_fork_leaves_its_parent_s_registrations_alone(cupy: FakeCupy) -> None:
    tier = make()
    handles = tier.allocate(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        tier.release(handles)
    assert cupy.nbytes == CHUNK
    cupy.ranges.clear()


def test_exit_unpins() -> None:
    said = run_alone("""
unregister = fake.hostUnregister
fake.hostUnregister = lambda address: (unregister(address), print('unpinned'))
tier = HostTier([96], 96000, pin_to=GPU)
tier.allocate(1)
tier.itself = tier
print('over')
""")
    assert said.split() == ["over", "unpinned"]


# -- copies ---------------------------------------------------------------------------------------


def test_copies_are_pinned_by_themselves(cupy: FakeCupy) -> None:
    tier = make()
    handles = tier.allocate(2 * PER_CHUNK)
    content = write(tier, handles)
    others = pickle.loads(pickle.dumps(tier)), copy.deepcopy(tier)
    assert cupy.num_waits == 2  # each was made after the device was done
    for other in others:
        assert other.pinned
        assert_pinned(other, cupy)
        assert torch.equal(read(other, handles), content)
        other.check([handles])
    own = tier.extract(handles[5:9])
    assert cupy.num_waits == 3
    assert own.pinned
    assert torch.equal(read(own, own.extracted(handles[5:9])), content[5:9])
    assert_pinned(own, cupy)
    assert_pinned(tier, cupy)


def test_copies_that_are_refused(cupy: FakeCupy) -> None:
    tier = make()
    handles = tier.allocate(2 * PER_CHUNK)
    content = write(tier, handles)
    state = pickle.dumps(tier)
    cupy.refuse = {2}
    with pytest.warns(UserWarning, match="pageable"):
        pageable = pickle.loads(state)
    assert not pageable.pinned
    assert torch.equal(read(pageable, handles), content)
    cupy.refuse = {4, 6}
    with pytest.raises(HostTierFullError, match="pin"):
        pickle.loads(state)
    with pytest.raises(HostTierFullError, match="pin"):
        tier.extract(handles)
    gc.collect()
    assert cupy.nbytes == 2 * CHUNK
    tier.check([handles])


# -- giving memory back ---------------------------------------------------------------------------


class SpyingMap(mmap.mmap):
    """Notes what was given back to the system."""

    given_back: list[tuple[int, int]] = []  # noqa: RUF012

    def madvise(self, advice: int, *extent: int) -> None:
        if advice == mmap.MADV_DONTNEED:
            self.given_back.append((extent[0], extent[0] + extent[1]))
        super().madvise(advice, *extent)


@pytest.fixture
def given_back(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    monkeypatch.setattr(host_module.mmap, "mmap", SpyingMap)
    SpyingMap.given_back.clear()
    return SpyingMap.given_back


def test_what_is_pinned_is_never_given_back(
    cupy: FakeCupy, given_back: list[tuple[int, int]]
) -> None:
    tier = make()
    handles = tier.allocate(3 * PER_CHUNK)
    content = write(tier, handles)
    tier.release(handles[: 2 * PER_CHUNK])
    waits = cupy.num_waits
    tier.compact()
    assert cupy.num_waits == waits + 1  # before pieces move
    assert given_back == [(3 * CHUNK, 10 * CHUNK)]
    assert torch.equal(read(tier, handles[2 * PER_CHUNK :]), content[2 * PER_CHUNK :])
    tier.allocate(9 * PER_CHUNK)
    tier.compact()
    assert len(given_back) == 1


def test_a_pageable_tier_gives_back_as_ever(given_back: list[tuple[int, int]]) -> None:
    tier = HostTier([FINE], 10 * CHUNK)
    handles = tier.allocate(3 * PER_CHUNK)
    tier.release(handles[: 2 * PER_CHUNK])
    tier.compact()
    assert given_back == [(CHUNK, 10 * CHUNK)]


# -- what is logged -------------------------------------------------------------------------------


def test_one_line_tells_what_a_tier_is(cupy: FakeCupy, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "arkcache"):
        tiers = [make(), HostTier([FINE], 10 * FINE)]
        for tier in tiers:
            tier.allocate(1)
            tier.allocate(1)
    assert caplog.messages == [
        f"host tier: at most {10 * CHUNK} bytes, pinned for cuda:1 at the host's own addresses, "
        "reached by its kernels and copies",
        f"host tier: at most {10 * FINE} bytes, pageable (there is no CUDA device to pin it for), "
        "plain copies",
    ]


# -- runs, and any order of operations ------------------------------------------------------------


@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 9))
def test_runs_are_adjacent_and_cross_no_boundary(rows: list[int], per_chunk: int) -> None:
    runs = runs_of(ids(rows), per_chunk)
    listed = [row + i for row, _, num_rows in runs for i in range(num_rows)]
    assert listed == rows
    assert [position for _, position, _ in runs] == np.cumsum(
        [0, *(run.length for run in runs)]
    ).tolist()[: len(runs)]
    assert all(row // per_chunk == (row + n - 1) // per_chunk for row, _, n in runs)


def test_a_run_of_adjacent_rows_is_one() -> None:
    assert runs_of(np.arange(5, 15), 100) == [(5, 0, 10)]
    assert runs_of(np.arange(5, 15), 8) == [(5, 0, 3), (8, 3, 7)]
    assert runs_of(ids([4, 5, 9, 8, 7]), 100) == [(4, 0, 2), (9, 2, 1), (8, 3, 1), (7, 4, 1)]


def test_a_long_trace_of_a_pinned_tier(cupy: FakeCupy) -> None:
    most = PER_CHUNK + PER_CHUNK // 2
    model, order = Model((FINE,), most * FINE), random.Random(3)
    model.tier = make(most)
    for number in range(100):
        step(model, order)
        if number % 10 == 0:
            model.check()
            assert model.tier.num_pieces == 0 or model.tier.pinned
            assert_pinned(model.tier, cupy)
            gc.collect()
            assert cupy.nbytes <= most * FINE
