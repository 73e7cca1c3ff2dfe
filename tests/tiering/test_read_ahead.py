"""Blocks read ahead, on streams that run in any order that the events allow."""

from functools import partial

import pytest
import torch
from torch import Tensor

from arkcache.tiering.read_ahead import Block, read_ahead
from tests.tiering.fake_streams import World, earliest, latest

NUM_LOADS = 7


def load(number: int, block: Block) -> None:
    for plane in block:
        plane.fill_(number)


def read_all(world: World, num_blocks: int, num_loads: int = NUM_LOADS) -> list[list[float]]:
    """What the main stream finds in each block when it comes to it."""
    blocks = [(torch.full((3,), -1.0), torch.full((2,), -1.0)) for _ in range(num_blocks)]
    loads = [partial(load, number) for number in range(num_loads)]
    found: list[list[float]] = []

    def attend(block: tuple[Tensor, Tensor]) -> None:
        found.append(torch.cat(block).tolist())

    for block in read_ahead(world.streams, blocks, loads):
        world.streams.main.run(partial(attend, block))
    world.drain()
    return found


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
@pytest.mark.parametrize("num_loads", [0, 1, 2, NUM_LOADS])
@pytest.mark.parametrize("seed", range(5))
def test_every_block_in_turn(num_blocks: int, num_loads: int, seed: int) -> None:
    found = read_all(World(seed), num_blocks, num_loads)
    assert found == [[number] * 5 for number in range(num_loads)]


@pytest.mark.parametrize("order", [earliest("side"), latest("side")])
def test_the_worst_orders(order: object) -> None:
    assert read_all(World(order=order), 2) == [[number] * 5 for number in range(NUM_LOADS)]  # type: ignore[arg-type]


def test_without_the_wait_for_the_load_a_block_is_read_too_early() -> None:
    world = World(order=latest("side"))
    world.forget_waits_of("read_ahead")
    assert read_all(world, 2) != [[number] * 5 for number in range(NUM_LOADS)]


def test_without_the_wait_for_the_reader_a_block_is_overwritten() -> None:
    world = World(order=earliest("side"))
    world.forget_waits_of("_start")
    assert read_all(world, 2) != [[number] * 5 for number in range(NUM_LOADS)]


def test_with_two_blocks_a_load_runs_beside_the_reader() -> None:
    """The next block is loaded before the one at hand has been read; with one block it is not."""
    for num_blocks, expected in ((1, 0), (2, 1)):
        world, done = World(order=earliest("side")), [0]
        blocks = [(torch.zeros(1),) for _ in range(num_blocks)]
        ahead: list[int] = []

        def count(_block: Block, done: list[int] = done) -> None:
            done[0] += 1

        for number, _ in enumerate(read_ahead(world.streams, blocks, [count] * 4)):
            world.streams.main.run(
                partial(lambda n, a, d: a.append(d[0] - n - 1), number, ahead, done)
            )
        world.drain()
        assert max(ahead) == expected


def test_an_interrupted_reader_leaves_no_load_behind() -> None:
    """What the main stream does next finds the blocks as they will stay."""
    world = World(order=latest("side"))
    blocks = [(torch.zeros(1),), (torch.zeros(1),)]
    reader = read_ahead(world.streams, blocks, [partial(load, number) for number in range(1, 5)])
    next(reader)
    reader.close()
    found: list[float] = []
    world.streams.main.run(lambda: found.extend(float(block[0]) for block in blocks))
    world.drain()
    assert found == [1, 2]
