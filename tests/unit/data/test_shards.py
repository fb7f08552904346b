"""Specifications name shards, indexes are made once, and nothing in a shard's name or content runs."""

import hashlib
import json
import os
import pickle
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash
from webdataset.tariterators import group_by_keys, tar_file_expander

from softmoe_train.data.index import Shard, data_hash, index_shards, samples_of
from softmoe_train.data.places import expand_shards
from tests.unit.data.conftest import write_tar


def index(*paths: Path) -> list[Shard]:
    return list(index_shards(map(str, paths)))


def bytes_at(path: Path, where: list[int]) -> bytes:
    return path.read_bytes()[where[0] : where[0] + where[1]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b-1.tar", "b-0.tar", "a.tar", "notes.txt"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("", ["a.tar", "b-0.tar", "b-1.tar"]),
        ("/b-*.tar", ["b-0.tar", "b-1.tar"]),
        ("/b-{0..1}.tar", ["b-0.tar", "b-1.tar"]),
        ("/{b-1,a}.tar", ["b-1.tar", "a.tar"]),
        ("/a.tar", ["a.tar"]),
    ],
)
def test_a_folder_a_glob_a_brace_pattern_and_a_file_name_shards(folder: Path, spec: str, names: list[str]) -> None:
    assert expand_shards(f"{folder}{spec}", key="data.train") == [str(folder / name) for name in names]


def test_a_list_joins_its_specifications_in_order(folder: Path) -> None:
    found = expand_shards([f"{folder}/b-*.tar", f"{folder}/a.tar"], key="data.train")
    assert found == [str(folder / name) for name in ("b-0.tar", "b-1.tar", "a.tar")]


def test_a_path_with_braces_in_its_name_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "odd{0,1}.tar"
    path.touch()
    assert expand_shards(str(path), key="data.train") == [str(path)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (None, r"data\.train is not set: .*data\.train=FOLDER"),
        ([], r"data\.train is not set"),
        ("", r"data\.train is not set"),
        ("{folder}/empty", r"data\.train=.*empty holds no \*\.tar file"),
        ("{folder}/none-*.tar", r"data\.train=.*none-\*\.tar cannot be found: every named shard must exist"),
        ("{folder}/b-{{0..9}}.tar", r"b-2\.tar, .*b-3\.tar, .*b-4\.tar and 5 more cannot be found"),
        ("{folder}/b-{{0..9.tar", r"is not a brace pattern"),
        (["{folder}", "{folder}/a.tar"], r"names .*a\.tar twice"),
        ("pipe:cat {folder}/a.tar", r"data\.train=pipe:cat .* is not a local path"),
        ("file://{folder}/a.tar", r"is not a local path"),
    ],
)
def test_a_wrong_specification_is_refused_with_its_key_and_the_remedy(folder: Path, spec, message: str) -> None:
    (folder / "empty").mkdir()
    filled = (
        [one.format(folder=folder) for one in spec] if isinstance(spec, list) else spec and spec.format(folder=folder)
    )
    with pytest.raises(ValueError, match=message):
        expand_shards(filled, key="data.train")


def test_members_are_grouped_as_webdataset_groups_them(tmp_path: Path) -> None:
    members = [
        ("x/one.CLS", b"3"),
        ("x/one.seg.png", b"other"),
        ("x/one.JPG", b"picture"),
        ("__meta__", b"skipped"),
        ("noextension", b"skipped"),
        ("two.json", b"{}"),
        ("two.png", b"second"),
        ("README.md", b"no sample"),
    ]
    path = write_tar(tmp_path / "s.tar", members)
    samples = samples_of(index(path)[0])
    assert samples.keys() == ["x/one", "two"]
    assert [bytes_at(path, where) for where in samples.where["image"].tolist()] == [b"picture", b"second"]
    assert bytes_at(path, samples.where["cls"][0].tolist()) == b"3"
    assert samples.where["cls"][1].tolist() == [-1, -1]


def test_each_part_of_a_sample_has_its_place_and_the_hash_of_its_bytes(tmp_path: Path) -> None:
    large = bytes(range(256)) * 10_000
    members = [("a.png", large), ("a.txt", b"a caption"), ("b.jpg", b""), ("b.json", b"{}"), ("b.cls", b"7")]
    path = write_tar(tmp_path / "s.tar", members)
    [shard] = index(path)
    samples, data = samples_of(shard), path.read_bytes()
    found = {}
    for part, where in samples.where.items():
        for number, (start, size) in enumerate(where.tolist()):
            if start >= 0:
                found[samples.key(number), part] = data[start : start + size]
                expected = xxhash.xxh3_64(found[samples.key(number), part]).digest()
                assert int(samples.sums[part][number]).to_bytes(8, "big", signed=True) == expected
    assert found == {
        ("a", "image"): large, ("a", "txt"): b"a caption", ("b", "image"): b"", ("b", "json"): b"{}", ("b", "cls"): b"7"
    }  # fmt: skip
    assert shard.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", ["omniglot40-test", "flowers5-test", "coco-captions"])
