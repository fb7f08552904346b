"""This file owns what a worker of torchrun or srun does beside its training: meet the others, train in the largest legal world or wait."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from softmoe_train.at_end import at_end_problems, children_of
from softmoe_train.commands.workers import ranks, start_no_more
from softmoe_train.config import ConfigError
from softmoe_train.dist import World
from softmoe_train.faults.claim import owner, wait_until_free
from softmoe_train.launching.environment import by_srun
from softmoe_train.launching.meeting import End, Meeting, by_torchrun, restart_of
from softmoe_train.settings import RunConfig, check
from softmoe_train.worlds import common_problems, larger_worlds, lasting_problems, legal_worlds, told, world_problems

NODES_SECONDS = 600.0  # for which ranks that are too few wait for more nodes
OWNER_SECONDS = 300.0  # for which a worker that torchrun may have started again waits for the one before it to be gone


def is_elastic(config: RunConfig) -> bool:
    """Whether an illegal world is made smaller: only who asks torchrun for restarts has asked for that."""
    return config.elastic and by_torchrun(os.environ) and restart_of(os.environ).most > 0


def check_train(config: RunConfig, world: World | None) -> list[str]:
    """Every mistake in the settings of a run, but those of the number of ranks where that may be made smaller."""
    size, local_size = ranks(world, config)
    if world is None or not is_elastic(config):
        return check(config, size, local_size) + at_end_problems(config, lambda c: check(c, size, local_size))
    # The one before us may be dying still, or be cut off from its launcher and about to find out.
    holder = owner(config.folder)
    if holder is not None:
        if world.main:
            print(
                f"{config.folder} is in use by {holder}: waiting up to {OWNER_SECONDS:.0f} s for it to end", flush=True
            )
        wait_until_free(config.folder, OWNER_SECONDS)
    problems = lasting_problems(config, size, local_size)
    problems += at_end_problems(config, lambda c: lasting_problems(c, size, local_size))
    return problems or common_problems(config, children_of(config))


def in_legal_world(config: RunConfig, world: World, work: Callable[[World], End]) -> int:
    """Do this rank's part in a world that its settings allow, where torchrun started it; returns the exit code."""
    if by_srun(os.environ):
        return _as_task(world, work)
    if not by_torchrun(os.environ):
        return work(world).code
    meeting, restart = Meeting(world), restart_of(os.environ)
    if world.main and restart.count:
        print(f"started again by torchrun: {restart.count} of {restart.most} restarts are used", flush=True)
    size = _legal_size(config, meeting, world) if is_elastic(config) else world.size
    if world.rank >= size:
        end = _wait_as_spare(meeting, world, size)
    else:
        end = work(meeting.part_of(size))
        # torchrun ends the others as soon as one has failed, and the main rank has the last word.
        if world.main:
            meeting.end(end, followers=world.size - 1 if end.code else world.size - size)
        elif end.code:
            with suppress(ConnectionError):
                meeting.wait_for_end()
    if end.for_good:
        start_no_more(world, end.code)
    return end.code


def _as_task(world: World, work: Callable[[World], End]) -> int:
    """A rank of a step, which srun ends as soon as one rank has failed (`--kill-on-bad-exit`)."""
    meeting = Meeting(world)
    end = work(meeting.part_of(world.size))
    if end.code:
        meeting.leave_together()
    return end.code


def _legal_size(config: RunConfig, meeting: Meeting, world: World) -> int:
    """The most ranks that can train, told by rank 0 where it is not all; raises ConfigError where nodes do not come."""
    others = children_of(config)  # they are trained in this world too, when the run is complete
    legal = legal_worlds(config, meeting.hosts, others)
    if legal and legal[-1] == world.size:
        return world.size
    problems = world_problems(config, world.size, meeting.hosts[0], others)
    if not legal and next(larger_worlds(config, world.size, others), None) is None:
        raise ConfigError(problems)
    if world.main:
        waits = "" if legal else f", waiting up to {NODES_SECONDS / 60:.0f} minutes for more nodes"
        print(f"{told(config, meeting.hosts, legal, others)}{waits}", flush=True)
    if legal:
        return legal[-1]
    time.sleep(NODES_SECONDS)  # when nodes come, torchrun ends this process and starts it again among them
    raise ConfigError(problems)


def _wait_as_spare(meeting: Meeting, world: World, size: int) -> End:
    if world.rank == max(size, meeting.first_on_host()):  # one a host
        print(f"rank {world.rank} waits as a spare: {size} of {world.size} ranks train", flush=True)
    try:
        return meeting.wait_for_end()
    except ConnectionError as error:
        print(f"rank {world.rank}, a spare, lost the ranks that train: {error}", file=sys.stderr, flush=True)
        return End(1, for_good=False)
