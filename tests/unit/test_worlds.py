"""Legal worlds, against the rules themselves: what a run on so many ranks would be told, asked one by one."""

import math
from functools import cache
from itertools import islice
from tempfile import gettempdir

import pytest

from softmoe_train.config import compose
from softmoe_train.parallel.layout import layout_problems
from softmoe_train.settings import RunConfig, check
from softmoe_train.worlds import larger_worlds, lasting_problems, legal_worlds, shares, told

DEBUG = ["recipe=debug", "batch_size=48", "data.streams=24", "model.moe.num_experts=12"]
GRID = {
    "auto": [],
    "axis": ["parallel.expert_axis=3"],
    "micro": ["micro_batches=4"],
    "hsdp": ["parallel.sharding=hsdp", "parallel.shard_size=4"],
    "chunks": ["parallel.exchange_chunks=2"],
    "zero": ["engine=deepspeed", "engine.zero_stage=1"],
    "two_stage": ["parallel.exchange=two_stage"],
}


@cache
def composed(*overrides: str) -> RunConfig:
    return compose(RunConfig, [*DEBUG, f"run_dir={gettempdir()}/of_nobody", *overrides], lambda _: [])


def brute_force(config: RunConfig, size: int, hosts: list[int]) -> bool:
    """What `check` says before the start, and what `build_topology` says when all hosts have told."""
    parts = shares(hosts, size)
    found = check(config, size, parts[0]) or layout_problems(
        config.parallel, num_experts=config.model.num_experts, size=size, local_size=math.gcd(*parts)
    )
    return not found


@pytest.mark.parametrize("overrides", GRID.values(), ids=GRID)
@pytest.mark.parametrize("hosts", [[25], [8, 8, 8], [8, 4]], ids=str)
def test_a_world_is_legal_where_no_rule_objects(overrides: list[str], hosts: list[int]) -> None:
    config = composed(*overrides)
    assert legal_worlds(config, hosts) == [n for n in range(1, sum(hosts) + 1) if brute_force(config, n, hosts)]


def test_the_grid_has_worlds_that_are_legal_and_worlds_that_are_not() -> None:
    found = {name: legal_worlds(composed(*overrides), [25]) for name, overrides in GRID.items()}
    assert found["auto"] == found["zero"] == [1, 2, 3, 4, 6, 8, 12, 24]
    assert found["axis"] == [3, 6, 12, 24]
    assert found["micro"] == [1, 2, 3, 4, 6, 12]
    assert found["hsdp"] == [8, 12, 24]
    assert legal_worlds(composed(*GRID["two_stage"]), [8, 8, 8]) != found["two_stage"]
    assert list(islice(larger_worlds(composed(*GRID["axis"]), 6), 9)) == [12, 24]


def test_what_no_number_of_ranks_heals_is_a_mistake_on_any_number() -> None:
    def lasting(*overrides: str) -> list[str]:
        return lasting_problems(composed(*overrides), 5, 5)

    assert lasting() == []
    assert lasting("parallel.expert_axis=3") == []
    (schedule,) = lasting("parallel.expert_axis=3", "schedule.warmup_steps=900")
    assert "schedule.warmup_steps=900" in schedule
    # 7 experts' ranks would not divide the batch: nothing helps, and all is told.
    streams, axis = lasting("model.moe.num_experts=7", "parallel.expert_axis=7")
    assert "global batch of 48" in streams or "global batch of 48" in axis
    void = lasting("loss=softmax", "model.num_classes=1")
    assert any("loss=softmax with model.num_classes=1" in problem for problem in void)


def test_the_log_names_the_reason_the_legal_worlds_and_who_waits() -> None:
    config = composed("parallel.expert_axis=3")
    said = told(config, [4, 4], legal_worlds(config, [4, 4]))
    assert said.startswith("WORLD_SIZE=8 is not legal (parallel.expert_axis=3 does not divide the 8 ranks of this run")
    assert said.endswith("; the legal worlds are 3, 6, 12, 24: training on 6, ranks 6, 7 wait as spares")
    assert told(config, [2], []).endswith("; the legal worlds are 3, 6, 12, ...: too few ranks")
    assert told(config, [7], [3, 6]).endswith(": training on 6, rank 6 waits as a spare")
