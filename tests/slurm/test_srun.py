"""Every other way to start ranks under SLURM: srun alone and in an allocation, torchrun in a step, one task with its own workers, a job array.

Each trains the same run: its result is that of the first, bit for bit, for all have two ranks. `pytest -m full tests/slurm/test_srun.py`.
"""

import os
import sys
from pathlib import Path

import pytest

from tests.runs import metrics, same_bits, stored
from tests.slurm.cluster import Cluster
from tests.slurm.program import PLANTED
from tests.slurm.submit import Desk, failing

pytestmark = pytest.mark.full

TRAIN = ["softmoe", "train", "recipe=debug", "parallel.expert_axis=2"]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nnodes=2",
    "--nproc-per-node=1",
    "--rdzv-backend=c10d",
    "--no-python",
]
WAYS = {
    "alone": ["srun", "--nodes=2", *TRAIN],
    "in_salloc": ["salloc", "--nodes=2", "srun", *TRAIN],
    "reserved_port": ["salloc", "--nodes=2", "env", "MASTER_PORT=31990", "srun", *TRAIN],
    "own_workers": ["srun", "--nodes=1", "--cpus-per-task=2", *TRAIN, "processes=2"],
    "torchrun": ["srun", "--nodes=2", *TORCHRUN, "--rdzv-endpoint=127.0.0.1:31991", "--rdzv-id=job", "--local-addr=127.0.0.1", *TRAIN],
    "heterogeneous": ["salloc", "--ntasks=1", ":", "--ntasks=1", "srun", "--het-group=0,1", *TRAIN],
}  # fmt: skip


@pytest.fixture(scope="module")
def desk(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("srun"), cluster)


def start(desk: Desk, line: list[str], **changes: str) -> tuple[int, str]:
    """The exit code of a line in the environment of `desk`, and what it said."""
    own = {"PATH": f"{desk.folder}/bin:{os.environ['PATH']}", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    done = desk.cluster.run(*line, folder=desk.folder, **own, **desk.paced(), **changes)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def first(desk: Desk) -> Path:
    code, said = start(desk, ["srun", "--nodes=2", *TRAIN, "run_dir=runs/first"])
    assert code == 0, said
    return desk.folder / "runs/first"


@pytest.mark.parametrize("way", WAYS)
def test_a_way_to_start_trains_the_same_run(desk: Desk, first: Path, way: str) -> None:
    code, said = start(desk, [*WAYS[way], f"run_dir=runs/{way}"])
    assert code == 0, said
    assert "2 processes, expert axis 2" in said
    run = desk.folder / "runs" / way
    assert metrics(run, "train/loss") == metrics(first, "train/loss")
    assert same_bits(stored(run, 20), stored(first, 20))


@pytest.mark.parametrize("rank", [0, 1])
def test_without_kill_on_bad_exit_the_others_end_too_and_the_cause_speaks_first(desk: Desk, rank: int) -> None:
    code, said = start(desk, ["srun", "--nodes=2", *TRAIN, f"run_dir=runs/fails_{rank}"], **failing(rank))
    assert code == 1
    assert said.index(PLANTED) < said.find(f"rank {1 - rank} failed") % (len(said) + 1)


def test_each_task_of_an_array_is_a_run_of_its_own(desk: Desk) -> None:
    """As the head of launch/slurm.sbatch says."""
    words = ["seed=${oc.decode:${oc.env:SLURM_ARRAY_TASK_ID}}", "run_dir=runs/seed_${seed}"]
    job = desk.sbatch("--array=0-1", "--output=array_%a.out", "launch/slurm.sbatch", "recipe=debug", *words)
    desk.until(lambda: not desk.cluster.ask("squeue", "--noheader", f"--jobs={job}"), job)
    losses = [metrics(desk.folder / "runs" / f"seed_{seed}", "train/loss") for seed in range(2)]
    assert losses[0].keys() == losses[1].keys()
    assert losses[0] != losses[1]
