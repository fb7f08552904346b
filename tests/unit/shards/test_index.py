"""An index is published of whole tars alone, goes on listing what it listed, and its proof finds what differs."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from softmoe_train.commands.main import main
from softmoe_train.data.published import parse_index
from tests.unit.data.conftest import write_tar
from tests.unit.shards.conftest import tree, write
from tests.unit.shards.test_check import good


def index(data: Path | str, *overrides: str) -> int:
    """`softmoe shards index` in this process."""
    return main(["shards", "index", f"data={data}", "processes=1", "progress=plain", *overrides])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two training shards and one test shard in a folder."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, name in enumerate(("train-0.tar", "train-1.tar", "test-0.tar")):
        write_tar(folder / name, good(*range(10 * number, 10 * number + 5 + number)))
    return folder


def test_the_index_of_a_folder_lies_beside_its_tars_and_verifies(shards: Path, capsys) -> None:
    assert index(shards) == 0
    listed = parse_index((shards / "index.json").read_bytes(), "x")
    assert {name: entry.count for name, entry in listed.items()} == {
        "train-0.tar": 5,
        "train-1.tar": 6,
        "test-0.tar": 7,
    }
    assert "3 shards with 18 samples" in capsys.readouterr().out
    assert index(shards, "verify=true") == 0
    assert "no differences" in capsys.readouterr().out


def test_its_bytes_do_not_depend_on_processes_and_a_folder_of_its_own_takes_it(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    index(shards, f"out={tmp_path}/one")
    index(shards, "processes=2")
    assert tree(tmp_path / "one") == {name: data for name, data in tree(shards).items() if not name.endswith(".tar")}
    assert index(shards, f"out={tmp_path}/one", "verify=true") == 0


def test_an_index_goes_on_listing_the_tars_beside_those_that_are_named(shards: Path) -> None:
    index(f"{shards}/test-*.tar")
    index(f"{shards}/train-*.tar")
    assert set(parse_index((shards / "index.json").read_bytes(), "x")) == {"train-0.tar", "train-1.tar", "test-0.tar"}
    (shards / "train-1.tar").unlink()
    index(f"{shards}/test-*.tar")
    assert set(parse_index((shards / "index.json").read_bytes(), "x")) == {"train-0.tar", "test-0.tar"}


def test_damaged_tars_are_all_told_and_nothing_is_published(shards: Path, capsys) -> None:
    for name in ("train-0.tar", "test-0.tar"):
        write(shards / name, (shards / name).read_bytes()[:3000])
    assert index(shards) == 1
    said = capsys.readouterr()
    assert "train-0.tar is not a whole" in said.err and "test-0.tar is not a whole" in said.err
    assert "nothing was published" in said.out
    assert not (shards / "index.json").exists()


def _change_tar(shards: Path) -> None:
    write_tar(shards / "train-1.tar", good(*range(6)))


def _change_index_file(shards: Path) -> None:
    file = shards / "train-1.tar.index.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "cls": tensors["cls"].flip(0)}, file)


def _change_index_and_its_hash(shards: Path) -> None:
    import hashlib

    _change_index_file(shards)
    document = json.loads((shards / "index.json").read_text())
    data = (shards / "train-1.tar.index.safetensors").read_bytes()
    entry = next(entry for entry in document["shards"] if entry["name"] == "train-1.tar")
    entry |= {"index_size": len(data), "index_sha256": hashlib.sha256(data).hexdigest()}
    (shards / "index.json").write_text(json.dumps(document))


def _lose_tar(shards: Path) -> None:
    (shards / "train-1.tar").unlink()


def _add_tar(shards: Path) -> None:
    write_tar(shards / "train-1x.tar", good(90))


def _lose_index_file(shards: Path) -> None:
    (shards / "train-1.tar.index.safetensors").unlink()


@pytest.mark.parametrize(
    "change", [_change_tar, _change_index_file, _change_index_and_its_hash, _lose_tar, _add_tar, _lose_index_file]
)
def test_the_proof_finds_what_differs_and_writes_nothing(shards: Path, change, capsys) -> None:
    index(shards)
    change(shards)
    before = tree(shards)
    assert index(shards, "verify=true") == 1
    assert "train-1" in capsys.readouterr().err
    assert tree(shards) == before


def test_mistakes_are_refused_before_a_tar_is_read(tmp_path: Path, capsys) -> None:
    assert index(tmp_path / "nothing", "verfy=true") == 2
    said = capsys.readouterr().err
    assert "nothing" in said and "verify" in said
    assert index("https://example.invalid/a.tar") == 2
    assert "is at a URL" in capsys.readouterr().err
