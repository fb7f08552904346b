"""This file owns a real SLURM of two nodes on this machine: a controller, two node daemons and a munge of its own.

    python -m tests.slurm.cluster start          prints the folder, and the line that has sbatch, srun and scontrol speak to it
    python -m tests.slurm.cluster stop FOLDER

All that it writes lies in one new folder, its ports are free ones, and no file or daemon of the system takes part, so two of them do
not know of each other. Needs Debian's slurm-wlm and munge; root or not, jobs run as whoever started it.
"""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.ports import free_ports

NODES = ("n1", "n2")
PROGRAMS = ("slurmctld", "slurmd", "munged")
PARTITIONS = ("low", "high")  # a job in the second takes the nodes of those in the first, which are requeued
START_SECONDS = 60.0
END_SECONDS = 20.0
# Which cluster a daemon belongs to; not in the environment of jobs, which have SLURM_CONF and SLURM_JOB_ID.
MARK = "SOFTMOE_TESTS_CLUSTER"
CONFIGURATION = """
ClusterName=softmoe
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
ReturnToService=2
SlurmdParameters=config_overrides
InactiveLimit=0
FirstJobId={first_job}
MinJobAge=3600
KillWait=20
UnkillableStepTimeout=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=4
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
PartitionName={partitions[0]} Nodes={nodes[0]},{nodes[1]} Default=YES MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName={partitions[1]} Nodes={nodes[0]},{nodes[1]} MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    lacking = [name for name in PROGRAMS if _program(name) is None]
    return f"{', '.join(lacking)} not installed (Debian's slurm-wlm and munge)" if lacking else None


class Cluster:
    """The cluster whose folder this is; `environ` is what has a command of SLURM's speak to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []
        # What a surrounding job or shell says of another cluster must not reach ours.
        foreign = ("SLURM", "SBATCH", "SALLOC", "SRUN", "SQUEUE", "SCONTROL")
        own = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.environ = own | {"SLURM_CONF": str(self.configuration)}

    def run(self, *words: str, folder: Path | None = None, **changes: str) -> subprocess.CompletedProcess[str]:
        """One command of SLURM's in `folder` to its end, whatever that is, with `changes` in its environment."""
        return subprocess.run(
            words, cwd=folder, env=self.environ | changes, capture_output=True, text=True, timeout=300, check=False
        )

    def ask(self, *words: str) -> str:
        """What a command of SLURM's answers; it must succeed."""
        done = self.run(*words)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, ExitCode, StdOut ..."""
        words = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: str, *states: str, seconds: float = 120.0) -> dict[str, str]:
        """Until a job is in one of these states; what the controller knows of it then."""
        until = time.monotonic() + seconds
        while (known := self.job(number))["JobState"] not in states:
            assert time.monotonic() < until, f"job {number} is not {states} after {seconds:.0f} s: {known}"
            time.sleep(0.2)
        return known

    def said(self) -> str:
        """The logs of all daemons."""
        return "\n".join(
            f"== {log.name}\n{log.read_text(errors='replace')}" for log in sorted(self.folder.glob("*.log"))
        )

    def processes(self, job: str | None = None) -> dict[int, str]:
        """Whatever runs because of one job; or of this cluster, daemons too: by number, with its command."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal() or int(entry.name) == os.getpid():
                continue
            with suppress(OSError):  # it has ended
                environ = dict(
                    word.split(b"=", 1) for word in (entry / "environ").read_bytes().split(b"\0") if b"=" in word
                )
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if self._belongs(environ, command, job):
                    found[int(entry.name)] = command
        return found

    def _belongs(self, environ: dict[bytes, bytes], command: str, job: str | None) -> bool:
        """Whether a process is of a job (None: of any), or a daemon: one that minds the job's steps, or any."""
        of_daemons = environ.get(MARK.encode()) == str(self.folder).encode()
        of = environ.get(b"SLURM_JOB_ID") if environ.get(b"SLURM_CONF") == str(self.configuration).encode() else None
        if job is None:
            return of_daemons or of is not None
        return of == job.encode() or (of_daemons and command.startswith(f"slurmstepd: [{job}."))

    def start(self) -> None:
        """Write its configuration, start its daemons, and return when both nodes are idle."""
        controller, *ports = free_ports(1 + len(NODES))
        self.configuration.write_text(
            CONFIGURATION.format(
                host=socket.gethostname().partition(".")[0], user=getpass.getuser(), folder=self.folder, nodes=NODES,
                controller=controller, ports=ports, partitions=PARTITIONS,
                first_job=1 + secrets.randbelow(30000),  # ports follow from it, and another cluster may be here
            )
        )  # fmt: skip
        for name in ("state", "munge", *NODES):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={key.parent}/socket",
            f"--pid-file={key.parent}/pid", f"--log-file={self.folder}/munged.log", f"--seed-file={key.parent}/seed",
        )  # fmt: skip
        self._until((key.parent / "socket").exists)
        self._daemon("slurmctld", "-D", "-f", str(self.configuration))
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node, "-f", str(self.configuration))
        self._until(
            lambda: self.run("sinfo", "-h", "-N", "-p", PARTITIONS[0], "-o", "%t").stdout.split() == ["idle"] * 2
        )

    def stop(self) -> None:
        """End every job, daemon and process of it, and delete its folder."""
        with suppress(subprocess.TimeoutExpired):
            self.run("scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}")
        # Node daemons first wait for their steps; those of a test that failed may wait for ever.
        for number in (signal.SIGTERM, signal.SIGKILL):
            until = time.monotonic() + END_SECONDS
            while (left := self.processes()) and time.monotonic() < until:
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
                time.sleep(0.2)
        assert not left, f"cannot be ended: {left}"
        for daemon in self._daemons:
            daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _daemon(self, name: str, *words: str) -> None:
        program = _program(name)
        assert program is not None, missing()
        with (self.folder / f"{name}_out.log").open("a") as out:
            daemon = subprocess.Popen(
                [program, *words], env=self.environ | {MARK: str(self.folder)}, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        self._daemons.append(daemon)

    def _until(self, ready) -> None:
        until = time.monotonic() + START_SECONDS
        while not ready():
            assert time.monotonic() < until, f"not ready after {START_SECONDS:.0f} s\n{self.said()}"
            time.sleep(0.1)


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin")


def new_cluster() -> Cluster:
    """A cluster of its own in a new folder, started; one that does not start leaves nothing."""
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="softmoe_slurm_")))  # short: names of sockets have 107 bytes
    try:
        cluster.folder.chmod(0o755)  # clients of munge look at who may enter
        cluster.start()
    except BaseException:
        cluster.stop()
        raise
    return cluster


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster for the length of the block."""
    cluster = new_cluster()
    try:
        yield cluster
    finally:
        cluster.stop()


def main(words: list[str]) -> int:
    match words:
        case ["start"] if (lacking := missing()) is None:
            cluster = new_cluster()
            print(f"export SLURM_CONF={cluster.configuration}\n# python -m tests.slurm.cluster stop {cluster.folder}")
        case ["start"]:
            print(lacking, file=sys.stderr)
            return 1
        case ["stop", folder] if (Path(folder) / "slurm.conf").is_file():
            Cluster(Path(folder)).stop()
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
