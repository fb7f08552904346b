"""What only rank 0 needs is imported on rank 0, and rank 0 tells how long a start took."""

import json
import os
import subprocess
import sys
from pathlib import Path

from softmoe_train.config import compose
from softmoe_train.dist import World
from softmoe_train.observe.startup import Startup
from softmoe_train.run import train
from softmoe_train.settings import RunConfig
from tests.ports import free_ports
from tests.runs import environment

COSTLY = (
    "wandb",
    "matplotlib",
    "deepspeed",
    "sklearn",
    "pandas",
    "torchvision",
    "transformers",
    "tensorboard",
    "IPython",
)


def imported_by_training(rank: int, port: int, folder: str) -> None:
    """Print which of COSTLY a rank of two has imported when it has trained."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WANDB_MODE": "offline"}
    overrides = [
        "recipe=debug",
        f"run_dir={folder}/run",
        "stop_after=2",
        "observe.progress=off",
        "evals.upstream.every=0",
    ]
    train(compose(RunConfig, overrides, lambda _: []), World(rank, 2, rank, 2), Startup(None))
    print([name for name in COSTLY if name in sys.modules])


def test_only_rank_0_pays_for_wandb_and_nobody_for_what_the_run_does_not_use(tmp_path: Path) -> None:
    (port,) = free_ports(1)  # programs of their own: the ranks of other tests are forks that have it all
    program = "from tests.ranks.test_startup import imported_by_training; imported_by_training({}, {}, {!r})"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program.format(rank, port, str(tmp_path))],
            env=environment(), stdout=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    first, second = (rank.communicate(timeout=300)[0].splitlines() for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert (first[-1], second) == ("['wandb']", ["[]"])
    (process,) = json.loads((tmp_path / "run" / "summary.json").read_text())["history"]["processes"]
    startup = process["facts"]["startup"]
    assert list(startup) == ["process group", "engine", "data", "checkpoint", "log and W&B", "first step"]
    assert all(seconds >= 0 for seconds in startup.values())
