"""Fine-tuning: what is composed around a checkpoint, what it may not be told, at the end of a run, and among several rates."""

import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from softmoe_train.at_end import at_end_problems, children_of, is_complete
from softmoe_train.commands.finetune import finetune
from softmoe_train.commands.main import main
from softmoe_train.config import ConfigError, compose, config_folder, save_yaml
from softmoe_train.dist import World
from softmoe_train.finetune import compose_finetune
from softmoe_train.optim.schedule import learning_rate
from softmoe_train.run import train
from softmoe_train.settings import RunConfig, check
from softmoe_train.sweep import drive
from softmoe_train.sweep.ledger import Ledger
from softmoe_train.sweep.outcome import Outcome, ended
from softmoe_train.sweep.points import Point
from tests.runs import metrics, same_bits, stored

ALONE = World(0, 1, 0, 1)
QUIET = ["observe.wandb.mode=disabled", "observe.progress=off"]
SMALL = ["shrink=laptop", "data=synthetic", "data.num_test=16", "data.num_train=320", *QUIET]
RECIPES = sorted(file for file in (config_folder() / "recipe" / "finetune").glob("*.yaml") if file.stem[0] != "_")
AT_THE_END = '"shrink=laptop", "data=synthetic", "data.num_test=16", "data.num_train=320", "steps=4", "schedule.warmup_steps=1", "checkpoint.every=2"'


def run_of(*overrides: str) -> RunConfig:
    """A checked run on one process."""
    return compose(
        RunConfig,
        [*overrides, *QUIET],
        lambda c: [*check(c, 1, 1), *at_end_problems(c, lambda child: check(child, 1, 1))],
    )


def tuned(*overrides: str) -> RunConfig:
    """A checked fine-tuning on one process."""
    return compose_finetune(list(overrides), lambda c: check(c, 1, 1))


def refused(composing: Callable[..., RunConfig], *overrides: str) -> str:
    """What is told instead."""
    with pytest.raises(ConfigError) as caught:
        composing(*overrides)
    return "\n".join(caught.value.problems)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: 16 pixels in patches of 4, ten classes, four steps."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    words = [
        "recipe=debug",
        f"run_dir={folder}",
        "steps=4",
        "schedule.warmup_steps=1",
        "checkpoint.every=2",
        "evals=[]",
    ]
    assert train(run_of(*words), ALONE) == "complete"
    return folder


def test_the_model_is_the_checkpoint_s_with_the_recipe_s_images_and_classes(pretrained: Path) -> None:
    run = tuned(f"ckpt={pretrained}", "recipe=finetune/pets", "data=synthetic", "batch_size=64")
    before = run_of("recipe=debug").model
    assert run.model == before.model_copy(
        update={"image_size": 384, "num_classes": 37}
    )  # slots among what is unchanged
    assert run.warm is not None and (run.warm.source, run.warm.head) == (str(pretrained), "fresh")
    assert (run.name, run.run_dir) == ("finetune-pets-of-mine", "runs/finetune-pets-of-mine")
    assert run.observe.wandb.job_type == "finetune"
    step = pretrained / "checkpoints" / "step_00000002"
    words = [
        f"ckpt={step}",
        "recipe=finetune/pets",
        *SMALL,
        "model.image_size=64",
        "model.moe.sparse.capacity_factor=1.5",
        "observe.wandb.job_type=pretrain",
    ]
    other = tuned(*words)
    assert other.run_dir == "runs/finetune-pets-of-mine-step_00000002-laptop"
    assert (other.model.image_size, other.model.width, other.model.moe.sparse.capacity_factor) == (
        64,
        before.width,
        1.5,
    )
    assert other.observe.wandb.job_type == "pretrain"  # as given


