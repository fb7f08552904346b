"""Mistakes in a data configuration are found before a shard is read, all at once, and name the remedy."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError

from softmoe_train.data import DataConfig, SyntheticConfig, build_eval_stream, build_stream, check_data
from softmoe_train.data.records import ResizeCentralCrop
from tests.unit.data.conftest import settings, write_tar

CONF = Path(__file__).resolve().parents[3] / "conf"


def problems(cfg: DataConfig, *, batch: int = 8, world: int = 1, needs_test: bool = False) -> list[str]:
    return check_data(cfg, image_size=8, global_batch=batch, world=world, needs_test=needs_test)


def test_a_sound_configuration_has_no_problems(numbered_shards) -> None:
    folder = str(numbered_shards(3))
    assert problems(settings(train=folder)) == []
    assert problems(settings(train=folder, test=folder), needs_test=True) == []


@pytest.mark.parametrize(
    ("streams", "batch", "world", "legal"), [(3, 8, 1, "1, 2, 4, 8"), (4, 24, 6, "6, 12, 24"), (16, 8, 2, "2, 4, 8")]
)
def test_streams_that_do_not_divide_are_refused_with_the_legal_values(
    numbered_shards, streams, batch, world, legal
) -> None:
    cfg = settings(train=str(numbered_shards(3)), streams=streams)
    [problem] = problems(cfg, batch=batch, world=world)
    assert problem == (
        f"data.streams={streams}: the number of ranks ({world}) must divide it, and it must divide the global batch "
        f"({batch}); use one of {legal}."
        + (" With data.streams=4 the legal numbers of ranks are 1, 2, 4." if streams == 4 else "")
    )
    with pytest.raises(ValueError, match=r"data\.streams"):
        build_stream(cfg, image_size=8, num_classes=10, seed=0, global_batch=batch, rank=0, world=world)


def test_a_global_batch_that_the_ranks_cannot_share_is_refused(numbered_shards) -> None:
    [problem] = problems(settings(train=str(numbered_shards(3))), batch=10, world=4)
    assert "the global batch of 10 images does not divide into 4 ranks" in problem
    assert "use a multiple of 4" in problem


def test_a_number_of_ranks_that_cannot_share_the_streams_is_refused_with_those_that_can(numbered_shards) -> None:
    [problem] = problems(settings(train=str(numbered_shards(3)), streams=8), batch=32, world=3)
    assert problem.endswith("With data.streams=8 the legal numbers of ranks are 1, 2, 4, 8.")


def test_all_mistakes_are_reported_at_once() -> None:
    small = ResizeCentralCrop(kind="resize_central_crop", resize=7)
    cfg = settings(test="/nowhere", streams=3, train_transform=small, test_transform=small)
    found = problems(cfg)
    keys = ["data.streams", "data.train ", "data.test=", "data.train_transform", "data.test_transform"]
    assert len(found) == 5
    assert all(problem.startswith(key) for problem, key in zip(found, keys))


def test_a_transform_below_the_image_size_is_refused_in_building_too(numbered_shards) -> None:
    small = ResizeCentralCrop(kind="resize_central_crop", resize=7)
    cfg = settings(test=str(numbered_shards(3)), test_transform=small)
    with pytest.raises(ValueError, match=r"data\.test_transform\.resize=7 is below"):
        build_eval_stream(cfg, image_size=8, num_classes=10, seed=0, batch_size=8, rank=0, world=1)


def test_a_held_out_set_is_wanted_only_where_it_is_needed(numbered_shards) -> None:
    cfg = settings(train=str(numbered_shards(3)))
    assert problems(cfg) == []
    [problem] = problems(cfg, needs_test=True)
    assert problem.startswith("data.test is not set")


def test_a_check_reads_no_shard(tmp_path: Path, index_cache: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"not a tar")
    assert problems(settings(train=str(tmp_path))) == []
    assert list(index_cache.iterdir()) == []


def test_shards_without_samples_are_refused(tmp_path: Path) -> None:
    cfg = settings(train=str(write_tar(tmp_path / "empty.tar", [])), test=str(tmp_path))
    with pytest.raises(ValueError, match=r"data\.train=.*empty\.tar names 1 shards without a single sample"):
        build_stream(cfg, image_size=8, num_classes=10, seed=0, global_batch=8, rank=0, world=1)
    with pytest.raises(ValueError, match=r"data\.test=.* without a single sample"):
        build_eval_stream(cfg, image_size=8, num_classes=10, seed=0, batch_size=8, rank=0, world=1)


def composed(name: str, *overrides: str) -> DataConfig:
    with initialize_config_dir(str(CONF), version_base=None):
        values = OmegaConf.to_container(compose(f"data/{name}", overrides=list(overrides))["data"])
    return TypeAdapter(DataConfig).validate_python(values)


@pytest.mark.parametrize(("name", "size"), [("inception", 224), ("cifar10", 32), ("digits", 8), ("synthetic", 32)])
def test_every_data_choice_is_complete_and_lacks_only_the_shards(
    name: str, size: int, numbered_shards, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # where nobody has made the digits
    cfg = composed(name)
    found = check_data(cfg, image_size=size, global_batch=cfg.streams, world=1, needs_test=True)
    if isinstance(cfg, SyntheticConfig):
        assert found == []
        return
    said = (
        ["data.train=shards/digits/", "data.test=shards/digits/"]
        if name == "digits"
        else ["data.train is not set", "data.test is not set"]
    )
    assert len(found) == 2 and all(problem.startswith(start) for problem, start in zip(found, said))
    folder = str(numbered_shards(3))
    cfg = composed(name, f"data.train={folder}", f"data.test=[{folder}]")
    assert check_data(cfg, image_size=size, global_batch=cfg.streams, world=1, needs_test=True) == []


def test_a_key_that_nobody_reads_is_refused() -> None:
    with pytest.raises(ValidationError, match="shuffel_window"):
        settings(shuffel_window=3)
    with pytest.raises(ValidationError, match="workers"):
        SyntheticConfig.model_validate({**composed("synthetic").model_dump(), "workers": 2})
