"""The device tier: one pool, and in it a run of places and window that is attended as one view."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from arkcache.tiering.device import DeviceTier, Geometry, WorkingSet

PAGE = 4
GEOMETRY = Geometry(2, 3, 8, 6, torch.float32, torch.device("cpu"))
SLOTS, WINDOW, BLOCK = [5, 0, 3], 10, 16


def make(geometry: Geometry = GEOMETRY) -> DeviceTier:
    return DeviceTier(geometry, SLOTS, PAGE, WINDOW, BLOCK)


def planes(tier: DeviceTier) -> list[Tensor]:
    own = [plane for ws in tier.working_sets for plane in (ws.key, ws.value)]
    return [*own, tier.stream_key, tier.stream_value]


def pages_of(count: int) -> tuple[Tensor, Tensor]:
    """Random pages [2, 3, count, PAGE, dim] of keys and values."""
    return torch.randn(2, 3, count, PAGE, 8), torch.randn(2, 3, count, PAGE, 6)


def packed(key: Tensor, value: Tensor) -> Tensor:
    """One page of one row as the host tier holds it: keys, then values."""
    return torch.cat((key.flatten(), value.flatten()))


def test_the_planes_divide_the_pool() -> None:
    """No two planes overlap, and together they are all of it."""
    tier = make()
    for number, plane in enumerate(planes(tier), start=1):
        assert not plane.any()
        plane.fill_(number)
    assert not (tier.pool == 0).any()
    for number, plane in enumerate(planes(tier), start=1):
        assert (plane == number).all()
    assert tier.nbytes == sum(plane.numel() * 4 for plane in planes(tier))


def test_its_size_is_what_was_asked_for() -> None:
    tier = make()
    window_slots = 3  # 10 tokens in slots of 4
    tokens = sum(slots + window_slots for slots in SLOTS) * PAGE + BLOCK
    assert tier.nbytes == tokens * 2 * 3 * (8 + 6) * 4
    assert tier.nbytes == tier.pool.untyped_storage().nbytes()


def test_without_paged_layers_it_is_empty() -> None:
    assert DeviceTier(GEOMETRY, [], PAGE, WINDOW, BLOCK).nbytes == 0


def test_views_grow_from_the_boundary_to_both_sides() -> None:
    working_set = make().working_sets[0]
    pages, window = pages_of(5), torch.arange(float(WINDOW))[:, None]
    working_set.fill_places(slice(0, 2), 0, *pages)
    working_set.key_window[:, :, :WINDOW] = window
    working_set.value_window[:, :, :WINDOW] = window
    for num_pages in range(6):
        for num_recent in (0, 1, WINDOW):
            views = working_set.view(num_pages, num_recent)
            for view, part in zip(views, pages, strict=True):
                assert view.shape[2] == num_pages * PAGE + num_recent
                left = view[:, :, : num_pages * PAGE].unflatten(2, (num_pages, PAGE))
                assert torch.equal(left.flip(2), part[:, :, :num_pages])  # place 0 is nearest
                expected = torch.arange(float(num_recent))[:, None]
                assert torch.equal(
                    view[:, :, num_pages * PAGE :], expected.expand(2, 3, -1, view.shape[3])
                )


def test_a_view_copies_nothing() -> None:
    working_set = make().working_sets[0]
    key, _ = working_set.view(2, 3)
    key[0, 0, 0, 0] = 7.0
    assert working_set.key[0, 0, (SLOTS[0] - 2) * PAGE, 0] == 7.0


@pytest.mark.parametrize("first_place", [0, 2])
def test_fill_places_of_one_sequence(first_place: int) -> None:
    tier = make()
    working_set, (key, value) = tier.working_sets[0], pages_of(2)
    working_set.fill_places(slice(1, 2), first_place, key[1:], value[1:])
    held_key, held_value = places(working_set)
    own = slice(first_place, first_place + 2)
    assert torch.equal(held_key[1, :, own], key[1])
    assert torch.equal(held_value[1, :, own], value[1])
    assert_only_written(tier, 2 * 3 * PAGE * (8 + 6))


def test_write_pages() -> None:
    """Packed pages land in their rows and places, and nowhere else."""
    tier = make()
    working_set, (key, value) = tier.working_sets[0], pages_of(5)
    targets = [(0, 4), (1, 0), (5, 3), (5, 2), (2, 1)]
    content = [packed(key[0, 0, i], value[0, 0, i]) for i in range(5)]
    rows, where = (torch.tensor(part) for part in zip(*targets, strict=True))
    working_set.write_pages(rows, where, torch.stack(content))
    held_key, held_value = places(working_set)
    for page, (row, place) in enumerate(targets):
        assert torch.equal(held_key[row // 3, row % 3, place], key[0, 0, page])
        assert torch.equal(held_value[row // 3, row % 3, place], value[0, 0, page])
    assert_only_written(tier, 5 * PAGE * (8 + 6))


def test_both_ways_of_writing_agree() -> None:
    first, second, (key, value) = make(), make(), pages_of(5)
    first.working_sets[0].fill_places(slice(0, 2), 0, key, value)
    for row in range(6):
        for place in range(5):
            page = packed(key[row // 3, row % 3, place], value[row // 3, row % 3, place])
            second.working_sets[0].write_pages(
                torch.tensor([row]), torch.tensor([place]), page[None]
            )
    assert torch.equal(first.pool, second.pool)


def test_copy_sequences() -> None:
    tier = make()
    tier.pool.copy_(torch.randn_like(tier.pool))
    other = make(Geometry(3, 3, 8, 6, torch.float32, torch.device("cpu")))
    index = torch.tensor([1, 1, 0])
    for target, source in zip(other.working_sets, tier.working_sets, strict=True):
        target.copy_sequences(source, index)
        assert torch.equal(target.key, source.key[index])
        assert torch.equal(target.value, source.value[index])


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda tier: pickle.loads(pickle.dumps(tier))]
)
def test_copies_are_views_of_their_own_pool(duplicate) -> None:  # type: ignore[no-untyped-def]
    tier = make()
    tier.pool.copy_(torch.randn_like(tier.pool))
    twin = duplicate(tier)
    assert torch.equal(twin.pool, tier.pool)
    before = tier.pool.clone()
    twin.pool.zero_()
    assert not any(plane.any() for plane in planes(twin))
    twin.working_sets[0].key_window.fill_(3.0)
    assert (twin.working_sets[0].view(0, WINDOW)[0] == 3.0).all()
    assert torch.equal(tier.pool, before)


def places(working_set: WorkingSet) -> tuple[Tensor, Tensor]:
    """Keys and values by place [2, 3, places, PAGE, dim]."""
    views = working_set.view(working_set.num_slots, 0)
    key, value = (view.unflatten(2, (-1, PAGE)).flip(2) for view in views)
    return key, value


def assert_only_written(tier: DeviceTier, count: int) -> None:
    """The pool was zeros; random numbers are not."""
    assert int((tier.pool != 0).sum()) == count
