"""The product's own proof over every layout: a subset that covers all pairs of settings here, the whole by `pytest -m full -rP`."""

from functools import cache
from itertools import combinations
from typing import Any, NamedTuple

import pytest
import torch

from softmoe_train.config import compose, config_folder, load_yaml
from softmoe_train.dist import World
from softmoe_train.parity.measure import Row
from softmoe_train.parity.prove import prove
from softmoe_train.settings import RunConfig
from tests.ranks.launch import run_ranks

BATCH = 20  # cases of one start
PROMISE = 1e-5  # gradients and norm in float32, small models
ZERO = load_yaml(config_folder() / "engine" / "deepspeed.yaml")
# What makes a layout of each kind, beside the number of ranks and the expert axis.
KINDS: dict[str, dict[str, Any]] = {
    "replicated": {},
    "fsdp": {"parallel.sharding": "fsdp"},
    "hsdp": {"parallel.sharding": "hsdp", "parallel.shard_size": 2},
    **{f"zero {stage}": {"engine": {**ZERO, "zero_stage": stage}} for stage in (0, 1, 2)},
}
OFFLOADED = {"zero 2 offloaded": {"engine": {**ZERO, "zero_stage": 2, "offload_optimizer": True}}}


class Case(NamedTuple):
    ranks: int
    axis: int
    kind: str
    precision: str
    micro_batches: int
    recompute: str
    more: str = ""  # further overrides

    def __str__(self) -> str:
        return "-".join(map(str, self)).rstrip("-")


CASES = [
    Case(ranks, axis, kind, precision, micro_batches, recompute)
    for ranks in (1, 2, 4)
    for axis in (1, 2, 4)
    for kind in KINDS
    for precision in ("float32", "bfloat16")
    for micro_batches in (1, 4)
    for recompute in ("none", "block")
    if axis <= ranks and (kind != "hsdp" or ranks == 4)
]


@cache
def pairs(case: Case) -> set[tuple[tuple[int, Any], ...]]:
    return set(combinations(enumerate(case), 2))


def covering(cases: list[Case]) -> list[Case]:
    """Few of `cases` that hold together every pair of settings which any of them holds; greedy, and always the same."""
    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


MORE = [
    Case(2, 2, "fsdp", "float32", 4, "none", "optim=adafactor average=ema"),
    Case(2, 1, "zero 2", "float32", 1, "none", "optim=sgd average=ema"),
    Case(2, 2, "replicated", "float32", 1, "none", "optim=adam parallel.exchange_chunks=2"),
    Case(4, 4, "fsdp", "float32", 1, "none", "parallel.exchange=two_stage parallel.node_size=2"),
    Case(2, 2, "replicated", "float32", 1, "none", "parallel.exchange_dtype=bfloat16"),
    Case(2, 2, "zero 2 offloaded", "float32", 4, "moe", "average=ema"),
    # 2 experts on 4 ranks: cut along their hidden dim.
    Case(4, 1, "fsdp", "float32", 1, "none", "optim=adafactor average=ema model.moe.num_experts=2"),
    Case(4, 2, "hsdp", "bfloat16", 4, "none", "optim=adafactor average=ema"),
]
SOME = [*covering(CASES), *MORE]
REST = [case for case in CASES if case not in SOME]


@cache
def plain(more: str) -> dict[str, Any]:
    small = ["recipe=debug", "model.moe.expert_init=identical", "model.moe.blocks=last 2", "model.image_size=8"]
    return compose(RunConfig, [*small, *more.split()], lambda _: []).model_dump()


def config_of(case: Case) -> RunConfig:
    """The debug recipe in the layout of `case`."""
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in plain(case.more).items()}
    changes = {
        "precision": case.precision,
        "micro_batches": case.micro_batches,
        "parallel.expert_axis": case.axis,
        "parallel.recompute": case.recompute,
        **{**KINDS, **OFFLOADED}[case.kind],
    }
    for key, value in changes.items():
        group, _, name = key.rpartition(".")
        (tree[group] if group else tree)[name] = value
    return RunConfig.model_validate(tree)