def test_real_shards_are_indexed_as_webdataset_reads_them(shared: Path, name: str) -> None:
    path = shared / f"{name}-000000.tar"
    with path.open("rb") as file:
        truth = list(group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])))
    samples = samples_of(index(path)[0])
    assert samples.keys() == [one["__key__"] for one in truth]
    images = [one.get("jpg", one.get("png")) for one in truth]
    data = path.read_bytes()
    assert [data[start : start + size] for start, size in samples.where["image"].tolist()] == images
    labels = [None if start < 0 else data[start : start + size] for start, size in samples.where["cls"].tolist()]
    assert labels == [one.get("cls") for one in truth]


@pytest.mark.parametrize("style", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_whole(tmp_path: Path, style: int) -> None:
    key = "/".join(["folder-with-a-long-name" * 4] * 4 + ["é" * 60])
    path = write_tar(tmp_path / "long.tar", [(f"{key}.cls", b"1"), (f"{key}.png", b"picture")], format=style)
    samples = samples_of(index(path)[0])
    assert samples.keys() == [key]
    assert bytes_at(path, samples.where["image"][0].tolist()) == b"picture"


@pytest.mark.parametrize("cut", [300, 512, 1024, 1300, 2047, 2048])
def test_a_tar_that_breaks_off_is_refused_in_one_line(tmp_path: Path, cut: int) -> None:
    path = write_tar(tmp_path / "cut.tar", [("a.cls", b"1"), ("a.png", b"picture")])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"cut\.tar is not a whole, uncompressed tar") as caught:
        index(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_header_inside_a_tar_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "hit.tar", [(f"{n}.cls", b"1") for n in range(5)])
    data = bytearray(path.read_bytes())
    data[2 * 1024 : 2 * 1024 + 64] = b"\xff" * 64
    path.write_bytes(data)
    with pytest.raises(ValueError, match="breaks off or is damaged at byte 2048"):
        index(path)


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "zipped.tar"
    with tarfile.open(path, "w:gz"):
        pass
    with pytest.raises(ValueError, match="uncompressed tar"):
        index(path)


def test_a_sample_with_a_member_twice_is_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "twice.tar", [("a.cls", b"1"), ("a.cls", b"2")])
    with pytest.raises(ValueError, match=r"a\.cls: duplicate"):
        index(path)


def test_a_fifo_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.tar")
    with pytest.raises(ValueError, match="not a regular file"):
        index(tmp_path / "fifo.tar")


