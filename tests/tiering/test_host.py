"""The host tier: pieces of two sizes, counted by reference, in one mapping without waste."""

import mmap
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from arkcache import HostTierFullError, IntegrityError
from arkcache.tiering import host as host_module
from arkcache.tiering import pieces as pieces_module
from arkcache.tiering.host import HostTier

FINE, COARSE = 96, 32
ODD_SIZES = (100, 48)
"""The first no multiple of 8 or 16, as a page of an odd model may be."""


def make(most: int = 1000) -> HostTier:
    return HostTier([FINE], most * FINE)


def make_two(limit: int = 100 * FINE) -> HostTier:
    return HostTier([FINE, COARSE], limit)


def write(tier: HostTier, handles: np.ndarray) -> torch.Tensor:
    """Random content for handles of one kind; returns it."""
    kind = int(tier.kinds(handles)[0]) if len(handles) else 0
    content = torch.randint(0, 256, (len(handles), tier.piece_bytes[kind]), dtype=torch.uint8)
    tier.write(handles, content)
    return content


def read(tier: HostTier, handles: np.ndarray) -> torch.Tensor:
    """The content of handles of one kind."""
    kind = int(tier.kinds(handles)[0]) if len(handles) else 0
    return tier.pieces(kind)[torch.from_numpy(tier.positions(handles))]


def ids(items: list[int]) -> np.ndarray:
    return np.array(items, dtype=np.int64)


def extents(tier: HostTier) -> int:
    """Bytes from the ends of the arena to the last piece of each side, holes included."""
    return sum(side.extent * size for side, size in zip(tier._sides, tier.piece_bytes, strict=True))


# -- references and room --------------------------------------------------------------------------


def test_pieces_are_distinct_and_counted() -> None:
    tier = make()
    handles = np.concatenate((tier.allocate(3), tier.allocate(0), tier.allocate(5)))
    assert len(set(handles.tolist())) == 8
    assert tier.num_pieces == tier.count(0) == 8
    assert tier.piece_bytes == (FINE,)
    assert tier.used_bytes == 8 * FINE
    tier.check([handles])


def test_pieces_of_two_kinds() -> None:
    tier = make_two()
    fine, coarse = tier.allocate(3), tier.allocate(5, 1)
    contents = write(tier, fine), write(tier, coarse)
    both = np.concatenate((fine, coarse))
    assert tier.kinds(both).tolist() == [0] * 3 + [1] * 5
    assert (
        tier.kinds(both.reshape(2, 4)).shape == tier.positions(both.reshape(2, 4)).shape == (2, 4)
    )
    assert (tier.count(0), tier.count(1), tier.num_pieces) == (3, 5, 8)
    assert tier.used_bytes == 3 * FINE + 5 * COARSE
    assert tier.bytes_of(np.concatenate((both, fine))) == tier.used_bytes
    assert tier.bytes_of(fine[:0]) == 0
    assert torch.equal(read(tier, fine), contents[0])
    assert torch.equal(read(tier, coarse), contents[1])
    tier.check([both])


def test_a_piece_is_free_when_its_last_reference_goes() -> None:
    tier = make()
    handles = tier.allocate(4)
    tier.retain(handles[:2])
    tier.release(handles)
    assert tier.num_pieces == 2
    tier.check([handles[:2]])
    again = tier.allocate(2)
    assert set(again.tolist()) == set(handles[2:].tolist())
    tier.check([handles[:2], again])


def test_one_piece_listed_several_times() -> None:
    tier = make()
    handles = tier.allocate(3)
    listed = handles[[0, 0, 1]]
    tier.retain(listed)
    tier.check([handles, listed])
    assert tier.bytes_of(np.concatenate((handles, listed))) == 3 * FINE
    tier.release(handles[[0, 0, 0]])
    assert tier.num_pieces == 2
    tier.check([handles[[1, 1, 2]]])


