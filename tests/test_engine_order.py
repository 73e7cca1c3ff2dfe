"""The engine on streams that lag: steps are right with all barriers and wrong without any one."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from arkcache import manager
from arkcache.engines import device, device_tokens, offloaded_pages
from arkcache.engines.capture import PlannedStep
from arkcache.engines.device_page_table import DevicePageTable
from arkcache.errors import IntegrityError
from arkcache.kernels.arguments import Selection
from arkcache.tiering.backup import BackupEngine
from arkcache.tiering.host import HostTier
from tests.marks import needs_interpreter
from tests.tiering.fake_cupy import GPU, cupy
from tests.tiering.fake_streams import FakeEvent, World, at_random, latest
from tests.twins import Twins, small_config

__all__ = ["cupy"]

pytestmark = needs_interpreter

BOXES: dict[str, Any] = {"backend": "triton", "index": "cuboid-mean"}
"""The interpreter takes three times as long for the token index."""


class PromptMain:
    """A main stream that does its work at once, while the others lag as far as events allow."""

    def __init__(self, world: World) -> None:
        self._world = world

    def run(self, work: Any) -> None:
        work()

    def record(self) -> FakeEvent:
        event = FakeEvent(self._world)
        event.reached = True
        return event

    def wait(self, event: FakeEvent) -> None:
        if sys._getframe(1).f_code.co_name not in self._world.forgetful:
            event.synchronize()
            return
        left = iter(range(2))  # meanwhile other streams get half of something done
        self._world.run_until(lambda: next(left, None) is None)

    def keep(self, tensor: Tensor) -> None:
        """What closures use they hold."""


@pytest.fixture(params=["backup last", "side last", "any order"])
def world(request: Any, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> World:
    orders = {"backup last": latest("backup"), "side last": latest("side")}
    lagging = World(order=orders.get(request.param, at_random(3)))
    streams = replace(lagging.streams, main=PromptMain(lagging))
    engine = BackupEngine(streams, torch.device("cpu"), block_bytes=1, num_blocks=2)
    monkeypatch.setattr(device, "streams_of", lambda _: streams)
    monkeypatch.setattr(offloaded_pages, "backup_engine_of", lambda _: engine)

    def pinned(sizes: list[int], limit: int | None, **_: Any) -> HostTier:
        return HostTier(sizes, limit, pin_to=GPU)

    monkeypatch.setattr(manager, "HostTier", pinned)
    return lagging


def converse(**settings: Any) -> None:
    """Prompts, steps that seal and recall, and a retry, every step against the oracle."""
    config = small_config(**BOXES, host_bytes=1 << 16, **settings)
    twins = Twins(config, batch=1, num_kv_heads=1, seed=5)
    try:
        twins.append(70)
        for step in range(8):
            twins.append(1)
            twins.attend(size=2.0)
            if step == 4:
                twins.append(21)
        twins.crop(60)
        twins.attend(3)
        twins.check()
    finally:
        twins.manager.reset()


def test_with_its_barriers_every_step_is_right(world: World) -> None:
    converse(device_pool_factor=2.0)
    world.drain()


@pytest.mark.parametrize("world", ["side last"], indirect=True)
def test_without_joining_a_speculation_steps_go_wrong(world: World) -> None:
    world.forget_waits_of("join")
    with pytest.raises((AssertionError, IntegrityError)):
        converse(device_pool_factor=2.0)


@pytest.mark.parametrize("world", ["backup last"], indirect=True)
def test_without_settling_a_backup_steps_go_wrong(world: World) -> None:
    world.forget_waits_of("settle")
    with pytest.raises((AssertionError, IntegrityError)):
        converse()


def interrupted(twins: Twins, *, recorded: bool) -> PlannedStep:
    """A step that speculates and is interrupted before it is over."""
    manager, shape = twins.manager, (1, 1, 1, twins.head_dim)
    planned = twins.steps.plan()
    key, value, query = twins.randn(*shape), twins.randn(*shape), twins.query(size=2.0)

    def step() -> None:
        with planned.run(recorded=recorded):
            manager.append(0, key, value)
            manager.attend(0, query)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        step()
    return planned


@pytest.mark.parametrize("world", ["side last"], indirect=True)
def test_a_step_is_taken_back_when_its_speculation_is_over(world: World) -> None:
    """Else a guess is half done: pages are noted where they will only be copied."""
    config = small_config(
        backend="triton", index="cuboid-mean", host_bytes=1 << 16, device_pool_factor=2.0
    )
    twins = Twins(config, batch=1, num_kv_heads=1, seed=5)
    twins.append(160)
    try:
        for _ in range(4):
            planned = interrupted(twins, recorded=False)
            for _ in range(2):  # it waits for the main stream, then it chooses
                if world["side"].is_ready:
                    world["side"].go_on()
            planned.undo()
            twins.check()
            twins.append(1)
            twins.attend(size=2.0)
    finally:
        world.drain()
        twins.manager.reset()


@pytest.mark.parametrize("world", ["side last"], indirect=True)
def test_what_was_to_be_recorded_is_waited_for_by_nobody(world: World) -> None:
    config = small_config(
        backend="triton", index="cuboid-mean", host_bytes=1 << 16, device_pool_factor=2.0
    )
    twins = Twins(config, batch=1, num_kv_heads=1, seed=5)
    twins.append(71)
    planned = interrupted(twins, recorded=True)
    assert world["side"].is_ready
    planned.undo()
    assert world["side"].is_ready
    world.drain()
    twins.manager.reset()


class HalfAhead:
    """An order in which half of a guess runs before anything else of its step, if it may."""

    def __init__(self) -> None:
        self.is_new_step = True

    def __call__(self, ready: Sequence[str]) -> str:
        if "side" in ready and self.is_new_step:
            self.is_new_step = False
            return "side"
        return "main" if "main" in ready else ready[0]


def queue_steps(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a step's own kernels queued on the main stream; those of a guess run when it does."""
    attend, gather, select = (
        device_tokens.paged_attention,
        offloaded_pages.gather,
        DevicePageTable.select,
    )

    def queued_attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = torch.empty_like(query)
        world.streams.main.run(lambda: output.copy_(attend(query, *args, **kwargs)))
        return output

    def queued_select(self: DevicePageTable, *args: Any, speculative: bool = False) -> Selection:
        if speculative:
            return select(self, *args, speculative=True)
        rows, table = len(self.selected), (len(self.selected), self.max_selected)
        shapes = (table, table, (rows,), table, (rows,))
        output = Selection(*(torch.zeros(shape, dtype=torch.int32) for shape in shapes))

        def choose() -> None:
            for mine, result in zip(output[:5], select(self, *args)[:5], strict=True):
                assert mine is not None
                assert result is not None
                mine.copy_(result)

        world.streams.main.run(choose)
        return output

    def queued_gather(*args: Any, **kwargs: Any) -> None:
        is_guess = args[1].pages.shape[1] > 5
        run = (lambda work: work()) if is_guess else world.streams.main.run
        run(lambda: gather(*args, **kwargs))

    monkeypatch.setattr(device_tokens, "paged_attention", queued_attend)
    monkeypatch.setattr(offloaded_pages, "gather", queued_gather)
    monkeypatch.setattr(DevicePageTable, "select", queued_select)
    monkeypatch.setattr(device, "streams_of", lambda _: world.streams)


@pytest.mark.parametrize("waits", [True, False])
def test_speculation_waits_for_the_step_before_it(
    waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = HalfAhead()
    world = World(order=order)
    queue_steps(world, monkeypatch)
    if not waits:
        world.forget_waits_of("_speculate")
    twins = Twins(small_config(**BOXES, device_pool_factor=2.0), batch=1, seed=5)
    assert twins.oracle.num_selected(0, 0) == 5
    twins.append(160)
    wrong = 0
    for _ in range(4):
        query = twins.query(size=2.0)
        output = twins.manager.attend(0, query)
        world.drain()
        order.is_new_step = True
        try:
            twins.oracle.attend_one(0, query).check(output)
            twins.manager.check_integrity()
        except (AssertionError, IntegrityError):
            wrong += 1
        world.drain()
    assert (wrong == 0) == waits
