"""Few-shot, k-NN and the probe measure the same on any number of ranks, expert axis and sharding, broken images included."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from softmoe_train.config import ConfigError, compose
from softmoe_train.data.batch import Cursor
from softmoe_train.dist import World, process_group
from softmoe_train.evals.on_sets import FeatureSets
from softmoe_train.run import train
from softmoe_train.settings import RunConfig, check
from tests.ranks.launch import run_ranks
from tests.ranks.small import build
from tests.runs import metrics
from tests.unit.data.conftest import encoded, write_tar

AXES = {2: [(1, "replicated")], 4: [(4, "replicated"), (2, "fsdp")]}  # the last cuts experts, and shards the rest
CLASSES = 5


def picture(label: int, number: int) -> np.ndarray:
    """8 x 8 pixels: a pattern of its class under noise."""
    pattern = np.random.default_rng(label).integers(0, 256, (8, 8, 3))
    noise = np.random.default_rng(1000 + number).normal(0, 60, (8, 8, 3))
    return (pattern + noise).clip(0, 255).astype(np.uint8)


def shards(folder: Path, name: str, counts: list[int], *, classes: int = CLASSES, broken: tuple[int, ...] = ()) -> str:
    """Tars with `counts` pictures, labelled number mod `classes`; those of `broken` are no pictures."""
    number = 0
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            data = b"no picture" if number in broken else encoded(picture(number % classes, number))
            members += [(f"{number:05d}.cls", b"%d" % (number % classes)), (f"{number:05d}.png", data)]
            number += 1
        write_tar(folder / f"{name}-{shard}.tar", members)
    return str(folder / f"{name}-*.tar")


def settings(sets: dict[str, tuple[str, str]], *overrides: str) -> RunConfig:
    """All three evaluators on some sets."""
    given = ", ".join(f"{name}: {{train: '{train}', test: '{test}'}}" for name, (train, test) in sets.items())
    return compose(
        RunConfig,
        [
            "recipe=debug", "evals=[fewshot,knn,probe]", f"evals.fewshot.sets={{{given}}}", "evals.fewshot.shots=[1,3]", "evals.fewshot.seeds=2", "evals.knn.k=5",
            "evals.fewshot.data.workers=0", "evals.fewshot.batch_size=3", "evals.knn.batch_size=3", "evals.probe.batch_size=3",
            "evals.probe.l2=[-8,-2]", "evals.fewshot.every=2", *overrides,
        ],
        lambda _: [],
    )  # fmt: skip


def measured(config: RunConfig, engine: Any, world: World, over: Any = iter) -> dict[str, float]:
    """What all three say."""
    sets = FeatureSets(config.evals.on_sets, image_size=8, world=world)
    state: Any = SimpleNamespace(engine=engine, step=2, cursor=Cursor(32))
    told = sets.evaluators(over).items()
    assert json.loads(json.dumps({source: one.told[1] for source, one in told}))
    return {f"{source}/{name}": value for source, one in told for name, value in one.run(state)}


def _on_rank(rank: int, world: int, config: RunConfig) -> list[dict[str, float]]:
    axes = AXES[world]
    return [measured(config, build(rank, world, *axis), World(rank, world, rank, world)) for axis in axes]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """One set with broken images on both sides, and one with more features than shots."""
    folder = tmp_path_factory.mktemp("sets")
    train, test = shards(folder, "train", [31, 30], broken=(7, 44)), shards(folder, "test", [41, 12], broken=(3,))
    few, held = shards(folder, "few", [8], classes=2), shards(folder, "held", [9], classes=2)
    return {"a": (train, test), "b": (few, held)}


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("own_cache")
def test_every_layout_measures_the_same(sets: dict[str, tuple[str, str]]) -> None:
    config = settings(sets)
    alone = World(0, 1, 0, 1)
    batches: list[int] = []

    def over(items: Any) -> Any:
        for item in items:
            batches.append(len(getattr(item, "images", ())))
            yield item

    with process_group(alone, torch.device("cpu")):
        engine = build(0, 1, 1, "replicated")
        one = measured(config, engine, alone, over)
        hidden = measured(settings(sets, "evals.fewshot.l2=heldout"), engine, alone)
    assert one["fewshot/a/3shot"] > 0.5 > 1.5 / CLASSES
    assert one["fewshot/a/3shot"] > one["fewshot/a/1shot"]
    assert one["knn/a/broken_images"] == one["probe/a/broken_images"] == 3
    # Of 24 shots, 2 classes x 3 shots x 2 draws; then 53 + 9 test images and 61 + 8 train images, once for all three: none twice.
    drawn = (8, 17)
    images = sum(size for size in batches if size)
    assert sum(drawn) <= images - (54 + 9 + 63 + 9) <= 2 * 15 + 9
    assert {name for name in one if name.endswith("_l2")} == {f"fewshot/{s}/{k}shot_l2" for s in "ab" for k in (1, 3)}
    assert one["fewshot/a/3shot_l2"] == one["fewshot/b/3shot_l2"]
    assert hidden["fewshot/a/3shot"] == pytest.approx(one["fewshot/a/3shot"], abs=0.15)
    for ranks in (2, 4):
        for said in run_ranks(_on_rank, ranks, config):
            for axis, other in zip(AXES[ranks], said, strict=True):
                assert other.keys() == one.keys()
                # Features differ in their last bits (float32), so no image but a tie may be judged otherwise; there is none here.
                exact = {name for name in one if not name.endswith(("/gradient", "/iterations"))}
                assert {n: other[n] for n in exact} == {n: one[n] for n in exact}, axis


@pytest.mark.usefixtures("own_cache")
def test_a_run_measures_and_says_on_what(sets: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    small = [
        "steps=2",
        "schedule.warmup_steps=1",
        "average=ema",
        "average.decay=0.999999999",
        "average.warmup=false",
        f"run_dir={tmp_path}/run",
    ]
    quiet = [
        "observe.wandb.mode=disabled",
        "observe.progress=off",
        "checkpoint.best=highest fewshot/a/3shot",
        "checkpoint.every=1",
    ]
    config = settings(sets, *small, *quiet, "evals.fewshot.every=1", "evals.knn.every=1")
    assert check(config, 1, 1) == []
    train(config, World(0, 1, 0, 1))
    for name in ("fewshot/a/3shot", "fewshot/b/1shot_std", "knn/a/top1"):
        assert sorted(metrics(tmp_path / "run", name)) == [1, 2]
    assert sorted(metrics(tmp_path / "run", "probe_average/b/top1")) == [2]
    # What stays the same is measured the same, beside weights that do not.
    for name in ("fewshot_average/a/3shot", "knn_average/a/top1"):
        first, second = metrics(tmp_path / "run", name).values()
        assert first == second
    facts = json.loads((tmp_path / "run" / "summary.json").read_text())["history"]["processes"][0]["facts"]
    a = facts["fewshot"]["sets"]["a"]
    assert (a["classes"], a["train"], a["test"], len(a["drawn"])) == (5, 61, 53, 2)
    assert facts["knn"]["sets"]["a"]["test_hash"] == a["test_hash"]


@pytest.mark.usefixtures("own_cache")
def test_features_that_are_not_finite_measure_nothing(sets: dict[str, tuple[str, str]]) -> None:
    alone = World(0, 1, 0, 1)
    with process_group(alone, torch.device("cpu")):
        engine = build(0, 1, 1, "replicated")
        engine.local["norm.bias"].fill_(float("nan"))
        said = measured(settings(sets), engine, alone)
    assert all(np.isnan(said[name]) for name in ("fewshot/a/1shot", "knn/b/top1", "probe/a/top1"))
    assert not any(name.endswith("_l2") for name in said)


@pytest.mark.usefixtures("own_cache")
def test_sets_that_cannot_be_measured_are_all_named_at_once(tmp_path: Path) -> None:
    train = shards(tmp_path, "train", [5])  # one image a class
    other = shards(tmp_path, "other", [9], classes=9)
    alike = shards(tmp_path, "alike", [3], classes=1)
    (tmp_path / "cut.tar").write_bytes((tmp_path / "train-0.tar").read_bytes()[:700])

    def problems(**sets: tuple[str, str]) -> list[str]:
        config, alone = settings(sets, "evals.probe=null", "evals.knn.k=6"), World(0, 1, 0, 1)
        with process_group(alone, torch.device("cpu")), pytest.raises(ConfigError) as caught:
            FeatureSets(config.evals.on_sets, image_size=8, world=alone)
        return caught.value.problems

    told = problems(few=(train, train), lack=(train, other), one=(alike, alike))
    key = "evals.fewshot.sets"
    assert told[0].startswith(
        f"{key}.lack.test={other} has 4 classes of which {key}.lack.train has no image, such as 5 (1 images)"
    )
    assert told[1].startswith(f"{key}.one.train={alike} has images of class 0 alone")
    assert told[2].startswith(
        f"evals.fewshot.shots=[1, 3]: {key}.few.train has 1 images of class 0, fewer than 3 shots, and 4 other classes have too few; use 1"
    )
    assert told[3].startswith(f"evals.knn.k=6 is more than the 5 images of {key}.few.train")
    assert len(told) == 4
    (cut,) = problems(cut=(str(tmp_path / "cut.tar"), train))
    assert cut.startswith(f"{key}.cut.train: {tmp_path}/cut.tar is not a whole, uncompressed tar of samples")
