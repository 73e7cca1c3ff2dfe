"""Lanes: at once on a host, streams on a device; and the fake ones that the other tests run on."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

from arkcache.tiering import lanes as lanes_module
from arkcache.tiering.lanes import CudaLane, Lane, lanes_of, numbered
from tests.tiering.fake_lanes import NAMES, World, earliest, latest

CPU = torch.device("cpu")


# -- a host ---------------------------------------------------------------------------------------


def test_a_host_does_its_work_at_once() -> None:
    lanes, done = lanes_of(CPU), []
    for lane in (lanes.main, lanes.backup, lanes.side):
        lane.run(lambda: done.append(True))
        event = lane.record()
        lanes.main.wait(event)
        event.synchronize()
        lane.keep(torch.zeros(1))
    assert done == [True] * 3


def test_a_host_raises_what_its_work_raises() -> None:
    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        lanes_of(CPU).backup.run(fail)


def test_lanes_are_one_set_per_device() -> None:
    assert lanes_of(CPU) is lanes_of(torch.device("cpu"))
    assert numbered(CPU) == CPU


# -- a device -------------------------------------------------------------------------------------


class FakeStream:
    """Notes what it is asked for; `current` is the one that work would go to."""

    current: "FakeStream"

    def __init__(self, device: torch.device | None = None) -> None:
        self.device, self.calls = device, []

    def wait_event(self, event: object) -> None:
        self.calls.append(event)


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert not enable_timing

    def record(self, stream: FakeStream) -> None:
        stream.calls.append("record")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.cuda with two devices, each with a default stream; the second is current."""
    default = {index: FakeStream(torch.device("cuda", index)) for index in range(2)}

    @contextlib.contextmanager
    def use(stream: FakeStream) -> Iterator[None]:
        before, FakeStream.current = FakeStream.current, stream
        yield
        FakeStream.current = before

    def current_stream(device: torch.device) -> FakeStream:
        is_there = FakeStream.current.device == device
        return FakeStream.current if is_there else default[device.index]

    FakeStream.current = default[1]
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "device", lambda device: use(current_stream(device)))
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    lanes_module._lanes_of.cache_clear()
    yield
    lanes_module._lanes_of.cache_clear()


def stream_of(lane: Lane) -> FakeStream:
    """Where the lane's work goes."""
    used: list[FakeStream] = []
    lane.run(lambda: used.append(FakeStream.current))
    return used[0]


@pytest.mark.usefixtures("cuda")
def test_a_device_has_streams_of_its_own() -> None:
    lanes = lanes_of(torch.device("cuda"))
    assert lanes is lanes_of(torch.device("cuda:1"))
    other = lanes_of(torch.device("cuda:0"))
    streams = [stream_of(lane) for each in (lanes, other) for lane in vars(each).values()]
    assert len(set(streams)) == 6
    assert [stream.device.index for stream in streams] == [1, 1, 1, 0, 0, 0]


@pytest.mark.usefixtures("cuda")
def test_the_main_lane_is_the_stream_of_the_moment() -> None:
    device = torch.device("cuda", 0)
    main, users_own = lanes_of(device).main, FakeStream(device)
    before = stream_of(main)
    with torch.cuda.stream(users_own):
        assert stream_of(main) is users_own
        event = main.record()
        main.wait(event)
    assert users_own.calls == ["record", event]
    assert stream_of(main) is before


@pytest.mark.usefixtures("cuda")
def test_events_order_one_stream_against_another() -> None:
    lanes = lanes_of(torch.device("cuda", 0))
    event = lanes.backup.record()
    lanes.side.wait(event)
    assert stream_of(lanes.backup).calls == ["record"]
    assert stream_of(lanes.side).calls == [event]


@pytest.mark.usefixtures("cuda")
def test_memory_that_a_stream_uses_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    lane, kept = CudaLane(torch.device("cuda", 0), FakeStream()), []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: kept.append(stream))
    lane.keep(torch.zeros(1))
    assert kept == [lane.stream]


# -- the fake ones --------------------------------------------------------------------------------


def order_of(world: World, queue: Callable[[World, list[str]], None]) -> str:
    """The order in which a world does what `queue` gives it."""
    done: list[str] = []
    queue(world, done)
    assert done == []
    world.drain()
    return " ".join(done)


def two_each(world: World, done: list[str]) -> None:
    for name in NAMES:
        for number in range(2):
            world[name].run(lambda name=name, number=number: done.append(f"{name[0]}{number}"))


def test_fake_lanes_run_in_every_order_that_keeps_each_lane_s() -> None:
    orders = {order_of(World(seed), two_each) for seed in range(2000)}
    assert len(orders) == 90  # 6! / (2! 2! 2!)
    for order in orders:
        assert all(order.index(f"{lane}0") < order.index(f"{lane}1") for lane in "mbs")
    assert order_of(World(5), two_each) == order_of(World(5), two_each)


def test_fake_lanes_run_as_early_and_as_late_as_can_be() -> None:
    assert order_of(World(order=earliest("backup")), two_each).startswith("b0 b1")
    assert order_of(World(order=latest("main")), two_each).endswith("m0 m1")


def test_fake_lanes_obey_events() -> None:
    def queue(world: World, done: list[str]) -> None:
        world["backup"].wait(world["main"].record())
        two_each(world, done)
        world["main"].wait(world["backup"].record())
        world["main"].run(lambda: done.append("last"))

    for seed in range(200):
        order = order_of(World(seed), queue)
        assert order.index("b1") < order.index("last")
    assert order_of(World(order=latest("backup")), queue).endswith("b0 b1 last")


def test_a_fake_event_can_be_waited_for() -> None:
    world, done = World(order=latest("backup")), []
    world["backup"].run(lambda: done.append("b"))
    event = world["backup"].record()
    world["backup"].run(lambda: done.append("more"))
    world["main"].run(lambda: done.append("m"))
    event.synchronize()
    assert done == ["m", "b"]
    world.drain()
    assert done == ["m", "b", "more"]
