"""Which checkpoints of a whole run stay: the last, every n-th, and the best, whose record resumes."""

import json
import shutil
from pathlib import Path

from softmoe_train.config import compose
from softmoe_train.dist import World
from softmoe_train.run import train
from softmoe_train.settings import RunConfig, check
from tests.runs import metrics

QUIET = ["recipe=debug", "schedule.warmup_steps=1", "observe.every=1", "observe.wandb.mode=disabled", "steps=6"]
QUIET += ["observe.progress=plain", "evals.upstream.every=1", "checkpoint.every=1", "checkpoint.keep_last=1"]
QUIET += ["checkpoint.keep_every=4", "checkpoint.best=lowest upstream/test/loss", "allow_changes=true"]


def go(run: Path, *overrides: str) -> list[str]:
    """Train, and return the names of the checkpoints that are left."""
    config = compose(RunConfig, [*QUIET, f"run_dir={run}", *overrides], lambda config: check(config, 1, 1))
    train(config, World(rank=0, size=1, local_rank=0, local_size=1))
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def best(run: Path, step: int) -> dict:
    return json.loads((run / f"checkpoints/step_{step:08d}/loop.json").read_text())["best"]


def test_the_best_checkpoint_and_every_nth_stay_also_after_a_resume(tmp_path: Path) -> None:
    # A small rate, then one that ruins the model: the best step is before the stop.
    go(tmp_path, "schedule.peak=1e-3", "stop_after=2")
    kept = go(tmp_path, "schedule.peak=5.0", "stop_after=5")
    losses = metrics(tmp_path, "upstream/test/loss")
    assert min(losses, key=lambda step: losses[step]) == 2
    assert kept == ["step_00000002", "step_00000004", "step_00000005"]
    assert best(tmp_path, 5) == {"rule": "lowest upstream/test/loss", "step": 2, "value": losses[2]}
    shutil.rmtree(tmp_path / "checkpoints/step_00000002")
    assert go(tmp_path, "schedule.peak=5.0") == ["step_00000004", "step_00000006"]
    assert best(tmp_path, 6)["step"] == 6, "the best of those that are there, not of one that somebody deleted"
