"""Routing measures, what pictures are drawn from, and expert updates are the same on every layout, under both engines."""

import math
from typing import Any

import pytest
import torch

from softmoe_train.config import config_folder, load_yaml, parse
from softmoe_train.data.batch import Cursor
from softmoe_train.dist import local_values
from softmoe_train.engine.protocol import Engine
from softmoe_train.evals.looks import looks_at, seen_of, sum_looks
from softmoe_train.evals.routing import RoutingConfig, RoutingEvaluator
from softmoe_train.loop import TrainState
from tests.ranks.deepspeed_ranks import zero
from tests.ranks.launch import run_ranks
from tests.ranks.small import SGD, build, share

Layout = tuple[str, int, str, str]  # engine, expert axis, sharding, router
ONE: list[Layout] = [("torch", 1, "replicated", "soft"), ("torch", 1, "replicated", "tokens_choice")]
TWO: list[Layout] = [
    ("torch", 2, "replicated", "soft"),
    ("torch", 1, "fsdp", "soft"),
    ("deepspeed", 2, "replicated", "soft"),
    ("torch", 2, "fsdp", "tokens_choice"),
]


def config() -> RoutingConfig:
    tree = load_yaml(config_folder() / "evals" / "routing.yaml")["routing"]
    # So low that the small model has some of each.
    found, problems = parse(
        RoutingConfig, {**tree, "thresholds": {"near_uniform": 0.995, "one_hot": 0.08, "duplicate": 0.7, "dead": 0.9}}
    )
    assert found is not None, problems
    return found


def engine_of(rank: int, world: int, layout: Layout) -> Engine:
    kind, axis, sharding, router = layout
    if kind == "deepspeed":
        return zero((world, axis, 1, 1), optim=SGD)
    group = 1 if router == "soft" else 2
    return build(rank, world, axis, sharding, router=router, group_images=group)


def moved(rank: int, world: int, engine: Engine) -> tuple[torch.Tensor, torch.Tensor]:
    """How far each expert moves in a step by the engine, and by its weights before and after (where they are whole)."""
    weights = {name: p for name, p in engine.module.named_parameters() if ".experts." in name}
    before = {name: local_values(p).clone() for name, p in weights.items()}
    (batch,) = share(rank, world)
    engine.forward_backward(batch, last=True)
    told = engine.update(0.1, moves=True).moved
    assert told is not None
    rows = []
    for block in (1, 2):
        for e in range(len(before[f"blocks.{block}.moe.experts.b1"])):
            pairs = [(before[n][e], local_values(p)[e]) for n, p in weights.items() if n.startswith(f"blocks.{block}.")]
            update = sum(((new - old).double() ** 2).sum() for old, new in pairs)
            rows.append(math.sqrt(update / sum((old.double() ** 2).sum() for old, _ in pairs)))
    return told, torch.tensor(rows, dtype=torch.float64)


def measured(rank: int, world: int, layouts: list[Layout]) -> list[Any]:
    found = []
    for layout in layouts:
        engine = engine_of(rank, world, layout)
        batches = share(rank, world, micro_batches=2)
        run = RoutingEvaluator(config(), batches, [1, 2], main=False).run(TrainState(engine, 7, 0, Cursor(0), ""))
        said = {name: value for name, value in run if isinstance(value, float)}
        looks = looks_at(engine.module, [1, 2], config().thresholds, engine.device, curves=True)  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            for batch in batches:
                for look, routing in zip(looks.values(), seen_of(engine.module, batch.images, batch.mask), strict=True):
                    look.add(routing, batch.mask)
        sum_looks(looks)
        parts = [part for look in looks.values() for part in look.parts()]
        found.append((said, parts, *moved(rank, world, engine)))
    return found


def test_measures_and_curves_do_not_depend_on_the_layout() -> None:
    alone, pair = run_ranks(measured, 1, ONE)[0], run_ranks(measured, 2, TWO)
    assert 0 < alone[0][0]["1/one_hot_slots"] < 1 and 0 < alone[1][0]["2/unserved_tokens"] < 1
    for of_rank in pair:
        for layout, (said, parts, told, _) in zip(TWO, of_rank, strict=True):
            expected, sums, alike, by_weights = alone[0 if layout[3] == "soft" else 1]
            assert torch.allclose(told, alike, rtol=2e-5, atol=0), layout
            assert torch.allclose(alike.flatten(), by_weights, rtol=1e-9, atol=0) and alike.min() > 0
            # float32 forwards of other batch shapes; a count at a threshold may fall the other way in one of 16 x 16 tokens.
            assert said == pytest.approx(expected, rel=2e-5, abs=2e-3), layout
            exact = [name for name in expected if name.endswith(("entropy", "_max", "_mean", "scale", "spread"))]
            assert {n: said[n] for n in exact} == pytest.approx({n: expected[n] for n in exact}, rel=2e-5, abs=1e-7)
            for part, of_one in zip(parts, sums, strict=True):
                assert (part - of_one).abs().sum() <= 2e-3 * of_one.abs().sum(), layout
