"""A training set of several sources: batches, layouts, replacements, measures, fingerprints and refusals."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from softmoe_train.changes import changed_settings
from softmoe_train.config import ConfigError, compose
from softmoe_train.data import Cursor, build_stream, check_data, make_indexes
from softmoe_train.data.mixture import Mixture, source_seed
from softmoe_train.data.order import Order
from softmoe_train.settings import RunConfig
from tests.unit.data.conftest import encoded, numbered_picture, numbers_of, settings, write_tar

WEIGHTS = {"few": 1, "many": 3}


def shard(folder: Path, name: str, numbers: range, broken: tuple[int, ...] = ()) -> str:
    members = []
    for number in numbers:
        picture = b"broken" if number in broken else encoded(numbered_picture(number))
        members += [(f"{number}.cls", b"%d" % (number % 10)), (f"{number}.png", picture)]
    return str(write_tar(folder / name, members))


def mixed(folder: Path, *, broken: tuple[int, ...] = (), **changes: object):
    """Twelve numbered pictures of "few" in two tars, twenty from 100 on of "many"; three of many to one of few."""
    few = [shard(folder, "few-0.tar", range(5)), shard(folder, "few-1.tar", range(5, 12))]
    many = shard(folder, "many.tar", range(100, 120), broken)
    sources = {
        "many": {"shards": many, "weight": 6, "seed": 1},
        "few": {"shards": few, "weight": 2, "seed": 0},
    }
    return settings(mixture=sources, **changes)


def stream(cfg, rank: int = 0, world: int = 1, *, batch: int = 8):
    return build_stream(cfg, image_size=4, num_classes=10, seed=7, global_batch=batch, rank=rank, world=world)


def test_batches_hold_what_the_mixture_says(tmp_path: Path) -> None:
    few, many = (
        Order(counts, streams=4, window=8, block=4, seed=source_seed(7, own))
        for counts, own in (([5, 7], 0), ([20], 1))
    )
    mixture = Mixture([few, many], [1, 3], seed=7, names=["few", "many"])
    one = stream(mixed(tmp_path))
    seen = []
    for batch in islice(one, 8):
        where = mixture.locate(batch.sample_ids.numpy())
        numbers = (np.asarray([0, 5, 100])[where.shard] + where.index).tolist()
        assert numbers_of(batch.images) == numbers
        assert batch.labels.tolist() == [number % 10 for number in numbers]
        seen += numbers
    assert sum(number < 100 for number in seen) == 16  # a quarter of 64
    assert sorted(n for n in seen if n < 100)[:12] != sorted(n for n in seen if n < 100)[4:]
    names = [(sample.shard, sample.key) for sample in one.samples(Cursor(0), 0)]
    assert names == [("many.tar", str(n)) if n >= 100 else (f"few-{int(n > 4)}.tar", str(n)) for n in seen[:8]]


def test_a_mixture_gives_every_layout_the_same_and_goes_on_anywhere(tmp_path: Path) -> None:
    cfg = mixed(tmp_path)
    whole = list(islice(stream(cfg), 6))
    ranks = [list(islice(stream(cfg, rank, 2), 6)) for rank in (0, 1)]
    for one, *parts in zip(whole, *ranks, strict=True):
        ids = torch.cat([part.sample_ids for part in parts])
        assert torch.equal(torch.cat([part.images for part in parts])[ids.argsort()], one.images)
    resumed = stream(cfg)
    resumed.seek(whole[2].cursor)
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[3:], islice(resumed, 3), strict=True))


def test_a_broken_sample_is_replaced_from_its_own_source(tmp_path: Path) -> None:
    broken = tuple(range(100, 118, 2))
    cfg = mixed(tmp_path, broken=broken, max_broken=1000)
    one = stream(cfg)
    reported = set()
    for batch in islice(one, 20):
        asked = [int(sample.key) for sample in one.samples(Cursor(batch.cursor.position - 8), 0)]
        for wanted, got in zip(asked, numbers_of(batch.images), strict=True):
            assert (wanted >= 100) == (got >= 100)
            assert got == wanted or (wanted in broken and got not in broken)
        reported |= {one.key for one in batch.broken}
    assert reported <= {str(number) for number in broken}
    assert len(reported) > 5


def test_samples_and_epochs_of_every_source_are_told(tmp_path: Path) -> None:
    one = stream(mixed(tmp_path))
    few = [n for batch in islice(one, 5) for n in numbers_of(batch.images) if n < 100]
    told = one.measures(Cursor(40))
    assert told == {
        "few/samples": len(few),
        "few/epochs": len(few) / 12,
        "many/samples": 40 - len(few),
        "many/epochs": (40 - len(few)) / 20,
    }
    assert stream(settings(train=str(tmp_path / "many.tar"))).measures(Cursor(40)) == {}


def test_the_fingerprint_follows_sources_and_not_how_they_are_written(tmp_path: Path) -> None:
    cfg = mixed(tmp_path)
    plain = stream(cfg).fingerprint()
    assert cfg.mixture is not None

    def changed(name: str, **values: object) -> dict[str, object]:
        assert cfg.mixture is not None
        sources = {n: s.model_dump() for n, s in cfg.mixture.items()}
        sources[name] |= values
        return stream(settings(mixture=sources)).fingerprint()

    same = settings(mixture={n: {**s.model_dump(), "weight": WEIGHTS[n]} for n, s in reversed(cfg.mixture.items())})
    assert stream(same).fingerprint() == plain
    assert changed("few", weight=3) != plain
    assert changed("few", seed=5) != plain
    assert changed("few", shards=[str(tmp_path / "few-0.tar")]) != plain
    renamed = {f"{name}_": source.model_dump() for name, source in cfg.mixture.items()}
    assert stream(settings(mixture=renamed)).fingerprint() != plain


def test_without_a_mixture_the_fingerprint_is_that_of_old_checkpoints(numbered_shards) -> None:
    told = stream(settings(train=str(numbered_shards(4, 6)))).fingerprint()
    assert list(told) == ["kind", "data", "samples", "streams", "shuffle_window", "block", "seed"]
    assert {**told, "data": ""} == {
        "kind": "webdataset", "data": "", "samples": 10, "streams": 4, "shuffle_window": 8, "block": 4, "seed": 7,
    }  # fmt: skip


def test_every_tar_of_every_source_is_indexed_once(tmp_path: Path, index_cache: Path) -> None:
    (tmp_path / "bad").mkdir()
    bad = tmp_path / "bad" / "torn.tar"
    bad.write_bytes(b"no tar")
    cfg = mixed(tmp_path)
    assert cfg.mixture is not None
    sources = {name: source.model_dump() for name, source in cfg.mixture.items()}
    sources["few"]["shards"] = [*sources["few"]["shards"], str(bad)]
    found = [make_indexes(settings(mixture=sources), part=part, parts=2, needs_test=False) for part in (0, 1)]
    assert [len(one) for one in found] == [1, 0] or [len(one) for one in found] == [0, 1]
    assert len(list(index_cache.rglob("*.safetensors"))) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"train": "x"},
            "data.train=x with data.mixture={few, many}: both name what is trained on; set one of them to null",
        ),
        ({"weight": 4999}, "use smaller ones, as few=1, many=100"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_before_a_shard_is_read(tmp_path: Path, changes, said: str) -> None:
    cfg = mixed(tmp_path, **({} if "weight" in changes else changes))
    assert cfg.mixture is not None
    sources = {name: source.model_dump() for name, source in cfg.mixture.items()}
    if "weight" in changes:
        sources["many"]["weight"] = changes["weight"]
    cfg = settings(mixture=sources, train=cfg.train)
    problems = check_data(cfg, image_size=4, global_batch=8, world=1, needs_test=False)
    assert said in problems[0]
    with pytest.raises(ValueError, match=r"data\.mixture"):
        stream(cfg)


def test_a_source_that_is_missing_or_empty_is_named_by_its_key(tmp_path: Path) -> None:
    sources = {"a": {"shards": "/nowhere", "weight": 1, "seed": 0}, "b": {"shards": "", "weight": 1, "seed": 0}}
    problems = check_data(settings(mixture=sources), image_size=4, global_batch=8, world=1, needs_test=False)
    assert [problem.split("=")[0].split(" ")[0] for problem in problems] == [
        "data.mixture.a.shards",
        "data.mixture.b.shards",
    ]
    sources["a"]["shards"] = str(write_tar(tmp_path / "empty.tar", []))
    with pytest.raises(
        ValueError, match=r"data\.mixture\.a\.shards=.*empty\.tar names 1 shards without a single sample"
    ):
        stream(settings(mixture={"a": sources["a"]}))


MIXED = "data.mixture={digits: {shards: a.tar, weight: 1, seed: 0}, flowers: {shards: b.tar, weight: 1, seed: 0}}"


def test_a_mixture_and_its_parts_are_hydra_overrides() -> None:
    lines = ["data=digits", "data.train=null", MIXED, "data.mixture.flowers.weight=2"]
    data = compose(RunConfig, lines, lambda _: []).data
    assert data.kind == "webdataset" and data.mixture is not None
    assert {name: source.weight for name, source in data.mixture.items()} == {"digits": 1, "flowers": 2}
    with pytest.raises(ConfigError) as caught:  # each is tried alone, beside a mistake
        compose(RunConfig, [*lines[2:], "data.mixture.flower.weight=2"], lambda _: [])
    [problem] = caught.value.problems
    assert problem.startswith("data.mixture.flower.weight=2: there is no key data.mixture.flower")


@pytest.mark.parametrize("sources", [{"a/b": 1}, {"a.b": 1}, {"": 1}, {}, {"a": 0}])
def test_a_source_without_a_plain_name_or_a_weight_is_refused(sources: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="mixture"):
        settings(mixture={name: {"shards": "x", "weight": weight, "seed": 0} for name, weight in sources.items()})


def test_shards_of_a_source_may_be_moved_under_a_run_and_nothing_else_of_it_changes() -> None:
    plain = {"data": {"mixture": {"a": {"shards": "x", "weight": 1, "seed": 0}}}}
    moved = {"data": {"mixture": {"a": {"shards": ["y"], "weight": 1, "seed": 0}}}}
    assert changed_settings(plain, moved) == []
    for key in ("weight", "seed"):
        other = {"data": {"mixture": {"a": {**plain["data"]["mixture"]["a"], key: 7}}}}
        [told] = changed_settings(plain, other)
        assert told.startswith(f"data.mixture.a.{key}=7 (was ")
    assert len(changed_settings(plain, {"data": {"mixture": None}})) == 2


def test_a_run_from_before_there_were_these_settings_goes_on() -> None:
    now = {"data": settings().model_dump()}
    added = {"mixture", "label", "classes", "text", "keep", "quarantine", "max_broken_fraction"}
    before = {"data": {key: value for key, value in now["data"].items() if key not in added}}
    assert changed_settings(before, now) == []
    assert changed_settings(before, {"data": {**now["data"], "label": "json:a"}}) == ["data.label=json:a (was cls)"]
