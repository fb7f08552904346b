"""A published index says of a folder of shards what reading them would say, and nothing of it is believed unchecked."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from softmoe_train.data.index import PARTS, Shard, index_shards, samples_of
from softmoe_train.data.published import INDEX, SUFFIX, Entry, parse_index, publish_index, unpack
from tests.unit.data.conftest import write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tar(
        tmp_path / "b.tar", [("é.cls", b"1"), ("é.png", b"two"), ("x.txt", b"a"), ("x.json", b"{}"), ("x.jpg", b"4")]
    )
    write_tar(tmp_path / "a.tar", [("a.cls", b"1")])
    write_tar(tmp_path / "empty.tar", [("README.md", b"no sample")])
    return tmp_path


def publish(folder: Path) -> tuple[list[Shard], dict[str, Entry]]:
    shards = list(index_shards(map(str, sorted(folder.glob("*.tar")))))
    path = Path(publish_index(shards, str(folder)))
    return shards, parse_index(path.read_bytes(), str(path))


def test_what_is_published_is_what_reading_the_tars_says(folder: Path) -> None:
    shards, entries = publish(folder)
    assert list(entries) == ["a.tar", "b.tar", "empty.tar"]
    for shard in shards:
        name = Path(shard.path).name
        data, entry = (folder / (name + SUFFIX)).read_bytes(), entries[name]
        assert (entry.index_size, entry.index_sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert entry.sha256 == hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert entry.shard(shard.path, shard.mtime_ns)[:5] == shard[:5]
        here, there = samples_of(shard), unpack(data, entry.shard("elsewhere", 0), "test")
        assert there.keys() == here.keys()
        for part in PARTS:
            assert np.array_equal(there.where[part], here.where[part])
            assert np.array_equal(there.sums[part], here.sums[part])


def test_publishing_again_elsewhere_gives_the_same_bytes(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    publish(folder)
    other = tmp_path_factory.mktemp("other")
    for tar in folder.glob("*.tar"):
        (other / tar.name).write_bytes(tar.read_bytes())
    publish(other)
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        assert (other / path.name).read_bytes() == path.read_bytes()
        assert str(folder).encode() not in path.read_bytes()


def test_shards_of_one_name_or_a_strange_name_are_not_published(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    twin = write_tar(tmp_path / "sub" / "a.tar", [("b.cls", b"1")])
    with pytest.raises(ValueError, match=r"two shards are named a\.tar"):
        publish_index(list(index_shards([str(folder / "a.tar"), str(twin)])), str(folder))
    odd = write_tar(tmp_path / "sub" / "what?.tar", [("b.cls", b"1")])
    with pytest.raises(ValueError, match=r"what\?\.tar cannot be published: name: .*not a plain file name; rename it"):
        publish_index(list(index_shards([str(odd)])), str(folder))
    assert not (folder / INDEX).exists()


GOOD = {"name": "a.tar", "count": 1, "size": 10240, "sha256": "0" * 64, "index_size": 500, "index_sha256": "f" * 64}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "../a.tar"}, "not the name of a tar"),
        ({"name": "/etc/a.tar"}, "not a plain file name"),
        ({"name": "..\\a.tar"}, "not the name of a tar"),
        ({"name": "x\\a.tar"}, "not a plain file name"),
        ({"name": "a?x.tar"}, "not a plain file name"),
        ({"name": "x::a.tar"}, "not a plain file name"),
        ({"name": "a\n.tar"}, "not a plain file name"),
        ({"name": "a" * 300 + ".tar"}, "not the name of a tar"),
        ({"name": "passwd"}, "not the name of a tar"),
        ({"name": 3}, "valid string"),
        ({"count": -1}, "greater than or equal to 0"),
        ({"count": 21}, "cannot hold what it says"),
        ({"count": 1.5}, "valid integer"),
        ({"count": True}, "valid integer"),
        ({"size": 1 << 60}, "less than"),
        ({"index_size": 1 << 40}, "cannot hold what it says"),
        ({"sha256": "F" * 64}, "pattern"),
        ({"sha256": "0" * 64 + "\n"}, "pattern"),
        ({"more": 1}, "not permitted"),
    ],
)
def test_an_index_that_says_what_cannot_be_is_refused_with_its_name(change: dict[str, Any], words: str) -> None:
    good = json.dumps({"format": 1, "shards": [GOOD]}).encode()
    assert list(parse_index(good, "http://x/index.json")) == ["a.tar"]
    with pytest.raises(ValueError, match=words) as caught:
        parse_index(json.dumps({"format": 1, "shards": [{**GOOD, **change}]}).encode(), "http://x/index.json")
    assert "http://x/index.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, json.dumps({"format": 2, "shards": []}).encode(),
     json.dumps({"format": 1, "shards": [GOOD, GOOD]}).encode(), b'{"format": 1, "shards": [' + b'{"name":' * 50_000],
)  # fmt: skip
def test_what_is_no_index_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"http://x/index\.json (is no index|lists a\.tar twice)") as caught:
        parse_index(data, "http://x/index.json")
    assert len(str(caught.value)) < 600


def test_an_index_file_that_cannot_be_that_of_its_tar_is_refused(folder: Path) -> None:
    publish(folder)
    shard = next(index_shards([str(folder / "b.tar")]))
    data = (folder / f"b.tar{SUFFIX}").read_bytes()
    good = load(data)
    wrong = [
        {"image": good["image"] + 100_000},
        {"image": good["image"] * -1},
        {"image": torch.full_like(good["image"], (1 << 63) - 1)},
        {"image": good["image"].int()},
        {"image": good["image"][:1]},
        {"cls_sums": good["cls_sums"][None]},
        {"keys": good["keys"][:1]},
        {"keys": good["keys"] | 128},
        {"key_ends": good["key_ends"].flip(0)},
        {"key_ends": good["key_ends"] - 1},  # inside a letter
        {"more": good["keys"].clone()},
    ]
    files = [save({**good, **change}) for change in wrong]
    files += [b"", data[:-1], data[:50], struct.pack("<Q", 1 << 60) + data[8:], data.replace(b"key_ends", b"key_endz")]
    for file in files:
        with pytest.raises(
            ValueError, match=r"b\.index is no index of b\.tar \(.*make it again with `softmoe shards index`"
        ):
            unpack(file, shard, "b.index")
    assert unpack(data, shard, "b.index").keys() == ["é", "x"]
