"""The device tier: one pool, and in it a run of places and window that is attended as one view."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor

from arkcache.formats import PRESETS, PageFormat, PageLayout
from arkcache.kernels.torch_pages import PagePacker
from arkcache.tiering import device
from arkcache.tiering.device import (
    DeviceTier,
    Geometry,
    PackedWorkingSet,
    TierPlan,
    WorkingSet,
    copy_sequences,
    unpacked_pages,
)

PAGE = 4
GEOMETRY = Geometry(2, 3, 8, 6, torch.float32, torch.device("cpu"))
SLOTS, WINDOW, BLOCK = (5, 0, 3), 10, 16
WHOLE_WINDOW = 12
"""10 tokens in slots of 4."""

FORMAT = PageFormat(4, 2, group_size=3)
PACKER = PagePacker(PageLayout(FORMAT, PAGE, 8, 6, 4), torch.float32)

EITHER_KIND = pytest.mark.parametrize("packer", [None, PACKER], ids=["unpacked", "packed"])


def make(
    geometry: Geometry = GEOMETRY,
    slots: tuple[int, ...] = SLOTS,
    packer: PagePacker | None = None,
) -> DeviceTier:
    return DeviceTier(TierPlan(geometry, slots, PAGE, WINDOW, BLOCK, packer))


def unpacked_set(tier: DeviceTier, layer: int = 0) -> WorkingSet:
    return cast("WorkingSet", tier.working_sets[layer])


def packed_set(tier: DeviceTier, layer: int = 0) -> PackedWorkingSet:
    return cast("PackedWorkingSet", tier.working_sets[layer])


def planes(tier: DeviceTier) -> list[Tensor]:
    own = [plane for ws in tier.working_sets for plane in ws.planes]
    return [*own, *(plane for block in tier.stream_blocks for plane in block)]


def fill(tier: DeviceTier) -> None:
    """Random numbers, or random bytes, in every plane."""
    for plane in planes(tier):
        plane.copy_(torch.randn(plane.shape) if plane.is_floating_point() else random_bytes(plane))


def random_bytes(plane: Tensor) -> Tensor:
    return torch.randint(1, 256, plane.shape, dtype=torch.uint8)


def pages_of(count: int) -> tuple[Tensor, Tensor]:
    """Random pages [2, 3, count, PAGE, dim] of keys and values."""
    return torch.randn(2, 3, count, PAGE, 8), torch.randn(2, 3, count, PAGE, 6)


def bytes_of_pages(count: int) -> Tensor:
    """Random bytes [2, 3, count, nbytes], of which none is 0."""
    return torch.randint(1, 256, (2, 3, count, PACKER.layout.nbytes), dtype=torch.uint8)


# -- the pool -------------------------------------------------------------------------------------


@EITHER_KIND
def test_the_planes_share_nothing_and_start_aligned(packer: PagePacker | None) -> None:
    tier = make(packer=packer)
    assert tier.pool.dtype == torch.uint8
    for number, plane in enumerate(planes(tier), start=1):
        assert not plane.any()
        assert plane.is_contiguous()
        assert plane.untyped_storage().data_ptr() == tier.pool.data_ptr()
        assert plane.numel() == 0 or (plane.data_ptr() - tier.pool.data_ptr()) % 64 == 0
        plane.fill_(number)
    for number, plane in enumerate(planes(tier), start=1):
        assert (plane == number).all()


@EITHER_KIND
def test_all_of_the_pool_is_planes_and_their_padding(packer: PagePacker | None) -> None:
    tier = make(packer=packer)
    padded = sum(math.ceil(plane.nbytes / 64) * 64 for plane in planes(tier))
    assert tier.nbytes == padded == tier.plan.nbytes == tier.pool.untyped_storage().nbytes()


def test_its_size_is_what_was_asked_for() -> None:
    tokens = [slots * PAGE + WHOLE_WINDOW for slots in SLOTS] + [BLOCK]
    assert all(2 * 3 * n * dim * 4 % 64 == 0 for n in tokens for dim in (8, 6))
    assert make().nbytes == sum(tokens) * 2 * 3 * (8 + 6) * 4


def test_its_size_where_slots_are_packed() -> None:
    """A page of 4-bit keys and 2-bit values, by hand, and windows in full precision."""
    key_bytes = 48  # 8 channels of 4 bytes, 4 tokens of 4
    value_bytes = 48  # 4 tokens of 2 groups of 4 bytes, 4 tokens of 2
    assert PACKER.layout.nbytes == key_bytes + value_bytes
    slots = sum(SLOTS) * 2 * 3 * (key_bytes + value_bytes)
    tokens = len(SLOTS) * WHOLE_WINDOW + BLOCK
    assert make(packer=PACKER).nbytes == slots + tokens * 2 * 3 * (8 + 6) * 4


def test_odd_planes_are_padded() -> None:
    """3 rows of 3 tokens of 5 elements of 2 bytes are 90 bytes."""
    geometry = Geometry(1, 3, 5, 5, torch.bfloat16, torch.device("cpu"))
    tier = DeviceTier(TierPlan(geometry, (0,), 3, 3, 3))
    assert tier.nbytes == tier.plan.nbytes == 4 * 128
    key, value = tier.stream_blocks[0]
    key.fill_(1)
    assert not value.any()


@EITHER_KIND
def test_without_paged_layers_it_is_empty(packer: PagePacker | None) -> None:
    assert make(slots=(), packer=packer).nbytes == 0


@EITHER_KIND
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda tier: pickle.loads(pickle.dumps(tier))]
)
def test_copies_are_views_of_their_own_pool(
    duplicate: Callable[[DeviceTier], DeviceTier], packer: PagePacker | None
) -> None:
    tier = make(packer=packer)
    fill(tier)
    twin = duplicate(tier)
    assert torch.equal(twin.pool, tier.pool)
    assert all(map(torch.equal, planes(twin), planes(tier)))
    before = tier.pool.clone()
    twin.pool.zero_()
    assert not any(plane.any() for plane in planes(twin))
    twin.working_sets[0].windows[0].fill_(3.0)
    assert int((twin.pool != 0).sum()) == 2 * 2 * 3 * WHOLE_WINDOW * 8  # 3.0 is 0x40400000
    assert torch.equal(tier.pool, before)


@EITHER_KIND
def test_copy_sequences(packer: PagePacker | None) -> None:
    tier, other = make(packer=packer), make(Geometry(3, *vars_of(GEOMETRY)), packer=packer)
    fill(tier)
    index = torch.tensor([1, 1, 0])
    for target, source in zip(other.working_sets, tier.working_sets, strict=True):
        copy_sequences(source.planes, target.planes, index)
        for mine, theirs in zip(target.planes, source.planes, strict=True):
            assert torch.equal(mine, theirs[index])
    assert not other.stream_blocks[0][0].any()


def vars_of(geometry: Geometry) -> tuple[int, int, int, torch.dtype, torch.device]:
    """All sizes but the batch."""
    return (
        geometry.num_kv_heads,
        geometry.head_dim,
        geometry.value_dim,
        geometry.dtype,
        geometry.device,
    )


# -- unpacked working sets ------------------------------------------------------------------------


def test_views_grow_from_the_boundary_to_both_sides() -> None:
    working_set = unpacked_set(make())
    pages = pages_of(5)
    working_set.fill_places(slice(0, 2), 0, *pages)
    for window in working_set.windows:
        assert window.shape[2] == WHOLE_WINDOW
        window[:, :, :WINDOW] = torch.arange(float(WINDOW))[:, None]
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
    working_set = unpacked_set(make())
    key, _ = working_set.view(2, 3)
    key[0, 0, 0, 0] = 7.0
    assert working_set.key[0, 0, (SLOTS[0] - 2) * PAGE, 0] == 7.0


@pytest.mark.parametrize("first_place", [0, 2])
def test_fill_places_of_one_sequence(first_place: int) -> None:
    tier = make()
    working_set, (key, value) = unpacked_set(tier), pages_of(2)
    working_set.fill_places(slice(1, 2), first_place, key[1:], value[1:])
    held_key, held_value = places(working_set)
    own = slice(first_place, first_place + 2)
    assert torch.equal(held_key[1, :, own], key[1])
    assert torch.equal(held_value[1, :, own], value[1])
    assert_only_written(tier, 2 * 3 * PAGE * (8 + 6))


TARGETS = [(0, 4), (1, 0), (5, 3), (5, 2), (2, 1)]
"""Rows and places of five pages."""


def test_write_pages() -> None:
    """Pages land in their rows and places, and nowhere else."""
    tier = make()
    working_set, (key, value) = unpacked_set(tier), pages_of(5)
    rows, where = (torch.tensor(part) for part in zip(*TARGETS, strict=True))
    working_set.write_pages(rows, where, key[0, 0], value[0, 0])
    held_key, held_value = places(working_set)
    for page, (row, place) in enumerate(TARGETS):
        assert torch.equal(held_key[row // 3, row % 3, place], key[0, 0, page])
        assert torch.equal(held_value[row // 3, row % 3, place], value[0, 0, page])
    assert_only_written(tier, 5 * PAGE * (8 + 6))


@pytest.mark.parametrize("first_place", [0, 1])
def test_load_places(first_place: int) -> None:
    """Pages as the host tier holds them, keys first, some of them in several rows."""
    tier = make()
    working_set, (key, value) = unpacked_set(tier), pages_of(7)
    source = torch.cat((key[0, 0].flatten(1), value[0, 0].flatten(1)), dim=1)
    pieces = torch.randint(0, 7, (6, 4))
    working_set.load_places(first_place, source, pieces)
    held_key, held_value = places(working_set)
    own = slice(first_place, first_place + 4)
    assert torch.equal(held_key.flatten(0, 1)[:, own], key[0, 0][pieces])
    assert torch.equal(held_value.flatten(0, 1)[:, own], value[0, 0][pieces])
    assert_only_written(tier, 6 * 4 * PAGE * (8 + 6))


def test_all_ways_of_writing_agree() -> None:
    tiers, (key, value) = [make() for _ in range(3)], pages_of(5)
    first, second, third = (unpacked_set(tier) for tier in tiers)
    first.fill_places(slice(0, 2), 0, key, value)
    for row, place in ((row, place) for row in range(6) for place in range(5)):
        page = (part[row // 3, row % 3, place][None] for part in (key, value))
        second.write_pages(torch.tensor([row]), torch.tensor([place]), *page)
    source = torch.cat((key.flatten(0, 2).flatten(1), value.flatten(0, 2).flatten(1)), dim=1)
    third.load_places(0, source, torch.arange(30).view(6, 5))
    assert torch.equal(tiers[0].pool, tiers[1].pool)
    assert torch.equal(tiers[0].pool, tiers[2].pool)


def places(working_set: WorkingSet) -> tuple[Tensor, Tensor]:
    """Keys and values by place [2, 3, places, PAGE, dim]."""
    views = working_set.view(working_set.num_slots, 0)
    key, value = (view.unflatten(2, (-1, PAGE)).flip(2) for view in views)
    return key, value


def assert_only_written(tier: DeviceTier, count: int) -> None:
    """The pool was zeros; random numbers are not."""
    assert sum(int((plane != 0).sum()) for plane in planes(tier)) == count


# -- packed working sets --------------------------------------------------------------------------


@pytest.mark.parametrize("first_place", [0, 2])
def test_fill_packed_places_of_one_sequence(first_place: int) -> None:
    tier, packed = make(packer=PACKER), bytes_of_pages(2)
    packed_set(tier).fill_places(slice(1, 2), first_place, packed[1:])
    held = packed_set(tier).slots.flip(2)
    assert torch.equal(held[1, :, first_place : first_place + 2], packed[1])
    assert_only_written(tier, 2 * 3 * PACKER.layout.nbytes)


def test_write_packed_pages() -> None:
    """Packed pages land in their rows and places, and nowhere else."""
    tier, packed = make(packer=PACKER), bytes_of_pages(5)
    rows, where = (torch.tensor(part) for part in zip(*TARGETS, strict=True))
    packed_set(tier).write_pages(rows, where, packed[0, 0])
    held = packed_set(tier).slots.flip(2)
    for page, (row, place) in enumerate(TARGETS):
        assert torch.equal(held[row // 3, row % 3, place], packed[0, 0, page])
    assert_only_written(tier, 5 * PACKER.layout.nbytes)


def test_both_ways_of_writing_packed_pages_agree() -> None:
    tiers, packed = [make(packer=PACKER) for _ in range(2)], bytes_of_pages(5)
    packed_set(tiers[0]).fill_places(slice(0, 2), 0, packed)
    rows, where = torch.meshgrid(torch.arange(6), torch.arange(5), indexing="ij")
    by_slot = packed.flatten(0, 2)
    packed_set(tiers[1]).write_pages(rows.flatten(), where.flatten(), by_slot)
    assert torch.equal(tiers[0].pool, tiers[1].pool)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 3, 8, 100])
def test_parts_are_the_view_of_the_unpacked_pages(
    at_once: int, dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any number of pages, more than are unpacked at a time included, and of tokens."""
    slots = 8
    monkeypatch.setattr(device, "UNPACKED_BYTES", at_once * PAGE * 2 * 3 * (8 + 6) * 4)
    form = PageFormat(PRESETS[name].key_bits, PRESETS[name].value_bits, 3)
    packer = PagePacker(PageLayout(form, PAGE, 8, 6, dtype.itemsize), dtype)
    geometry = Geometry(2, 3, 8, 6, dtype, torch.device("cpu"))
    plain, packed = (make(geometry, (slots,), kind) for kind in (None, packer))
    fill(plain)
    windows = (tier.working_sets[0].windows for tier in (packed, plain))
    for mine, theirs in zip(*windows, strict=True):
        mine.copy_(theirs)
    bytes_of = packer.pack(*(part.to(dtype) for part in pages_of(slots)))
    packed_set(packed).fill_places(slice(0, 2), 0, bytes_of)
    unpacked_set(plain).fill_places(slice(0, 2), 0, *packer.unpack(bytes_of))
    for num_pages in range(slots + 1):
        for num_recent in (0, 1, WINDOW):
            parts = list(packed_set(packed).parts(num_pages, num_recent))
            assert all(part[0].shape[2] <= at_once * PAGE for part in parts[:-1])
            views = unpacked_set(plain).view(num_pages, num_recent)
            for view, part in zip(views, zip(*parts, strict=True), strict=True):
                assert torch.equal(torch.cat(part, dim=2), view)


def test_a_page_is_unpacked_however_many_rows_there_are() -> None:
    few, many = (Geometry(batch, 3, 8, 6, *vars_of(GEOMETRY)[3:]) for batch in (100, 10_000))
    assert unpacked_pages(few, PAGE) == (4 << 20) // (100 * 3 * PAGE * (8 + 6) * 4)
    assert unpacked_pages(many, PAGE) == 1
