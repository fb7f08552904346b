"""Each kind of source gives its pictures, labels and texts; and what it gives trains."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest

from softmoe_train.commands.main import main
from tests.unit.data.conftest import SHARED
from tests.unit.shards.conftest import left_out, make, picture, samples, write

SYNSETS = ["n01440764", "n02119789", "n07747607"]


def tar_of(members: dict[str, bytes]) -> bytes:
    """A tar as tarfile writes it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def class_tars() -> dict[str, bytes]:
    """A tar a synset, as ImageNet's training archive holds them, in an order that is not sorted."""
    return {
        f"{synset}.tar": tar_of(
            {f"{synset}_{n}.JPEG": picture(100 * SYNSETS.index(synset) + n, "JPEG") for n in range(5)}
        )
        for synset in reversed(SYNSETS)
    }


def trains(data: Path, classes: int, folder: Path) -> None:
    """Two steps on the shards."""
    run = ["recipe=debug", "observe.wandb.mode=disabled", "observe.progress=plain", f"run_dir={folder}/run"]
    asked = [
        f"data.train={data}",
        "data.test=null",
        f"model.num_classes={classes}",
        "steps=2",
        "schedule.warmup_steps=1",
        "evals=[]",
    ]
    assert main(["train", *run, "data=digits", *asked, "batch_size=8"]) == 0


def labels(out: Path) -> dict[str, str]:
    """Each sample's .cls."""
    return {key: sample["cls"].decode() for key, sample in samples(*out.glob("*.tar")).items()}


def test_a_folder_trains(pictures: Path, tmp_path: Path) -> None:
    assert make(f"from={pictures}", f"out={tmp_path}/out") == 0
    trains(tmp_path / "out", 3, tmp_path)


@pytest.mark.parametrize("layout", ["a tar of tars", "a folder of tars"])
def test_imagenet_s_training_archive_is_read_without_unpacking(layout: str, tmp_path: Path) -> None:
    if layout == "a tar of tars":
        source = write(tmp_path / "ILSVRC2012_img_train.tar", tar_of(class_tars()))
    else:
        source = tmp_path / "winter21"
        for name, data in class_tars().items():
            write(source / name, data)
    assert make("source=archives", f"from={source}", f"out={tmp_path}/out", "samples_per_shard=4") == 0
    expected = {f"{synset}/{synset}_{n}": str(label) for label, synset in enumerate(SYNSETS) for n in range(5)}
    assert labels(tmp_path / "out") == expected
    read = samples(*(tmp_path / "out").glob("*.tar"))
    assert read["n02119789/n02119789_3"]["jpg"] == picture(103, "JPEG")
    assert (tmp_path / "out" / "classes.txt").read_text().split() == SYNSETS
    if layout == "a tar of tars":
        trains(tmp_path / "out", 3, tmp_path)


def validation(tmp_path: Path) -> Path:
    names = {f"ILSVRC2012_val_{n:08d}.JPEG": picture(n, "JPEG") for n in (3, 1, 2, 4)}
    return write(tmp_path / "ILSVRC2012_img_val.tar", tar_of(names))


@pytest.mark.parametrize(
    ("lines", "synsets"),
    [
        ("n07747607\nn01440764\nn07747607\nn02119789\n", None),
        ("3\n2\n3\n1\n", "n02119789 1 kit_fox\nn01440764 2 tench\nn07747607 3 orange\n"),
        ("ImageId,PredictionString\nILSVRC2012_val_00000002,n01440764 1 2 3 4\nILSVRC2012_val_00000001,n07747607 1 2 3 4 n07747607 5 6 7 8\n"
            "ILSVRC2012_val_00000004,n02119789 1 2 3 4\nILSVRC2012_val_00000003,n07747607 1 2 3 4\n", None),
    ],
    ids=["synsets", "numbers of the development kit", "Kaggle's CSV"],
)  # fmt: skip
def test_imagenet_s_validation_archive_gets_the_training_set_s_numbers(
    tmp_path: Path, lines: str, synsets: str | None
) -> None:
    write(tmp_path / "truth.txt", lines.encode())
    write(tmp_path / "classes.txt", "".join(f"{synset}\n" for synset in SYNSETS).encode())
    asked = [
        "source=archives",
        f"from={validation(tmp_path)}",
        f"labels={tmp_path}/truth.txt",
        f"classes={tmp_path}/classes.txt",
    ]
    if synsets is not None:
        write(tmp_path / "map_clsloc.txt", synsets.encode())
        asked.append(f"synsets={tmp_path}/map_clsloc.txt")
    assert make(*asked, f"out={tmp_path}/out", "name=val") == 0
    found = {key[-1]: label for key, label in labels(tmp_path / "out").items()}
    assert found == {"1": "2", "2": "0", "3": "2", "4": "1"}


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (b"3\n2\n3\n1\n", "give synsets=FILE"), (b"n01440764\n", "has 1 lines for 4 pictures"), (b"", "is empty"),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, lines: bytes, told: str, capsys) -> None:
    truth = write(tmp_path / "truth.txt", lines)
    assert make("source=archives", f"from={validation(tmp_path)}", f"labels={truth}", f"out={tmp_path}/out") == 2
    assert told in capsys.readouterr().err


