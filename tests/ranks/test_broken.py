"""Broken samples on several ranks: counted over all of them, and the end of the run for all of them at one step."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from softmoe_train.checkpoint.store import CheckpointStore
from softmoe_train.data.batch import Batch, Broken, Cursor
from softmoe_train.dist import World, control_group
from softmoe_train.faults.broken import Budget, TooManyBrokenError
from softmoe_train.faults.stop import agreed_stop
from softmoe_train.loop import TrainState, fit
from softmoe_train.observe.log import SilentLog
from tests.ranks.launch import run_ranks
from tests.ranks.small import GLOBAL_BATCH, build
from tests.ranks.test_loop import Stream, plan, saver

STEPS = 8


class Sick(Stream):
    """The small global batches; the first row of each step's batch is broken, on the rank that has it."""

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            lost = [g for g in batch.sample_ids.tolist() if g % GLOBAL_BATCH == 0]
            told = tuple(Broken("a.tar", f"k{g % 3}", "torn", "0" * 64, g) for g in lost)
            yield replace(batch, broken=told)


def run(rank: int, world: int, folder: str, budgets: list[Budget], report_every: int) -> list[dict[str, Any]]:
    """One life after another in `folder`, each with its budget."""
    lives = []
    for budget in budgets:
        group = control_group(World(rank, world, rank, world))
        store = CheckpointStore(Path(folder), keep_last=2, rank=rank, world=world, group=group)
        state = TrainState(build(rank, world, expert_axis=world, sharding="replicated"), 0, 0, Cursor(0), "")
        path = store.latest()
        if path is not None:
            state.restore(store.read_documents(path)["loop"])
        file = Path(folder, "broken_samples.jsonl") if rank == 0 else None
        how = plan(steps=STEPS, report_every=report_every, budget=budget, broken_file=file)
        stream = Sick(rank, world, {})
        stream.seek(state.cursor)
        with agreed_stop(World(rank, world, rank, world), ends_at=None, grace_seconds=60, exit_code=75) as stop:
            try:
                ended = fit(state, how, stream, {}, saver(store), SilentLog(""), stop)
            except TooManyBrokenError as error:
                ended = str(error)
        lives.append(
            {"ended": ended, "step": state.step, "broken": state.broken_samples, "known": state.broken.model_dump()}
        )
    return lives


def bears(count: int, fraction: float | None = None) -> Budget:
    return Budget(count=count, fraction=fraction)


def test_ranks_end_together_are_told_where_and_go_on_with_a_larger_budget(tmp_path: Path) -> None:
    ranks = run_ranks(run, 2, str(tmp_path), [bears(2), bears(2), bears(100)], 4)
    first, again, last = ranks[0]
    assert all(lives == ranks[0] for lives in ranks)
    # Step 3 is one too many; all ranks hear of it a step later, before the report at step 4 or with it.
    assert first["step"] == 4
    assert first["broken"] == 4
    assert first["ended"].startswith(
        f"4 broken samples among {4 * GLOBAL_BATCH} images are more than data.max_broken=2: a.tar 4"
    )
    assert "go on from step 4 with a higher data.max_broken" in first["ended"]
    assert (again["step"], again["ended"]) == (4, first["ended"])  # at once: no step is taken
    assert (last["ended"], last["step"], last["broken"]) == ("complete", STEPS, STEPS)
    lines = [json.loads(line) for line in (tmp_path / "broken_samples.jsonl").read_text().splitlines()]
    want = {
        f"k{g % 3}": [h for h in range(0, STEPS * GLOBAL_BATCH, GLOBAL_BATCH) if h % 3 == g % 3]
        for g in range(0, 3 * GLOBAL_BATCH, GLOBAL_BATCH)
    }
    assert {line["key"]: (line["times"], line["first_sample"]) for line in lines} == {
        key: (len(numbers), numbers[0]) for key, numbers in want.items()
    }


def test_a_rank_alone_ends_the_run_without_waiting_for_a_report_and_a_fraction_is_judged_at_one(tmp_path: Path) -> None:
    [prompt], [_] = run_ranks(run, 2, str(tmp_path / "count"), [bears(1)], 100)
    assert prompt["step"] == 3
    per_step = 1 / GLOBAL_BATCH
    (borne,), _ = run_ranks(run, 2, str(tmp_path / "borne"), [bears(100, per_step)], 1)
    assert borne["ended"] == "complete"
