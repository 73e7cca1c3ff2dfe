"""Pinning ahead of need: in a thread that nobody waits for unless what it pins is needed by now."""

import gc
import logging
import mmap
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch

from arkcache import HostTierFullError
from arkcache.tiering import pinned, registration
from arkcache.tiering.host import HostTier
from arkcache.tiering.pieces import Ids
from tests.tiering.fake_cupy import GPU, FakeCupy, cupy, run_alone
from tests.tiering.test_host import read, write
from tests.tiering.test_pinned import assert_pinned

__all__ = ["cupy"]

CHUNK = PIECE = mmap.PAGESIZE
"""A piece fills a chunk, so that pieces count chunks."""


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(pinned, "MAX_AT_ONCE_BYTES", 8 * CHUNK)
    monkeypatch.setattr(pinned, "MAX_AHEAD_BYTES", 100 * CHUNK)


@pytest.fixture
def gate(cupy: FakeCupy) -> Iterator[threading.Event]:
    """Registration 2, the first ahead in these tests, takes until this is set."""
    opened = threading.Event()
    cupy.gates[2] = opened
    yield opened
    opened.set()


def make(most: int = 1000) -> HostTier:
    return HostTier([PIECE], most * PIECE, pin_to=GPU)


def waiting() -> list[threading.Thread]:
    """Threads that register ahead."""
    every = threading.enumerate()
    return [thread for thread in every if isinstance(thread, registration.RegistrationAhead)]


def finish() -> None:
    for thread in waiting():
        thread.join()


def started(tier: HostTier) -> Ids:
    """Eight pieces, and a thread that registers more."""
    handles = tier.allocate(8)
    assert tier._pinning._ahead is not None
    return handles


def grown(tier: HostTier, *steps: int) -> None:
    for step in steps:
        tier.allocate(step)


# -- how far --------------------------------------------------------------------------------------


def test_a_tier_that_grows_by_steps_is_a_step_ahead(cupy: FakeCupy) -> None:
    tier = make()
    grown(tier, 1, 7, 8)
    finish()
    assert cupy.nbytes == 24 * CHUNK
    asked_by: list[int] = []
    register = cupy.hostRegister

    def spy(address: int, size: int, flags: int) -> None:
        asked_by.append(threading.get_ident())
        assert size == 8 * CHUNK
        register(address, size, flags)

    cupy.hostRegister = spy  # type: ignore[method-assign]
    for _ in range(10):
        grown(tier, 8)
        finish()
    assert len(asked_by) == 10
    assert threading.get_ident() not in asked_by


def test_several_chunks_are_one_registration(cupy: FakeCupy) -> None:
    tier = make()
    tier.check_room([20])
    finish()
    assert list(cupy.ranges.values()) == [CHUNK, 8 * CHUNK, 8 * CHUNK, 3 * CHUNK, 5 * CHUNK]


def test_a_tier_that_grows_little_by_little_keeps_some_ahead(cupy: FakeCupy) -> None:
    tier = make()
    grown(tier, 40)
    calls = cupy.num_calls
    for _ in range(40):
        finish()
        grown(tier, 1)
        finish()
        held = tier.num_pieces * PIECE
        assert held * 9 // 8 <= tier._pinning.claimed_bytes <= held * 5 // 4 + CHUNK
    assert cupy.num_calls - calls < 10


def test_one_prompt_is_no_sign_of_another_as_long(cupy: FakeCupy) -> None:
    tier = make()
    grown(tier, 32)
    finish()
    assert cupy.nbytes == 40 * CHUNK


def test_a_small_tier_takes_one_chunk(cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "CHUNK_BYTES", 100 * CHUNK)
    tier = make()
    grown(tier, 1, 40, 20)
    assert not waiting()
    assert cupy.nbytes == 100 * CHUNK


def test_nothing_is_pinned_beyond_the_limit(cupy: FakeCupy) -> None:
    tier = make(20)
    grown(tier, 8, 8)
    finish()
    assert cupy.nbytes == 20 * CHUNK
    grown(tier, 4)
    finish()
    assert cupy.nbytes == tier.limit_bytes


# -- waiting --------------------------------------------------------------------------------------


def test_nobody_waits_for_what_is_not_needed_yet(cupy: FakeCupy, gate: threading.Event) -> None:
    tier = make()
    handles = started(tier)
    content = write(tier, handles)
    tier.release(handles[:3])
    tier.allocate(3)
    assert torch.equal(read(tier, handles[3:]), content[3:])
    assert len(waiting()) == 1
    assert cupy.nbytes == 8 * CHUNK


def test_what_is_needed_is_waited_for(cupy: FakeCupy, gate: threading.Event) -> None:
    tier = make()
    started(tier)
    threading.Timer(0.05, gate.set).start()
    tier.check_room([1])
    assert tier._pinning.nbytes >= 9 * CHUNK


