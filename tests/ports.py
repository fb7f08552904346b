"""Ports of this host that nothing takes between the moment a test chooses them and the moment a process binds them."""

import random
import socket
from contextlib import ExitStack

from softmoe_train.launching.environment import PORTS


def free_ports(count: int) -> list[int]:
    """Ports below the kernel's ephemeral ones: those it may give to any socket of any test in the meantime."""
    tries = random.SystemRandom().sample(PORTS, len(PORTS))  # not the same for two tests that share a seed
    ports: list[int] = []
    with ExitStack() as stack:
        while len(ports) < count:
            one = stack.enter_context(socket.socket())
            try:
                one.bind(("127.0.0.1", tries.pop()))
            except OSError:  # taken
                continue
            ports.append(one.getsockname()[1])
    return ports
