"""What only rank 0 needs is imported on rank 0, and rank 0 tells how long a start took."""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from softmoe_train.config import compose
from softmoe_train.dist import World
from softmoe_train.observe.startup import Startup
from softmoe_train.run import train
from softmoe_train.settings import RunConfig
from tests.ports import free_ports
from tests.ranks.launch import run_ranks

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


def imported_by_training(rank: int, world: int, folder: str, port: int) -> set[str]:
    """Which of COSTLY a rank has imported when it has trained."""
    dist.barrier()
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WANDB_MODE": "offline"}
    overrides = [
        "recipe=debug",
        f"run_dir={folder}/run",
        "stop_after=2",
        "observe.progress=off",
        "evals.upstream.every=0",
    ]
    train(compose(RunConfig, overrides, lambda _: []), World(rank, world, rank, world), Startup(None))
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    return {name for name in COSTLY if name in sys.modules}


def test_only_rank_0_pays_for_wandb_and_nobody_for_what_the_run_does_not_use(tmp_path: Path) -> None:
    first, second = run_ranks(imported_by_training, 2, str(tmp_path), *free_ports(1))
    assert first == {"wandb"}
    assert second == set()
    (process,) = json.loads((tmp_path / "run" / "summary.json").read_text())["history"]["processes"]
    startup = process["facts"]["startup"]
    assert list(startup) == ["process group", "engine", "data", "checkpoint", "log and W&B", "first step"]
    assert all(seconds >= 0 for seconds in startup.values())
