"""Tiers without a limit: together they take what the system has to spare, and then say so."""

import copy
import gc
import mmap
import pickle
import weakref

import numpy as np
import pytest
import torch

from arkcache import HostTierFullError
from arkcache.tiering import allowance, pinned, registration
from arkcache.tiering import host as host_module
from arkcache.tiering.host import HostTier
from tests.tiering.fake_cupy import GPU, FakeCupy, cupy
from tests.tiering.test_host import read, write

__all__ = ["cupy"]

PIECE = max(4096, mmap.PAGESIZE)
SPARE = 100
"""Pieces that the made-up system has to spare while no tier has touched any."""


class System:
    """Takes what tiers have touched from what it has; counts how often it is asked."""

    def __init__(self) -> None:
        self.spare, self.num_asked = SPARE * PIECE, 0

    def available(self) -> int:
        self.num_asked += 1
        every = [one for ref in allowance._all.valuerefs() if (one := ref()) is not None]
        return self.spare - sum(one._touched for one in every)


@pytest.fixture(autouse=True)
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    made_up = System()
    monkeypatch.setattr(allowance, "available_memory_bytes", made_up.available)
    monkeypatch.setattr(allowance, "MIN_GRANT_BYTES", 4 * PIECE)
    monkeypatch.setattr(allowance, "_all", weakref.WeakValueDictionary())
    monkeypatch.setattr(host_module, "physical_memory_bytes", lambda: 10 * SPARE * PIECE)
    return made_up


def test_a_tier_ends_where_the_system_s_memory_ends() -> None:
    tier = HostTier([PIECE], None)
    handles = tier.allocate(SPARE)
    content = write(tier, handles)
    for attempt in (lambda: tier.check_room([1]), lambda: tier.allocate(1)):
        with pytest.raises(HostTierFullError, match=r"needs .*only 0 to spare.*host_bytes"):
            attempt()
    tier.check([handles])
    assert torch.equal(read(tier, handles), content)


def test_a_limit_that_was_given_is_taken_at_its_word(system: System) -> None:
    tier = HostTier([PIECE], 2 * SPARE * PIECE)
    tier.allocate(2 * SPARE)
    assert system.num_asked == 0


def test_what_others_take_meanwhile_counts(system: System) -> None:
    tier = HostTier([PIECE], None)
    tier.allocate(30)
    system.spare = 20 * PIECE
    with pytest.raises(HostTierFullError):
        tier.allocate(10)
    system.spare = 50 * PIECE
    tier.allocate(10)


def test_small_growth_seldom_asks(system: System) -> None:
    tier = HostTier([PIECE], None)
    for _ in range(SPARE // 2):
        tier.allocate(1)
    assert system.num_asked <= SPARE // 2 // 4


def test_tiers_that_grow_in_turn_share_what_is_there() -> None:
    """The second may not take what the first was granted and will touch."""
    tiers = [HostTier([PIECE], None) for _ in range(3)]
    for tier in tiers:
        tier.check_room([30])
    with pytest.raises(HostTierFullError):
        HostTier([PIECE], None).check_room([30])
    held = [tier.allocate(30) for tier in tiers]

    def grow(number: int) -> None:
        held[number] = np.append(held[number], tiers[number].allocate(1))

    for number in range(3):
        grow(number)
    for number in range(3):
        with pytest.raises(HostTierFullError):
            _ = [grow(number) for _ in range(SPARE)]
    assert sum(tier.num_pieces for tier in tiers) <= SPARE
    for tier, handles in zip(tiers, held, strict=True):
        tier.check([handles])


@pytest.mark.parametrize("way", ["release", "collect"])
def test_what_a_tier_gave_back_serves_another(way: str) -> None:
    first, second = HostTier([PIECE], None), HostTier([PIECE], None)
    handles = first.allocate(SPARE - 10)
    with pytest.raises(HostTierFullError):
        second.allocate(20)
    if way == "release":
        first.release(handles)
    del first
    gc.collect()
    second.allocate(SPARE - 10)


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="nothing is given back")
def test_what_compact_gives_back_serves_another() -> None:
    first, second = HostTier([PIECE], None), HostTier([PIECE], None)
    handles = first.allocate(SPARE - 10)
    first.release(handles[20:])
    with pytest.raises(HostTierFullError):
        second.allocate(30)
    first.compact()
    second.allocate(60)
    first.check([handles[:20]])


def test_holes_are_memory_that_the_tier_has() -> None:
    tier = HostTier([PIECE], None)
    handles = tier.allocate(SPARE)
    tier.release(handles[::2])
    tier.check([handles[1::2], tier.allocate(SPARE // 2)])


def test_both_sides_count() -> None:
    tier = HostTier([PIECE, PIECE // 4], None)
    tier.allocate(SPARE // 2)
    tier.allocate(SPARE, 1)
    with pytest.raises(HostTierFullError):
        tier.allocate(SPARE // 2, 0)
    with pytest.raises(HostTierFullError):
        tier.allocate(SPARE + 5, 1)
    tier.allocate(SPARE // 4)


def test_copies_ask_for_themselves() -> None:
    tier = HostTier([PIECE], None)
    handles = tier.allocate(40)
    state = pickle.dumps(tier)
    other = copy.deepcopy(tier)
    for copied in (lambda: pickle.loads(state), lambda: tier.extract(handles)):
        with pytest.raises(HostTierFullError):
            copied()
    other.check([handles])
    own = tier.extract(handles[:10])
    with pytest.raises(HostTierFullError):
        own.allocate(20)
    tier.check([handles])


def test_a_copy_of_a_tier_with_a_limit_asks_nobody(system: System) -> None:
    tier = HostTier([PIECE], 2 * SPARE * PIECE)
    handles = tier.allocate(SPARE)
    other = pickle.loads(pickle.dumps(tier))
    tier.extract(handles).allocate(SPARE)
    other.allocate(SPARE)
    assert system.num_asked == 0


def test_nothing_is_pinned_ahead_that_the_system_cannot_spare(
    system: System, cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinned, "CHUNK_BYTES", PIECE)
    system.spare = 16 * PIECE
    tier = HostTier([PIECE], None, pin_to=GPU)
    tier.allocate(8)
    tier.allocate(8)
    registration._finish()
    assert cupy.nbytes == 16 * PIECE
    with pytest.raises(HostTierFullError, match="to spare"):
        tier.allocate(1)


def test_whole_chunks_are_asked_for(
    system: System, cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is pinned is touched, however little of it is used."""
    monkeypatch.setattr(pinned, "CHUNK_BYTES", 20 * PIECE)
    system.spare = 19 * PIECE
    tier = HostTier([PIECE], None, pin_to=GPU)
    with pytest.raises(HostTierFullError, match="to spare"):
        tier.allocate(1)
    assert cupy.num_calls == 0
    system.spare = 20 * PIECE
    tier.allocate(1)
