"""Bad data in the middle of a run: it is named and passed over, and the run is the one that would never have met it."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from softmoe_train.checkpoint.folder import step_folders
from softmoe_train.config import compose
from softmoe_train.data.batch import Batch
from softmoe_train.data.stream import Share
from softmoe_train.dist import World
from softmoe_train.engine.torch_engine import TorchEngine
from softmoe_train.faults.bad_steps import BadStepsError
from softmoe_train.run import train
from softmoe_train.settings import RunConfig, check
from tests.ports import free_ports
from tests.ranks.launch import run_ranks
from tests.runs import metrics, same_bits, stored

STEPS, BATCH = 14, 16
ALONE = World(rank=0, size=1, local_rank=0, local_size=1)
RUN = [
    "recipe=debug", f"steps={STEPS}", "observe.every=2", "observe.progress=plain", "observe.wandb.mode=disabled", "checkpoint.every=4",
    "evals.upstream.every=0", "bad_steps.in_a_row=3", "bad_steps.then=rollback",
]  # fmt: skip
FORWARD, ROWS = TorchEngine.forward_backward, Share.rows
BAD = {6: "nan", 7: "nan", 8: "nan"}  # batches, from 0: those of the steps 7, 8 and 9


class Killed(BaseException):
    """What a test ends a run by, at an instant of its choice; nothing catches it."""


@contextmanager
def planted(bad: dict[int, str], kill_at: int | None = None) -> Iterator[None]:
    """The last image of each batch in `bad` ruins its loss, on the rank that has it; the run dies in its `kill_at`-th step."""
    steps = 0

    def forward_backward(self: TorchEngine, batch: Batch, *, last: bool) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == kill_at:
            raise Killed
        loss = FORWARD(self, batch, last=last)
        kinds = [bad.get((g - BATCH + 1) / BATCH) for g in batch.sample_ids.tolist()]
        if "nan" in kinds:
            self.objective.minimised += math.nan
            return loss * math.nan
        return loss + 50 if "spike" in kinds else loss

    TorchEngine.forward_backward = forward_backward
    try:
        yield
    finally:
        TorchEngine.forward_backward = FORWARD


@contextmanager
def without(first: int, count: int) -> Iterator[None]:
    """A data set that never had `count` batches from batch `first` on: the independent truth."""

    def rows(self: Share, position: int) -> Any:
        return ROWS(self, position + (count * BATCH if position >= first * BATCH else 0))

    Share.rows = rows
    try:
        yield
    finally:
        Share.rows = ROWS


def go(run: Path, *overrides: str, world: World = ALONE) -> str:
    """Train in this process."""
    config = compose(RunConfig, [*RUN, f"run_dir={run}", *overrides], lambda c: check(c, world.size, world.local_size))
    return train(config, world)


def on_two_ranks(rank: int, world: int, folder: str, ports: list[int]) -> list[str]:
    """The same run, told apart by what happens to it."""
    dist.barrier()
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(world)}
    left, said = iter(ports), []

    def start(run: str, *overrides: str) -> None:
        os.environ["MASTER_PORT"] = str(next(left))
        try:
            said.append(go(Path(folder, run), *overrides, world=World(rank, world, rank, world)))
        except Killed:
            dist.destroy_process_group()
            said.append("killed")

    with without(6, 3):
        start("truth")
    with planted(BAD):
        start("rolled")
    with planted(BAD, kill_at=13):  # the steps 1 to 10, then 5 and 6, then 7 with other data: then the kill
        start("killed")
    with planted(BAD):
        start("killed")
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of `on_two_ranks`."""
    folder = tmp_path_factory.mktemp("rollback")
    said = run_ranks(on_two_ranks, 2, str(folder), free_ports(4))
    assert said == [["complete", "complete", "killed", "complete"]] * 2
    return folder


@pytest.mark.parametrize("run", ["rolled", "killed"])
def test_bad_data_is_passed_over_bit_for_bit_as_if_it_had_never_been(folder: Path, run: str) -> None:
    truth, other = folder / "truth", folder / run
    for measure in ("train/loss", "train/grad_norm", "upstream/test/loss"):
        assert metrics(other, measure) == metrics(truth, measure)
    assert same_bits(stored(other, STEPS), stored(truth, STEPS))
    assert metrics(other, "train/rollbacks") == dict.fromkeys(range(6, STEPS + 1, 2), 1.0)
    loop = json.loads((other / f"checkpoints/step_{STEPS:08d}/loop.json").read_text())
    assert loop["bad_steps"]["passed_over"] == [{"first_step": 7, "last_step": 9, "begin": 6 * BATCH, "end": 9 * BATCH}]
    assert loop["cursor"] == {"position": (STEPS + 3) * BATCH}
    assert loop["images_seen"] == STEPS * BATCH
    assert loop["skipped_updates"] == 0


