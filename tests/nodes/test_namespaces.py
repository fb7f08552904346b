"""Two hosts, each a network namespace with an agent of torchrun: one is lost, or the link between them is cut.

They share this machine's disk, as nodes of a cluster share theirs. Run it as root: `pytest -m full -s tests/nodes/test_namespaces.py`.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from softmoe_train.checkpoint.folder import step_folders
from tests.nodes.agents import Agent
from tests.nodes.test_elastic import RUN, each_step_once
from tests.runs import alive, environment, metrics, softmoe

pytestmark = pytest.mark.full

STEPS = 1500
PROGRAM = [*RUN, f"steps={STEPS}", "run_dir=run", "checkpoint.every=100", "observe.every=10"]
# After so many retries the kernel gives a connection up: 15, its own value, is a quarter of an hour, and 5 some 10 s.
RETRIES = 5


class Hosts:
    """Two namespaces, joined by a veth pair: 10.99.7.1 and 10.99.7.2."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [f"softmoe{os.getpid()}{end}" for end in "ab"]
        self.started: list[Agent] = []
        a, b = self.names
        ip(f"netns add {a}", f"netns add {b}", f"link add {a[-8:]} netns {a} type veth peer name {b[-8:]} netns {b}")
        for number, name in enumerate(self.names, start=1):
            ip(f"-n {name} addr add 10.99.7.{number}/24 dev {name[-8:]}")
            ip(f"-n {name} link set lo up", f"-n {name} link set {name[-8:]} up")
            setting = f"echo {RETRIES} > /proc/sys/net/ipv4/tcp_retries2"
            subprocess.run(["ip", "netns", "exec", name, "sh", "-c", setting], check=True)

    def start(self, rendezvous: int, only: int | None = None) -> list[Agent]:
        """An agent on each host, or on one; the rendezvous is on host 1 or 2. The workers of host 1 are the first ranks."""
        begun = len(self.started)
        for number, name in enumerate(self.names, start=1):
            if only not in (None, number):
                continue
            place = {
                "endpoint": f"10.99.7.{rendezvous}:29400", "hosts": number == rendezvous, "address": f"10.99.7.{number}",
                "within": ("ip", "netns", "exec", name), "GLOO_SOCKET_IFNAME": name[-8:],
            }  # fmt: skip
            log = f"host{number}_{len(self.started)}"
            self.started.append(Agent(self.folder, log, PROGRAM, nodes="1:2", workers=1, restarts=3, **place))
        return self.started[begun:]

    def cut(self) -> None:
        ip(f"-n {self.names[0]} link set {self.names[0][-8:]} down")

    def end(self) -> None:
        for agent in self.started:
            agent.kill()
        for name in self.names:
            ip(f"netns delete {name}")


def ip(*commands: str) -> None:
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if os.geteuid() != 0:
        pytest.skip("only root may make network namespaces")
    if shutil.which("ip") is None:
        pytest.skip("network namespaces are made by iproute2, which is not installed")
    hosts = Hosts(tmp_path)
    try:
        yield hosts
    finally:
        hosts.end()


def both_train(first: Agent) -> None:
    first.wait_for("2 processes, expert axis 2")
    first.wait_for(f"step  300/{STEPS}")


def ends_on_the_last_step_as_if_nothing_had_happened(folder: Path) -> None:
    assert each_step_once(folder / "run", every=10)
    assert json.loads((folder / "run" / "summary.json").read_text())["ended"] == "complete"
    softmoe(*PROGRAM, "run_dir=whole", folder=folder)
    ours, theirs = (metrics(folder / name, "train/loss") for name in ("run", "whole"))
    # What was asked to end, for a node that came, has reported there too.
    assert {step: ours[step] for step in theirs} == pytest.approx(theirs, rel=1e-5)


def newest_is_whole(folder: Path) -> int:
    inspect = [sys.executable, "-m", "softmoe_train", "inspect", "ckpt=run", "verify=true"]
    subprocess.run(inspect, cwd=folder, env=environment(), check=True, capture_output=True)
    return len(step_folders(folder / "run" / "checkpoints", complete=True))


def show(what: str, began: float, *agents: Agent) -> None:
    """What its user sees, without the steps, stacks and what torch says of its sockets."""
    print(f"\n== {what}, after {time.monotonic() - began:.0f} s")
    noise = ("step", "  ", "frame", "Traceback", "[W", "Exception raised", "<omitting")
    for agent in agents:
        lines = [line for line in agent.said.splitlines() if line and not line.startswith(noise)]
        print(f"-- {agent.log.stem}", *lines, sep="\n   ")


def test_a_host_that_is_lost_is_done_without(hosts: Hosts) -> None:
    first, second = hosts.start(rendezvous=1)
    both_train(first)
    began = time.monotonic()
    workers = second.kill()
    assert first.end() == 0, first.said
    show("host 2 lost, host 1 has completed the run with exit code 0", began, first)
    assert not any(alive(worker) for worker in workers)
    assert "1 of 3 restarts are used" in first.said
    ends_on_the_last_step_as_if_nothing_had_happened(hosts.folder)


def test_a_host_that_is_lost_comes_back_and_trains_again(hosts: Hosts) -> None:
    first, second = hosts.start(rendezvous=1)
    both_train(first)
    began = time.monotonic()
    second.kill()
    first.wait_for("1 process; cpu")
    (back,) = hosts.start(rendezvous=1, only=2)
    first.wait_for("2 processes, expert axis 2", times=2)
    assert (first.end(), back.end()) == (0, 0), first.said + back.said
    show("host 2 lost and back, both have completed the run with exit code 0", began, first, back)
    assert first.said.count("resumed from run/checkpoints/") == 2  # without it, and with it again
    ends_on_the_last_step_as_if_nothing_had_happened(hosts.folder)


def test_without_the_host_of_the_rendezvous_the_job_ends_and_the_same_command_goes_on(hosts: Hosts) -> None:
    first, second = hosts.start(rendezvous=1)
    both_train(first)
    began = time.monotonic()
    first.kill()
    assert second.end() == 1, second.said
    show("host 1 and the rendezvous lost, torchrun on host 2 has ended with 1", began, second)
    assert "RendezvousConnectionError" in second.said
    assert newest_is_whole(hosts.folder)
    first, second = hosts.start(rendezvous=1)
    assert (first.end(), second.end()) == (0, 0), first.said + second.said
    assert "resumed from run/checkpoints/" in first.said
    ends_on_the_last_step_as_if_nothing_had_happened(hosts.folder)


@pytest.mark.parametrize("rendezvous", [1, 2])
def test_when_the_link_is_cut_the_side_of_the_rendezvous_goes_on(hosts: Hosts, rendezvous: int) -> None:
    both = hosts.start(rendezvous)
    stays, leaves = both if rendezvous == 1 else reversed(both)
    both_train(both[0])
    workers = leaves.workers()
    began = time.monotonic()
    hosts.cut()
    assert leaves.end() == 1, leaves.said
    show(f"link cut, torchrun has ended with 1 on host {3 - rendezvous}", began, leaves)
    assert not any(alive(worker) for worker in workers)
    assert stays.end() == 0, stays.said
    show(f"link cut, host {rendezvous} has completed the run with exit code 0", began, stays)
    assert "resumed from run/checkpoints/" in stays.said
    ends_on_the_last_step_as_if_nothing_had_happened(hosts.folder)
