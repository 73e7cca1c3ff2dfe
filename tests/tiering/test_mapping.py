"""A fork inherits what is pageable, and nothing of what is pinned."""

import mmap
import os
import subprocess
import sys

import pytest

from arkcache.tiering import mapping
from arkcache.tiering.host import HostTier
from tests.tiering.fake_cupy import GPU, FakeCupy, cupy, run_alone

__all__ = ["cupy"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and forks")

SETUP = """
import gc, mmap, os
from arkcache import InputError
from tests.tiering.test_host import read, write

def is_mapped(address):
    bounds = [line.split()[0].split('-') for line in open('/proc/self/maps')]
    return any(int(low, 16) <= address < int(high, 16) for low, high in bounds)

def in_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
"""


def run(code: str) -> str:
    """What a process prints that has no thread but one, as a fork should be."""
    return run_alone(SETUP + code)


def test_a_fork_does_not_inherit_what_is_pinned() -> None:
    run("""
tier = HostTier([96], 96 * 1000, pin_to=GPU)
handles = tier.allocate(10)
content, address = write(tier, handles), tier.pieces().data_ptr()
assert tier.pinned and is_mapped(address)

def look():
    assert not is_mapped(address)
    for use in (lambda: tier.allocate(1), lambda: tier.extract(handles)):
        try:
            use()
        except InputError as error:
            assert 'fork' in str(error)
        else:
            raise AssertionError('a child used what it does not have')

in_child(look)
assert torch.equal(read(tier, handles), content)
tier.check([handles, tier.allocate(1)])
""")


def test_a_fork_that_forgets_a_pinned_tier_unmaps_nothing_of_its_own() -> None:
    """The addresses are free in the child: what it maps there must outlive its cache."""
    run("""
size = 64 << 20
tier = HostTier([4096], size, pin_to=GPU)
tier.allocate(1)
start = tier.pieces().data_ptr()

def forget():
    global tier
    others = []
    for _ in range(100):  # the system fills holes sooner or later
        others.append(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        address = torch.frombuffer(others[-1], dtype=torch.uint8).data_ptr()
        if start <= address < start + size or address <= start < address + size:
            break
    else:
        print('no mapping came to lie there')
    del tier
    gc.collect()
    others[-1][:] = bytes(size)  # would be a fault

in_child(forget)
assert fake.ranges
""")


def test_a_fork_reads_and_extends_what_is_pageable() -> None:
    run("""
tier = HostTier([96], None)
handles = tier.allocate(10)
content = write(tier, handles)

def use():
    assert torch.equal(read(tier, handles), content)
    more = tier.allocate(2000)
    written = write(tier, more)
    assert torch.equal(read(tier, more), written)
    tier.write(handles, 255 - content)
    tier.release(more)

in_child(use)
assert torch.equal(read(tier, handles), content)
""")


def test_a_fork_inherits_what_the_driver_refused_to_pin() -> None:
    run("""
import warnings
fake.refuse = {0}
tier = HostTier([96], 96 * 1000, pin_to=GPU)
with warnings.catch_warnings(record=True):
    handles = tier.allocate(10)
content = write(tier, handles)
assert not tier.pinned

def use():
    assert torch.equal(read(tier, handles), content)
    assert len(tier.allocate(5)) == 5

in_child(use)
""")


def test_a_child_may_have_a_pinned_tier_of_its_own() -> None:
    run("""
tier = HostTier([96], 96 * 1000, pin_to=GPU)
tier.allocate(10)

def use():
    fake.ranges.clear()  # the child's driver knows nothing of the parent's memory
    own = HostTier([96], 96 * 1000, pin_to=GPU)
    handles = own.allocate(7)
    assert torch.equal(write(own, handles), read(own, handles))
    own.release(handles)

in_child(use)
""")


def test_a_system_that_cannot_keep_it_from_forks_says_so(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, advice: int, *extent: int) -> None:
            if advice == mmap.MADV_DONTFORK:
                raise OSError(22, "Invalid argument")
            super().madvise(advice, *extent)

    monkeypatch.setattr(mapping.mmap, "mmap", Refusing)
    tier = HostTier([os.sysconf("SC_PAGE_SIZE")], 1 << 20, pin_to=GPU)
    tier.allocate(1)
    assert tier.pinned
    assert "a fork will copy" in caplog.text


def test_a_process_with_several_caches_can_be_forked() -> None:
    """Each may take all memory, and none has taken it."""
    program = """
import os
import torch
from arkcache.tiering.host import HostTier

tiers = [HostTier([96], None) for _ in range(4)]
for tier in tiers:
    tier.write(tier.allocate(3), torch.ones(3, 96, dtype=torch.uint8))
child = os.fork()
if child == 0:
    os._exit(0 if all((tier.pieces()[:3] == 1).all() for tier in tiers) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
