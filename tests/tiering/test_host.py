"""The host tier: blocks counted by reference in one mapping that never moves."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from arkcache import HostTierFullError, IntegrityError
from arkcache.tiering import host as host_module
from arkcache.tiering.host import HostTier

SHAPE = (2, 12)
BLOCK_BYTES = 2 * 12 * 4


def make(most: int = 1000) -> HostTier:
    return HostTier(SHAPE, torch.float32, most * BLOCK_BYTES)


def write(tier: HostTier, blocks: np.ndarray) -> torch.Tensor:
    """Random content for blocks; returns it."""
    content = torch.randn(len(blocks), *SHAPE)
    tier.blocks[torch.from_numpy(blocks)] = content
    return content


def test_blocks_are_distinct_and_counted() -> None:
    tier = make()
    blocks = np.concatenate((tier.allocate(3), tier.allocate(0), tier.allocate(5)))
    assert len(set(blocks.tolist())) == 8
    assert tier.num_blocks == 8
    assert tier.block_bytes == BLOCK_BYTES
    assert tier.used_bytes == 8 * BLOCK_BYTES
    tier.check([blocks])


def test_a_block_is_free_when_its_last_reference_goes() -> None:
    tier = make()
    blocks = tier.allocate(4)
    tier.retain(blocks[:2])
    tier.release(blocks)
    assert tier.num_blocks == 2
    tier.check([blocks[:2]])
    again = tier.allocate(2)
    assert set(again.tolist()) == set(blocks[2:].tolist())
    tier.check([blocks[:2], again])


def test_one_block_listed_several_times() -> None:
    tier = make()
    blocks = tier.allocate(3)
    listed = blocks[[0, 0, 1]]
    tier.retain(listed)
    tier.check([blocks, listed])
    assert tier.bytes_of(np.concatenate((blocks, listed))) == 3 * BLOCK_BYTES
    tier.release(blocks[[0, 0, 0]])
    assert tier.num_blocks == 2
    tier.check([blocks[[1, 1, 2]]])


def test_the_limit_is_an_error_before_anything_changes() -> None:
    tier = make(most=4)
    blocks = tier.allocate(3)
    content = write(tier, blocks)
    for attempt in (lambda: tier.check_room(2), lambda: tier.allocate(2)):
        with pytest.raises(HostTierFullError, match="host_bytes") as caught:
            attempt()
        message = str(caught.value)
        assert str(3 * BLOCK_BYTES) in message
        assert str(4 * BLOCK_BYTES) in message
    tier.check([blocks])
    assert torch.equal(tier.blocks[torch.from_numpy(blocks)], content)
    tier.check_room(1)
    last = tier.allocate(1)
    tier.release(blocks)
    tier.check([last, tier.allocate(3)])


def test_a_limit_below_one_block_holds_nothing() -> None:
    tier = HostTier(SHAPE, torch.float32, BLOCK_BYTES - 1)
    with pytest.raises(HostTierFullError):
        tier.allocate(1)
    tier.check([])


def test_growth_never_moves_a_block() -> None:
    tier = make()
    blocks = tier.allocate(2)
    content, address = write(tier, blocks), tier.blocks.data_ptr()
    for _ in range(20):
        write(tier, tier.allocate(30))
    assert tier.blocks.data_ptr() == address
    assert torch.equal(tier.blocks[torch.from_numpy(blocks)], content)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_taken_when_written_and_given_back_when_released() -> None:
    size = 64 << 20
    tier = HostTier((1, 1 << 18), torch.float32, 64 * size)
    start = resident_bytes()
    blocks = tier.allocate(size // tier.block_bytes)
    assert resident_bytes() - start < size // 4
    tier.blocks[torch.from_numpy(blocks)] = 1.0
    assert resident_bytes() - start > size // 2
    tier.release(blocks)
    assert tier.used_bytes == 0
    assert resident_bytes() - start < size // 4


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_it_serves_again_after_all_was_released() -> None:
    tier = make(most=5)
    tier.release(tier.allocate(5))
    tier.check([])
    blocks = tier.allocate(5)
    content = write(tier, blocks)
    assert torch.equal(tier.blocks[torch.from_numpy(blocks)], content)
    tier.check([blocks])


def test_pickle() -> None:
    tier = make()
    blocks = tier.allocate(6)
    content = write(tier, blocks)
    tier.release(blocks[:2])
    state = pickle.dumps(tier)
    assert len(state) < 10 * BLOCK_BYTES + 2000  # what it holds, not the limit
    copy = pickle.loads(state)
    copy.check([blocks[2:]])
    assert torch.equal(copy.blocks[torch.from_numpy(blocks[2:])], content[2:])
    write(copy, copy.allocate(900))  # it may grow to the limit as before
    assert torch.equal(tier.blocks[torch.from_numpy(blocks[2:])], content[2:])
    with pytest.raises(HostTierFullError):
        copy.allocate(100)


def test_pickle_of_an_empty_tier() -> None:
    copy = pickle.loads(pickle.dumps(make()))
    copy.check([copy.allocate(3)])


def test_extract_takes_the_listed_blocks_only() -> None:
    tier = make()
    blocks = tier.allocate(6)
    content = write(tier, blocks)
    listed = blocks[[5, 1, 5]]
    own = tier.extract(listed)
    moved = own.extracted(listed)
    assert own.num_blocks == 2
    own.check([moved])
    assert torch.equal(own.blocks[torch.from_numpy(moved)], content[[5, 1, 5]])
    tier.check([blocks])


def test_check_finds_books_that_do_not_balance() -> None:
    tier = make()
    blocks = tier.allocate(3)
    for holders in ([], [blocks, blocks], [blocks[:2]], [blocks[[0, 1, 1]]]):
        with pytest.raises(IntegrityError):
            tier.check(holders)
    tier._free.append(int(blocks[0]))
    with pytest.raises(IntegrityError, match="free"):
        tier.check([blocks])


def test_refused_address_space_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    tier = make()
    monkeypatch.setattr(host_module.mmap, "mmap", refuse)
    with pytest.raises(HostTierFullError, match="host_bytes"):
        tier.allocate(1)
    tier.check([])
    monkeypatch.undo()
    tier.check([tier.allocate(2)])


class Holders(RuleBasedStateMachine):
    """Any order of taking, sharing and giving back: content stays, books balance."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = make(most=40)
        self.held: list[int] = []
        self.content: dict[int, torch.Tensor] = {}

    @rule(count=st.integers(0, 9))
    def allocate(self, count: int) -> None:
        room = 40 - len(set(self.held))
        if count > room:
            with pytest.raises(HostTierFullError):
                self.tier.allocate(count)
            return
        blocks = self.tier.allocate(count)
        assert not set(blocks.tolist()) & set(self.held)
        self.held += blocks.tolist()
        self.content |= dict(zip(blocks.tolist(), write(self.tier, blocks), strict=True))

    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        if self.held:
            some = data.draw(st.lists(st.sampled_from(self.held), max_size=5))
            self.tier.retain(np.array(some, dtype=np.int64))
            self.held += some

    @rule(data=st.data(), everything=st.booleans())
    def release(self, data: st.DataObject, everything: bool) -> None:
        order = data.draw(st.permutations(self.held))
        some = order if everything else order[: len(order) // 3]
        self.tier.release(np.array(some, dtype=np.int64))
        for block in some:
            self.held.remove(block)

    @rule()
    def pickle(self) -> None:
        self.tier = pickle.loads(pickle.dumps(self.tier))

    @invariant()
    def holds_what_was_written(self) -> None:
        self.tier.check([np.array(self.held, dtype=np.int64)])
        assert self.tier.num_blocks == len(set(self.held))
        for block in set(self.held):
            assert torch.equal(self.tier.blocks[block], self.content[block])


TestHolders = Holders.TestCase