def test_what_a_fine_tuning_cannot_be_is_refused_before_it_starts(pretrained: Path, tmp_path: Path) -> None:
    ckpt, recipe = f"ckpt={pretrained}", "recipe=finetune/pets"
    said = refused(tuned, "recipe=finetune/pest", "model=vit_b16", "warm.head=auto", "stepz=3")
    assert all(
        word in said for word in ("ckpt is not set", "no such file", "warm.head: a head always", "did you mean steps?")
    )
    said = refused(tuned, "ckpt=nowhere", "recipe=pareto")
    assert "there is no such file or folder" in said and "recipe=pareto: is not for fine-tuning" in said
    said = refused(tuned, ckpt, "model=vit_b16")
    assert "recipe is not set; use one of finetune/cifar10" in said and "model: it is that of ckpt=" in said
    (tmp_path / "one.tar").touch()
    same = [f"data.{part}={tmp_path}/one.tar" for part in ("train", "test")]
    assert "one.tar is trained on too, and no test" in refused(tuned, ckpt, recipe, *same, *QUIET)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_a_fine_tuning_recipe_says_what_it_is_composes_as_it_says_and_runs_shrunk(
    recipe: Path, pretrained: Path, tmp_path: Path
) -> None:
    header = [line[1:].strip() for line in recipe.read_text().splitlines() if line.startswith("#")]
    said = {line.split(":")[0] for line in header if re.match(r"[A-Z][a-z]+: ", line)}
    assert {"Reproduces", "Command", "Data", "Layout", "Hardware", "Time", "Score", "Unpublished", "Reached"} <= said
    (tmp_path / "train.tar").touch(), (tmp_path / "test.tar").touch()
    words = [shlex.split(found[1]) for line in header if (found := re.search(r"softmoe finetune (ckpt=[^(]*)", line))]
    for given in words:
        filled = [word.replace("ckpt=RUN", f"ckpt={pretrained}") for word in given]
        filled = [re.sub(r"data.(\w+)=SHARDS", rf"data.\1={tmp_path}/\1.tar", word) for word in filled]
        compose_finetune(filled, lambda c: check(c, 8, 8))
    assert words
    small = tuned(f"ckpt={pretrained}", f"recipe=finetune/{recipe.stem}", *SMALL, f"run_dir={tmp_path}/run")
    assert train(small.model_copy(update={"stop_after": 1}), ALONE) == "stopped"


def test_recipes_are_the_documented_protocols() -> None:
    """paper.md 6.2; the small sets as big_vision's transfer.py."""
    of = {file.stem: compose(RunConfig, [f"recipe=finetune/{file.stem}"], lambda _: []) for file in RECIPES}
    documented = {
        "imagenet1k": (1024, 10_000, 500, 0.003, 10.0, 0.01), "imagenet1k_vit": (512, 20_000, 500, 0.03, 1.0, 0.01),
        "cifar10": (512, 10_000, 500, 0.003, 1.0, 0.02), "cifar100": (512, 10_000, 500, 0.01, 1.0, 0.02),
        "pets": (512, 500, 100, 0.003, 1.0, 0.1), "flowers": (512, 500, 100, 0.003, 1.0, 0.1),
    }  # fmt: skip
    assert of.keys() == documented.keys()
    for name, values in documented.items():
        run = of[name]
        rates = run.schedule
        found = (run.batch_size, run.steps, rates.warmup_steps, rates.peak, run.optim.clip_norm, run.data.holdout)
        assert found == values, name
        assert (run.optim.kind, run.optim.momentum, run.loss, run.model.image_size) == ("sgd", 0.9, "softmax", 384)
        assert set(run.optim.decay.model_dump().values()) == {0.0}
    run = of["imagenet1k"]
    assert learning_rate(run.schedule, run.steps - 1, run.steps) == pytest.approx(1e-5, rel=1e-3)


