"""The command line as people meet it: the real program, its messages and its exit codes."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from softmoe_train.commands.main import main
from softmoe_train.faults.claim import claim
from tests.forked import training
from tests.runs import SHARED, run_here, softmoe, with_digits

CIFAR = [f"data.train={SHARED}/cifar10-train-{{000000..000001}}.tar", f"data.test={SHARED}/cifar10-test-000000.tar"]
needs_cifar = pytest.mark.skipif(
    not (SHARED / "cifar10-test-000000.tar").is_file(), reason="the cifar10 shards are not on this machine"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which the program is called without a process of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_cfg_job_prints_the_whole_truth_and_starts_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipe=debug", "seed=7", "--cfg", "job"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["seed"] == 7
    assert tree["model"]["moe"]["num_experts"] == 4
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.widht=64", "model.widht=64: there is no key model.widht; did you mean model.width"),
        ("steps=ten", "steps='ten': input should be a valid integer"),
        (
            "parallel.expert_axis=3",
            "parallel.expert_axis=3 does not divide model.moe.num_experts=4 nor the 2 ranks of this run",
        ),
        ("data.train=missing", "data.train=missing: "),
        ("data.train=[]", "data.train is not set"),
    ],
)
def test_a_wrong_setting_ends_with_one_message_and_code_2(
    here: Path, override: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["data=cifar10", "data.streams=8"] if override.startswith("data.") else []
    assert main(["train", "recipe=debug", "processes=2", *data, override]) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert "nothing was started" in err
    assert out == ""
    assert list(here.iterdir()) == []


def test_cfg_job_needs_no_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg", "job"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["model"]["moe"]["num_experts"] == 128
    assert tree["data"]["train"] is None


def first_line(folder: Path, *overrides: str) -> dict[str, float]:
    run = folder / str(abs(hash(overrides)))
    steps = ["recipe=debug", "steps=2", "schedule.warmup_steps=1", "observe.every=1", "observe.wandb.mode=disabled"]
    run_here(run, *steps, *overrides)
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[1])


def test_every_setting_that_shapes_the_numbers_reaches_the_run(tmp_path: Path) -> None:
    plain = first_line(tmp_path)
    assert plain["step"] == 2
    assert plain["train/learning_rate"] == pytest.approx(1e-3)
    for override in (
        "seed=1",
        "loss=sigmoid",
        "precision=bfloat16",
        "model.moe.expert_init=independent",
    ):
        other = first_line(tmp_path, override)
        assert other["train/loss"] != plain["train/loss"] or other["train/grad_norm"] != plain["train/grad_norm"], (
            override
        )
    same = first_line(tmp_path, "micro_batches=4", "parallel.sharding=fsdp")
    assert same["train/loss"] == pytest.approx(plain["train/loss"], rel=1e-6)
    assert same["train/grad_norm"] == pytest.approx(plain["train/grad_norm"], rel=1e-5)


def test_a_run_folder_in_use_is_refused_with_its_owner(here: Path) -> None:
    short = ["recipe=debug", "steps=2", "schedule.warmup_steps=1", "observe.wandb.mode=disabled"]
    with claim(here / "runs" / "debug"):
        done = training(*short, folder=here, ok=False)  # a process does not lock itself out
    assert done.returncode == 2
    assert f"run_dir=runs/debug is in use by process {os.getpid()} on " in done.stderr
    assert main(["train", *short]) == 0


def test_a_rank_without_a_world_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "recipe=debug"]) == 2
    assert "RANK=0 is set in the environment without WORLD_SIZE" in capsys.readouterr().err
    assert list(here.iterdir()) == []


def test_all_damaged_tars_are_told_in_one_message(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.tar").write_bytes(b"not a tar" * 100)
    data = ["data=cifar10", "data.streams=8", f"data.train={tmp_path}/*.tar", f"data.test={tmp_path}/a.tar"]
    done = training("recipe=debug", "processes=2", *data, folder=tmp_path, ok=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("is not a whole, uncompressed tar") == 2


def test_an_unknown_verb_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2
    assert "train" in capsys.readouterr().err


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path: Path) -> None:
    run = ["recipe=debug", "processes=2", "checkpoint.every=4"]
    training(*run, "stop_after=8", folder=tmp_path)
    checkpoints = tmp_path / "runs/debug/checkpoints"
    config = checkpoints / "step_00000008" / "config.json"
    config.write_text(config.read_text().replace('"seed": 0', '"seed": 1'))
    done = training(*run, "stop_after=12", folder=tmp_path)
    assert "step_00000008 is damaged:\n  - config.json is not what COMPLETE.json says: it was changed" in done.stderr
    assert "resumed from runs/debug/checkpoints/step_00000004 at step 4 of 20" in done.stdout
    assert "in 2 files), data position 64; damaged, set aside: step_00000008\n" in done.stdout
    history = json.loads((tmp_path / "runs/debug/summary.json").read_text())["history"]
    assert (history["starts"], history["interruptions"], history["lost_steps"]) == (2, {"stopped": 2}, 4)
    assert [(p["from_step"], p["to_step"]) for p in history["processes"]] == [(0, 8), (4, 12)]
    assert history["processes"][1]["facts"]["resumed"]["set_aside"] == ["step_00000008"]
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["step_00000004", "step_00000008", "step_00000008.damaged", "step_00000012"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path: Path) -> None:
    run = ["recipe=debug", "processes=4", "parallel.expert_axis=4", "steps=8", "checkpoint.every=0"]
    training(*run, "stop_after=4", folder=tmp_path)
    (tmp_path / "runs/debug/checkpoints/step_00000004/rank_00002.safetensors").unlink()
    metrics = (tmp_path / "runs/debug/metrics.jsonl").read_bytes()
    for ranks in (2, 1):
        done = training(*run, f"processes={ranks}", f"parallel.expert_axis={ranks}", folder=tmp_path, ok=False)
        assert done.returncode == 3
        assert "Traceback" not in done.stderr
        assert "no checkpoint is left to resume from" in done.stderr
        assert "step_00000004.damaged is damaged" in done.stderr
        if ranks == 2:
            assert "rank_00002.safetensors is missing" in done.stderr
            assert re.search(r"experts? 2(\.\.2)? of model\.blocks\.1\.moe\.experts\.w1", done.stderr)
    assert (tmp_path / "runs/debug/metrics.jsonl").read_bytes() == metrics


def test_the_run_folder_holds_what_the_readme_says_and_no_pickle(tmp_path: Path) -> None:
    softmoe(
        "recipe=debug", "processes=2", folder=tmp_path
    )  # the real program; elsewhere here, a process with its imports
    run = tmp_path / "runs" / "debug"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["ended"] == "complete"
    assert summary["steps"] == 20
    assert yaml.safe_load((run / "config.yaml").read_text())["name"] == "debug"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all({"step", "images_seen"} <= line.keys() for line in lines)
    assert {"train/loss", "upstream/test/top1", "perf/images_per_second"} <= {name for line in lines for name in line}
    kinds = {path.suffix for path in (run / "checkpoints").rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json"}


def test_image_files_of_another_class_count_are_named(tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip("the image shards are not on this machine")
    done = training(
        "recipe=cifar10", "shrink=laptop", *CIFAR, "model.num_classes=4", "data.max_broken=3", folder=tmp_path, ok=False
    )
    assert done.returncode == 3
    assert "cifar10-train-00000" in done.stderr
    assert "num_classes" in done.stderr


@needs_cifar
def test_cifar10_shrinks_to_a_laptop(tmp_path: Path) -> None:
    done = training("recipe=cifar10", "shrink=laptop", *CIFAR, folder=tmp_path)
    assert "complete at step 40 of 40" in done.stdout


@pytest.mark.full  # CI runs it whole
def test_quickstart_shrinks_to_a_laptop(tmp_path: Path) -> None:
    done = training("recipe=quickstart", "shrink=laptop", folder=with_digits(tmp_path))
    assert "complete at step 40 of 40" in done.stdout


@needs_cifar
@pytest.mark.full
def test_experts_learn_from_real_photographs(tmp_path: Path) -> None:
    """A hundred steps of the real recipe: well above chance (0.10), whatever the machine."""
    more = ["steps=100", "schedule.warmup_steps=10", "evals.upstream.every=0", "checkpoint.every=0"]
    training("recipe=cifar10", *CIFAR, *more, folder=tmp_path)
    summary = json.loads((tmp_path / "runs/cifar10/summary.json").read_text())
    assert summary["metrics"]["upstream/test/top1"] > 0.2


def test_a_second_folder_is_not_needed_to_start_again(tmp_path: Path) -> None:
    training("recipe=debug", "steps=4", "schedule.warmup_steps=1", folder=tmp_path)
    shutil.rmtree(tmp_path / "runs/debug/checkpoints")
    done = training("recipe=debug", "steps=4", "schedule.warmup_steps=1", "seed=3", folder=tmp_path)
    assert "resumed" not in done.stdout
    lines = (tmp_path / "runs/debug/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3, "the first attempt's lines are gone: its steps come again"
