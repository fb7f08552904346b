"""This file owns where the tasks of an srun step meet: at the first of a few ports that is free on the host of task 0.

No task can tell another which one that is, and any may be another program's, or another job's. So task 0 answers there with
the name of its step and the port of its store, which the system chose, and the others ask at each until they hear that name.
"""

import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

from torch.distributed import Store, TCPStore
from torch.distributed.constants import default_pg_timeout

from softmoe_train.dist import World
from softmoe_train.launching.environment import by_srun, ports_of_step

MEETING_SECONDS = 600.0  # from the first task to the last
ANSWER_SECONDS = 5.0  # for which whoever listens at a port may take to say that it is a store
LONGEST = 200  # bytes of an answer


def with_store(world: World) -> World:
    """`world`, with a store for its ranks where srun started them; other launchers have brought one. Every rank calls it."""
    if not by_srun(os.environ):
        return world
    host, ports, name = os.environ["MASTER_ADDR"], ports_of_step(os.environ), step_name(os.environ)
    return world._replace(store=opened(host, ports, name) if world.main else joined(host, ports, name, MEETING_SECONDS))


def step_name(environ: Mapping[str, str]) -> str:
    """What no other step has: also not one of another cluster, or the same step before a requeue."""
    names = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return ".".join(environ.get(name, "0") for name in names)


def opened(host: str, ports: list[int], name: str) -> Store:
    """A store on this host, told of at the first free one of `ports`; raises OSError where none is."""
    for port in ports:
        with suppress(OSError):
            door = _listening(port)
            break
    else:
        raise OSError(f"none of the ports {', '.join(map(str, ports))} is free on {host}: export another MASTER_PORT")
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=default_pg_timeout)
    threading.Thread(target=_answer, args=(door, f"{name} {store.port}\n".encode()), daemon=True).start()
    return store


def joined(host: str, ports: list[int], name: str, seconds: float) -> Store:
    """The store that task 0 has opened at one of `ports`; raises TimeoutError where it does not in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for port in ports:
            words = _said_at(host, port).split()
            if len(words) == 2 and words[0] == name:
                return TCPStore(
                    host, int(words[1]), is_master=False, wait_for_workers=False, timeout=default_pg_timeout
                )
        time.sleep(0.1)
    raise TimeoutError(
        f"task 0 was not at {host} within {seconds:.0f} s (ports {', '.join(map(str, ports))}): it has not started, or cannot be reached"
    )


def _listening(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", port), backlog=4096)


def _answer(door: socket.socket, text: bytes) -> None:
    while True:  # as long as this process lives: a rank whose answer was lost asks again
        try:
            with door.accept()[0] as asked:
                asked.sendall(text)
        except OSError:
            time.sleep(0.1)


def _said_at(host: str, port: int) -> str:
    """What whoever listens there says first, if it is short."""
    said, until = b"", time.monotonic() + ANSWER_SECONDS
    with suppress(OSError, UnicodeDecodeError), socket.create_connection((host, port), ANSWER_SECONDS) as asking:
        while not said.endswith(b"\n") and len(said) < LONGEST and time.monotonic() < until:
            got = asking.recv(LONGEST)
            if not got:
                break
            said += got
        return said.decode()
    return ""