def test_frozen_routers_stay_to_the_last_bit_and_all_else_learns(pretrained: Path, tmp_path: Path) -> None:
    words = [
        f"ckpt={pretrained}",
        "recipe=finetune/pets",
        *SMALL,
        f"run_dir={tmp_path}",
        "steps=5",
        "schedule.warmup_steps=1",
        "schedule.peak=1.0",
    ]
    run = tuned(*words, 'optim.frozen=["*.router.*"]', "optim.layer_decay=0.5", "optim.decay.router_scale=0.1")
    assert train(run, ALONE) == "complete"
    before, after = stored(pretrained, 4), stored(tmp_path, 5)
    names = [
        name for name in after if ":model." in name and before[name].shape == after[name].shape
    ]  # but position and head
    same = {name for name in names if torch.equal(before[name], after[name])}
    assert same == {name for name in names if ".router." in name} != set()
    assert not any(".router." in name for name in after if "optimizer." in name)


def test_a_fine_tuning_at_the_end_goes_on_where_it_was_interrupted_and_is_told_by_the_run(tmp_path: Path) -> None:
    """Bit for bit as if it had not been, and never again once it is complete."""

    def words(folder: str, *more: str) -> list[str]:
        inner = ", ".join([AT_THE_END, *(f'"{word}"' for word in more)])
        own = ["steps=2", "schedule.warmup_steps=1", "evals=[]", f"run_dir={tmp_path}/{folder}"]
        return ["recipe=debug", *own, "finetune.small.recipe=finetune/pets", f"finetune.small.overrides=[{inner}]"]

    assert train(run_of(*words("one")), ALONE) == "complete"
    assert train(run_of(*words("two", "stop_after=2")), ALONE) == "stopped"
    child = tmp_path / "two" / "finetune" / "small"
    assert [path.name for path in sorted((child / "checkpoints").glob("step_*"))] == ["step_00000002"]
    assert metrics(tmp_path / "two", "finetune/small/top1") == {}
    assert train(run_of(*words("two")), ALONE) == "complete"
    assert same_bits(stored(tmp_path / "one" / "finetune" / "small", 4), stored(child, 4))
    told = metrics(tmp_path / "two", "finetune/small/top1")
    assert told == {2: metrics(child, "finetune/test/top1")[4]} == metrics(tmp_path / "one", "finetune/small/top1")
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["metrics"]["finetune/small/top1"] == told[2]
    lines = (tmp_path / "two" / "metrics.jsonl").read_text()
    assert train(run_of(*words("two")), ALONE) == "complete"
    assert (tmp_path / "two" / "metrics.jsonl").read_text() == lines


def test_a_run_is_complete_when_its_fine_tunings_are(tmp_path: Path) -> None:
    words = ["recipe=debug", f"run_dir={tmp_path}", "finetune.pets.recipe=finetune/pets"]
    run = compose(RunConfig, [*words, 'finetune.pets.overrides=["data.train=a.tar"]'], lambda _: [])

    def end(one: RunConfig, steps: int) -> None:
        one.folder.mkdir(parents=True, exist_ok=True)
        save_yaml(one.as_saved(), one.folder / "config.yaml")
        (one.folder / "summary.json").write_text(json.dumps({"ended": "complete", "steps": steps}))

    end(run, run.steps)
    point = Point("one", [], {}, {}, run)
    assert not is_complete(run) and ended(point, 75).state == "interrupted" and ended(point, 0).state == "stopped"
    (child,) = children_of(run).values()
    end(child, child.steps - 1)
    assert not is_complete(run)
    end(child, child.steps)
    assert is_complete(run) and ended(point, 0).state == "complete"


def test_a_mistake_in_a_fine_tuning_at_the_end_is_told_before_the_run_starts() -> None:
    begin = ["recipe=debug", "finetune.pets.recipe=finetune/pets"]
    said = refused(run_of, *begin, 'finetune.pets.overrides=["data.train=nowhere.tar", "run_dir=x"]')
    assert "finetune.pets: run_dir: it is the run's" in said
    assert "finetune.pets: data.test" in refused(run_of, *begin, 'finetune.pets.overrides=["data.train=nowhere.tar"]')
    said = refused(run_of, *begin, "finetune.pets.overrides=[data=synthetic,steps=4]")
    assert 'as \'finetune.pets.overrides=["steps=100",' in said
    assert "finetune.pets: data.train" in refused(run_of, *begin)  # no overrides are none


