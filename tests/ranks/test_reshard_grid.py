"""Weights, moments and averages that any layout of either engine saved load bit-equal into any other: a subset that covers all pairs here."""

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from softmoe_train.engine.protocol import Engine
from tests.ranks.deepspeed_ranks import EMA, RATE, accumulate, restored, store_at, whole, zero
from tests.ranks.launch import run_ranks
from tests.ranks.small import ADAMW, build
from tests.ranks.test_matrix import covering

WORLDS = (1, 2, 4)
KINDS = ("replicated", "fsdp", "zero 0", "zero 1", "zero 2")
PATIENCE_SECONDS = 300


class At(NamedTuple):
    """A layout: ranks, expert axis, and the engine with its sharding."""

    ranks: int
    axis: int
    kind: str


class Move(NamedTuple):
    """From a layout to a layout, field by field, so that pairs of fields can be covered."""

    ranks: int
    axis: int
    kind: str
    to_ranks: int
    to_axis: int
    to_kind: str

    @property
    def source(self) -> At:
        return At(*self[:3])

    @property
    def target(self) -> At:
        return At(*self[3:])


EVERY = [At(ranks, axis, kind) for ranks in WORLDS for axis in WORLDS if axis <= ranks for kind in KINDS]
MOVES = [Move(*source, *target) for source in EVERY for target in EVERY]
SOME: list[Move] = covering(MOVES)  # pyright: ignore[reportArgumentType, reportAssignmentType]


def engine_of(rank: int, at: At, *, perturbed: bool) -> Engine:
    if at.kind.startswith("zero"):
        layout = (at.ranks, at.axis, int(at.kind[-1]), 1)
        return zero(layout, optim=ADAMW, average=EMA, perturbed=perturbed)
    return build(rank, at.ranks, at.axis, at.kind, optim=ADAMW, average=EMA, perturbed=perturbed)


def moved(rank: int, world: int, folder: str, moves: list[Move]) -> dict[Move, list[str]]:
    """What differs after each of the moves to this world; every source of this world is saved first, after an update of its own."""
    for source in dict.fromkeys(move.source for move in moves if move.ranks == world):
        engine, number = engine_of(rank, source, perturbed=True), EVERY.index(source)
        accumulate(engine, rank, (world, source.axis, 0, 1), step=number)
        engine.update(RATE)
        saved = whole(engine.state_dict())
        if rank == 0:  # by another way than ours, for whoever loads
            save_file({name: tensor.contiguous() for name, tensor in saved.items()}, f"{folder}/{number}.truth")
        store_at(f"{folder}/{number}", rank, world).save(number, engine.state_dict(), {})
    wrong: dict[Move, list[str]] = {}
    for target in dict.fromkeys(move.target for move in moves if move.to_ranks == world):
        engine = engine_of(rank, target, perturbed=False)
        for move in moves:
            if move.target == target:
                number = EVERY.index(move.source)
                wait_for(Path(f"{folder}/{number}/step_{number:08d}/COMPLETE.json"))
                truth = load_file(f"{folder}/{number}.truth")
                got = restored(engine, f"{folder}/{number}", number, rank, world)
                assert got.keys() == truth.keys()
                wrong[move] = [name for name in truth if not torch.equal(got[name], truth[name])]
    return wrong


def wait_for(mark: Path) -> None:
    """Another world saves at the same time."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not mark.is_file():
        assert time.monotonic() < until, mark
        time.sleep(0.05)


def check(folder: Path, moves: list[Move]) -> None:
    """Make the moves, in one start of each world, all at once."""
    with ThreadPoolExecutor(len(WORLDS)) as pool:
        worlds = [pool.submit(run_ranks, moved, world, str(folder), moves, timeout=900) for world in WORLDS]
        found = [wrong for world in worlds for wrong in world.result()[:1]]
    wrong = {move: names for of_world in found for move, names in of_world.items()}
    assert sorted(wrong) == sorted(moves)
    assert {move: names for move, names in wrong.items() if names} == {}
    truths = [load_file(file) for file in folder.glob("*.truth")]
    for name in ("model.head.weight", "optimizer.exp_avg_sq.blocks.2.moe.experts.w1", "average.head.weight"):
        # Each load had to replace what the one before it left.
        assert not any(torch.equal(one[name], two[name]) for one, two in combinations(truths, 2)), name


def test_moves_that_cover_all_pairs_of_settings_are_bit_equal(tmp_path: Path) -> None:
    check(tmp_path, SOME)


@pytest.mark.full
def test_every_move_between_layouts_and_engines_is_bit_equal(tmp_path: Path) -> None:
    began = time.monotonic()
    check(tmp_path, MOVES)
    print(f"{len(MOVES)} moves between {len(EVERY)} layouts in {time.monotonic() - began:.0f} s")
