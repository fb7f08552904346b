"""This file owns how a test starts torchrun's agents, each one a node, and how it waits for what they say."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.runs import ROOT, alive, children_of, command, environment

# Quick to see that a node is gone, and to go on without it. The heartbeats leave room for a busy machine.
QUICK = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=6,read_timeout=10"
PATIENCE = 240.0  # on a machine that does other things beside
PROGRAMS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # torchrun and softmoe


class Agent:
    """One node: launch/torchrun.sh with its workers, `within` the command that enters a network namespace, if any; one of all `hosts` the rendezvous."""

    def __init__(
        self, folder: Path, name: str, overrides: list[str], *, nodes: str, workers: int, restarts: int, endpoint: str,
        address: str = "127.0.0.1", within: tuple[str, ...] = (), hosts: bool = True, **changes: str,
    ) -> None:  # fmt: skip
        self.log = folder / f"{name}.log"
        line = [*within, str(ROOT / "launch" / "torchrun.sh"), endpoint, nodes, *command(*overrides)[4:]]
        told = {
            "PATH": PROGRAMS, "RANKS": str(workers), "RESTARTS": str(restarts), "JOB": "job", "ADDRESS": address,
            "RENDEZVOUS": f"{QUICK},is_host={int(hosts)}",
        }  # fmt: skip
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                line, cwd=folder, env=environment(**{**told, **changes}), stdout=out, stderr=subprocess.STDOUT
            )

    @property
    def said(self) -> str:
        """All that this node has written so far."""
        return self.log.read_text()

    def wait_for(self, text: str, times: int = 1) -> None:
        """Until it has said this, so many times."""
        until = time.monotonic() + PATIENCE
        while self.said.count(text) < times:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < until, f"{text!r} did not come:\n{self.said}"
            time.sleep(0.05)

    def workers(self) -> list[int]:
        """The processes of its ranks."""
        return children_of(self.process.pid)

    def kill(self) -> list[int]:
        """As if the node had lost its power: agent and workers at once; returns the workers, which are gone."""
        if self.process.poll() is not None:
            return []
        workers = self.workers()
        for pid in (self.process.pid, *workers):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return workers

    def end(self) -> int:
        """Its exit code; no worker of it is left."""
        workers = self.workers()
        code = self.process.wait(PATIENCE)
        assert not any(alive(worker) for worker in workers)
        return code
