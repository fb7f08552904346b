"""The commands of the guide to data sets run as written, one after another; so do the programs under data/."""

import importlib.util
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from softmoe_train.commands.main import main
from softmoe_train.shards import make_shards, making
from tests.runs import ROOT
from tests.unit.shards.conftest import left_out, picture, samples, write
from tests.unit.shards.test_sources import SYNSETS, class_tars, tar_of, validation

GUIDE = (ROOT / "data" / "README.md").read_text().replace("\\\n", " ")
LINES = re.findall(r"^    softmoe (shards .*)$", GUIDE, flags=re.MULTILINE)


def archives(folder: Path) -> None:
    """ImageNet in miniature."""
    write(folder / "ILSVRC2012_img_train.tar", tar_of(class_tars()))
    validation(folder)
    rows = "".join(f"ILSVRC2012_val_{n:08d},{SYNSETS[n % 3]} 1 2 3 4\n" for n in range(1, 5))
    write(folder / "LOC_val_solution.csv", f"ImageId,PredictionString\n{rows}".encode())


def test_the_guide_runs_as_written(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    archives(tmp_path)
    rows = "".join(
        f"{path.relative_to(tmp_path)},{path.relative_to(pictures).parts[0]}\n"
        for path in sorted(pictures.rglob("*.png"))
    )
    write(tmp_path / "list.csv", f"path,class\n{rows}".encode())
    has_parquet = importlib.util.find_spec("pyarrow") is not None
    if has_parquet:
        import pyarrow
        import pyarrow.parquet

        (tmp_path / "downloads" / "data").mkdir(parents=True)
        table = pyarrow.table({"image": [picture(n) for n in range(5)], "label": [0] * 5})
        pyarrow.parquet.write_table(table, tmp_path / "downloads" / "data" / "train.parquet")
    monkeypatch.chdir(tmp_path)
    assert len(LINES) >= 8
    for line in LINES:
        if "source=parquet" not in line or has_parquet:
            assert main(shlex.split(line)) == 0, line + capsys.readouterr().err
    assert len(samples(*Path("shards/mine").glob("*.tar"))) == 40
    assert len(list(Path("shards/listed").glob("*.tar"))) == 4
    assert {key[-1]: one["cls"] for key, one in samples(*Path("shards/imagenet/val").glob("*.tar")).items()} == {
        "1": b"1", "2": b"2", "3": b"0", "4": b"1"
    }  # fmt: skip


def test_the_tables_of_the_guide_name_keys_that_there_are() -> None:
    keys = set(re.findall(r"^(\w+):", (ROOT / "conf" / "shards_make.yaml").read_text(), flags=re.MULTILINE))
    section = GUIDE.split("## Make shards from your pictures")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)=", section))
    assert named <= keys
    assert {"samples_per_shard", "test_every", "max_broken", "verify"} <= named


def test_the_program_for_imagenet_makes_both_splits(tmp_path: Path) -> None:
    archives(tmp_path / "archives")
    program = runpy.run_path(str(ROOT / "data" / "make_imagenet.py"))
    assert program["make_imagenet"](tmp_path / "archives", tmp_path / "out", ["processes=1"]) == 0
    assert len(samples(*(tmp_path / "out" / "train").glob("*.tar"))) == 15
    assert len(samples(*(tmp_path / "out" / "val").glob("*.tar"))) == 4


def test_the_program_with_a_source_of_its_own_keeps_every_caption(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in range(4)]
    captions = [{"image_id": n % 3, "caption": f"caption {n} "} for n in range(6)]
    for n in (0, 1, 3):
        write(tmp_path / "pictures" / f"{n:012d}.jpg", picture(n, "JPEG"))
    write(tmp_path / "captions.json", json.dumps({"images": images, "annotations": captions}).encode())
    program = runpy.run_path(str(ROOT / "data" / "make_captions.py"))
    source = program["Captions"](tmp_path / "pictures", tmp_path / "captions.json")
    make_shards(source, making(out=str(tmp_path / "out"), processes=1, progress="off"))
    found = samples(tmp_path / "out" / "train-000000.tar")
    assert {key: (one["txt"], json.loads(one["json"])["captions"]) for key, one in found.items()} == {
        f"{n:012d}": (b"caption %d" % n, [f"caption {n}", f"caption {n + 3}"]) for n in (0, 1)
    }
    assert left_out(tmp_path / "out") == {"000000000002.jpg": "no such file", "000000000003.jpg": "no caption"}
