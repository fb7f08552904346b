"""This file owns how a verb becomes processes: one worker under a launcher, the launcher of local workers, or this process."""

import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from softmoe_train.commands.allocation import NO_MEMORY, no_memory
from softmoe_train.config import ConfigError, Record, compose_own
from softmoe_train.dist import World, world_of
from softmoe_train.launching.environment import adopt_environment, under_launcher
from softmoe_train.launching.local import TOLD_CODES, launch_local
from softmoe_train.launching.meeting import PARTING_SECONDS, by_torchrun, restart_of
from softmoe_train.launching.store import with_store
from softmoe_train.launching.worker import end_launcher, run_worker

GRACE_SECONDS = 5  # what the workers of a verb that saves nothing get to end after a signal


class HasProcesses(Protocol):
    """What a verb's configuration must say: how many local workers to start."""

    @property
    def processes(self) -> int: ...


C = TypeVar("C", bound=HasProcesses)
R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Verb(Generic[C]):
    """A verb of several processes: what it composes, what each rank does, what an interruption means.

    `compose` takes the world that a launcher gave, or None where the configuration decides, and raises ConfigError. `work` returns the
    exit code, the same on every rank; those of `told` say that rank 0 has told why.
    """

    name: str
    compose: Callable[[World | None], C]
    work: Callable[[C, World], int]
    interrupted: Callable[[C], str]
    told: Collection[int] = TOLD_CODES
    grace_seconds: Callable[[C], int] = lambda _: GRACE_SECONDS


def ranks(world: World | None, config: HasProcesses) -> tuple[int, int]:
    """How many ranks there are or will be, and how many of them on a host."""
    return (world.size, world.local_size) if world else (config.processes, config.processes)


def under_a_launcher() -> bool:
    """Whether a launcher started this process; raises ConfigError where its variables contradict each other."""
    try:
        return under_launcher(os.environ)
    except ValueError as error:
        raise ConfigError([str(error)]) from None


def compose_alone(name: str, record: type[R], overrides: list[str]) -> R:
    """The keys of a verb that is one process and has no run; ConfigError tells all mistakes, and a launcher is one."""
    settings, problems = compose_own(record, f"{name}.yaml", overrides)
    if under_a_launcher():
        problems.append(f"softmoe {name} is one process; start it without a launcher")
    if settings is None or problems:
        raise ConfigError(problems)
    return settings


def run_verb(verb: Verb[C], overrides: list[str]) -> int:
    """Compose and check before anything is started, then work in as many processes as were asked for; returns the exit code."""
    if under_a_launcher():
        return as_worker(verb.name, lambda world: verb.work(verb.compose(world), with_store(world)))
    config = verb.compose(None)
    if config.processes > 1:
        command = [sys.executable, "-m", "softmoe_train", verb.name, *overrides]
        code = launch_local(config.processes, command, grace_seconds=verb.grace_seconds(config), told=verb.told)
        if code in (128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGUSR1):
            print(f"softmoe {verb.name}: {verb.interrupted(config)}", file=sys.stderr)
        return code
    try:
        return verb.work(config, world_of(os.environ))
    except KeyboardInterrupt:
        print(f"softmoe {verb.name}: {verb.interrupted(config)}", file=sys.stderr)
        return 128 + signal.SIGINT


def start_no_more(world: World, code: int) -> None:
    """Keep torchrun from starting again and again what ends with this code whenever it is started; by every rank of a host."""
    restart = restart_of(os.environ)
    if not by_torchrun(os.environ) or restart.count >= restart.most:
        return
    if world.local_rank:
        time.sleep(PARTING_SECONDS)  # who exits before torchrun has been told is taken for a failure
        return
    print(f"exit code {code}: ending torchrun, which would start this again for nothing", file=sys.stderr, flush=True)
    end_launcher()


def as_worker(name: str, work: Callable[[World], int]) -> int:
    """Run `work` as one rank of several, whoever started it; a refused setting is told once a host, missing memory by its rank."""
    try:
        adopt_environment(os.environ)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    world = world_of(os.environ)

    def told() -> int:
        try:
            return work(world)
        except ConfigError as error:
            if world.local_rank == 0:  # a host may find what the others do not: a file, a version
                print(f"softmoe {name}: {error}", file=sys.stderr, flush=True)
            start_no_more(world, 2)
            return 2
        except (RuntimeError, MemoryError) as error:
            said = no_memory(name, error)
            if said is None:
                raise
            # One write with its newline: every rank may say it at once, and workers are not buffered.
            sys.stderr.write(f"softmoe {name}: rank {world.rank}: {said}\n")
            sys.stderr.flush()
            return NO_MEMORY

    return run_worker(told)