def test_an_index_is_made_once_and_again_when_the_file_changes(tmp_path: Path, index_cache: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.cls", b"1")])
    first = index(path)[0]
    cached = list(index_cache.rglob("*.safetensors"))
    stamp = cached[0].stat().st_mtime_ns
    assert index(path) == [first]
    assert [file.stat().st_mtime_ns for file in index_cache.rglob("*.safetensors")] == [stamp]
    write_tar(path, [("a.cls", b"1"), ("b.cls", b"2")])
    assert index(path)[0].count == 2
    with pytest.raises(ValueError, match="has changed since"):
        samples_of(first)


@pytest.mark.parametrize("kept", [0, 40, -20])
def test_a_cut_off_cache_file_is_made_again(tmp_path: Path, index_cache: Path, kept: int) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.cls", b"1")])
    first = index(path)
    [cached] = index_cache.rglob("*.safetensors")
    cached.write_bytes(cached.read_bytes()[:kept])
    assert index(path) == first
    assert samples_of(first[0]).keys() == ["a"]


def test_without_a_place_for_the_cache_the_remedy_is_named(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="set XDG_CACHE_HOME"):
        index(write_tar(tmp_path / "s.tar", [("a.cls", b"1")]))


def test_the_cache_belongs_to_the_owner_alone_and_holds_only_tensors(tmp_path: Path, index_cache: Path) -> None:
    index(write_tar(tmp_path / "s.tar", [("a.cls", b"1")]))
    [cached] = index_cache.rglob("*.safetensors")
    assert cached.parent == index_cache / "softmoe_train" / "index"
    assert cached.parent.stat().st_mode & 0o077 == 0
    assert cached.stat().st_mode & 0o077 == 0
    header = cached.read_bytes()[8 : 8 + int.from_bytes(cached.read_bytes()[:8], "little")]
    assert {"keys", "key_ends", "image", "image_sums"} <= json.loads(header).keys()


def test_a_cache_folder_that_others_can_write_is_refused(tmp_path: Path, index_cache: Path) -> None:
    folder = index_cache / "softmoe_train" / "index"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(ValueError, match="set XDG_CACHE_HOME"):
        index(write_tar(tmp_path / "s.tar", [("a.cls", b"1")]))


def test_nothing_is_written_beside_a_shard(tmp_path: Path) -> None:
    folder = tmp_path / "readonly"
    folder.mkdir()
    path = write_tar(folder / "s.tar", [("a.cls", b"1")])
    folder.chmod(0o555)
    assert index(path)[0].count == 1
    assert os.listdir(folder) == ["s.tar"]


def test_processes_that_index_at_once_agree(tmp_path: Path, index_cache: Path) -> None:
    paths = [str(write_tar(tmp_path / f"{n}.tar", [(f"{n}.cls", b"1")])) for n in range(8)]
    with ProcessPoolExecutor(3) as pool:
        first, *others = pool.map(_index_all, [paths] * 6)
    assert all(other == first for other in others)
    assert len(list(index_cache.rglob("*"))) == 2 + len(paths)


def _index_all(paths: list[str]) -> list[Shard]:
    return list(index_shards(paths))


def test_the_data_hash_follows_names_and_content_and_not_the_folder(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    here = index(write_tar(tmp_path / "here" / "s.tar", [("a.cls", b"1")]))
    there = index(write_tar(tmp_path / "there" / "s.tar", [("a.cls", b"1")]))
    other = index(write_tar(tmp_path / "there" / "t.tar", [("a.cls", b"1")]))
    changed = index(write_tar(tmp_path / "here" / "s.tar", [("a.cls", b"2")]))
    assert data_hash(here) == data_hash(there)
    assert len({data_hash(here), data_hash(other), data_hash(changed), data_hash(here + other)}) == 4


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_no_member_name_or_environment_variable_runs_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = [tmp_path / name for name in ("rewritten", "unpickled", "piped.tar")]
    monkeypatch.setenv("GOPEN_REWRITE", f"{tmp_path}=pipe:touch {marks[0]} #")
    monkeypatch.setenv("WDS_REWRITE", f"{tmp_path}=pipe:touch {marks[0]} #")
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb(marks[1]))
    members = [("a.cls", b"1"), *[(f"a.{suffix}", bomb) for suffix in ("pyd", "pkl", "pth", "pickle")]]
    write_tar(tmp_path / f"pipe:touch {marks[2].name}", members)
    for spec in (f"pipe:touch {marks[2]}", f"{{pipe:touch {marks[2]},a}}"):
        with pytest.raises(ValueError, match=r"data\.train"):
            expand_shards(spec, key="data.train")
    [shard] = index_shards(expand_shards(".", key="data.train"))
    assert samples_of(shard).keys() == ["a"]
    assert not any(mark.exists() for mark in marks)


def test_the_real_shards_are_indexed_as_their_readme_says(shared: Path) -> None:
    counts = {
        Path(shard.path).name: shard.count for shard in index_shards(expand_shards(str(shared), key="data.train"))
    }
    assert counts["cifar10-train-000001.tar"] == 5000
    assert counts["flowers5-test-000000.tar"] == 50
    assert counts["omniglot40-train-000000.tar"] == 400


NAMES = [
    "a",
    "a.b/c",
    "deep/er/and/deeper/d",
    "\u00e9t\u00e9/\u65e5\u672c",
    "with space",
    "UPPER",
    "e\u0301",
    "x" * 180,
    "y/" * 60 + "z",
]
SUFFIXES = ["jpg", "PNG", "cls", "json", "txt", "seg.png", "npy", "pickle", "cls.bak"]


@pytest.mark.parametrize("style", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("trial", range(4))
def test_members_in_any_order_and_company_are_the_samples_that_webdataset_makes(
    tmp_path: Path, trial: int, style: int
) -> None:
    rng = np.random.default_rng(trial)
    members = []
    once, again = rng.permutation(NAMES).tolist(), rng.permutation(NAMES).tolist()
    if again[0] == once[-1]:
        again.reverse()
    for key in [*once, *again]:  # twice: with another key between them they are two samples
        chosen = rng.permutation(SUFFIXES)[: rng.integers(1, len(SUFFIXES))].tolist()
        members += [(f"{key}.{suffix}", f"{key} {suffix} {rng.integers(99)}".encode()) for suffix in chosen]
        members += [
            [(f"{key}/", b""), ("._hidden.jpg", b"x"), ("__odd__/n.jpg", b"x"), ("README", b"x")][rng.integers(4)]
        ]
    path = write_tar(tmp_path / "s.tar", members, format=style)
    with path.open("rb") as file:
        truth = list(group_by_keys(tar_file_expander([{"url": str(path), "stream": file}])))
    pictures = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "pnm")
    truth = [one for one in truth if {"cls", *pictures} & one.keys()]
    samples = samples_of(index(path)[0])
    assert samples.keys() == [one["__key__"] for one in truth]
    data = path.read_bytes()
    for part, suffixes in (("image", pictures), ("cls", ["cls"]), ("json", ["json"]), ("txt", ["txt"])):
        found = [None if at < 0 else data[at : at + size] for at, size in samples.where[part].tolist()]
        assert found == [next((one[s] for s in suffixes if s in one), None) for one in truth]


def test_links_and_folders_inside_a_tar_are_no_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, kind in (
            ("a.jpg", tarfile.SYMTYPE),
            ("b.jpg", tarfile.LNKTYPE),
            ("c.jpg", tarfile.DIRTYPE),
            ("d.jpg", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert index(tmp_path / "s.tar")[0].count == 0
