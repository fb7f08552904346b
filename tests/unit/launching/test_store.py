"""Tasks of a step meet although ports are taken: by a program that says nothing, by one that talks, by another job's store."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from softmoe_train.launching import store
from softmoe_train.launching.store import joined, opened
from tests.ports import free_ports

HOST = "127.0.0.1"


@pytest.fixture
def taken() -> Iterator[list[int]]:
    """Ports at which there is somebody else."""
    mute, talks, other = free_ports(3)
    with ExitStack() as stack:
        stack.enter_context(socket.create_server(("", mute)))
        talking = stack.enter_context(socket.create_server(("", talks)))

        def talk() -> None:
            while True:
                try:
                    talking.accept()[0].sendall(b"SSH-2.0-OpenSSH_9.2\r\n" * 9)
                except OSError:
                    return

        threading.Thread(target=talk, daemon=True).start()
        opened(HOST, [other], "other.1.0.0")
        yield [mute, talks, other]
        talking.shutdown(socket.SHUT_RDWR)


def test_task_0_takes_the_first_free_port_and_the_others_find_it(
    taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "ANSWER_SECONDS", 0.5)
    ports = [*taken, *free_ports(1)]
    found = []
    other = threading.Thread(target=lambda: found.append(joined(HOST, ports, "ours.1.0.0", 30.0)))
    other.start()  # before task 0
    time.sleep(0.2)
    first = opened(HOST, ports, "ours.1.0.0")
    other.join()
    first.set("said", "by task 0")
    assert found[0].get("said") == b"by task 0"


def test_a_step_before_a_requeue_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = free_ports(1)
    before = opened(HOST, ports, "ours.1.0.0")
    with pytest.raises(TimeoutError, match=rf"task 0 was not at {HOST} within 0 s \(ports {ports[0]}\)"):
        joined(HOST, ports, "ours.1.0.1", 0.3)
    del before


def test_without_a_free_port_the_remedy_is_told(taken: list[int]) -> None:
    with pytest.raises(OSError, match=r"none of the ports .* is free on 127.0.0.1: export another MASTER_PORT"):
        opened(HOST, taken, "ours.1.0.0")
