"""What is read of the machine's memory and of the control groups around a process."""

from pathlib import Path

import pytest

from arkcache.tiering import system_memory
from arkcache.tiering.system_memory import available_memory_bytes, physical_memory_bytes

GIB = 1 << 30

V1_MOUNT = "35 31 0:32 {inside} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
OTHER_V1 = "33 31 0:30 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"
V2_MOUNT = "41 31 0:38 {inside} /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"


class Machine:
    """Files of a made-up machine with 64 GiB, 40 of them available, and of its control groups."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.put("proc/meminfo", meminfo(64 * GIB, 40 * GIB))

    def put(self, path: str, text: str | int) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def join(self, group: str, *mounts: str) -> None:
        self.put("proc/self/cgroup", group)
        self.put("proc/self/mountinfo", "\n".join(mounts))

    def v2(self, group: str, limit: int | str, used: int, *, files: int = 0) -> None:
        self.put(f"sys/fs/cgroup/{group}/memory.max", limit)
        self.put(f"sys/fs/cgroup/{group}/memory.high", "max")
        self.put(f"sys/fs/cgroup/{group}/memory.current", used)
        self.put(f"sys/fs/cgroup/{group}/memory.stat", f"anon 7\ninactive_file {files}")

    def v1(self, group: str, limit: int, used: int, *, files: int = 0) -> None:
        self.put(f"sys/fs/cgroup/memory/{group}/memory.limit_in_bytes", limit)
        self.put(f"sys/fs/cgroup/memory/{group}/memory.usage_in_bytes", used)
        stat = f"inactive_file 5\ntotal_inactive_file {files}"
        self.put(f"sys/fs/cgroup/memory/{group}/memory.stat", stat)

    def expect(self, total: int, available: int) -> None:
        """Of the narrowest bound, before its margin."""
        assert physical_memory_bytes(self.root) == total
        expected = available - system_memory._margin(total)
        assert available_memory_bytes(self.root) == max(0, expected)


def meminfo(total: int, available: int) -> str:
    return f"MemTotal: {total >> 10} kB\nMemFree: 1 kB\nMemAvailable: {available >> 10} kB\nX: 3"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_groups_it_is_what_the_machine_has_available(machine: Machine) -> None:
    machine.expect(64 * GIB, 40 * GIB)
    machine.put("proc/meminfo", meminfo(64 * GIB, 3 * GIB))
    machine.expect(64 * GIB, 3 * GIB)  # less than the margin: nothing


def test_a_group_of_version_2(machine: Machine) -> None:
    machine.join("0::/", V2_MOUNT.format(inside="/"))
    machine.v2("", 16 * GIB, 9 * GIB, files=2 * GIB)
    machine.expect(16 * GIB, 9 * GIB)
    machine.put("sys/fs/cgroup/memory.current", 17 * GIB)
    machine.expect(16 * GIB, 1 * GIB)


def test_a_group_of_version_1(machine: Machine) -> None:
    machine.join("9:cpu:/\n4:memory:/", OTHER_V1, V1_MOUNT.format(inside="/"))
    machine.v1("", 16 * GIB, 9 * GIB, files=2 * GIB)
    machine.expect(16 * GIB, 9 * GIB)


@pytest.mark.parametrize("narrow", ["", "batch", "batch/job 7"])
def test_the_narrowest_of_nested_groups_counts(machine: Machine, narrow: str) -> None:
    machine.join("0::/batch/job 7", V2_MOUNT.format(inside="/"))
    for group in ("", "batch", "batch/job 7"):
        machine.v2(group, 8 * GIB if group == narrow else 32 * GIB, 3 * GIB)
    machine.expect(8 * GIB, 5 * GIB)


def test_available_is_the_least_of_all_though_another_is_narrower(machine: Machine) -> None:
    machine.join("0::/a/b", V2_MOUNT.format(inside="/"))
    machine.v2("a", 32 * GIB, 31 * GIB)
    machine.v2("a/b", 16 * GIB, 1 * GIB)
    assert physical_memory_bytes(machine.root) == 16 * GIB
    assert available_memory_bytes(machine.root) == 0


def test_nested_groups_of_version_1(machine: Machine) -> None:
    machine.join("4:cpuset,memory:/batch/7\n0::/", V1_MOUNT.format(inside="/"))
    machine.v1("", 9223372036854771712, 50 * GIB)  # no limit
    machine.v1("batch", 10 * GIB, 8 * GIB)
    machine.v1("batch/7", 12 * GIB, 1 * GIB)
    machine.expect(10 * GIB, 2 * GIB)


def test_a_container_that_sees_its_own_group_only(machine: Machine) -> None:
    """Its mount begins where its group is; the kernel still tells the whole path."""
    machine.join("4:memory:/docker/123/inner", V1_MOUNT.format(inside="/docker/123"))
    machine.v1("", 20 * GIB, 2 * GIB)
    machine.v1("inner", 9 * GIB, 1 * GIB)
    machine.expect(9 * GIB, 8 * GIB)


@pytest.mark.parametrize("own", ["/elsewhere/5", "/../../other"])
def test_a_group_out_of_sight_is_the_mounted_one(machine: Machine, own: str) -> None:
    machine.join(f"0::{own}", V2_MOUNT.format(inside="/kubepods/9"))
    machine.v2("", 8 * GIB, 2 * GIB)
    machine.expect(8 * GIB, 6 * GIB)


def test_where_a_group_is_slowed_down_is_a_limit_too(machine: Machine) -> None:
    machine.join("0::/", V2_MOUNT.format(inside="/"))
    machine.v2("", 16 * GIB, 2 * GIB)
    machine.put("sys/fs/cgroup/memory.high", 12 * GIB)
    machine.expect(12 * GIB, 10 * GIB)


def test_groups_without_a_limit_say_nothing(machine: Machine) -> None:
    machine.join("0::/a", V2_MOUNT.format(inside="/"))
    machine.v2("a", "max", 50 * GIB)
    machine.v2("", 100 * GIB, 90 * GIB)  # more than there is
    machine.expect(64 * GIB, 40 * GIB)


def test_half_of_the_file_pages_in_use_can_be_had(machine: Machine) -> None:
    machine.join("0::/", V2_MOUNT.format(inside="/"))
    machine.v2("", 16 * GIB, 9 * GIB)
    stat = f"inactive_file {GIB}\nactive_file {4 * GIB}"
    machine.put("sys/fs/cgroup/memory.stat", stat)
    machine.expect(16 * GIB, (7 + 1 + 2) * GIB)


def test_where_the_system_tells_nothing_it_is_the_machine_s_memory(tmp_path: Path) -> None:
    total = physical_memory_bytes(tmp_path)
    assert total > 0
    assert available_memory_bytes(tmp_path) == total - system_memory._margin(total)


def test_this_machine_has_some() -> None:
    assert 0 <= available_memory_bytes() < physical_memory_bytes()


@pytest.mark.parametrize(
    ("total", "margin"), [(256 << 20, 64 << 20), (2 * GIB, 256 << 20), (64 * GIB, 4 * GIB)]
)
def test_the_margin_follows_the_memory(total: int, margin: int) -> None:
    assert system_memory._margin(total) == margin
    assert system_memory._margin(1 << 50) == 8 * GIB
