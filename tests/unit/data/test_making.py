"""The programs and examples under the top-level data/ make shards that the stream reads."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from softmoe_train.data import build_eval_stream
from softmoe_train.data.index import data_hash, index_shards
from softmoe_train.data.places import expand_shards
from tests.unit.data.conftest import settings

MAKING = Path(__file__).resolve().parents[3] / "data"


def all_of(spec: str, size: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    cfg = settings(test=spec)
    batches = list(build_eval_stream(cfg, image_size=size, num_classes=classes, seed=0, batch_size=64, rank=0, world=1))
    images, labels = (torch.cat([getattr(b, name)[b.mask] for b in batches]) for name in ("images", "labels"))
    return images, labels


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, cut by the program as a user runs it."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("digits")
    subprocess.run([sys.executable, MAKING / "make_digits.py", "--out", folder], check=True, capture_output=True)
    return folder


def test_digits_are_all_there_and_split_by_class(digits_folder: Path) -> None:
    from sklearn.datasets import load_digits

    train, train_labels = all_of(f"{digits_folder}/train-*.tar", 8, 10)
    test, test_labels = all_of(f"{digits_folder}/test-*.tar", 8, 10)
    digits = load_digits()
    known = sorted((label, picture.tobytes()) for label, picture in zip(digits.target.tolist(), digits.images))
    read = [
        (label, (image[0].numpy() / 255 * 16).round().tobytes())
        for label, image in zip(torch.cat([train_labels, test_labels]).tolist(), torch.cat([train, test]))
    ]
    assert len(read) == 1797
    found = sorted((label, np.frombuffer(data, np.float64).tobytes()) for label, data in read)
    assert found == known
    shares = torch.bincount(test_labels) / torch.bincount(torch.cat([train_labels, test_labels]))
    assert ((shares - 0.2).abs() < 0.005).all()


def test_digit_shards_are_uneven_and_the_same_bytes_each_time(digits_folder: Path, tmp_path: Path) -> None:
    make = runpy.run_path(str(MAKING / "make_digits.py"))["make_digits"]
    make(tmp_path)
    shards, again = (list(index_shards(expand_shards(str(folder), key="x"))) for folder in (digits_folder, tmp_path))
    assert len({shard.count for shard in shards}) == len(shards) == 6
    assert data_hash(shards) == data_hash(again)


def test_digits_that_are_there_are_left_alone_and_a_missing_shard_is_made(
    digits_folder: Path, tmp_path: Path, capsys
) -> None:
    make = runpy.run_path(str(MAKING / "make_digits.py"))["make_digits"]
    make(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "train-000002.tar").unlink()
    capsys.readouterr()
    make(tmp_path)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {path for path in before if before[path] != after[path]} == {tmp_path / "train-000002.tar"}
    assert capsys.readouterr().out.count("already there") == 5