def test_the_limit_is_an_error_before_anything_changes() -> None:
    tier = make(most=4)
    handles = tier.allocate(3)
    content = write(tier, handles)
    for attempt in (lambda: tier.check_room([2]), lambda: tier.allocate(2)):
        with pytest.raises(HostTierFullError, match="host_bytes") as caught:
            attempt()
        message = str(caught.value)
        assert str(3 * FINE) in message
        assert str(4 * FINE) in message
    tier.check([handles])
    assert torch.equal(read(tier, handles), content)
    tier.check_room([1])
    last = tier.allocate(1)
    tier.release(handles)
    tier.check([last, tier.allocate(3)])


def test_the_limit_counts_both_kinds_to_the_byte() -> None:
    tier = make_two(4 * FINE + 2 * COARSE)
    fine = tier.allocate(3)
    tier.check_room([1, 2])
    tier.check_room([0, 5])
    tier.check_room([1])
    for counts in ([2, 0], [1, 3], [0, 6]):
        with pytest.raises(HostTierFullError):
            tier.check_room(counts)
    coarse = tier.allocate(5, 1)
    assert tier.used_bytes == tier.limit_bytes
    for kind in (0, 1):
        with pytest.raises(HostTierFullError):
            tier.allocate(1, kind)
    tier.check([fine, coarse])


def test_a_limit_below_one_piece_holds_nothing() -> None:
    tier = HostTier([FINE], FINE - 1)
    with pytest.raises(HostTierFullError):
        tier.allocate(1)
    tier.check([])


@pytest.mark.parametrize("sizes", [(FINE, COARSE), (COARSE, FINE)])
def test_a_limit_below_one_piece_of_a_kind_holds_the_other(sizes: tuple[int, int]) -> None:
    tier = HostTier(sizes, FINE - 1)
    small = sizes.index(COARSE)
    with pytest.raises(HostTierFullError):
        tier.allocate(1, 1 - small)
    handles = tier.allocate(2, small)
    content = write(tier, handles)
    tier.compact()
    assert torch.equal(read(tier, handles), content)
    assert tier.pieces(1 - small).shape == (0, FINE)
    tier.check([handles])


def test_it_serves_again_after_all_was_released() -> None:
    tier = make(most=5)
    tier.release(tier.allocate(5))
    tier.check([])
    handles = tier.allocate(5)
    content = write(tier, handles)
    assert torch.equal(read(tier, handles), content)
    tier.check([handles])


def test_no_limit_is_the_memory_of_the_machine() -> None:
    assert HostTier([FINE], None).limit_bytes == host_module.physical_memory_bytes()


# -- where pieces are -----------------------------------------------------------------------------


def test_growth_never_moves_a_piece() -> None:
    tier = make()
    handles = tier.allocate(2)
    content, address = write(tier, handles), tier.pieces().data_ptr()
    for _ in range(20):
        write(tier, tier.allocate(30))
    assert tier.pieces().data_ptr() == address
    assert torch.equal(read(tier, handles), content)


