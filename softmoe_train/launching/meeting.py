"""This file owns how workers that torchrun or srun started meet, and how they part: spare ones after the others, all of a step at once.

torchrun keeps one store for all its restarts: what workers of an earlier start left there, the addresses of their sockets say,
would be read for the new ones'. And it counts restarts on each node by itself, so no number in the environment tells them apart.
"""

import json
import queue
import signal
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from itertools import accumulate
from typing import NamedTuple

from torch.distributed import PrefixStore, Store
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from softmoe_train.dist import World
from softmoe_train.launching.worker import LAUNCHER

MEETING_SECONDS = 600.0  # from the first worker of a start to the last; torchrun's own nodes get as much
LOOK_SECONDS = 1.0  # between two looks of who waits for the end
SILENCE_SECONDS = 60.0  # of the store, after which the main rank is lost
PARTING_SECONDS = 10.0  # for which the main rank keeps its store for the others
ROUND = "softmoe/round"


class End(NamedTuple):
    """How the training of one rank ended; `for_good` where another start would do no better."""

    code: int
    for_good: bool


class Restart(NamedTuple):
    """Which of torchrun's restarts this start is, of how many; 0 is the first start. Nodes that come and go do not count."""

    count: int
    most: int


def restart_of(environ: Mapping[str, str]) -> Restart:
    """What torchrun says of its restarts; 0 of 0 elsewhere."""
    return Restart(*(int(environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS")))


def by_torchrun(environ: Mapping[str, str]) -> bool:
    """Whether this process is a worker of torchrun, which may start it again; our own launcher never does."""
    return "TORCHELASTIC_RUN_ID" in environ and LAUNCHER not in environ


class Meeting:
    """The workers of one start of torchrun's or srun's: `hosts` has the number of ranks of each, in their order; `store` is theirs alone."""

    def __init__(self, world: World) -> None:
        """Meet all ranks of `world`; raises TimeoutError where some do not come."""
        self._world = world
        limit = timedelta(seconds=MEETING_SECONDS)
        self._shared = world.store or next(rendezvous("env://", world.rank, world.size, timeout=limit))[0]
        self._name = self._welcome() if world.main else self._be_welcomed()
        self.store: Store = PrefixStore(self._name, self._shared)
        self.hosts: list[int] = json.loads(self.store.get("hosts"))
        self._shared.set_timeout(default_pg_timeout)

    def part_of(self, size: int) -> World:
        """This rank in a world of the first `size` ranks, to which it must belong."""
        begin = self.first_on_host()
        on_host = min(begin + self._world.local_size, size) - begin
        assert self._world.rank < size, (self._world, size)
        return self._world._replace(size=size, local_size=on_host, store=self.store)

    def first_on_host(self) -> int:
        """The lowest rank of this host."""
        begins = accumulate(self.hosts, initial=0)
        return max(begin for begin in begins if begin <= self._world.rank)

    def end(self, how: End, followers: int) -> None:
        """Tell those who wait for it how the training has ended; by the main rank, which waits a moment until they know."""
        self.store.set("ended", json.dumps(how))
        _wait_until(lambda: self.store.add("left", 0) >= followers, PARTING_SECONDS)

    def leave_together(self) -> None:
        """Hold this rank until all have ended their work: srun ends the others as soon as one is gone with an exit code that is not 0.

        It asks by SIGTERM, which nobody needs to hear any more: a rank that it ended so would hide the others' exit code.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        others = self._world.size - 1
        with suppress(RuntimeError):  # rank 0 is gone: it waits no longer than this
            self.store.add("here", 1)
            _wait_until(lambda: self.store.add("here", 0) > others, PARTING_SECONDS)
            if self._world.main:
                _wait_until(lambda: self.store.add("left", 0) == others, 1.0)
            else:
                self.store.add("left", 1)

    def wait_for_end(self) -> End:
        """Wait until the main rank has said how the training has ended. Raises ConnectionError where it is lost."""
        answers: queue.SimpleQueue[End | Exception | None] = queue.SimpleQueue()
        # A store beyond a broken link answers never, and nothing bounds that.
        threading.Thread(target=self._look, args=(answers,), daemon=True).start()
        while True:
            try:
                answer = answers.get(timeout=SILENCE_SECONDS)
            except queue.Empty:
                raise ConnectionError(f"their store has not answered for {SILENCE_SECONDS:.0f} s") from None
            if isinstance(answer, Exception):
                raise ConnectionError(str(answer).partition("\n")[0]) from answer
            if answer is not None:
                return answer

    def _look(self, answers: "queue.SimpleQueue[End | Exception | None]") -> None:
        try:
            while not self.store.check(["ended"]):
                if self._shared.get(ROUND).decode() != self._name:
                    raise ConnectionError("they were started again without this one")
                answers.put(None)
                time.sleep(LOOK_SECONDS)
            ended = End(*json.loads(self.store.get("ended")))
            self.store.add("left", 1)
            answers.put(ended)
        except (RuntimeError, ConnectionError) as error:
            answers.put(error)

    def _welcome(self) -> str:
        """Name this start, and tell the name to every rank that says hello: what an old one left is answered too, and ignored."""
        name, others = uuid.uuid4().hex, range(1, self._world.size)
        self._shared.set(ROUND, name)
        answered: dict[int, str] = {}

        def all_here() -> bool:
            for rank in others:
                hello = self._shared.get(_hello(rank)).decode() if self._shared.check([_hello(rank)]) else ""
                if hello and answered.get(rank) != hello:
                    self._shared.set(_welcome_of(hello.split()[0]), name)
                    answered[rank] = hello
            return self._shared.add(f"{name}/met", 0) == len(others)

        if not _wait_until(all_here, MEETING_SECONDS):
            came = self._shared.add(f"{name}/met", 0) + 1
            raise TimeoutError(f"{came} of {self._world.size} ranks were here {MEETING_SECONDS:.0f} s after rank 0")
        local_sizes = [self._world.local_size, *(int(answered[rank].split()[1]) for rank in others)]
        self._shared.set(f"{name}/hosts", json.dumps(_hosts(local_sizes)))
        return name

    def _be_welcomed(self) -> str:
        token = uuid.uuid4().hex
        self._shared.set(_hello(self._world.rank), f"{token} {self._world.local_size}")
        try:
            name = self._shared.get(_welcome_of(token)).decode()
        except RuntimeError as error:
            raise TimeoutError(f"rank 0 did not come within {MEETING_SECONDS:.0f} s, or was lost") from error
        self._shared.add(f"{name}/met", 1)
        return name


def _hello(rank: int) -> str:
    return f"softmoe/hello/{rank}"


def _welcome_of(token: str) -> str:
    return f"softmoe/welcome/{token}"


def _hosts(local_sizes: list[int]) -> list[int]:
    """The number of ranks of each host, from what each rank says of its own; torchrun numbers ranks host by host."""
    hosts, rank = [], 0
    while rank < len(local_sizes):
        hosts.append(local_sizes[rank])
        rank += local_sizes[rank]
    return hosts


def _wait_until(done: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not (finished := done()) and time.monotonic() < until:
        time.sleep(0.05)
    return finished
