"""Streams: at once on a host, CUDA's on a device; and the fake ones that the other tests run on."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

from arkcache.tiering import streams as streams_module
from arkcache.tiering.streams import CudaStream, Stream, numbered, streams_of
from tests.tiering.fake_streams import NAMES, World, earliest, latest

CPU = torch.device("cpu")


# -- a host ---------------------------------------------------------------------------------------


def test_a_host_does_its_work_at_once() -> None:
    streams, done = streams_of(CPU), []
    for stream in (streams.main, streams.backup, streams.side):
        stream.run(lambda: done.append(True))
        event = stream.record()
        streams.main.wait(event)
        event.synchronize()
        stream.keep(torch.zeros(1))
    assert done == [True] * 3


def test_a_host_raises_what_its_work_raises() -> None:
    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        streams_of(CPU).backup.run(fail)


def test_streams_are_one_set_per_device() -> None:
    assert streams_of(CPU) is streams_of(torch.device("cpu"))
    assert numbered(CPU) == CPU


# -- a device -------------------------------------------------------------------------------------


class FakeCudaStream:
    """Notes what it is asked for; `current` is the one that work would go to."""

    current: "FakeCudaStream"

    def __init__(self, device: torch.device | None = None) -> None:
        self.device, self.calls = device, []

    def wait_event(self, event: object) -> None:
        self.calls.append(event)


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert not enable_timing

    def record(self, stream: FakeCudaStream) -> None:
        stream.calls.append("record")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.cuda with two devices, each with a default stream; the second is current."""
    default = {index: FakeCudaStream(torch.device("cuda", index)) for index in range(2)}

    @contextlib.contextmanager
    def use(stream: FakeCudaStream) -> Iterator[None]:
        before, FakeCudaStream.current = FakeCudaStream.current, stream
        yield
        FakeCudaStream.current = before

    def current_stream(device: torch.device) -> FakeCudaStream:
        is_there = FakeCudaStream.current.device == device
        return FakeCudaStream.current if is_there else default[device.index]

    FakeCudaStream.current = default[1]
    monkeypatch.setattr(torch.cuda, "Stream", FakeCudaStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "device", lambda device: use(current_stream(device)))
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    streams_module._streams_of.cache_clear()
    yield
    streams_module._streams_of.cache_clear()


def cuda_stream_of(stream: Stream) -> FakeCudaStream:
    """Where the stream's work goes."""
    used: list[FakeCudaStream] = []
    stream.run(lambda: used.append(FakeCudaStream.current))
    return used[0]


@pytest.mark.usefixtures("cuda")
def test_a_device_has_streams_of_its_own() -> None:
    streams = streams_of(torch.device("cuda"))
    assert streams is streams_of(torch.device("cuda:1"))
    other = streams_of(torch.device("cuda:0"))
    cuda_streams = [
        cuda_stream_of(stream) for each in (streams, other) for stream in vars(each).values()
    ]
    assert len(set(cuda_streams)) == 6
    assert [stream.device.index for stream in cuda_streams] == [1, 1, 1, 0, 0, 0]


@pytest.mark.usefixtures("cuda")
def test_the_main_stream_is_the_current_one() -> None:
    device = torch.device("cuda", 0)
    main, users_own = streams_of(device).main, FakeCudaStream(device)
    before = cuda_stream_of(main)
    with torch.cuda.stream(users_own):
        assert cuda_stream_of(main) is users_own
        event = main.record()
        main.wait(event)
    assert users_own.calls == ["record", event]
    assert cuda_stream_of(main) is before


@pytest.mark.usefixtures("cuda")
def test_events_order_one_stream_against_another() -> None:
    streams = streams_of(torch.device("cuda", 0))
    event = streams.backup.record()
    streams.side.wait(event)
    assert cuda_stream_of(streams.backup).calls == ["record"]
    assert cuda_stream_of(streams.side).calls == [event]


@pytest.mark.usefixtures("cuda")
def test_memory_that_a_stream_uses_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, kept = CudaStream(torch.device("cuda", 0), FakeCudaStream()), []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: kept.append(stream))
    stream.keep(torch.zeros(1))
    assert kept == [stream.cuda_stream]


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


def test_fake_streams_run_in_every_order_that_keeps_each_stream_s() -> None:
    orders = {order_of(World(seed), two_each) for seed in range(2000)}
    assert len(orders) == 90  # 6! / (2! 2! 2!)
    for order in orders:
        assert all(order.index(f"{stream}0") < order.index(f"{stream}1") for stream in "mbs")
    assert order_of(World(5), two_each) == order_of(World(5), two_each)


def test_fake_streams_run_as_early_and_as_late_as_can_be() -> None:
    assert order_of(World(order=earliest("backup")), two_each).startswith("b0 b1")
    assert order_of(World(order=latest("main")), two_each).endswith("m0 m1")


def test_fake_streams_obey_events() -> None:
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