def test_one_kind_never_moves_a_piece() -> None:
    tier, order = make(most=50), random.Random(0)
    held: dict[int, int] = {}
    for _ in range(300):
        some = order.sample(sorted(held), order.randint(0, len(held) // 2))
        tier.release(ids(some))
        for handle in some:
            del held[handle]
        new = tier.allocate(order.randint(0, 50 - len(held)))
        held |= dict(zip(new.tolist(), tier.positions(new).tolist(), strict=True))
        assert tier.positions(ids(list(held))).tolist() == list(held.values())
    tier.check([ids(list(held))])


@pytest.mark.parametrize("sizes", [(FINE,), (FINE, COARSE), ODD_SIZES, (4096, 1168)])
def test_pieces_is_a_plain_view_of_the_arena(sizes: tuple[int, ...]) -> None:
    tier = HostTier(sizes, 12_345)
    for kind, size in enumerate(sizes):
        assert tier.pieces(kind).shape == (0, size)
    held = tier.allocate(1)
    for kind, size in enumerate(sizes):
        pieces = tier.pieces(kind)
        assert pieces.shape == (12_345 // size, size)
        assert pieces.dtype == torch.uint8
        assert pieces.is_contiguous()
        assert pieces.data_ptr() % 16 == 0
        if size % 16 == 0:
            assert pieces.view(torch.bfloat16).data_ptr() == pieces.data_ptr()
    tier.release(held)
    assert len(tier.pieces()) == 0


def test_kernels_under_inference_mode_get_ordinary_tensors() -> None:
    with torch.inference_mode():
        tier = make_two()
        handles = tier.allocate(2, 1)
        content = write(tier, handles)
        assert not tier.pieces(1).is_inference()
    assert torch.equal(read(tier, handles), content)


@pytest.mark.parametrize("offset", [0, 3, 8])
def test_write_takes_any_layout_of_bytes(offset: int) -> None:
    tier = make()
    handles = tier.allocate(2)
    content = torch.randint(0, 256, (1000,), dtype=torch.uint8)[offset : offset + 4 * FINE]
    content = content.view(2, 2 * FINE)[:, :FINE]
    tier.write(handles, content)
    assert torch.equal(read(tier, handles), content)
    tier.write(handles[:1], content[1:, :])
    assert torch.equal(read(tier, handles), content[[1, 1]])
    tier.write(handles[:0], content[:0])


# -- holes ----------------------------------------------------------------------------------------


def test_compact_leaves_no_holes_and_keeps_contents() -> None:
    tier = make_two()
    held = []
    for kind in (0, 1):
        handles = tier.allocate(20, kind)
        content = write(tier, handles)
        tier.release(handles[::2])
        held.append((handles[1::2], content[1::2]))
    assert extents(tier) == 2 * tier.used_bytes
    tier.compact()
    assert extents(tier) == tier.used_bytes
    for handles, content in held:
        assert torch.equal(read(tier, handles), content)
    tier.check([handles for handles, _ in held])
    tier.compact()
    tier.check([handles for handles, _ in held])


def test_compact_moves_much_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "MOVE_BYTES", 5 * FINE)
    tier = make()
    handles = tier.allocate(41)
    content = write(tier, handles)
    tier.release(handles[:20])
    tier.compact()
    assert torch.equal(read(tier, handles[20:]), content[20:])
    own = tier.extract(handles[20:])
    assert torch.equal(read(own, own.extracted(handles[20:])), content[20:])


def test_a_move_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tier = make_two()
    handles = tier.allocate(20, 1)
    content = write(tier, handles)
    tier.release(handles[:5])

    def fail(*_args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(host_module, "copy_pieces", fail)
    with pytest.raises(MemoryError):
        tier.compact()
    tier.check([handles[5:]])
    assert torch.equal(read(tier, handles[5:]), content[5:])


def test_compact_of_an_empty_tier() -> None:
    for tier in (make(), make_two()):
        tier.compact()
        tier.check_room([1])
        tier.compact()
        tier.check([tier.allocate(3)])


@pytest.mark.parametrize("kind", [0, 1])
def test_holes_of_the_other_side_serve_an_allocation(kind: int) -> None:
    tier = make_two(12 * FINE)
    other = 1 - kind
    full = tier.allocate(12 * FINE // tier.piece_bytes[other], other)
    content = write(tier, full)
    keep = np.arange(len(full)) % 2 == 1
    tier.release(full[~keep])
    new = tier.allocate(6 * FINE // tier.piece_bytes[kind], kind)
    written = write(tier, new)
    assert torch.equal(read(tier, full[keep]), content[torch.from_numpy(keep)])
    assert torch.equal(read(tier, new), written)
    assert extents(tier) == tier.used_bytes == tier.limit_bytes
    tier.check([full[keep], new])


def test_holes_of_the_own_side_are_filled_without_moving_anything() -> None:
    tier = make_two(12 * FINE)
    full = tier.allocate(12)
    rows = tier.positions(full)
    tier.release(full[::2])
    tier.check([full[1::2], tier.allocate(6)])
    assert np.array_equal(tier.positions(full[1::2]), rows[1::2])


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_taken_when_written_and_given_back_when_released() -> None:
    size = 64 << 20
    tier = HostTier([1 << 20], 64 * size)
    start = resident_bytes()
    handles = tier.allocate(size >> 20)
    assert resident_bytes() - start < size // 4
    tier.pieces()[torch.from_numpy(tier.positions(handles))] = 1
    assert resident_bytes() - start > size // 2
    tier.release(handles)
    assert tier.used_bytes == 0
    assert resident_bytes() - start < size // 4


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_compact_gives_memory_back() -> None:
    tier = HostTier([64 << 10, 16 << 10], 64 << 20)
    held = []
    for kind in (0, 1):
        handles = tier.allocate((32 << 20) // tier.piece_bytes[kind], kind)
        content = write(tier, handles)
        tier.release(handles[np.arange(len(handles)) % 8 != 0])
        held.append((handles[::8], content[::8]))
    assert resident_bytes_at(tier.pieces().data_ptr()) >= 60 << 20
    tier.compact()
    assert tier.used_bytes == 8 << 20
    assert resident_bytes_at(tier.pieces().data_ptr()) <= 9 << 20
    for handles, content in held:
        assert torch.equal(read(tier, handles), content)


def resident_bytes_at(address: int) -> int:
    """Memory behind the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            low, high = (int(end, 16) for end in first.split("-"))
            inside = low <= address < high
        elif inside and first == "Rss:":
            return int(line.split()[1]) << 10
    raise AssertionError("the address is not mapped")


def test_compact_without_advice_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(host_module.mmap, "MADV_DONTNEED", raising=False)
    tier = make_two()
    handles = tier.allocate(20)
    content = write(tier, handles)
    tier.release(handles[:10])
    tier.compact()
    assert torch.equal(read(tier, handles[10:]), content[10:])


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


# -- copies ---------------------------------------------------------------------------------------


def test_pickle() -> None:
    tier = make()
    handles = tier.allocate(6)
    content = write(tier, handles)
    tier.release(handles[:2])
    state = pickle.dumps(tier)
    assert len(state) < 10 * FINE + 2500  # what it holds, not the limit
    copy = pickle.loads(state)
    copy.check([handles[2:]])
    assert torch.equal(read(copy, handles[2:]), content[2:])
    write(copy, copy.allocate(900))  # it may grow to the limit as before
    assert torch.equal(read(tier, handles[2:]), content[2:])
    with pytest.raises(HostTierFullError):
        copy.allocate(100)


def test_pickle_of_an_empty_tier() -> None:
    for tier in (make(), make_two()):
        copy = pickle.loads(pickle.dumps(tier))
        copy.check([copy.allocate(3)])


@pytest.mark.parametrize("kind", [0, 1])
def test_pickle_of_one_side(kind: int) -> None:
    tier = make_two()
    handles = tier.allocate(7, kind)
    content = write(tier, handles)
    copy = pickle.loads(pickle.dumps(tier))
    assert torch.equal(read(copy, handles), content)
    copy.check([handles, copy.allocate(2, 1 - kind)])


def test_extract_takes_the_listed_pieces_only() -> None:
    tier = make_two()
    coarse, fine = tier.allocate(6, 1), tier.allocate(6)
    contents = write(tier, coarse), write(tier, fine)
    listed = np.concatenate((fine[[5, 1, 5]], coarse[[0, 4]]))
    own = tier.extract(listed)
    moved = own.extracted(listed)
    assert (own.count(0), own.count(1)) == (2, 2)
    assert own.kinds(moved).tolist() == [0, 0, 0, 1, 1]
    own.check([moved])
    assert torch.equal(read(own, moved[:3]), contents[1][[5, 1, 5]])
    assert torch.equal(read(own, moved[3:]), contents[0][[0, 4]])
    assert own.extracted(listed[:4].reshape(2, 2)).shape == (2, 2)
    tier.check([fine, coarse])


def test_extract_of_nothing() -> None:
    own = make().extract(ids([]))
    assert own.num_pieces == 0
    own.check([own.extracted(ids([]))])


# -- invariants -----------------------------------------------------------------------------------


def test_check_finds_references_that_do_not_balance() -> None:
    tier = make()
    handles = tier.allocate(3)
    for holders in ([], [handles, handles], [handles[:2]], [handles[[0, 1, 1]]]):
        with pytest.raises(IntegrityError, match="references"):
            tier.check(holders)
    tier.check([handles])


def with_holes() -> tuple[HostTier, list[np.ndarray]]:
    """A tier with pieces 1, 2, 3 and hole 0 on either side, and who holds them."""
    tier = make_two()
    handles = [tier.allocate(4), tier.allocate(4, 1)]
    tier.release(np.concatenate((handles[0][:1], handles[1][:1])))
    held = [some[1:] for some in handles]
    tier.check(held)
    return tier, held


def test_check_finds_a_free_handle_that_is_held() -> None:
    tier, held = with_holes()
    tier._free.push(held[0][:1])
    with pytest.raises(IntegrityError, match="free handles"):
        tier.check(held)


def test_check_finds_a_handle_that_is_lost() -> None:
    tier, held = with_holes()
    tier._free.pop(1)
    with pytest.raises(IntegrityError, match="free handles"):
        tier.check(held)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("row", "message"),
    [(2, "share a place"), (4, "outside its side"), (-1, "outside its side")],
)
def test_check_finds_a_misplaced_piece(side: int, row: int, message: str) -> None:
    tier, held = with_holes()
    tier._position[held[side][0]] = row
    with pytest.raises(IntegrityError, match=message):
        tier.check(held)


@pytest.mark.parametrize("side", [0, 1])
def test_check_finds_swapped_pieces(side: int) -> None:
    tier, held = with_holes()
    tier._position[held[side][:2]] = tier._position[held[side][1::-1]]
    with pytest.raises(IntegrityError, match="names another"):
        tier.check(held)


@pytest.mark.parametrize("side", [0, 1])
def test_check_finds_holes_that_are_pieces_or_lost(side: int) -> None:
    tier, held = with_holes()
    tier._sides[side].holes.push(tier._position[held[side][:1]])
    with pytest.raises(IntegrityError, match="free places"):
        tier.check(held)
    tier._sides[side].holes.pop(2)
    with pytest.raises(IntegrityError, match="free places"):
        tier.check(held)


def test_check_finds_a_piece_of_no_kind() -> None:
    tier, held = with_holes()
    tier._kind[held[0][0]] = 2
    tier._sides[0].holes.push(tier._position[held[0][:1]])
    with pytest.raises(IntegrityError, match="of a kind"):
        tier.check(held)


def test_check_finds_sides_that_overlap() -> None:
    tier, held = with_holes()
    side = tier._sides[0]
    side.holes.push(np.arange(side.extent, 101))
    side.extent = 101
    with pytest.raises(IntegrityError, match="overlap"):
        tier.check(held)


def test_check_finds_more_than_the_limit() -> None:
    tier, held = with_holes()
    tier.limit_bytes = tier.used_bytes - 1
    with pytest.raises(IntegrityError, match="limit"):
        tier.check(held)


# -- any order of operations ----------------------------------------------------------------------


class Model:
    """A tier beside a plain account of it: what each piece holds, and who refers to it."""

    def __init__(self, sizes: tuple[int, ...], limit: int, num_holders: int = 3) -> None:
        self.tier = HostTier(sizes, limit)
        self.holders: list[list[int]] = [[] for _ in range(num_holders)]
        self.content: dict[int, bytes] = {}

    @property
    def left(self) -> int:
        return self.tier.limit_bytes - sum(map(len, self.content.values()))

    def allocate(self, holder: int, count: int, kind: int) -> None:
        if count * self.tier.piece_bytes[kind] > self.left:
            with pytest.raises(HostTierFullError):
                self.tier.allocate(count, kind)
            return
        handles = self.tier.allocate(count, kind)
        assert len(set(handles.tolist())) == count
        assert not set(handles.tolist()) & set(self.content)
        self.write(handles, write(self.tier, handles))
        self.holders[holder] += handles.tolist()

    def write(self, handles: np.ndarray, content: torch.Tensor) -> None:
        for handle, piece in zip(handles.tolist(), content, strict=True):
            self.content[handle] = piece.numpy().tobytes()

    def retain(self, holder: int, some: list[int]) -> None:
        self.tier.retain(ids(some))
        self.holders[holder] += some

    def release(self, holder: int, some: list[int]) -> None:
        """Give up some of what a holder has, by position."""
        chosen = set(some)
        held = self.holders[holder]
        self.tier.release(ids([held[i] for i in chosen]))
        self.holders[holder] = [handle for i, handle in enumerate(held) if i not in chosen]
        still = {handle for held in self.holders for handle in held}
        self.content = {handle: self.content[handle] for handle in still}

    def demote(self, holder: int, positions: list[int]) -> None:
        """Exchange a holder's fine pieces for coarse ones, made of their first bytes."""
        held = self.holders[holder]
        chosen = [i for i in sorted(set(positions)) if self.tier.kinds(ids([held[i]]))[0] == 0]
        fine, size = ids([held[i] for i in chosen]), self.tier.piece_bytes[1]
        if len(fine) == 0 or len(fine) * size > self.left:
            return
        packed = read(self.tier, fine).repeat(1, 3)[:, :size]
        coarse = self.tier.allocate(len(fine), 1)
        self.tier.write(coarse, packed)
        self.write(coarse, packed)
        self.holders[holder] += coarse.tolist()
        self.release(holder, chosen)

    def compact(self) -> None:
        self.tier.compact()
        assert extents(self.tier) == self.tier.used_bytes

    def pickle(self) -> None:
        self.tier = pickle.loads(pickle.dumps(self.tier))

    def extract(self, holder: int) -> None:
        """Replace the tier by a copy for one holder, as copying a cache does."""
        kept = self.holders[holder]
        old, self.tier = self.tier, self.tier.extract(ids(kept))
        moved = self.tier.extracted(ids(kept)).tolist()
        content = {new: self.content[handle] for handle, new in zip(kept, moved, strict=True)}
        old.check([ids(held) for held in self.holders])
        self.holders = [[] for _ in self.holders]
        self.holders[holder], self.content = moved, content

    def check(self) -> None:
        tier = self.tier
        tier.check([ids(held) for held in self.holders])
        assert tier.num_pieces == len(self.content)
        assert tier.used_bytes == sum(map(len, self.content.values())) <= tier.limit_bytes
        held = ids(list(self.content))
        for kind in range(len(tier.piece_bytes)):
            handles = held[tier.kinds(held) == kind]
            expected = b"".join(self.content[handle] for handle in handles.tolist())
            assert read(tier, handles).numpy().tobytes() == expected if len(handles) else True

    def fill(self) -> None:
        """Take all that is left, to the last byte that a piece fits."""
        for kind, size in enumerate(self.tier.piece_bytes):
            self.allocate(0, self.left // size, kind)
        assert self.left < min(self.tier.piece_bytes)


def step(model: Model, order: random.Random) -> None:
    holder, sizes = order.randrange(len(model.holders)), model.tier.piece_bytes
    held = model.holders[holder]
    some = order.sample(range(len(held)), order.randint(0, min(len(held), 12)))
    kind = order.randrange(len(sizes))
    match order.choices(range(7), weights=(60, 10, 15, 30 * (len(sizes) - 1), 3, 1, 0.3))[0]:
        case 0:  # mostly as much as there is, so that the tier is near full all the time
            most = model.left // sizes[kind]
            model.allocate(holder, order.choice((1, order.randint(0, most), most, most + 1)), kind)
        case 1:
            other = order.randrange(len(model.holders))
            model.retain(other, [held[i] for i in some])
        case 2:
            model.release(holder, some)
        case 3:
            model.demote(holder, some)
        case 4:
            model.compact()
        case 5:
            model.pickle()
        case 6:
            model.extract(holder)


@pytest.mark.parametrize("sizes", [(FINE, COARSE), ODD_SIZES, (COARSE, FINE), (FINE,)])
def test_a_long_trace_wastes_nothing(sizes: tuple[int, ...]) -> None:
    model, order = Model(sizes, 60 * sizes[0] + 7), random.Random(1)
    for number in range(4000):
        step(model, order)
        if number % 8 == 0:
            model.check()
        if number % 500 == 499:  # however long it ran: every byte still serves
            model.fill()
            model.check()
            model.compact()
            model.check()
            for holder, held in enumerate(model.holders):
                model.release(holder, order.sample(range(len(held)), len(held) // 3))


def test_demoting_all_the_time_at_the_limit() -> None:
    """The regime of a long context: fine pages come, older ones become coarse, nothing is lost."""
    model, order = Model((FINE, COARSE), 200 * FINE), random.Random(2)
    for _ in range(300):
        if model.left < FINE:
            held = model.holders[0]
            fine = np.flatnonzero(model.tier.kinds(ids(held)) == 0).tolist()
            if len(fine) < 8:
                model.release(0, order.sample(range(len(held)), len(held) // 2))
                continue
            gone = order.sample(fine, 2)
            model.release(0, gone)
            fine = np.flatnonzero(model.tier.kinds(ids(model.holders[0])) == 0).tolist()
            model.demote(0, order.sample(fine, 6))
        model.allocate(0, model.left // FINE, 0)
        model.check()
        assert model.left < FINE


class AnyOrder(RuleBasedStateMachine):
    """Any order of taking, sharing, demoting and giving back: content stays, metadata balances."""

    @initialize(sizes=st.sampled_from([(FINE,), (FINE, COARSE), ODD_SIZES]))
    def start(self, sizes: tuple[int, ...]) -> None:
        self.model = Model(sizes, 20 * sizes[0])

    @rule(seed=st.integers(0, 1 << 30), count=st.integers(1, 5))
    def steps(self, seed: int, count: int) -> None:
        order = random.Random(seed)
        for _ in range(count):
            step(self.model, order)

    @rule(holder=st.integers(0, 2), count=st.integers(0, 9), coarse=st.booleans())
    def allocate(self, holder: int, count: int, coarse: bool) -> None:
        self.model.allocate(holder, count, int(coarse) % len(self.model.tier.piece_bytes))

    @rule(holder=st.integers(0, 2), data=st.data(), demote=st.booleans())
    def give_up(self, holder: int, data: st.DataObject, demote: bool) -> None:
        held = self.model.holders[holder]
        if held:
            some = data.draw(st.lists(st.integers(0, len(held) - 1), max_size=8))
            if demote and len(self.model.tier.piece_bytes) == 2:
                self.model.demote(holder, some)
            else:
                self.model.release(holder, some)

    @rule(holder=st.integers(0, 2))
    def leave(self, holder: int) -> None:
        self.model.release(holder, list(range(len(self.model.holders[holder]))))

    @rule()
    def compact(self) -> None:
        self.model.compact()

    @invariant()
    def holds_what_was_written(self) -> None:
        if hasattr(self, "model"):
            self.model.check()


TestAnyOrder = AnyOrder.TestCase