class Here(NamedTuple):
    """Runs the points of a sweep in this process, but fails with `code` at rates that begin with `failing`."""

    failing: str
    code: int

    def run(self, points: Sequence[Point], ledger: Ledger) -> list[Outcome]:
        return [self._outcome(point) for point in points]

    def _outcome(self, point: Point) -> Outcome:
        if is_complete(point.config):
            return Outcome(point, "complete", None, "complete already")
        if point.swept["schedule.peak"].startswith(self.failing):
            return Outcome(point, "failed", self.code, "planted")
        return ended(point, finetune(point.overrides, print_only=False))


def test_a_rate_is_chosen_on_held_out_images_and_only_the_chosen_one_is_tested(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails or diverges is told and not chosen; what was tested is tested again where it is not what is asked now."""
    words = [
        "finetune",
        "-m",
        f"ckpt={pretrained}",
        "recipe=finetune/pets",
        *SMALL,
        "steps=6",
        "schedule.warmup_steps=1",
        "sweep.cost=false",
    ]
    mine = [*words, f"run_dir={tmp_path}", "schedule.peak=1e-9,0.03,7"]
    monkeypatch.setattr(drive, "build_launcher", lambda _: Here(failing="7", code=3))
    assert main(mine) == 0
    folders = {peak: tmp_path / f"peak={peak}" for peak in ("1e-09", "0.03")}
    held = {peak: metrics(folder, "finetune/val/loss")[6] for peak, folder in folders.items()}
    assert held["0.03"] < held["1e-09"]  # and so, with equal top-1 at worst, it is chosen
    said = capsys.readouterr()
    assert re.search(r"peak=0\.03 .*chosen", said.out) and re.search(r"peak=1e-09 .* -\n", said.out)
    assert re.search(r"peak=7 +failed +-\n", said.out) and "peak=7: planted" in said.err
    assert [(folder / "test.json").is_file() for folder in folders.values()] == [False, True]
    assert [metrics(folder, "finetune/test/top1") for folder in folders.values()] == [{}, {}]

    account = folders["0.03"] / "test.json"
    first = account.read_text()
    account.write_text(
        first.replace('"digest": "', '"digest": "0').replace('"finetune/test/top1": ', '"finetune/test/top1": 7')
    )
    assert main(mine) == 0 and account.read_text() == first  # of other images, as it said
    when = account.stat().st_mtime_ns
    assert main(mine) == 0 and account.stat().st_mtime_ns == when

    summary = folders["0.03"] / "summary.json"
    summary.write_text(re.sub(r'("finetune/val/loss": )[^,\n]+', r"\1null", summary.read_text()))
    capsys.readouterr()
    assert main(mine) == 0
    table = capsys.readouterr().out
    assert re.search(r"peak=0\.03 +diverged +-\n", table) and re.search(r"peak=1e-09 .*chosen", table)

    monkeypatch.setattr(drive, "build_launcher", lambda _: Here(failing="", code=3))
    assert main([*words, f"run_dir={tmp_path}/none", "schedule.peak=1,2"]) == 3
    assert main(words) == 2


def test_a_fine_tuning_is_complete_with_the_settings_and_the_shards_that_it_had(tmp_path: Path) -> None:
    words = ["recipe=debug", "data=digits", "data.test=b.tar", f"run_dir={tmp_path}"]

    def run(*more: str) -> RunConfig:
        return compose(RunConfig, [*words, "data.train=a.tar", *more], lambda _: [])

    save_yaml(run().as_saved(), tmp_path / "config.yaml")
    (tmp_path / "summary.json").write_text(json.dumps({"ended": "complete", "steps": run().steps}))
    assert is_complete(run()) and is_complete(run("data.test=c.tar", "evals=[]", "processes=2"))
    for other in ("steps=21", "schedule.peak=0.5", "data.train=c.tar", "data.holdout=0.1"):
        assert not is_complete(run(other)), other
