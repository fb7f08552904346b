"""How many cores there are to use: planted control groups in the kernel's own format, and a real one where this user may make it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from softmoe_train.cores import cores_of_host, quota, usable_cores
from tests.runs import ROOT

SECOND = "31 23 0:28 {root} {point} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
FIRST = "32 31 0:29 {root} {point} rw,nosuid - cgroup cgroup rw,cpu,cpuacct"
OTHER = "33 31 0:30 {root} {point} rw,nosuid - cgroup cgroup rw,cpuset"
DISK = "1 1 259:1 / / rw shared:1 - ext4 /dev/vda rw"
V1 = "4:cpu,cpuacct:"


def v1(time: int) -> dict[str, str]:
    """A group's files in version 1."""
    return {"cpu.cfs_quota_us": f"{time}\n", "cpu.cfs_period_us": "100000\n"}


def v2(time: int | str, period: int = 100000) -> dict[str, str]:
    """A group's file in version 2."""
    return {"cpu.max": f"{time} {period}\n"}


@pytest.mark.parametrize(
    ("mount", "root", "member", "groups", "expected"),
    [
        (SECOND, "/", "0::/", {"": v2(150000)}, 1.5),  # docker --cpus=1.5: a namespace of its own
        (SECOND, "/", "0::/pods/one/main", {"": {}, "pods/one": v2(200000), "pods/one/main": v2("max")}, 2.0),
        (SECOND, "/", "0::/a/b", {"a": v2(100000), "a/b": v2(400000)}, 1.0),  # the one above bounds too
        (SECOND, "/", "0::/a", {"a": v2(75000, 25000), "b": v2(1)}, 3.0),  # another group's is not ours
        (SECOND, "/..", "0::/", {"": v2(200000)}, 2.0),
        (SECOND, "/", "0::/../elsewhere", {"": v2(200000), "elsewhere": v2(1)}, 2.0),
        (FIRST, "/docker/c0ffee", V1 + "/docker/c0ffee", {"": v1(50000)}, 0.5),
        (FIRST, "/", V1 + "/docker/c0ffee", {"": v1(-1), "docker": v1(-1), "docker/c0ffee": v1(300000)}, 3.0),
        (FIRST, "/", V1 + "/", {"": v1(-1)}, None),
        (SECOND, "/", "0::/", {"": v2("max")}, None),
        (SECOND, "/", "0::/", {"": {"cpu.max": ""}}, None),
        (OTHER, "/", V1 + "/", {"": v1(100000)}, None),  # a mount of another controller
        (FIRST, "/", "0::/", {"": v1(100000)}, None),  # a process of no such group
    ],
)
def test_the_tightest_bound_of_a_group_and_those_above_it_holds(
    tmp_path: Path, mount: str, root: str, member: str, groups: dict[str, dict[str, str]], expected: float | None
) -> None:
    for group, files in groups.items():
        (tmp_path / "groups" / group).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / "groups" / group / name).write_text(text)
    (tmp_path / "cgroup").write_text(f"9:name=systemd:/\n{member}\n")
    (tmp_path / "mountinfo").write_text(DISK + "\n" + mount.format(root=root, point=tmp_path / "groups") + "\n")
    assert quota(tmp_path) == expected


def test_a_system_without_control_groups_has_no_bound(tmp_path: Path) -> None:
    assert quota(tmp_path) is None


@pytest.mark.parametrize(("bound", "usable", "host"), [(None, 6, 8), (2.9, 2, 2), (0.4, 1, 1), (64.0, 6, 8)])
def test_whole_cores_within_the_bound_are_used(
    monkeypatch: pytest.MonkeyPatch, bound: float | None, usable: int, host: int
) -> None:
    monkeypatch.setattr("softmoe_train.cores.quota", lambda: bound)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert (usable_cores(), cores_of_host()) == (usable, host)


@pytest.fixture
def one_core() -> Iterator[Path]:
    """A group of the running kernel that gives its processes the time of one core."""
    tops = [Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup/cpu,cpuacct"), Path("/sys/fs/cgroup")]
    top = next((path for path in tops if (path / "cgroup.procs").is_file()), None)
    if top is None or not os.access(top, os.W_OK) or usable_cores() < 2:
        pytest.skip("no control group that this user may make, or one core")
    group = top / f"softmoe_test_{os.getpid()}"
    group.mkdir()
    files = v1(100000) if (group / "cpu.cfs_quota_us").exists() else v2(100000)
    try:
        if not all((group / name).exists() for name in files):
            pytest.skip("no controller of CPU time in this group")
        for name, text in files.items():
            (group / name).write_text(text)
        yield group
    finally:
        group.rmdir()


def test_a_process_with_the_time_of_one_core_counts_one_and_computes_with_one_thread(one_core: Path) -> None:
    program = "import torch; from softmoe_train import cores; cores.limit_threads()\n"
    program += "print(cores.usable_cores(), torch.get_num_threads())"
    enter = ["sh", "-c", 'echo $$ >"$1/cgroup.procs"; shift; exec "$@"', "-", str(one_core)]
    known = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [*enter, sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=ROOT, env=known, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["1", "1"]
