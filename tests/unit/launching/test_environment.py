import socket
from pathlib import Path

import pytest

from softmoe_train.launching.environment import PORTS, adopt_environment, first_host, under_launcher

JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "gpu[003-005]",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_NTASKS": "12",
}
BATCH = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_TASK_PID": "99"}
TASK = JOB | {
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[004-005]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network in which the nodes of TASK have the addresses of hosts of their names, and no others have."""

    def getaddrinfo(host: str, port: None) -> list[str]:
        if host.startswith("gpu"):
            return [host]
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize("environment", [TORCHRUN, TASK, TASK | TORCHRUN], ids=["torchrun", "srun", "torchrun-in-srun"])
def test_a_worker_is_known(environment: dict[str, str]) -> None:
    assert under_launcher(environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        JOB,
        BATCH,
        # salloc with use_interactive_step: the shell is a step of one task
        JOB | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
    ids=["alone", "salloc", "sbatch", "interactive-step", "srun-of-one"],
)
def test_a_shell_is_not_mistaken_for_a_worker(environment: dict[str, str]) -> None:
    before = dict(environment)
    assert not under_launcher(environment)
    adopt_environment(environment)
    assert environment == before


@pytest.mark.parametrize(("name", "missing"), [("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")])
def test_half_a_launcher_is_refused_with_the_remedy(name: str, missing: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=3 .* without {missing}: .* unset it"):
        under_launcher({name: "3"})


def test_srun_is_read_as_torchrun_would_have_set_it() -> None:
    environment = dict(TASK)
    adopt_environment(environment)
    assert {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu004",
    }
    assert int(environment["MASTER_PORT"]) in PORTS


@pytest.mark.parametrize(
    ("counts", "node", "here"),
    [("8", "0", "8"), ("4(x2)", "1", "4"), ("4(x2),2,1(x3)", "1", "4"), ("4(x2),2,1(x3)", "2", "2"), ("4,2", "1", "2")],
)
def test_each_host_knows_its_own_tasks(counts: str, node: str, here: str) -> None:
    environment = TASK | {"SLURM_STEP_TASKS_PER_NODE": counts, "SLURM_NODEID": node}
    adopt_environment(environment)
    assert environment["LOCAL_WORLD_SIZE"] == here


def test_every_task_of_a_step_finds_one_port_and_the_next_step_another() -> None:
    def port(**changes: str) -> str:
        environment = TASK | changes
        adopt_environment(environment)
        return environment["MASTER_PORT"]

    assert port(SLURM_PROCID="0", SLURM_LOCALID="0") == port(SLURM_PROCID="7")
    assert len({port(SLURM_STEP_ID="0"), port(SLURM_STEP_ID="1"), port(SLURM_JOB_ID="4712")}) == 3


def test_a_port_that_slurm_reserved_for_the_step_is_taken() -> None:
    environment = TASK | {"SLURM_STEP_RESV_PORTS": "12003-12005,12009"}
    adopt_environment(environment)
    assert environment["MASTER_PORT"] == "12003"


def test_a_node_whose_name_is_no_host_s_has_the_address_that_slurm_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on clouds, where NodeName is one thing and NodeAddr another."""
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\necho "NodeName=$4 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=ip-7"\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    environment = TASK | {"SLURM_STEP_NODELIST": "n[1-2]"}
    adopt_environment(environment)
    assert environment["MASTER_ADDR"] == "10.0.0.7"


def test_a_node_without_any_address_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"first node of this step is n1, .* export MASTER_ADDR"):
        adopt_environment(TASK | {"SLURM_STEP_NODELIST": "n[1-2]"})


def test_torchrun_inside_srun_wins() -> None:
    environment = TASK | TORCHRUN
    adopt_environment(environment)
    assert environment == TASK | TORCHRUN


def test_a_master_that_the_user_set_is_kept() -> None:
    environment = TASK | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
    adopt_environment(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "29501")


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[003-005,9],login1", "gpu003"),
        ("gpu[7,9-12]", "gpu7"),
        ("a[1-2]-ib,b3", "a1-ib"),
        ("rack[0-1]n[2-4]", "rack0n2"),
        ("node-a.cluster.org,n[1-2]", "node-a.cluster.org"),
    ],
)
def test_the_first_host_of_a_compressed_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host
