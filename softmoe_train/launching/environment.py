"""This file owns how a process knows that it is one of several: torchrun's variables, and srun's read as torchrun's."""

import re
import socket
import subprocess
from collections.abc import Mapping, MutableMapping

PORTS = range(15000, 31000)  # below Linux's ephemeral ports (from 32768), above the usual services
NUM_PORTS, PORTS_APART = 8, 1999  # of a step


def under_launcher(environ: Mapping[str, str]) -> bool:
    """Whether this process is a worker that torchrun, our own launcher or `srun` with several tasks started.

    A shell in `salloc` or a batch script has SLURM_NTASKS, and a batch script even SLURM_PROCID=0, without being a
    worker: only srun's own step variables tell. A step of one task starts its workers itself, or is alone.
    Raises ValueError if RANK or WORLD_SIZE is set without the other.
    """
    found = [name for name in ("RANK", "WORLD_SIZE") if name in environ]
    if len(found) == 1:
        missing = "WORLD_SIZE" if found == ["RANK"] else "RANK"
        raise ValueError(
            f"{found[0]}={environ[found[0]]} is set in the environment without {missing}: "
            "a launcher sets both; unset it, or start through torchrun or srun"
        )
    return bool(found) or is_srun_task(environ)


def is_srun_task(environ: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks of an srun step."""
    step = all(name in environ for name in ("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"))
    return step and int(environ["SLURM_STEP_NUM_TASKS"]) > 1


def by_srun(environ: Mapping[str, str]) -> bool:
    """Whether srun itself started this process as one of several ranks, and no torchrun between them."""
    return is_srun_task(environ) and "TORCHELASTIC_RUN_ID" not in environ


def adopt_environment(environ: MutableMapping[str, str]) -> None:
    """Under plain srun, set the variables that torchrun would have; torchrun inside srun is left as it is.

    MASTER_ADDR is the step's first host, where srun puts task 0; MASTER_PORT the first of its ports. Either is kept where it is
    set already. Raises ValueError where that host has no address.
    """
    if "RANK" in environ or not is_srun_task(environ):
        return
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["WORLD_SIZE"] = environ["SLURM_STEP_NUM_TASKS"]
    environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
    here = tasks_of_hosts(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = 0 if len(set(here)) == 1 else int(environ.get("SLURM_NODEID", len(here)))  # among the hosts of the step
    if node < len(here):
        environ["LOCAL_WORLD_SIZE"] = str(here[node])
    if "MASTER_ADDR" not in environ:
        node = first_host(environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"])
        environ["MASTER_ADDR"] = address_of(node)
    environ["MASTER_PORT"] = str(ports_of_step(environ)[0])


def ports_of_step(environ: Mapping[str, str]) -> list[int]:
    """Where the tasks of a step may meet, the same for each: where the user says, else at what SLURM has reserved for the step
    (`srun --resv-ports`), else at some that follow from job and step."""
    job, step = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])
    ports = [PORTS[(job * 101 + step + number * PORTS_APART) % len(PORTS)] for number in range(NUM_PORTS)]
    reserved = [int(port) for port in re.findall(r"\d+", environ.get("SLURM_STEP_RESV_PORTS", ""))]
    ports = reserved or ports
    given = int(environ.get("MASTER_PORT", ports[0]))
    return ports if given == ports[0] else [given]


def address_of(node: str) -> str:
    """A node's name where that is a host's, else the address that SLURM reaches it by; raises ValueError where there is neither."""
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        return _slurms_address_of(node)
    return node


def _slurms_address_of(node: str) -> str:
    command = ["scontrol", "--oneliner", "show", "node", node]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        return re.findall(r"\bNodeAddr=(\S+)", said)[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        raise ValueError(
            f"the first node of this step is {node}, which is no host's name here, and `{' '.join(command)}` tells no address: "
            "export MASTER_ADDR with one that every node of the job reaches"
        ) from None


def tasks_of_hosts(counts: str) -> list[int]:
    """SLURM's compressed numbers of tasks, host by host: `4(x2),2` is 4, 4, 2; nothing where it is not given."""
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return [int(tasks) for tasks, times in runs for _ in range(int(times or 1))]


def first_host(nodelist: str) -> str:
    """The first host of SLURM's compressed list: `gpu[003-005,9],login1` is `gpu003`."""
    item = re.split(r",(?![^\[]*\])", nodelist.strip())[0]  # commas inside brackets separate numbers, not hosts
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", item)
