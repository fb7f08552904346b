"""A run that is stopped or moved to another layout goes on as if nothing had happened."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.runs import metrics, same_bits, stored, with_digits
from tests.under_way import train

# Digits with random crops and a decode worker: order, augmentation and optimizer state all matter.
DATA = [
    "recipe=quickstart", "steps=20", "schedule.warmup_steps=5", "batch_size=32", "observe.every=1", "evals.upstream.every=0",
    "data.workers=1", "transform@data.train_transform=padded_crop", "data.train_transform.padding=1",
    "model.width=32", "model.depth=3", "checkpoint.every=10", "checkpoint.keep_last=5",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the digits' shards."""
    return with_digits(tmp_path_factory.mktemp("resume"))


def go(folder: Path, run: str, ranks: int, axis: int, *more: str) -> Path:
    layout = [f"run_dir={run}", f"processes={ranks}", f"parallel.expert_axis={axis}"]
    train(*DATA, *layout, *more, folder=folder)
    return folder / run


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """20 steps on two ranks, expert axis 2, without interruption."""
    return go(folder, "whole", 2, 2)


@pytest.fixture(scope="module")
def half(folder: Path) -> Path:
    """The same, stopped after 10."""
    return go(folder, "half", 2, 2, "stop_after=10")


def copy_of(run: Path, name: str) -> str:
    shutil.copytree(run, run.parent / name)
    return name


@pytest.mark.parametrize("sharding", [pytest.param("replicated", marks=pytest.mark.full), "fsdp"])
def test_ten_and_ten_steps_equal_twenty_bit_for_bit(
    folder: Path, sharding: str, request: pytest.FixtureRequest
) -> None:
    how = f"parallel.sharding={sharding}"
    if sharding == "replicated":
        one, two = request.getfixturevalue("whole"), folder / copy_of(request.getfixturevalue("half"), "two")
    else:
        one, two = go(folder, "one_fsdp", 2, 2, how), go(folder, "two_fsdp", 2, 2, how, "stop_after=10")
    assert sorted(metrics(two, "train/loss")) == list(range(1, 11))
    go(folder, two.name, 2, 2, how)
    assert metrics(one, "train/loss") == metrics(two, "train/loss")
    assert metrics(one, "train/grad_norm") == metrics(two, "train/grad_norm")
    assert metrics(one, "upstream/test/loss")[20] == metrics(two, "upstream/test/loss")[20]
    assert same_bits(stored(one, 20), stored(two, 20))
    assert not same_bits(stored(one, 10), stored(one, 20))


@pytest.mark.parametrize(
    ("ranks", "axis", "sharding"),
    [
        (2, 1, "replicated"),
        pytest.param(4, 4, "replicated", marks=pytest.mark.full),
        (4, 2, "fsdp"),
        (1, 1, "replicated"),
    ],
)
def test_another_layout_continues_the_same_losses(
    whole: Path, half: Path, ranks: int, axis: int, sharding: str
) -> None:
    name = copy_of(half, f"moved_{ranks}_{axis}_{sharding}")
    moved = go(half.parent, name, ranks, axis, f"parallel.sharding={sharding}")
    compare(whole, moved, f"2 ranks, axis 2 -> {ranks} ranks, axis {axis}, {sharding}")


@pytest.mark.full
def test_experts_gathered_in_one_place_can_be_spread(folder: Path, whole: Path) -> None:
    go(folder, "gathered", 2, 1, "stop_after=10")
    compare(whole, go(folder, "gathered", 2, 2), "2 ranks, axis 1 -> 2 ranks, axis 2, replicated")


def compare(whole: Path, other: Path, what: str) -> None:
    want, got = metrics(whole, "train/loss"), metrics(other, "train/loss")
    assert want.keys() == got.keys()
    worst = max(abs(want[step] - got[step]) for step in range(11, 21))
    print(f"| {what} | {worst:.1e} |")
    assert worst < 1e-5


def test_a_finished_run_says_so_and_changes_nothing(folder: Path, whole: Path) -> None:
    before = stored(whole, 20), (whole / "metrics.jsonl").read_text()
    done = train(*DATA, "run_dir=whole", "processes=2", "parallel.expert_axis=2", folder=folder)
    assert "complete at step 20 of 20" in done.stdout
    assert same_bits(before[0], stored(whole, 20))
    assert before[1] == (whole / "metrics.jsonl").read_text()


def test_settings_that_shape_the_numbers_may_not_change(folder: Path, half: Path) -> None:
    name = copy_of(half, "changed")
    done = train(*DATA, f"run_dir={name}", "processes=2", "seed=5", "optim.clip_norm=2.0", folder=folder, ok=False)
    assert done.returncode == 2
    (half.parent / name / "config.yaml").unlink()
    again = train(*DATA, f"run_dir={name}", "processes=2", "seed=5", "optim.clip_norm=2.0", folder=folder, ok=False)
    assert again.stderr == done.stderr, "what counts is what the checkpoint was made with"
    assert (
        "run_dir=changed holds a run with other settings: optim.clip_norm=2.0 (was 1.0), seed=5 (was 0)" in done.stderr
    )
    assert "allow_changes=true" in done.stderr


def test_a_run_cannot_end_before_its_newest_checkpoint(folder: Path, half: Path) -> None:
    done = train(*DATA, "run_dir=half", "processes=2", "steps=8", "allow_changes=true", folder=folder, ok=False)
    assert done.returncode == 2
    assert "steps=8: run_dir=half is at step 10 already" in done.stderr


def test_other_images_are_not_taken_for_the_same_run(folder: Path, half: Path) -> None:
    name = copy_of(half, "other_data")
    done = train(
        *DATA, f"run_dir={name}", "processes=2", "data.train=shards/digits/test-*.tar", folder=folder, ok=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "data.train gives other samples than" in done.stderr
    assert re.search(
        r"trained on: data=[0-9a-f]{64} \(was [0-9a-f]{64}\), samples=\d+ \(was \d+\)\. The fingerprints are ",
        done.stderr,
    )
    then = json.loads((folder / name / "checkpoints/step_00000010/stream.json").read_text())
    assert f"{then} then; give the same shards" in done.stderr
    assert "allow_changes=true to go on with these" in done.stderr


def test_other_streams_of_which_no_batch_begins_at_the_position_are_refused(folder: Path, half: Path) -> None:
    name = copy_of(half, "other_streams")
    other = ["batch_size=28", "data.streams=28", "allow_changes=true"]
    done = train(*DATA, f"run_dir={name}", "processes=2", *other, folder=folder, ok=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "cursor=320 is not a multiple of data.streams=28" in done.stderr
