"""The launcher of the rank tests returns what ranks return and names the one that fails."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks.launch import RankFailedError, run_ranks


def _sum(rank: int, world_size: int, base: int) -> tuple[int, torch.Tensor]:
    total = torch.tensor([float(rank + base)])
    dist.all_reduce(total)
    return rank, total


def _raise_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("the culprit")
    dist.barrier()


def _die_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _sleep(rank: int, world_size: int) -> None:
    time.sleep(600)


def test_results_come_back_in_the_order_of_the_ranks() -> None:
    results = run_ranks(_sum, 2, 10)
    assert results == [(0, torch.tensor([21.0])), (1, torch.tensor([21.0]))]


def test_a_rank_that_raises_is_named_with_its_traceback() -> None:
    with pytest.raises(RankFailedError, match=r"(?s)rank 1 of 2:.*_raise_on_rank_1.*KeyError: 'the culprit'"):
        run_ranks(_raise_on_rank_1, 2)


def test_a_rank_that_is_killed_is_named_with_its_signal() -> None:
    with pytest.raises(RankFailedError, match=r"rank 1 of 2:\nkilled by SIGKILL"):
        run_ranks(_die_on_rank_1, 2)


def test_ranks_that_never_answer_are_named_and_ended() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailedError, match=r"ranks \[0\] of 1"):
        run_ranks(_sleep, 1, timeout=2)
    assert time.monotonic() - start < 30
