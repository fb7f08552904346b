"""This file owns how many cores there are to use: those that this process may run on, within what its control groups allow."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch


def usable_cores() -> int:
    """The cores that this process may use: as many as it may run on, or fewer, where `docker --cpus` or a pod's limit gives it the time of fewer.

    What such a bound has beyond whole cores is left: threads wait for each other, and so all for the one that is held back.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return _within_quota(allowed)


def cores_of_host() -> int:
    """The cores that the processes beside this one share with it: all of the host, or of the container."""
    return _within_quota(os.cpu_count() or 1)


def limit_threads() -> None:
    """Have this process compute with no more threads than it has cores; torch, which sees no quota, would start one for each of the host.

    OMP_NUM_THREADS, which a user or a launcher has set, is kept.
    """
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > usable_cores():
        torch.set_num_threads(usable_cores())


def quota(process: Path = Path("/proc/self")) -> float | None:
    """How many cores' time the control groups of a process allow it, or those above them; None where none sets a bound."""
    try:
        groups = [line.split(":", 2) for line in (process / "cgroup").read_text(errors="replace").splitlines()]
        mounts = (process / "mountinfo").read_text(errors="replace").splitlines()
    except OSError:  # not on Linux
        return None
    found = []
    for mount in mounts:
        root, point = mount.split()[3:5]
        kind, *_, options = mount.partition(" - ")[2].split()  # proc(5), mountinfo
        for _, controllers, path in groups:
            second = kind == "cgroup2" and not controllers
            first = kind == "cgroup" and "cpu" in options.split(",") and "cpu" in controllers.split(",")
            if second or first:
                found += _bounds(root, point, path)
    return min(found, default=None)


def _within_quota(cores: int) -> int:
    bound = quota()
    return cores if bound is None else max(1, min(cores, int(bound)))


def _bounds(root: str, point: str, path: str) -> Iterator[float]:
    """Those of a group and of all above it that can be seen: the mount at `point` shows the groups from `root` on."""
    group, top = PurePosixPath(path), Path(point)
    seen = (
        group.is_relative_to(root) and ".." not in group.parts
    )  # else it is above what its namespace or container shows
    folder = top / group.relative_to(root) if seen else top
    for one in (folder, *folder.parents):
        if one.is_relative_to(top) and (bound := _bound(one)) is not None:
            yield bound


def _bound(group: Path) -> float | None:
    """What one group sets, in version 2 or 1 of control groups; the topmost and those without the controller have no such file."""
    try:
        if (group / "cpu.max").exists():
            time, period = (group / "cpu.max").read_text().split()
        else:
            time, period = (group / "cpu.cfs_quota_us").read_text(), (group / "cpu.cfs_period_us").read_text()
        return int(time) / int(period) if int(time) > 0 else None  # -1: none
    except (OSError, ValueError):  # max: none
        return None
