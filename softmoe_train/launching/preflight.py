"""This file owns the preflight: every rank tells what it is and how fast, before the first step, and rank 0 what does not fit.

Facts come first, over the CPU's process group: versions that differ, or two ranks on one GPU, are told before a collective of GPUs
fails on them. Then each rank is measured by itself and with partners, and the collectives of the run are tried.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import xxhash
from torch.distributed import ProcessGroup

from softmoe_train.config import ConfigError, Record, flat
from softmoe_train.dist import World
from softmoe_train.launching import verdict
from softmoe_train.launching.collectives import Tried, try_collectives
from softmoe_train.launching.facts import RankFacts, clock_of, facts_of_rank
from softmoe_train.launching.speed import Speed, speed_of_rank
from softmoe_train.observe.run_files import replace_text

FILE = "preflight.json"  # of the run folder
MOST_HOSTS = 16  # in the table
SHOWN = ("python", "torch", "CUDA", "NCCL", "softmoe_train")
R = TypeVar("R", bound=Record)
V = TypeVar("V")


class PreflightError(ConfigError):
    """What no run should start with: the same on every rank."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(problems)
        self.args = ("preflight refuses this run, no step was made:\n" + "\n".join(f"  - {p}" for p in self.problems),)


class Measured(Record):
    """What one rank measured and tried."""

    speed: Speed
    tried: list[Tried]


class About(NamedTuple):
    """What the run is to do, as far as a preflight asks."""

    folder: Path
    settings: Mapping[str, Any]  # all of them, to be the same on every rank
    fsdp: bool
    workers: int  # that decode, of a rank
    dtype: torch.dtype  # of what is computed, and of slots on their way


class Preflight:
    """The preflight of one start. Making it gathers the facts; every method is collective, over all ranks.

    Raises PreflightError on every rank where versions, settings or code differ, or ranks share a device.
    """

    def __init__(self, world: World, device: torch.device, about: About) -> None:
        self._world, self._device, self._about = world, device, about
        self._began = time.perf_counter()
        settings = xxhash.xxh3_64_hexdigest(json.dumps(about.settings, sort_keys=True, default=str).encode())
        self._facts = _gathered(RankFacts, facts_of_rank(world, device, about.folder, settings))  # rank 0 has them
        self._refuse(self._differing_settings() + verdict.refusals(self._facts))

    def measure(self, expert_axis: ProcessGroup, slots_bytes: int) -> None:
        """Measure and try all, with `slots_bytes` of a rank over the expert axis; rank 0 tells and keeps it.

        Raises PreflightError on every rank where a collective gave a wrong result.
        """
        about, hosts = self._about, verdict.hosts_of(self._facts)
        on_host = _of_first(max(map(len, hosts.values()), default=0))
        speed = speed_of_rank(self._world, self._device, about.dtype, on_host)
        tried = try_collectives(self._device, expert_axis, slots_bytes, about.dtype)
        measured = _gathered(Measured, Measured(speed=speed, tried=tried))
        warnings, problems = [], []
        if self._world.main:
            warnings = verdict.slow_ranks([one.speed for one in measured], self._facts)
            warnings += verdict.warnings(self._facts, fsdp=about.fsdp, workers=about.workers)
            problems = verdict.wrong_results([one.tried for one in measured])
            print("\n".join(_table(self._facts, measured)), flush=True)
        self._refuse(problems, warnings, measured)
        if self._world.main:
            seconds = time.perf_counter() - self._began
            ending = (
                f"with {len(warnings)} warnings"
                if len(warnings) > 1
                else "with a warning"
                if warnings
                else "nothing to say"
            )
            lines = [f"preflight warning: {text}" for text in warnings]
            print(
                "\n".join([*lines, f"preflight passed in {seconds:.1f} s, {ending}; {FILE} has every rank"]), flush=True
            )

    def _differing_settings(self) -> list[str]:
        """Which settings not all ranks have alike; hashes are compared first, since a thousand ranks have many settings."""
        if not _of_first(len({facts.settings for facts in self._facts}) > 1):
            return []
        own = {key: str(value) for key, value in flat(dict(self._about.settings)).items()}
        texts = _texts(json.dumps(own))
        return verdict.differing(dict(enumerate(map(json.loads, texts))), self._facts, verdict.ALIKE)

    def _refuse(self, problems: list[str], warnings: Sequence[str] = (), measured: Sequence[Measured] = ()) -> None:
        """Keep what was found, and raise on every rank where rank 0 knows of problems."""
        if self._world.main:
            head = {
                "refused": problems,
                "warnings": list(warnings),
                "seconds": round(time.perf_counter() - self._began, 3),
            }
            self._about.folder.mkdir(parents=True, exist_ok=True)
            replace_text(self._about.folder / FILE, document(head, self._facts, measured))
        if problems := _of_first(problems):
            raise PreflightError(problems)


