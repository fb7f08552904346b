"""Ranks that do not see the same shards are told before a step is taken: they would train on samples that nobody chose."""

import os
from pathlib import Path

import torch

from softmoe_train.config import ConfigError, compose
from softmoe_train.dist import World
from softmoe_train.run import training_stream
from softmoe_train.settings import RunConfig
from tests.ranks.launch import run_ranks
from tests.unit.data.conftest import encoded, numbered_picture, write_tar


def problem_of(rank: int, world: int, folders: list[str]) -> str:
    os.environ["XDG_CACHE_HOME"] = f"{folders[rank]}/cache{rank}"
    overrides = ["recipe=debug", "data=digits", f"data.train={folders[rank]}", "data.streams=4", "batch_size=4"]
    config = compose(RunConfig, overrides, lambda _: [])
    try:
        training_stream(config, World(rank, world, rank, world), torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    return ""


def test_hosts_with_other_shards_are_told_on_every_rank(tmp_path: Path) -> None:
    folders = []
    for number in (0, 1, 1):
        folder = tmp_path / str(len(folders))
        folder.mkdir()
        write_tar(folder / "a.tar", [("a.cls", b"1"), ("a.png", encoded(numbered_picture(number)))])
        folders.append(str(folder))
    told = run_ranks(problem_of, 2, folders[:2])
    assert told[0] == told[1]
    assert "data.train: the ranks do not see the same shards ({" in told[0]
    assert told[0].endswith("give every host the same files, or one URL")
    assert run_ranks(problem_of, 2, folders[1:]) == ["", ""]