def test_an_interrupted_wait_changes_nothing(
    cupy: FakeCupy, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = make()
    handles = started(tier)

    def interrupt(_thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registration.RegistrationAhead, "join", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tier.allocate(1)
    tier.check([handles])
    gate.set()
    tier.check([handles, tier.allocate(1)])


# -- refused --------------------------------------------------------------------------------------


def test_a_refusal_ahead_is_no_error_until_it_is_needed(
    cupy: FakeCupy, caplog: pytest.LogCaptureFixture
) -> None:
    cupy.refuse = {2, 3}
    tier = make()
    handles = started(tier)
    finish()
    tier.release(handles[:5])
    tier.allocate(1)
    assert "ahead of need: cudaErrorMemoryAllocation" in caplog.text
    for _ in range(4):
        tier.allocate(1)
    assert cupy.num_calls == 3  # it is not tried over and over
    with pytest.raises(HostTierFullError, match="ulimit"):
        tier.allocate(1)
    assert tier.num_pieces == 8
    grown(tier, 1)  # the limit was raised: ahead again
    finish()
    assert cupy.nbytes > 9 * CHUNK


def test_other_errors_are_raised_where_the_memory_is_needed(
    cupy: FakeCupy, gate: threading.Event
) -> None:
    tier = make()
    started(tier)

    def fail(_address: int) -> None:
        raise TypeError("not what cupy takes")

    cupy.pointerGetAttributes = fail  # type: ignore[assignment]
    gate.set()
    finish()
    with pytest.raises(TypeError, match="cupy takes"):
        tier.allocate(1)
    cupy.ranges.popitem()


def test_without_threads_it_is_pinned_when_needed(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    tier = make()
    with caplog.at_level(logging.WARNING, "arkcache"):
        grown(tier, 1, 7, 8, 8)
    assert tier.pinned
    assert cupy.nbytes == 24 * CHUNK
    assert "can't start new thread" in caplog.text


# -- letting go -----------------------------------------------------------------------------------


def test_a_release_does_not_wait_and_leaves_nothing(cupy: FakeCupy, gate: threading.Event) -> None:
    tier = make()
    tier.release(started(tier))
    assert len(waiting()) == 1
    assert cupy.nbytes == 0
    more = tier.allocate(3)  # the next arena knows nothing of it
    gate.set()
    finish()
    assert_pinned(tier, cupy)
    assert cupy.nbytes == tier._pinning.claimed_bytes
    tier.check([more])


def test_what_was_registered_and_not_taken_over_is_released_too(cupy: FakeCupy) -> None:
    tier = make()
    handles = started(tier)
    finish()
    assert cupy.nbytes == 10 * CHUNK
    tier.release(handles)
    assert cupy.ranges == {}


def test_a_thread_keeps_no_tier_alive(cupy: FakeCupy, gate: threading.Event) -> None:
    tier = make()
    started(tier)
    gone, mapping = weakref.ref(tier), weakref.ref(tier._mapping)
    del tier
    assert gone() is None
    assert cupy.nbytes == 0
    gc.collect()
    assert mapping() is not None  # until the driver is done with it
    gate.set()
    finish()
    assert cupy.ranges == {}
    gc.collect()
    assert mapping() is None


@pytest.mark.parametrize("when", ["before", "after"])
def test_garbage_collected_in_the_thread_itself(cupy: FakeCupy, when: str) -> None:
    """A collection may run in any thread: in this one it must not wait for the thread to end."""
    tiers, register, main = [make()], cupy.hostRegister, threading.get_ident()
    collected = []

    def collect(*arguments: int) -> None:
        is_ahead = threading.get_ident() != main
        if is_ahead and when == "before":
            tiers.clear()
        register(*arguments)
        if is_ahead and when == "after":
            tiers.clear()
        collected.append(is_ahead)

    cupy.hostRegister = collect  # type: ignore[method-assign]
    tiers[0].check_room([8])
    for thread in waiting():
        thread.join(10)
        assert not thread.is_alive()
    assert collected == [False, False, True]
    assert cupy.ranges == {}


def test_garbage_collected_after_the_thread_has_handed_over(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = make()
    started(tier)
    finish()
    ahead = tier._pinning._ahead
    assert ahead is not None
    ahead.give_up()
    ahead.give_up()
    assert cupy.nbytes == 8 * CHUNK
    tier._pinning._ahead = None


def test_compact_leaves_alone_what_is_being_pinned(
    cupy: FakeCupy, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SpyingMap(mmap.mmap):
        def madvise(self, advice: int, *extent: int) -> None:
            if advice == mmap.MADV_DONTNEED:
                given_back.append(extent[0])
            super().madvise(advice, *extent)

    given_back: list[int] = []
    monkeypatch.setattr(mmap, "mmap", SpyingMap)
    tier = make(100)
    started(tier)
    tier.compact()
    assert given_back == [10 * CHUNK]


def test_exit_waits_for_the_driver() -> None:
    said = run_alone("""
import threading, time
from arkcache.tiering import pinned

pinned.CHUNK_BYTES = 4096
register, unregister = fake.hostRegister, fake.hostUnregister

def slow(*arguments):
    if threading.current_thread() is not threading.main_thread():
        time.sleep(0.2)
        print('ahead')
    register(*arguments)

fake.hostRegister = slow
fake.hostUnregister = lambda address: (unregister(address), print('unpinned'))
tier = HostTier([4096], 4096 * 1000, pin_to=GPU)
tier.allocate(8)
print('over')
""").split()
    assert said == ["over", "ahead", "unpinned", "unpinned", "unpinned"]
