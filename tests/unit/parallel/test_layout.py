"""What fits the axes, and the words for what does not."""

import re

import pytest

from softmoe_train.parallel.layout import ParallelConfig, chunk_problems, expert_axis, layout_problems, node_size
from tests.ranks.small import parallel_config


def config(axis: int | str) -> ParallelConfig:
    return parallel_config(axis)


@pytest.mark.parametrize(("experts", "ranks", "axis"), [(128, 256, 128), (8, 2, 2), (6, 4, 2), (7, 4, 1), (128, 1, 1)])
def test_auto_takes_the_largest_common_divisor(experts: int, ranks: int, axis: int) -> None:
    assert expert_axis(config("auto"), num_experts=experts, size=ranks) == axis
    assert layout_problems(config("auto"), num_experts=experts, size=ranks, local_size=ranks) == []


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        (
            6,
            "parallel.expert_axis=6 does not divide model.moe.num_experts=64 nor the 16 ranks of this run; 64 experts on 16 ranks allow 1, 2, 4, 8 or 16",
        ),
        (32, "parallel.expert_axis=32 does not divide the 16 ranks"),
        (0, "parallel.expert_axis=0 does not divide"),
        (-2, "parallel.expert_axis=-2 does not divide"),
    ],
)
def test_an_axis_that_does_not_divide_is_refused_with_the_legal_ones(axis: int, said: str) -> None:
    (problem,) = layout_problems(config(axis), num_experts=64, size=16, local_size=8)
    assert said in problem


@pytest.mark.parametrize(
    ("axis", "local_size", "on_node"), [(128, 8, 8), (16, 8, 8), (4, 6, 2), (6, 4, 2), (4, 8, 4), (8, 1, 1)]
)
def test_as_many_ranks_of_the_axis_are_on_a_node_as_lie_on_one_host_wherever_they_begin(
    axis: int, local_size: int, on_node: int
) -> None:
    assert node_size(parallel_config(axis, exchange="two_stage"), axis=axis, local_size=local_size) == on_node


@pytest.mark.parametrize(
    ("axis", "changes", "said"),
    [
        (16, {"exchange": "two_stage"}, None),
        (16, {"exchange": "two_stage", "node_size": 4}, None),
        (1, {"exchange": "two_stage"}, None),
        (
            16,
            {"exchange": "two_stage", "node_size": 3},
            "parallel.node_size=3 does not cut an expert axis of 16 ranks into nodes of several; set parallel.node_size to 2, 4 or 8, "
            "or use parallel.exchange=flat",
        ),
        (16, {"exchange": "two_stage", "node_size": 16}, "parallel.node_size=16 does not cut"),
        (2, {"exchange": "two_stage", "node_size": 2}, "into nodes of several; use parallel.exchange=flat"),
        (
            8,
            {"exchange": "two_stage"},
            "parallel.exchange=two_stage, but with 8 of 16 ranks to a host an expert axis of 8 has 8 on a node, so there are no "
            "two stages; set parallel.node_size to 2 or 4, or use parallel.exchange=flat",
        ),
    ],
)
def test_an_axis_without_two_stages_is_refused_with_the_node_sizes_that_cut_it(
    axis: int, changes: dict, said: str | None
) -> None:
    problems = layout_problems(parallel_config(axis, **changes), num_experts=64, size=16, local_size=8)
    assert len(problems) == (said is not None)
    if said is not None:
        assert said in problems[0]


def test_chunks_that_do_not_divide_the_images_of_a_micro_batch_are_refused() -> None:
    (problem,) = chunk_problems(parallel_config(2, exchange_chunks=4), num_experts=8, size=2, images=6)
    assert problem == (
        "parallel.exchange_chunks=4 does not divide the 6 images of a micro-batch on each rank; use 1, 2, 3 or 6"
    )
    assert chunk_problems(parallel_config(2, exchange_chunks=3), num_experts=8, size=2, images=6) == []
    assert chunk_problems(parallel_config(1, exchange_chunks=4), num_experts=8, size=2, images=6) == [], (
        "nothing is cut"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sharding": "hsdp"}, "parallel.shard_size=null with parallel.sharding=hsdp: hsdp needs the number of ranks"),
        ({"shard_size": 8}, "parallel.shard_size=8 with parallel.sharding=replicated"),
        ({"sharding": "fsdp", "shard_size": 8}, "the others take null"),
        ({"reduce_each_micro": True}, "parallel.reduce_each_micro=true with parallel.sharding=replicated"),
        ({"node_size": 4}, "parallel.node_size=4 is used by parallel.exchange=two_stage alone; set it, or"),
        ({"prefetch": 1}, "parallel.prefetch=1 with parallel.sharding=replicated: nothing is gathered; use null"),
    ],
)
def test_a_setting_that_another_makes_void_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        parallel_config("auto", **changes)


@pytest.mark.parametrize(
    ("axis", "shard_size", "size", "said"),
    [
        (4, 16, 16, "fewer than all, divide the ranks, and be a multiple or a divisor of the axis; use 2, 4 or 8"),
        (1, 3, 16, "parallel.shard_size=3 with 16 ranks and expert axis 1"),
        (2, 1, 16, "use 2, 4 or 8"),
        (2, 2, 2, "use parallel.sharding=fsdp or replicated"),
        (3, 2, 12, "use 3 or 6"),
    ],
)
def test_a_copy_that_does_not_fit_the_ranks_is_refused_with_the_legal_sizes(
    axis: int, shard_size: int, size: int, said: str
) -> None:
    layout = parallel_config(axis, "hsdp", shard_size=shard_size)
    (problem,) = layout_problems(layout, num_experts=48, size=size, local_size=8)
    assert said in problem
