"""Routing groups of several images: runs of consecutive global samples, whole in a micro-batch of one rank, or refused with what is legal."""

import numpy as np
import pytest

from softmoe_train.config import compose
from softmoe_train.data.stream import Share
from softmoe_train.settings import RunConfig, compute_problems
from softmoe_train.worlds import legal_worlds

SPARSE = ["recipe=debug", "model.moe.router=tokens_choice"]  # 16 images, 8 streams; evaluated 32 at a time


def problems(size: int, *overrides: str) -> list[str]:
    return compute_problems(compose(RunConfig, [*SPARSE, *overrides], lambda _: []), size, size)


@pytest.mark.parametrize(
    ("size", "group", "micro", "said"),
    [
        (1, 8, 1, []),
        (2, 4, 2, []),
        (
            2,
            8,
            1,
            ["divide the 4 consecutive samples that each of 2 ranks has of data.streams=8; use 1, 2 or 4, or streams that are a multiple of 16"],
        ),
        (
            2,
            4,
            4,
            ["divide the 2 images of a micro-batch on each of 2 ranks; use 1 or 2, or a batch_size that is a multiple of 32"],
        ),
        (1, 3, 1, ["the 16 images of a micro-batch", "the 8 consecutive samples", "evals.upstream.batch_size=32"]),
    ],
)  # fmt: skip
def test_a_group_that_would_span_ranks_or_micro_batches_is_refused(
    size: int, group: int, micro: int, said: list[str]
) -> None:
    told = problems(size, f"model.moe.sparse.group_images={group}", f"micro_batches={micro}")
    assert len(told) == len(said)
    for problem, text in zip(told, said):
        assert problem.startswith(f"model.moe.sparse.group_images={group} does not ")
        assert text in problem


def test_evaluation_takes_whole_groups_too() -> None:
    (told,) = problems(1, "model.moe.sparse.group_images=8", "evals.upstream.batch_size=12")
    assert told.endswith("does not divide evals.upstream.batch_size=12; use 1, 2 or 4, or a multiple of 8 there")


def test_soft_moe_has_no_groups_to_divide() -> None:
    assert problems(2, "model.moe.router=soft", "model.moe.sparse.group_images=7") == []
    assert problems(2, "model.moe.blocks=[]", "model.moe.sparse.group_images=7") == []


def test_chunks_of_the_exchange_cut_between_groups() -> None:
    chunked = ["model.moe.sparse.group_images=2", "parallel.exchange_chunks=8", "parallel.expert_axis=2"]
    (told,) = problems(2, *chunked)
    assert told == (
        "parallel.exchange_chunks=8 does not divide the 4 routing groups (8 images) of a micro-batch on each rank; use 1, 2 or 4"
    )
    assert problems(2, *chunked, "model.moe.sparse.group_images=1") == []


def test_worlds_that_would_cut_a_group_are_not_legal() -> None:
    config = compose(RunConfig, [*SPARSE, "model.moe.sparse.group_images=4"], lambda _: [])
    assert legal_worlds(config, [8]) == [1, 2]


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_legal_groups_are_the_same_consecutive_samples_on_every_world(n: int, micro: int) -> None:
    """By the arithmetic of the stream: a rank's rows, cut into micro-batches, then into groups."""
    found = {}
    for world in (1, 2, 4):
        config = [f"model.moe.sparse.group_images={n}", f"micro_batches={micro}", "data.streams=16", "batch_size=32"]
        assert (problems(world, *config) == []) == (32 % (world * micro * n) == 0)
        rows = [Share(32, 16, rank, world).rows(64) for rank in range(world)]
        parts = [part for of_rank in rows for part in np.split(of_rank, micro)]
        groups = sorted(group.tolist() for part in parts for group in part.reshape(-1, n))
        found[world] = groups
    assert found[1] == found[2] == found[4] == [list(range(g, g + n)) for g in range(64, 96, n)]
