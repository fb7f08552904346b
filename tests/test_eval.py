"""`softmoe eval`: a checkpoint measures what its run measured, on any layout, and mistakes are told before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from softmoe_train.commands.main import main
from tests.forked import forked
from tests.runs import run_here
from tests.unit.data.conftest import encoded, numbered_picture, write_tar

QUIET = ["observe.wandb.mode=disabled", "observe.progress=off"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the debug recipe with averaged weights."""
    folder = tmp_path_factory.mktemp("eval") / "run"
    assert main(["train", "recipe=debug", "average=ema", "average.decay=0.9", f"run_dir={folder}", *QUIET]) == 0
    return folder


def measured(run: Path, *overrides: str) -> dict[str, Any]:
    out = run.parent / "measured.json"
    assert (
        main(["eval", f"ckpt={run}", f"out={out}", "evals=[upstream]", "evals.upstream.batch_size=32", *overrides]) == 0
    )
    return json.loads(out.read_text())


def reported(run: Path, step: int, source: str) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {name: value for line in lines if line["step"] == step for name, value in line.items()}
    return {name.removeprefix(f"{source}/"): found[name] for name in found if name.startswith(f"{source}/")}


def test_a_checkpoint_measures_what_its_run_reported(run: Path) -> None:
    said = measured(run)
    assert (said["step"], said["images_seen"]) == (20, 320)
    assert said["metrics"] == {f"upstream/{name}": value for name, value in reported(run, 20, "upstream").items()}
    assert {"upstream/test/top5", "upstream/test/calibration_error"} <= set(said["metrics"])


def test_the_averaged_weights_and_a_step_folder_can_be_measured(run: Path) -> None:
    said = measured(run / "checkpoints" / "step_00000020", "weights=average")
    assert said["metrics"] == {f"upstream/{name}": v for name, v in reported(run, 20, "upstream_average").items()}


def test_two_sharded_ranks_measure_the_same(run: Path) -> None:
    out = run.parent / "two.json"
    layout = [
        "evals=[upstream]",
        "processes=2",
        "parallel.sharding=fsdp",
        "parallel.expert_axis=2",
        "evals.upstream.batch_size=24",
    ]
    done = forked("eval", f"ckpt={run}", f"out={out}", *layout, folder=run.parent)
    assert done.returncode == 0, done.stderr
    # Float32 logits of another order of sums: counts are equal, means nearly.
    assert json.loads(out.read_text())["metrics"] == pytest.approx(measured(run)["metrics"], rel=1e-5)
    assert "r/checkpoints" not in done.stdout and "upstream/test/top1" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], "ckpt is not set"),
        (["ckpt=nowhere"], "ckpt=nowhere: there is no such file or folder"),
        (["ckpt=RUN", "recipe=debug"], "a checkpoint has its settings"),
        (["ckpt=RUN", "evals=[]"], "there is nothing to measure"),
        (["ckpt=RUN", "model.num_classes=7"], "no head of so many classes"),
        (["ckpt=RUN", "model.width=96"], "ckpt=RUN"),
        (["ckpt=RUN", "evals.upstream.evry=7"], "did you mean evals.upstream.every"),
        (["ckpt=RUN", "processes=3", "parallel.expert_axis=3"], "parallel.expert_axis=3"),
        (["ckpt=RUN", "evals.upstream.sets.other.test=/nowhere"], "has no shards to share settings with"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(
    run: Path, overrides: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *(one.replace("RUN", str(run)) for one in overrides)]) == 2
    said = capsys.readouterr()
    assert told.replace("RUN", str(run)) in said.err
    assert said.out == ""


def test_damaged_weights_are_not_measured(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = tmp_path / "step_00000020"
    step.mkdir()
    for file in (run / "checkpoints" / "step_00000020").iterdir():
        data = bytearray(file.read_bytes())
        if file.suffix == ".safetensors":
            for at in range(len(data) // 4, len(data), 4096):
                data[at] ^= 1
        (step / file.name).write_bytes(data)
    assert main(["eval", f"ckpt={step}"]) == 1
    assert "step_00000020" in capsys.readouterr().err


def test_a_fine_tuning_is_tested_at_any_step_and_what_would_measure_nothing_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, own = run.parent / "tuned.json", ["eval", f"ckpt={run}/checkpoints/step_00000020", "evals=[finetune]"]
    longer = [*own, "steps=99", "evals.finetune.batch_size=32", "data.holdout=0.1", f"out={out}"]
    assert main(longer) == 0  # of a run that goes on after that step
    found = json.loads(out.read_text())["metrics"]
    assert found["finetune/test/top1"] == reported(run, 20, "upstream")["test/top1"] and "finetune/val/top1" in found
    assert main([*own, "evals.finetune.test=false"]) == 2
    assert "it would measure nothing" in capsys.readouterr().err


def test_the_shards_that_images_are_held_out_of_are_checked_too(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test.tar").touch()
    words = ["data=transfer", f"data.test={tmp_path}/test.tar", "data.holdout=0.1", "evals=[finetune]"]
    assert main(["eval", f"ckpt={run}", *words]) == 2
    assert "data.train" in capsys.readouterr().err


def test_sets_of_the_same_classes_are_measured_each_by_itself(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "some.tar",
        [
            member
            for i in range(40)
            for member in ((f"{i:04d}.png", encoded(numbered_picture(i, 16))), (f"{i:04d}.cls", b"%d" % (i % 10)))
        ],
    )
    short = ["recipe=debug", "steps=2", "schedule.warmup_steps=1", "data=cifar10", "data.streams=8", *QUIET]
    run = run_here(tmp_path / "run", *short, f"data.train={tar}", f"data.test={tar}")
    # Of `keep` the labels alone are others: the rest of it is the run's.
    parts = {"low": "[0,1,2,3,4]", "high": "[5,6,7,8,9]"}
    words = [
        f"evals.upstream.sets.{name}={{test: {tar}, keep: {{labels: {labels}}}}}" for name, labels in parts.items()
    ]
    of = measured(run, *words)["metrics"]
    for measure in ("top1", "top5", "loss"):
        halves = [of[f"upstream/{name}/{measure}"] for name in parts]
        assert halves[0] != halves[1]
        assert of[f"upstream/test/{measure}"] == pytest.approx(sum(halves) / 2, rel=1e-12)
