"""Every layout of either engine starts warm with the weights of one process, each rank reading what it holds."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softmoe_train.dist import World, control_group, global_values, local_values
from softmoe_train.engine.protocol import Engine
from softmoe_train.model.records import ModelConfig
from softmoe_train.optim.average import AverageConfig
from softmoe_train.warm import sources
from softmoe_train.warm.start import start_warm
from tests.ranks.deepspeed_ranks import accumulate, zero
from tests.ranks.launch import run_ranks
from tests.ranks.small import ADAMW, SEED, build, model_config
from tests.unit.warm.bare import as_run, in_timm_names, model_of, small, warm_config, warmed

EMA = AverageConfig(decay=0.75, warmup=False)
LAYOUTS = [(2, "fsdp"), (4, "replicated")]  # expert axis, sharding, of 4 ranks


def here() -> ModelConfig:
    """What `small.build` builds: 8 experts of 3 slots in the last 2 blocks."""
    return model_config()


def start(engine: Engine, rank: int, world: int, source: str, **changes: Any) -> None:
    group = control_group(World(rank, world, rank, world))
    start_warm(warm_config(source, **changes), here(), engine, seed=SEED, rank=rank, world=world, group=group)


def on_layouts(rank: int, world: int, source: str) -> list[tuple[dict[str, Tensor], int, int]]:
    """Of each layout the state after a noisy warm start, and how many elements this rank read and holds."""
    found, read_part = [], sources.read_part
    for axis, sharding in LAYOUTS:
        engine, read = build(rank, world, axis, sharding, optim=ADAMW, average=EMA, perturbed=False), [0]

        def counted(file: Any, tensor: Any, chunk: Any, part: Any, target: Any, read: list[int] = read) -> None:
            read[0] += math.prod(part.sizes)
            read_part(file, tensor, chunk, part, target)

        sources.read_part = counted
        try:
            start(engine, rank, world, source, noise=0.1)
        finally:
            sources.read_part = read_part
        held = sum(local_values(p).numel() for p in engine.parameters.values())
        state = {name: global_values(t).clone() for name, t in engine.state_dict().items()}
        found.append((state if rank == 0 else {}, read[0], held))
    return found


def check(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, t in expected.items():
        assert torch.equal(state[f"model.{name}"], t), name
        assert torch.equal(state[f"average.{name}"], t), name
    assert all(not t.any() for name, t in state.items() if name.startswith("optimizer."))


def both(rank: int, world: int, dense: str, soft: str) -> list[list[tuple[dict[str, Tensor], int, int]]]:
    return [on_layouts(rank, world, dense), on_layouts(rank, world, soft)]


def test_every_layout_starts_with_the_weights_of_one_process_and_a_rank_reads_what_it_holds(tmp_path: Path) -> None:
    dense, soft = as_run(tmp_path / "dense", model_of(small(blocks=[]))), as_run(tmp_path / "soft", model_of(here()))
    ranks = run_ranks(both, 4, str(dense), str(soft))
    expected = warmed(here(), dense, noise=0.1)[0].state_dict()
    for state, _, _ in ranks[0][0]:
        check(state, expected)
    for layout in zip(*(on_soft for _, on_soft in ranks), strict=True):
        assert [read for _, read, _ in layout] == [held for _, _, held in layout]


def on_zero(rank: int, world: int, source: str) -> dict[str, Tensor]:
    """The weights after a warm start and an update that moves nothing: ZeRO's own copies of the weights were renewed too."""
    layout = (world, 2, 1, 1)
    engine = zero(layout, perturbed=False, average=EMA)
    start(engine, rank, world, source)
    accumulate(engine, rank, layout)
    engine.update(0.0)
    return {name: global_values(t).clone() for name, t in engine.state_dict().items()}


def test_zero_s_own_copies_of_the_weights_start_warm_too(tmp_path: Path) -> None:
    dense = model_of(small(blocks=[]))
    source = in_timm_names(dense, tmp_path)
    check(run_ranks(on_zero, 2, str(source))[0], warmed(here(), source)[0].state_dict())


def fails_on_one(rank: int, world: int, source: str) -> str:
    engine = build(rank, world, 2, "replicated", perturbed=False)
    before = {name: p.clone() for name, p in engine.local.items()}
    try:
        start(engine, rank, world, source if rank == 0 else f"{source}/missing")
    except ValueError as error:
        assert all(torch.equal(p, before[name]) for name, p in engine.local.items())
        return str(error)
    return ""


def test_a_source_that_one_rank_cannot_see_fails_on_all_alike_before_a_weight_is_touched(tmp_path: Path) -> None:
    source = as_run(tmp_path / "dense", model_of(small(blocks=[])))
    first, second = run_ranks(fails_on_one, 2, str(source))
    assert "there is no such file or folder" in first
    assert "there is no such file or folder" in second