def prove_all(rank: int, world: int, cases: list[tuple[Case, RunConfig]]) -> dict[Case, list[Row]]:
    who, device = World(rank, world, rank, world), torch.device("cpu")
    dtypes = {"float32": torch.float64, "bfloat16": torch.bfloat16}
    return {case: prove(config, who, device, dtypes[config.precision], lambda _: None) for case, config in cases}


@cache
def proofs(cases: tuple[Case, ...]) -> dict[Case, list[Row]]:
    """One start of the processes serves several cases of as many ranks."""
    (ranks,) = {case.ranks for case in cases}
    return run_ranks(prove_all, ranks, [(case, config_of(case)) for case in cases], timeout=600)[0]


def batch_of(case: Case, cases: list[Case]) -> tuple[Case, ...]:
    """The cases that are proven together with `case`; few, since every proof leaves process groups, whose threads add up."""
    alike = [other for other in cases if other.ranks == case.ranks]
    first = alike.index(case) // BATCH * BATCH
    return tuple(alike[first : first + BATCH])


SHOWN = [
    "logits",
    "loss",
    "gradients",
    *(f"update {u}: {what}" for u in (1, 2) for what in ("gradient norm", "weights", "state")),
]
HEADER = "| " + " | ".join([*Case._fields, *SHOWN]) + " |\n" + "|---" * (len(Case._fields) + len(SHOWN)) + "|"


def check(case: Case, rows: list[Row]) -> None:
    named = {row.what: row for row in rows}
    worst = {what: row.errors[row.worst] for what, row in named.items()}
    cells = [f"{worst[what]:.1e}" for what in SHOWN]
    cells[SHOWN.index("gradients")] += f" {named['gradients'].worst}"
    print("| " + " | ".join([*map(str, case), *cells]) + " |")
    assert {row.what: row.failing for row in rows if row.failing} == {}
    if case.precision == "float32":
        assert worst["gradients"] < PROMISE
        assert worst["update 1: gradient norm"] < PROMISE


def test_pairs_of_settings_are_covered() -> None:
    print(HEADER)
    covered = set().union(*map(pairs, SOME))
    assert all(pairs(case) <= covered for case in CASES)
    assert len(SOME) < len(CASES) / 4, "the rest is for `pytest -m full`"


@pytest.mark.parametrize("case", SOME, ids=str)
def test_a_layout_equals_one_process(case: Case) -> None:
    check(case, proofs(batch_of(case, SOME))[case])


ODD = {
    "a token an image": ["model.patch_size=8"],
    "one expert": ["model.moe.num_experts=1", "model.moe.slots_per_expert=2"],
    "deeper": [
        "model.depth=6",
        "model.width=64",
        "model.moe.blocks=every 2",
        "model.moe.num_experts=16",
        "micro_batches=4",
    ],
}


SEEDS = (2, 4, 5, 6)  # those at which tolerances without room for chance gave false alarms


def prove_seeds(rank: int, world: int, more: list[str], seeds: tuple[int, ...]) -> list[tuple[int, str, list[str]]]:
    """What fails at any of these seeds in either precision; nothing should."""
    failing = []
    for precision in ("float32", "bfloat16"):
        for seed in seeds:
            overrides = ["recipe=debug", "model.image_size=8", f"precision={precision}", f"seed={seed}", *more]
            config = compose(RunConfig, overrides, lambda _: [])
            dtype = torch.float64 if precision == "float32" else torch.bfloat16
            who = World(rank, world, rank, world)
            rows = prove(config, who, torch.device("cpu"), dtype, lambda _: None)
            failing += [(seed, f"{precision}: {row.what}", row.failing) for row in rows if row.failing]
    return failing


@pytest.mark.parametrize("seeds", [SEEDS[:1], pytest.param(SEEDS[1:], marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize(
    "more", [pytest.param(more, marks=[pytest.mark.full] * (name == "deeper")) for name, more in ODD.items()], ids=ODD
)
def test_what_is_right_holds_at_any_seed_and_shape(more: list[str], seeds: tuple[int, ...]) -> None:
    assert run_ranks(prove_seeds, 2, more, seeds)[0] == []


@pytest.mark.full
@pytest.mark.parametrize("case", REST, ids=str)
def test_every_other_layout_equals_one_process_too(case: Case) -> None:
    check(case, proofs(batch_of(case, REST))[case])