@pytest.mark.parametrize("run", ["rolled", "killed"])
def test_the_samples_of_bad_steps_are_written_down_once(folder: Path, run: str) -> None:
    lines = [json.loads(line) for line in (folder / run / "bad_batches.jsonl").read_text().splitlines()]
    assert [(line["step"], line["why"], line["ranks"]) for line in lines] == [(s, "loss", [1]) for s in (7, 8, 9)]
    # Eight streams on two ranks: the second rank has the upper half of every eight.
    numbers = [g for g in range(6 * BATCH, 7 * BATCH) if g % 8 >= 4]
    assert lines[0]["samples"] == [{"number": g, "shard": "synthetic", "key": str(g)} for g in numbers]
    assert lines[0]["first_sample"] == 6 * BATCH


def test_another_number_of_ranks_goes_on_past_the_bad_data(folder: Path) -> None:
    shutil.copytree(folder / "rolled", folder / "moved")
    for step in (12, 14):
        shutil.rmtree(folder / f"moved/checkpoints/step_{step:08d}")
    with planted(BAD):
        assert go(folder / "moved") == "complete"
    truth, moved = (metrics(folder / run, "train/loss") for run in ("truth", "moved"))
    assert all(abs(truth[step] - moved[step]) < 1e-5 for step in range(10, STEPS + 1, 2))
    assert metrics(folder / "moved", "train/rollbacks")[STEPS] == 1


def test_spikes_from_before_the_first_checkpoint_take_a_run_back_to_its_start(tmp_path: Path, capsys: Any) -> None:
    spikes = ["bad_steps.spike=8", "bad_steps.spikes_in_a_row=2", "bad_steps.spike_memory=2", "checkpoint.every=0"]
    with planted({4: "spike", 5: "spike", 9: "spike"}):
        assert go(tmp_path / "run", *spikes) == "complete"
    with without(4, 2), planted({9: "spike"}):
        assert go(tmp_path / "truth", *spikes) == "complete"
    assert metrics(tmp_path / "run", "train/loss") == metrics(tmp_path / "truth", "train/loss")
    assert same_bits(stored(tmp_path / "run", STEPS), stored(tmp_path / "truth", STEPS))
    said = capsys.readouterr().out
    assert (
        "warning: rolled back from step 6 to 0: every step from 5 to 6 was bad, so their images, samples 64 to 95,"
        in said
    )
    assert "step 8: the loss of 5" in said


def test_a_run_that_meets_bad_data_wherever_it_goes_stops(tmp_path: Path, capsys: Any) -> None:
    endless = dict.fromkeys(range(6, 99), "nan")
    with planted(endless), pytest.raises(BadStepsError) as caught:
        go(tmp_path, "bad_steps.rollbacks=2")
    assert (
        "every step from 7 to 9 was bad: 3 not finite (no update was made), and the run has gone back 2 times"
        in str(caught.value)
    )
    assert metrics(tmp_path, "train/rollbacks") == {6: 2.0, 8: 2.0}
    assert [path.name for path in step_folders(tmp_path / "checkpoints", complete=True)] == [
        "step_00000000",
        "step_00000004",
    ]
    assert capsys.readouterr().out.count("step 8 is bad, and not saved") == 3
    assert json.loads((tmp_path / "summary.json").read_text())["ended"].startswith("failed: BadStepsError: every step")


def test_a_save_in_the_middle_of_bad_steps_is_not_gone_back_to(tmp_path: Path, capsys: Any) -> None:
    # Somebody stops the run after the first of three bad steps, which saves it.
    with planted(BAD):
        assert go(tmp_path / "run", "stop_after=7") == "stopped"
        assert go(tmp_path / "run") == "complete"
    assert "step_00000007 deleted" in capsys.readouterr().out
    with without(6, 3):
        go(tmp_path / "truth")
    assert same_bits(stored(tmp_path / "run", STEPS), stored(tmp_path / "truth", STEPS))


def test_without_a_checkpoint_from_before_a_run_stops(tmp_path: Path) -> None:
    with planted(BAD):
        go(tmp_path, "stop_after=7")
        for step in (0, 4):
            shutil.rmtree(tmp_path / f"checkpoints/step_{step:08d}")
        with pytest.raises(BadStepsError, match="there is no checkpoint from before them to go back to"):
            go(tmp_path)
