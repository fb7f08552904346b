"""What the settings may say of sets, and what is refused before anything starts."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from softmoe_train import config as configuration
from softmoe_train.config import ConfigError, compose, compose_onto, config_folder
from softmoe_train.data.build import build_pool_stream
from softmoe_train.data.records import Resize
from softmoe_train.evals.ridge import count_hits, solve_ridge
from softmoe_train.evals.sets import measured_set, named_sets
from softmoe_train.settings import RunConfig, check
from tests.runs import SHARED

ON = ["recipe=debug", "evals=[upstream,fewshot,knn]"]
PETS = "evals.fewshot.sets.pets"


def problems_of(*overrides: str, size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(RunConfig, [*ON, *overrides], lambda config: check(config, size, size))
    return caught.value.problems


@pytest.fixture
def pets(tmp_path: Path) -> list[str]:
    """Overrides that name a set whose files are there."""
    for part in ("train", "test"):
        (tmp_path / f"{part}.tar").touch()
    return [f"{PETS}.train={tmp_path}/train.tar", f"{PETS}.test={tmp_path}/test.tar"]


def test_what_is_wrong_with_sets_is_told_by_its_key(pets: list[str]) -> None:
    (none,) = problems_of()
    assert none.startswith(
        "evals.fewshot.sets={}: there is no set to measure on; give evals.fewshot.sets.NAME.train=SHARDS"
    )
    (own,) = problems_of(*pets, "evals.knn.sets.birds=7")
    assert (
        own
        == "evals.knn.sets.birds=7: a set is a mapping; give evals.knn.sets.birds.train=SHARDS evals.knn.sets.birds.test=SHARDS"
    )
    told = problems_of(
        *pets, f"{PETS}.mixup=0.2", f"{PETS}.keep.labels=[]", f"{PETS}.workers=-1", "evals.fewshot.sets={b/c: {train: x}}",
        "evals.fewshot.sets.cars.test=nowhere", "evals.fewshot.sets.dtd={train: a, test: b, keep: {labels: [tulip]}}",
    )  # fmt: skip
    start = (
        "evals.fewshot.sets.b/c: 'b/c' is no name for a set",
        "evals.fewshot.sets.cars.train is not set: name a folder, a glob or a brace pattern of tar shards, as in evals.fewshot.sets.cars.train=FOLDER.",
        "evals.fewshot.sets.cars.test=nowhere: nowhere cannot be found",
        "evals.fewshot.sets.dtd.train=a: a cannot be found",
        "evals.fewshot.sets.dtd.test=b: b cannot be found",
        "evals.fewshot.sets.dtd.keep.labels: 'tulip' is no name of evals.fewshot.sets.dtd.classes=None",
        f"{PETS}.mixup: there is no such key; a set has train, test, cache, workers",
        f"{PETS}.workers=-1: input should be greater than or equal to 0",
        f"{PETS}.keep.labels=[] keeps no sample",
    )
    for problem, words in zip(told, start, strict=True):
        assert problem.startswith(words)
    (l2,) = problems_of(*pets, "evals.fewshot.l2=best")
    assert l2.startswith("evals.fewshot.l2='best': input should be test, heldout, or a whole number")
    assert "evals.fewshot.shots=[5, 1] must list" in problems_of(*pets, "evals.fewshot.shots=[5,1]")[0]


def test_groups_and_the_best_checkpoint_know_the_evaluators_of_sets(pets: list[str]) -> None:
    sparse = ["model.moe.router=tokens_choice", "model.moe.sparse.group_images=4"]
    (group,) = problems_of(*pets, *sparse, "evals.knn.batch_size=6")
    assert group == (
        "model.moe.sparse.group_images=4 does not divide evals.knn.batch_size=6; use 1 or 2, or a multiple of 4 there"
    )
    (unknown,) = problems_of(*pets, "average=ema", "checkpoint.best=highest fewshot/pets/7shot")
    assert "use one of upstream/test/top1" in unknown
    assert "fewshot/pets/10shot, " in unknown
    assert unknown.endswith("knn_average/pets/top1")
    (never,) = problems_of(*pets, "checkpoint.best=highest knn_average/pets/top1", "average=ema")
    assert "evals.knn.every and checkpoint.every that meet" in never
    every = ["evals.fewshot.every=10", "checkpoint.best=highest fewshot/pets/10shot"]
    compose(RunConfig, [*ON, *pets, *every], lambda config: check(config, 1, 1))


def test_a_set_says_anew_what_of_the_data_is_another_for_it(pets: list[str]) -> None:
    anew = ["keep={labels: [5, 6], renumber: true}", "test_transform.resize=null", "label=json:species"]
    config = compose(RunConfig, [*ON, *pets, *(f"{PETS}.{one}" for one in anew)], lambda config: check(config, 1, 1))
    assert config.evals.fewshot is not None
    ([one], problems) = named_sets("fewshot", config.evals.fewshot, 16)
    assert problems == []
    assert one.data.keep.model_dump() == {"labels": [5, 6], "keys": None, "renumber": True}
    assert one.data.test_transform == Resize(kind="resize", resize=None, antialias=False)
    assert one.data.label == "json:species"
    other = compose(
        RunConfig, [*ON, *pets, f"{PETS}.test_transform={{kind: resize_central_crop, resize: 20}}"], lambda _: []
    )
    assert other.evals.fewshot is not None
    assert named_sets("fewshot", other.evals.fewshot, 16)[0][0].data.test_transform.kind == "resize_central_crop"


def test_sets_may_stand_in_a_recipe_and_be_added_to_a_saved_run(
    pets: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "conf"
    shutil.copytree(config_folder(), folder)
    (folder / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - debug\n  - override /evals: [upstream, fewshot]\n"
        "evals:\n  fewshot:\n    shots: [5]\n    sets:\n      birds: {train: a.tar, test: b.tar}\n"
    )
    monkeypatch.setattr(configuration, "config_folder", lambda: folder)
    mine = compose(RunConfig, ["recipe=mine", *pets], lambda _: [])
    assert mine.evals.fewshot is not None
    assert mine.evals.fewshot.shots == [5]
    assert set(mine.evals.fewshot.sets) == {"birds", "pets"}
    plain = compose(RunConfig, ["recipe=debug"], lambda _: []).as_saved()
    later = compose_onto(RunConfig, plain, ["evals=[fewshot]", *pets], lambda _: [])
    assert later.evals.fewshot is not None
    assert set(later.evals.fewshot.sets["pets"]) == {"train", "test"}
    assert later.evals.upstream is None


def pixels_of(config: RunConfig, side: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The gray pixels and the classes of both parts of the one set."""
    assert config.evals.fewshot is not None
    measured = measured_set(named_sets("fewshot", config.evals.fewshot, side)[0][0])
    pixels, classes = [], []
    for pool, numbers in ((measured.train_pool, measured.train), (measured.test_pool, measured.test)):
        assert np.bincount(measured.class_of(pool, numbers)).tolist() == [10] * 40
        stream = build_pool_stream(measured.named.data, pool, numbers, image_size=side, batch_size=100, rank=0, world=1)
        pixels.append(torch.cat([batch.images[:, 0].flatten(1) for batch in stream]).float())
        classes.append(torch.from_numpy(measured.class_of(pool, numbers)))
    return pixels, classes


def test_the_protocol_on_pixels_gives_what_is_known_of_real_images() -> None:
    if not SHARED.is_dir():
        pytest.skip(f"no real shards at {SHARED}")
    overrides = [f"evals.fewshot.sets.o.{part}={SHARED}/omniglot40-{part}-000000.tar" for part in ("train", "test")]
    overrides += ["evals.fewshot.data.test_transform.resize=null", "evals.fewshot.data.workers=0"]
    config = compose(RunConfig, ["recipe=debug", "evals=[fewshot]", *overrides], lambda _: [])
    pixels, labels = pixels_of(config, side=105)  # as they are stored
    solved = solve_ridge(pixels[0], labels[0], 40)
    share = count_hits(solved, pixels[1], labels[1], range(-10, 20)).double() / len(labels[1])
    assert share.max() == pytest.approx(0.40, abs=0.03)