def document(head: Mapping[str, Any], facts: Sequence[RankFacts], measured: Sequence[Measured]) -> str:
    """The JSON that is kept: `head`, and a line for each rank."""
    ranks = [
        {
            **one.model_dump(exclude={"clock"}),
            "clock": clock_of(one, facts[0]).model_dump(),
            **(measured[one.rank].speed.model_dump(exclude={"rank"}) if measured else {}),
            "collectives": measured[one.rank].model_dump()["tried"] if measured else [],
        }
        for one in facts
    ]
    lines = ",\n  ".join(map(json.dumps, ranks))
    return f'{json.dumps(head, indent=1)[:-2]},\n "ranks": [\n  {lines}\n ]\n}}\n'


def _gathered(record: type[R], own: R) -> list[R]:
    """That of every rank, by rank, on rank 0; nothing on others, which would read it a thousand times."""
    return [record.model_validate_json(text) for text in _texts(own.model_dump_json())]


def _texts(own: str) -> list[str]:
    texts = [""] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, texts, dst=0)
    return texts or []


def _of_first(value: V) -> V:
    """What rank 0 has of it."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _table(facts: Sequence[RankFacts], measured: Sequence[Measured]) -> list[str]:
    """What a person reads: a line a host, and one for each collective."""
    hosts, first = verdict.hosts_of(facts), facts[0]
    speeds, tried = [one.speed for one in measured], [one.tried for one in measured]
    told = ", ".join(f"{name} {first.versions[name]}" for name in SHOWN if name in first.versions)
    lines = [f"preflight: {_count(len(facts), 'rank')} on {_count(len(hosts), 'host')}; {told}"]
    for host, ranks in list(hosts.items())[:MOST_HOSTS]:
        clock = clock_of(facts[ranks[0]], first)
        rates = [f"{what} {_span([speeds[r].alone[what] for r in ranks], what)}" for what in speeds[0].alone]
        pairs = [pair.speed for rank in ranks for pair in speeds[rank].pairs]
        rates += [f"pairs {_span(pairs, 'pairs')}"] if pairs else []
        who = f"ranks {ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"
        offset = (clock.least + clock.most) / 2
        lines.append(f"  {host}: {who}, {facts[ranks[0]].device}, clock {offset:+.3f} s; {', '.join(rates)}")
    if len(hosts) > MOST_HOSTS:
        lines.append(f"  and {len(hosts) - MOST_HOSTS} more hosts")
    for place, one in enumerate(tried[0]):
        slowest = min(tried, key=lambda ones: ones[place].speed)[place]
        where = f", slowest group {slowest.first}-{slowest.last}" if one.ranks < len(facts) else ""
        lines.append(f"  {one.name}: {one.bytes / 2**20:.2f} MiB a rank, {slowest.speed / 2**20:,.0f} MiB/s{where}")
    return lines


def _span(rates: Sequence[float], what: str) -> str:
    """Lowest and highest, in GFLOP/s or MiB/s."""
    unit, scale = ("GFLOP/s", 1e9) if what == "matmul" else ("MiB/s", 2**20)
    return f"{min(rates) / scale:,.0f} to {max(rates) / scale:,.0f} {unit}"


def _count(number: int, what: str) -> str:
    return f"1 {what}" if number == 1 else f"{number} {what}s"
