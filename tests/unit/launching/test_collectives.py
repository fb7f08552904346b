"""What the trial of the collectives costs each of many ranks, told without those ranks: nothing here is sent."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from softmoe_train.launching import collectives, speed
from softmoe_train.launching.collectives import try_collectives
from softmoe_train.launching.preflight import FILE, Measured, document
from softmoe_train.launching.speed import Pair, Speed
from tests.runs import metrics, run_here
from tests.unit.launching.test_verdict import facts

CPU = torch.device("cpu")


@contextmanager
def made_up(ranks: int) -> Iterator[ProcessGroup]:
    """The world of the first of so many ranks, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def peak(exchanged: int) -> int:
    """The bytes that the trial of an exchange of so many has allocated at most, at once."""
    with made_up(8) as group, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        try_collectives(CPU, group, exchanged, torch.bfloat16)
    results: Any = seen.profiler and seen.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_a_large_exchange_needs_no_more_than_what_is_given_and_got(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "TIMES", 1)
    exchanged = 2**25
    assert 2 * exchanged <= peak(exchanged) < 3 * exchanged


def told(ranks: int) -> tuple[int, int]:
    """The bytes that so many ranks send to rank 0, and those of the file that it keeps, where every collective is wrong."""
    with made_up(ranks) as group:
        tried = try_collectives(CPU, group, 2**16, torch.bfloat16)
    assert all(one.wrong for one in tried)
    one = Speed(rank=0, alone={"matmul": 1e12 / 3}, pairs=[Pair(partner=1, speed=1e9 / 3)] * 4)
    measured = [Measured(speed=one, tried=tried)] * ranks
    return sum(len(one.model_dump_json()) for one in measured), len(document({}, facts(ranks), measured))


def test_what_all_ranks_tell_grows_as_their_number_and_not_as_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "TIMES", 1)
    # A made-up group leaves what it is to fill as the memory was, which may be what was expected.
    monkeypatch.setattr(collectives, "all_to_all", lambda group, given: torch.full_like(given, collectives.EXACT))
    for fewer, more in zip(told(1024), told(2048), strict=True):
        assert more < 2.5 * fewer
        assert more < 2048 * 4096


def test_a_preflight_draws_no_random_number_and_changes_no_number_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "WINDOW_SECONDS", 0.001)
    states: list[tuple[object, ...]] = []

    def noting(*words: object) -> Speed:
        before = (random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state().tolist())
        found = speed.speed_of_rank(*words)  # pyright: ignore[reportArgumentType]
        states.append((before, (random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state().tolist())))
        return found

    monkeypatch.setattr("softmoe_train.launching.preflight.speed_of_rank", noting)
    run = [
        "recipe=debug",
        "steps=3",
        "schedule.warmup_steps=1",
        "observe.every=1",
        "observe.wandb.mode=disabled",
        "observe.progress=plain",
    ]
    plain, tried = (run_here(tmp_path / name, *run, f"preflight={name}") for name in ("false", "true"))
    assert (tried / FILE).is_file() and not (plain / FILE).exists()
    ((before, after),) = states
    assert repr(before) == repr(after)
    for name in ("train/loss", "train/grad_norm"):
        assert metrics(plain, name) == metrics(tried, name) != {}