def test_a_damaged_archive_is_one_message(tmp_path: Path, capsys) -> None:
    whole = tar_of(class_tars())
    source = write(tmp_path / "train.tar", whole[: len(whole) // 2 // 512 * 512 + 100])
    assert make("source=archives", f"from={source}", f"out={tmp_path}/out") in (1, 2)
    said = capsys.readouterr().err
    assert "train.tar" in said and "copy" in said and "Traceback" not in said


def listed(tmp_path: Path) -> Path:
    for n in range(6):
        write(tmp_path / "pictures" / f"{n}.png", picture(n))
    return tmp_path / "pictures"


def test_a_csv_manifest_gives_class_names_and_texts(tmp_path: Path) -> None:
    root = listed(tmp_path)
    with open(root / "list.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "class", "text"])
        rows.writerows([f"{n}.png", ("zebra", "ant")[n % 2], f'a "{n}",\nin two lines, 字'] for n in range(6))
    assert make("source=manifest", f"from={root}/list.csv", f"out={tmp_path}/out") == 0
    found = samples(tmp_path / "out" / "train-000000.tar")
    assert {key: (one["cls"], one["txt"].decode(), one["png"]) for key, one in found.items()} == {
        str(n): ((b"1", b"0")[n % 2], f'a "{n}",\nin two lines, 字', picture(n)) for n in range(6)
    }
    assert (tmp_path / "out" / "classes.txt").read_text() == "ant\nzebra\n"
    trains(tmp_path / "out", 2, tmp_path)


def test_a_jsonl_manifest_gives_several_labels_and_more_facts(tmp_path: Path) -> None:
    root = listed(tmp_path)
    rows = [{"file": f"pictures/{n}.png", "tags": [n, 7], "id": f"id{n}", "source": {"n": n}} for n in range(6)]
    manifest = write(tmp_path / "list.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    asked = ["image_column=file", "label_column=tags", "key_column=id", "extra=[source]", f"root={tmp_path}"]
    assert make("source=manifest", f"from={manifest}", f"out={tmp_path}/out", *asked) == 0
    found = samples(tmp_path / "out" / "train-000000.tar")
    assert {key: (one["cls"], json.loads(one["json"])) for key, one in found.items()} == {
        f"id{n}": (f"{n} 7".encode(), {"source": {"n": n}}) for n in range(6)
    }
    assert not (tmp_path / "out" / "classes.txt").exists()
    assert root.is_dir()


def test_rows_that_are_none_are_left_out_by_their_number(tmp_path: Path) -> None:
    root = listed(tmp_path)
    write(tmp_path / "secret.png", picture(9))
    (root / "folder.png").mkdir()
    rows = [
        '{"path": "0.png", "label": 0}', "not json", "[1, 2]", '{"path": "1.png"}', '{"path": "2.png", "label": -1}', '{"path": "3.png", "label": 1.5}',
        '{"path": "../secret.png", "label": 1}', '{"path": "/etc/passwd", "label": 1}', '{"path": "none.png", "label": 1}', '{"path": "", "label": 1}',
        '{"path": "folder.png", "label": 1}', '{"path": "a\\u0000b.png", "label": 1}', '{"path": "4.png", "label": true}', '{"path": "5.png", "label": "\\ud800"}',
        '{"path": "0.png", "label": 1}', '{"path": 7, "label": 1}', "[" * 100_000,
    ]  # fmt: skip
    write(root / "list.jsonl", "\n".join(rows).encode())
    assert make("source=manifest", f"from={root}/list.jsonl", f"out={tmp_path}/out") == 1  # numbers and a name
    rows[13] = '{"path": "5.png", "label": 5}'
    write(root / "list.jsonl", "\n".join(rows).encode())
    assert make("source=manifest", f"from={root}/list.jsonl", f"out={tmp_path}/out2") == 0
    assert labels(tmp_path / "out2") == {"0": "0", "5": "5"}
    told = left_out(tmp_path / "out2")
    assert len(told) == len(rows) - 2
    for where, reason in {
        "row 2": "not JSON", "row 3": "not a JSON object", "row 4: 1.png": "no label", "row 5: 2.png": "below 0", "row 6: 3.png": "neither a number nor a name",
        "row 7: ../secret.png": "outside root", "row 8: /etc/passwd": "outside root", "row 9: none.png": "cannot be read", "row 10": "no path",
        "row 11: folder.png": "not a regular file", "row 12: a\0b.png": "cannot be read", "row 13: 4.png": "neither", "row 16": "no path", "row 17": "not JSON",
    }.items():  # fmt: skip
        assert reason in told[where], where


def test_columns_that_are_not_there_are_refused_all_at_once(tmp_path: Path, capsys) -> None:
    root = listed(tmp_path)
    write(root / "list.csv", b"file,caption\n0.png,x\n")
    asked = ["source=manifest", f"from={root}/list.csv", f"out={tmp_path}/out", "key_column=nothing", "extra=[more]"]
    assert make(*asked) == 2
    said = capsys.readouterr().err
    for word in ("key_column=nothing", "extra=more", "no column path", "neither labels nor text"):
        assert word in said


def test_parquet_of_hugging_face_s_kind_trains(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "data").mkdir()
    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    for file in range(2):
        images = [{"bytes": picture(10 * file + n, "JPEG"), "path": None} for n in range(10)]
        images[3] = {"bytes": None, "path": "lost.jpg"}
        table = pa.table({"image": images, "label": [n % 2 for n in range(10)]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
        parquet.write_table(table, tmp_path / "data" / f"train-{file}.parquet", row_group_size=4)
    asked = ["source=parquet", f"from={tmp_path}/data", "samples_per_shard=5"]
    assert make(*asked, f"out={tmp_path}/out") == 0
    found = samples(*(tmp_path / "out").glob("*.tar"))
    assert {key: (one["cls"], one["jpg"]) for key, one in found.items()} == {
        f"train-{file}-{n:08d}": (str(n % 2).encode(), picture(10 * file + n, "JPEG"))
        for file in range(2)
        for n in range(10)
        if n != 3
    }
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\ndog\n"
    assert list(left_out(tmp_path / "out")) == ["train-0-00000003", "train-1-00000003"]
    trains(tmp_path / "out", 2, tmp_path)
    write(tmp_path / "data" / "train-2.parquet", b"PAR1 but no more")
    assert make(*asked, f"out={tmp_path}/damaged") == 1


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, capsys, monkeypatch) -> None:
    import importlib.util

    write(tmp_path / "x.parquet", b"PAR1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert make("source=parquet", f"from={tmp_path}/x.parquet", f"out={tmp_path}/out") == 2
    assert "pip install" in capsys.readouterr().err


def test_real_photographs_keep_their_classes(tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"no real shards at {SHARED}; set SOFTMOE_SHARED")
    names = (SHARED / "flowers5-classes.txt").read_text().split()
    for key, sample in samples(SHARED / "flowers5-test-000000.tar").items():
        write(tmp_path / "flowers" / names[int(sample["cls"])] / f"{key}.jpg", sample["jpg"])
    assert make(f"from={tmp_path}/flowers", f"out={tmp_path}/out", "resize=64", "samples_per_shard=20") == 0
    found = labels(tmp_path / "out")
    numbers = sorted(names)
    assert {key.split("/")[1]: numbers[int(label)] for key, label in found.items()} == {
        key: names[int(sample["cls"])] for key, sample in samples(SHARED / "flowers5-test-000000.tar").items()
    }
