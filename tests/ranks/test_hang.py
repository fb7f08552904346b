"""A hang of one rank ends all of them: each says where it is, and the one that the others wait for is named."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from softmoe_train.dist import World, lengthen_timeouts, process_group, sum_over_world
from softmoe_train.faults.hang import watched
from softmoe_train.launching.worker import HUNG
from tests.ports import free_ports
from tests.ranks.launch import RankFailedError, run_ranks
from tests.ranks.test_interruption import RUN, Started
from tests.runs import command


def stick(rank: int, world: int, folder: str, port: int) -> None:
    """Rank 1 spins, where the others wait for it; what they say goes into files."""
    os.dup2(os.open(f"{folder}/said{rank}", os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.destroy_process_group()
    me = World(rank, world, rank, world)
    cpu = torch.device("cpu")
    # Rank 0 alone is in a hurry: the others end because it tells them.
    minutes = 0.1 if rank == 0 else 0.2
    with process_group(me, cpu), watched(me, minutes=minutes, folder=Path(folder), exit_code=HUNG) as watch:
        state = SimpleNamespace(step=12)
        watch.begin(state)
        state.step = 13
        while rank == 1:
            time.sleep(0.001)
        sum_over_world(torch.ones(1))


def test_every_rank_shows_where_it_is_when_one_of_them_finds_a_hang(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with pytest.raises(RankFailedError, match=f"ended with exit code {HUNG}"):
        run_ranks(stick, 3, str(tmp_path), port)
    stacks = [(tmp_path / "hangs" / f"rank_{rank:05d}.txt").read_text() for rank in range(3)]
    assert "in stick" in stacks[1]
    assert all("in sum_over_world" in stacks[rank] for rank in (0, 2))
    said = [(tmp_path / f"said{rank}").read_text() for rank in range(3)]
    (line,) = said[0].splitlines()
    assert line.startswith("softmoe train: hang: nothing moved for ")
    assert ": rank 1 (process " in line
    assert ") is in stick" in line
    assert "; ranks 0, 2 wait in all_reduce called by sum_over_world (softmoe_train/dist.py:" in line
    assert said[1] == f"rank 1 at {stacks[1]}"  # the stacks to look at are on the screen too
    assert said[2] == ""


def test_a_rank_that_is_stopped_is_named_by_the_others(tmp_path: Path) -> None:
    run = Started(tmp_path, command(*RUN, "processes=2", "hang_limit=0.1", "checkpoint.max_failures=1"))
    stopped = run.ranks[1]
    began = time.monotonic()
    os.kill(stopped, signal.SIGSTOP)
    assert run.end() == HUNG
    assert time.monotonic() - began < 50
    (line,) = run.err.splitlines()
    assert f"(hang_limit): rank 1 (process {stopped} on " in line
    assert ") gave no sign of life; rank 0 waits in " in line
    folder = tmp_path / "runs" / "debug"
    assert [path.name for path in (folder / "hangs").iterdir()] == ["rank_00000.txt"]
    assert "loop.py" in (folder / "hangs" / "rank_00000.txt").read_text()
    assert '"ended": "hang: nothing moved for ' in (folder / "summary.json").read_text()


def wait_long(rank: int, world: int) -> float:
    """The sum of a group whose collectives were given a second, and whose last rank comes after two."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=1))
    lengthen_timeouts(60)
    time.sleep(2 * rank)
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
    return total.item()


def test_groups_that_were_made_wait_as_long_as_they_are_told() -> None:
    assert run_ranks(wait_long, 2) == [2, 2]
