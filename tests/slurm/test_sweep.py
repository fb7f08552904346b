"""A sweep over experts and slots as jobs of two nodes each: cut off in the middle and run again, no point twice, all resumed."""

import json
import stat
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from softmoe_train.commands.main import main
from tests.runs import environment
from tests.slurm.cluster import Cluster

STEPS = 300
RUN = "runs/sweep"
COMMAND = [
    sys.executable, "-m", "softmoe_train", "train", "-m", "hydra/launcher=submitit_slurm", "hydra.launcher.nodes=2",
    "hydra.launcher.tasks_per_node=1", "hydra.launcher.timeout_min=10", "hydra.launcher.array_parallelism=2", "recipe=debug",
    "parallel.expert_axis=2", "model.moe.num_experts=4,8", "model.moe.slots_per_expert=1,2", f"steps={STEPS}", "checkpoint.every=20",
    "observe.every=10", "observe.wandb.mode=disabled", "sweep.cost=false", f"run_dir={RUN}",
]  # fmt: skip
FIRST, SECOND, *OTHERS = [f"num_experts={e}_slots_per_expert={s}" for e in (4, 8) for s in (1, 2)]
PATIENCE = 400.0  # on a machine that does other things beside


class Swept(NamedTuple):
    """The folder of a sweep that was killed and run again, its first two jobs, and what the second start said."""

    folder: Path
    jobs: dict[str, str]
    said: str


@pytest.fixture(scope="module")
def swept(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    if find_spec("submitit") is None or find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        pytest.skip("hydra-submitit-launcher is not installed")
    home = tmp_path_factory.mktemp("sweep")
    folder = home / RUN
    environ = cluster.environ | {name: value for name, value in environment().items() if not name.startswith("SLURM")}
    with (home / "first.log").open("w") as out:
        first = subprocess.Popen(COMMAND, cwd=home, env=environ, stdout=out, stderr=subprocess.STDOUT)
    jobs: dict[str, str] = {}
    try:
        for label in (FIRST, SECOND):
            until = time.monotonic() + PATIENCE
            while step(folder / label) < 40:
                assert time.monotonic() < until and first.poll() is None, (home / "first.log").read_text()
                time.sleep(0.05)
            jobs = {one["label"]: one["job"] for one in ledger(folder) if one["event"] == "started"}
            if label == FIRST:
                cluster.ask("scontrol", "suspend", jobs[FIRST])  # or it would come to its end before anybody looks
    finally:
        first.kill()  # in the middle of two points, two are still to be submitted
        first.wait()
    cluster.ask("scancel", jobs[SECOND])
    # As if the kill had come between the submission of the other and its note.
    kept = [one for one in ledger(folder) if not (one["event"] == "started" and one["label"] == FIRST)]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(one) + "\n" for one in kept))
    cluster.wait_for(jobs[SECOND], "CANCELLED")
    said = home / "second.log"
    with said.open("w") as out:
        second = subprocess.Popen(COMMAND, cwd=home, env=environ, stdout=out, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + PATIENCE
        while f"already as job {jobs[FIRST]}" not in said.read_text():
            assert time.monotonic() < until and second.poll() is None, said.read_text()
            time.sleep(0.1)
        cluster.ask("scontrol", "resume", jobs[FIRST])
        assert second.wait(2 * PATIENCE) == 0, said.read_text() + log(folder / SECOND)
    finally:
        second.kill()
        second.wait()
    return Swept(folder, jobs, said.read_text())


def ledger(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def step(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def log(folder: Path) -> str:
    return (folder / "output.log").read_text() if (folder / "output.log").is_file() else ""


def test_every_point_is_complete_over_two_nodes_and_no_job_ran_twice(cluster: Cluster, swept: Swept) -> None:
    for label in (FIRST, SECOND, *OTHERS):
        summary = json.loads((swept.folder / label / "summary.json").read_text())
        assert (summary["ended"], summary["steps"]) == ("complete", STEPS)
        assert "2 processes, expert axis 2, replicated" in log(swept.folder / label)
        reports = map(json.loads, (swept.folder / label / "metrics.jsonl").open())
        steps = [line["step"] for line in reports if "train/loss" in line]
        assert len(set(steps)) == len(steps) and set(range(10, STEPS + 1, 10)) <= set(steps)
    names = cluster.ask("scontrol", "--oneliner", "show", "job").splitlines()
    ours = [one.split("JobName=")[1].split()[0] for one in names if "JobName=softmoe-" in one]
    assert Counter(name.split("-", 2)[2] for name in ours) == {FIRST: 1, SECOND: 2, **dict.fromkeys(OTHERS, 1)}


def test_a_job_that_the_killed_sweep_left_is_found_and_one_that_was_cancelled_goes_on(swept: Swept) -> None:
    assert f"{FIRST}: waits already as job {swept.jobs[FIRST]}" in swept.said
    assert f"{SECOND}: submitted as job " in swept.said
    (line,) = (line for line in swept.said.splitlines() if line.startswith(f"{SECOND}: submitted as job "))
    assert "(attempt 2), goes on from about step " in line
    assert "resumed from runs/sweep/" in log(swept.folder / SECOND)
    ended = [(one["label"], one["state"]) for one in ledger(swept.folder) if one["event"] == "ended"]
    assert sorted(ended) == sorted(
        [(SECOND, "interrupted"), *((label, "complete") for label in (FIRST, SECOND, *OTHERS))]
    )


def test_pickles_lie_in_a_folder_of_our_own_alone_and_nothing_starts_where_others_may_write(
    cluster: Cluster, swept: Swept, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    private = swept.folder / ".submitit"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert {path.parent for path in swept.folder.rglob("*.pkl")} == {private}
    private.chmod(0o755)
    monkeypatch.setenv("SLURM_CONF", cluster.environ["SLURM_CONF"])
    monkeypatch.chdir(swept.folder.parent.parent)
    assert main(COMMAND[COMMAND.index("train") :]) == 2
    private.chmod(0o700)
    assert "must be a folder of your own with mode 700" in capsys.readouterr().err
