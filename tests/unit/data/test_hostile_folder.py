"""What lies in a folder of shards, or takes a shard's place, is refused with a message: nothing hangs, nothing ends in a traceback."""

import os
import resource
from collections.abc import Callable
from copy import deepcopy
from itertools import islice
from pathlib import Path

import pytest

from softmoe_train.data import build_eval_stream, build_stream
from softmoe_train.data.index import index_shards, samples_of
from tests.unit.data.conftest import encoded, numbered_picture, settings, write_tar
from tests.unit.data.test_hostile import FORM, child


def good(path: Path, samples: int = 8) -> Path:
    members = [
        (f"{n}.{s}", d) for n in range(samples) for s, d in (("cls", b"1"), ("png", encoded(numbered_picture(n))))
    ]
    return write_tar(path, members)


PLANTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "not a regular file"),
    "a folder": (os.mkdir, "not a regular file"),
    "a link to nothing": (lambda path: path.symlink_to("nothing.tar"), "cannot be read"),
    "a link to itself": (lambda path: path.symlink_to(path), "cannot be read"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "nothing": (lambda path: path.touch(), "not a whole, uncompressed tar"),
    "one block of zeros": (lambda path: path.write_bytes(bytes(512)), ""),
    "a page of text": (lambda path: path.write_text("<html>404</html>" * 100), "not a whole, uncompressed tar"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_is_no_shard_is_refused_by_its_name_before_a_run_starts(tmp_path: Path, what: str) -> None:
    good(tmp_path / "a.tar")
    plant, reason = PLANTED[what]
    plant(tmp_path / "b.tar")
    cfg = settings(train=str(tmp_path), max_broken=10)

    def refused() -> list[str]:
        try:
            batches = build_stream(cfg, global_batch=4, **FORM)
        except ValueError as error:
            return (
                []
                if reason and reason in str(error) and "b.tar" in str(error) and str(error).isprintable()
                else [str(error)]
            )
        return [f"{reason} was expected"] if reason else [] if len(list(islice(batches, 4))) == 4 else ["no batches"]

    assert child(refused, tmp_path) == []


def test_a_link_to_a_shard_is_a_shard(tmp_path: Path) -> None:
    (tmp_path / "link.tar").symlink_to(good(tmp_path / "a.dat"))
    [shard] = index_shards([str(tmp_path / "link.tar")])
    assert shard.count == 8


CHANGES: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "cut": lambda path: os.truncate(path, 2000),
    "replaced by a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "replaced by a folder": lambda path: (path.unlink(), path.mkdir()),
    "replaced by another": lambda path: (path.unlink(), good(path, 3)),
    "touched": lambda path: os.utime(path, (0, 0)),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("what", CHANGES)
def test_a_shard_that_is_changed_before_it_is_opened_stops_a_run_in_one_line(
    tmp_path: Path, what: str, workers: int
) -> None:
    path = good(tmp_path / "a.tar")

    def refused() -> list[str]:
        batches = build_stream(settings(train=str(path), workers=workers), global_batch=4, **FORM)
        CHANGES[what](path)
        try:
            list(islice(batches, 4))
        except ValueError as error:
            return [] if str(error).isprintable() and "a.tar" in str(error) and len(str(error)) < 400 else [str(error)]
        return ["it went on"]

    assert child(refused, tmp_path) == []


def test_bytes_that_change_under_an_open_shard_are_counted_sample_by_sample(tmp_path: Path) -> None:
    path = good(tmp_path / "a.tar")
    stream = build_eval_stream(settings(test=str(path), max_broken=10), batch_size=4, **FORM)
    [shard] = index_shards([str(path)])
    where = samples_of(shard).where
    first = next(iter(stream))
    assert first.mask.all()
    with path.open("r+b") as file:
        for part, number in (("image", 5), ("cls", 6)):
            file.seek(int(where[part][number][0]))
            file.write(b"7")
    os.utime(path, ns=(shard.mtime_ns, shard.mtime_ns))
    broken = [sample for batch in stream for sample in batch.broken]
    assert [sample.key for sample in broken] == ["5", "6"]
    assert all("indexed" in sample.reason for sample in broken)
    os.truncate(path, int(where["image"][7][0]) + 3)
    os.utime(path, ns=(shard.mtime_ns, shard.mtime_ns))
    broken = [sample for batch in stream for sample in batch.broken]
    assert [sample.key for sample in broken] == ["5", "6", "7"]
    assert "breaks off after 3 of" in broken[2].reason


def test_a_full_disk_for_indexes_is_told_with_the_remedy_and_leaves_nothing(tmp_path: Path, index_cache: Path) -> None:
    path = good(tmp_path / "a.tar")

    def refused() -> list[str]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        try:
            list(index_shards([str(path)]))
        except ValueError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return [] if "make room there, or set XDG_CACHE_HOME" in str(error) else [str(error)]
        return ["it was written"]

    assert child(refused, tmp_path) == []
    assert [file for file in index_cache.rglob("*") if file.is_file()] == []


@pytest.mark.parametrize("at", range(0, 100, 7))
def test_a_damaged_index_in_the_cache_is_made_again(tmp_path: Path, index_cache: Path, at: int) -> None:
    path = good(tmp_path / "a.tar")
    [shard] = index_shards([str(path)])
    want = deepcopy(samples_of(shard))  # not the mapped file, which is damaged here
    [cached] = (file for file in index_cache.rglob("*") if file.is_file())
    data = bytearray(cached.read_bytes())
    data[len(data) * at // 100] ^= 0x10
    cached.write_bytes(data)
    [again] = index_shards([str(path)])
    got = samples_of(again)
    assert (again, got.keys()) == (shard, want.keys())
    assert all(
        (got.where[part] == want.where[part]).all() and (got.sums[part] == want.sums[part]).all() for part in want.where
    )
