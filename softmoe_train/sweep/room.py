"""This file owns how many points go at a time on this machine: a budget of workers, and devices of which each has its own."""

from collections.abc import Mapping, Sequence

import torch

from softmoe_train.sweep.points import Point

VISIBLE = "CUDA_VISIBLE_DEVICES"


def devices_here(environ: Mapping[str, str]) -> list[str]:
    """The accelerators that a process started here may use, as its environment would name them; what it names already is respected."""
    return named_devices(environ, torch.cuda.device_count() if torch.cuda.is_available() else 0)


def named_devices(environ: Mapping[str, str], count: int) -> list[str]:
    """The names of `count` accelerators that are seen with these variables."""
    given = [name.strip() for name in environ.get(VISIBLE, "").split(",") if name.strip()]
    return given[:count] if given else [str(number) for number in range(count)]


class Room:
    """What the points that run now have taken of the budget and of the devices."""

    def __init__(self, budget: int, devices: Sequence[str]) -> None:
        self.budget = budget
        self.devices = tuple(devices)
        self._taken: dict[str, tuple[int, list[str]]] = {}

    def take(self, point: Point) -> list[str] | None:
        """Room for a point: the devices that are its own (none of a point that uses none); None where it has to wait."""
        processes = point.config.processes
        free = [name for name in self.devices if not any(name in names for _, names in self._taken.values())]
        needed = processes if self.uses_devices(point) else 0
        if sum(count for count, _ in self._taken.values()) + processes > self.budget or needed > len(free):
            return None
        self._taken[point.label] = (processes, free[:needed])
        return free[:needed]

    def give_back(self, point: Point) -> None:
        """The point has ended."""
        del self._taken[point.label]

    def uses_devices(self, point: Point) -> bool:
        """Whether its workers each need an accelerator."""
        return bool(self.devices) and point.config.device != "cpu"


def room_for(points: Sequence[Point], processes: int | None, devices: Sequence[str]) -> Room:
    """The room of a sweep: `processes` workers at a time; by default one point, or as many as there are devices."""
    on_devices = devices if any(point.config.device != "cpu" for point in points) else ()
    usual = max([len(on_devices), *(p.config.processes for p in points if not on_devices or p.config.device == "cpu")])
    return Room(processes or usual, on_devices)


def room_problems(points: Sequence[Point], room: Room) -> list[str]:
    """Why a point could never start."""
    problems = []
    for point in points:
        needed = point.config.processes
        if needed > room.budget:
            problems.append(
                f"{point.label}: processes={needed} is more than sweep.processes={room.budget}; give the sweep {needed} or more"
            )
        elif room.uses_devices(point) and needed > len(room.devices):
            count = len(room.devices)
            problems.append(
                f"{point.label}: processes={needed} needs as many accelerators, and {count} {'is' if count == 1 else 'are'} visible here; "
                f"use processes={count}, or device=cpu"
            )
    return problems
