"""Shards behind a server that does everything wrong give the batches of local files, pixel for pixel, or stop with one message."""

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import pytest
import torch

from softmoe_train.data import Batch, Cursor, WebDatasetConfig, build_eval_stream, build_stream, fetch, make_indexes
from softmoe_train.data.catalog import Catalog
from softmoe_train.data.index import data_hash, index_shards
from softmoe_train.data.places import ShardsError
from softmoe_train.data.published import INDEX, SUFFIX, publish_index
from softmoe_train.data.records import KeepConfig
from softmoe_train.data.remote import Remote
from tests.hostile_server import HostileServer
from tests.unit.data.conftest import CACHE, encoded, numbered_picture, settings, write_tar

pytest.importorskip("aiohttp")
COUNTS = (30, 7, 23, 40)


@pytest.fixture
def folder(numbered_shards: Callable[..., Path]) -> Path:
    return numbered_shards(*COUNTS)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostileServer]:
    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.01)
    with HostileServer(folder) as server:
        yield server


def publish(folder: Path) -> None:
    publish_index(list(index_shards(sorted(map(str, folder.glob("*.tar"))))), str(folder))


def config(train: str, workers: int = 0, **cache: object) -> WebDatasetConfig:
    return settings(train=train, workers=workers, cache={**CACHE, **cache})


def stream(cfg: WebDatasetConfig, rank: int = 0, world: int = 1):
    return build_stream(cfg, image_size=4, num_classes=10, seed=7, global_batch=8, rank=rank, world=world)


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("images", "labels", "mask", "sample_ids"))


def agree(ours: Iterator[Batch], theirs: Iterator[Batch], batches: int = 30) -> bool:
    return all(same(a, b) for a, b in zip(islice(ours, batches), islice(theirs, batches), strict=True))


def tar(number: int) -> str:
    return f"train-{number:06d}.tar"


FAULTS = [
    "drop",
    None,
    "truncate",
    503,
    "lies_short",
    None,
    "chunked_cut",
    429,
    "other_bytes",
    "no_length_cut",
    None,
    "refuse",
]


@pytest.mark.parametrize(
    ("published", "workers", "max_gib"),
    [(True, 0, 1.0), (True, 2, 1.0), (False, 0, 1.0), (False, 2, 1.0), (True, 0, 0.0), (True, 2, 0.00002)],
)
def test_a_server_that_fails_in_every_way_gives_the_batches_of_local_files(
    server: HostileServer, folder: Path, published: bool, workers: int, max_gib: float
) -> None:
    local = iter(stream(config(str(folder))))
    if published:
        publish(folder)
    faults = itertools.cycle([fault for fault in FAULTS if published or fault != "other_bytes"])  # who could tell?
    server.always = lambda _: next(faults)
    train = server.url + ("/" if published else "/train-{000000..000003}.tar")
    cfg = config(train, workers, max_gib=max_gib, attempts=12)
    assert make_indexes(cfg, part=0, parts=1, needs_test=False) == []
    assert agree(iter(stream(cfg)), local, 14 if max_gib == 1 else 5)


def test_a_run_may_move_between_a_disk_and_a_server_and_go_on(server: HostileServer, folder: Path) -> None:
    here = stream(config(str(folder)))
    publish(folder)
    there = stream(config(server.url + "/"))
    assert there.fingerprint() == here.fingerprint()
    assert stream(config(server.url + "/train-{000000..000003}.tar")).fingerprint() == here.fingerprint()
    whole = list(islice(here, 10))
    there.seek(Cursor.from_json(whole[4].cursor.to_json()))
    assert all(same(a, b) for a, b in zip(whole[5:], islice(there, 5), strict=True))


def test_evaluation_over_a_server_sees_what_it_sees_on_a_disk(server: HostileServer, folder: Path) -> None:
    def batches(test: str, rank: int) -> list[Batch]:
        cfg = settings(test=test, cache=CACHE)
        return list(build_eval_stream(cfg, image_size=4, num_classes=10, seed=7, batch_size=8, rank=rank, world=2))

    local = [batches(str(folder), rank) for rank in (0, 1)]
    publish(folder)
    for rank in (0, 1):
        assert all(same(a, b) for a, b in zip(local[rank], batches(server.url + "/", rank), strict=True))


def test_with_a_published_index_a_start_asks_for_it_alone(server: HostileServer, folder: Path) -> None:
    publish(folder)
    cfg = config(server.url + "/", prefetch=0)
    assert make_indexes(cfg, part=0, parts=1, needs_test=False) == []
    ours = stream(cfg)
    assert {one.name for one in server.asked} == {INDEX}
    next(iter(ours))
    opened = {one.name for one in server.asked} - {INDEX}
    tars = {name for name in opened if name.endswith(".tar")}
    assert 0 < len(tars) <= 4
    assert opened == tars | {name + SUFFIX for name in tars}


def test_without_one_each_tar_is_fetched_once_to_be_indexed_and_used(
    server: HostileServer, folder: Path, caplog
) -> None:
    cfg = config(server.url + "/train-{000000..000003}.tar")
    for part in (0, 1):
        assert make_indexes(cfg, part=part, parts=2, needs_test=False) == []
    assert "1 of 1: http" in caplog.text and "has no published index: it is fetched and read once" in caplog.text
    list(islice(stream(cfg), 40))
    assert all(sum(one.name == tar(n) and one.range is None for one in server.asked) == 1 for n in range(4))
    before = len(server.asked)
    assert make_indexes(cfg, part=0, parts=1, needs_test=False) == []  # a new start asks whether they are the same
    assert [one.range for one in server.asked[before:] if one.name != INDEX] == ["bytes=0-0"] * 4
    write_tar(folder / tar(1), [("x.cls", b"1"), ("x.png", encoded(numbered_picture(1)))])
    assert make_indexes(cfg, part=0, parts=1, needs_test=False) == []
    assert stream(cfg).fingerprint()["samples"] == sum(COUNTS) - COUNTS[1] + 1


def test_processes_that_start_at_once_on_an_empty_cache_fetch_each_shard_once(
    server: HostileServer, folder: Path
) -> None:
    publish(folder)
    children = []
    for rank in (0, 1) * 4:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                ours = stream(config(server.url + "/"), rank, 2)
                code = 0 if len(list(islice(ours, 14))) == 14 else 1
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 8
    whole = [one.name for one in server.asked if one.name.endswith(".tar") and one.range is None]
    assert sorted(whole) == [tar(n) for n in range(4)]


def test_a_rank_asks_for_the_shards_that_its_streams_read_and_for_no_others(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for shard in range(16):
        members = [
            (f"{n}.{end}", data)
            for n in range(20 * shard, 20 * shard + 20)
            for end, data in (("cls", b"1"), ("png", encoded(numbered_picture(n))))
        ]
        write_tar(folder / tar(shard), members)
    publish(folder)
    asked = []
    for rank in (0, 1):
        with HostileServer(folder) as server:
            cfg = config(server.url + "/", folder=str(tmp_path / f"cache{rank}"), prefetch=4)
            ours, batches = stream(cfg, rank, 2), 39  # 312 of the 320 samples of an epoch
            list(islice(ours, batches))
            need = {one.shard for at in range(batches) for one in ours.samples(Cursor(8 * at), rank)}
            time.sleep(0.3)  # what is fetched ahead would be asked for by now
            had = {one.name for one in server.asked if one.name.endswith(".tar")}
            assert need <= had
            asked.append(had)
    # The second epoch has another order: of it a few shards are fetched ahead, up to `prefetch`, by each rank.
    assert len(asked[0] & asked[1]) <= 2 + 4 + 4
    assert len(asked[0]) <= 9 + 4


def test_for_a_few_samples_of_a_shard_no_whole_copy_is_fetched(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    members = [m for n in range(100) for m in ((f"{n:03d}.cls", b"1"), (f"{n:03d}.png", encoded(numbered_picture(n))))]
    write_tar(folder / tar(0), members)
    publish(folder)
    for keys, whole in (("00.", 0), ("[0-2].$", 1)):  # 10 and 30 of the 100 samples
        with HostileServer(folder) as server:
            keep = KeepConfig(labels=None, keys=keys, renumber=False)
            cfg = config(server.url + "/", folder=str(tmp_path / f"cache{whole}")).model_copy(
                update={"keep": keep, "test": server.url + "/"}
            )
            list(islice(stream(cfg), 2))
            assert len(list((tmp_path / f"cache{whole}").glob("?" * 64))) == whole
            cfg = cfg.model_copy(
                update={"cache": cfg.cache.model_copy(update={"folder": str(tmp_path / f"held{whole}")})}
            )
            held_out = build_eval_stream(cfg, image_size=4, num_classes=10, seed=0, batch_size=4, rank=0, world=1)
            assert sum(int(batch.mask.sum()) for batch in held_out) == (30 if whole else 10)
            assert len(list((tmp_path / f"held{whole}").glob("?" * 64))) == whole


def test_the_cache_stays_within_its_bound_while_all_is_read(
    server: HostileServer, folder: Path, tmp_path: Path
) -> None:
    publish(folder)
    sizes = sorted(path.stat().st_size for path in folder.glob("*.tar"))
    bound = sizes[-1] + sizes[-2] + 100
    cfg = config(server.url + "/", folder=str(tmp_path / "kept"), max_gib=bound / 2**30)
    local, most = iter(stream(config(str(folder)))), 0
    for ours, theirs in islice(zip(stream(cfg), local), 16):
        assert same(ours, theirs)
        most = max(most, held(tmp_path / "kept"))
    assert sizes[-1] <= most <= bound


def held(folder: Path) -> int:
    """Bytes of a cache's files, which come and go under our hands."""
    size = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def test_a_server_without_ranges_and_a_cache_without_room_are_told(server: HostileServer, folder: Path) -> None:
    publish(folder)
    server.ranges = False
    with pytest.raises(
        ShardsError,
        match=r"sends all of it where a range is asked for\. The cache cannot take .* raise data\.cache\.max_gib=0\.0",
    ):
        list(islice(stream(config(server.url + "/", max_gib=0.0)), 4))


@pytest.mark.parametrize("workers", [0, 1])
def test_other_bytes_than_were_indexed_are_told_and_never_kept(
    server: HostileServer, folder: Path, workers: int, tmp_path: Path
) -> None:
    publish(folder)
    server.always = lambda name: "other_bytes" if name.endswith(".tar") else None
    cfg = config(server.url + "/", workers, folder=str(tmp_path / "kept"), prefetch=0)
    with pytest.raises(
        ShardsError, match=r"tar is not what its index says: 3 times other bytes came than those of SHA-256"
    ) as caught:
        list(islice(stream(cfg), 4))
    assert "\n" not in str(caught.value)
    # A worker that is ended while it tries the next one leaves what it had begun.
    assert {path.name.partition(".")[2] or path.name for path in (tmp_path / "kept").iterdir()} <= {"lock", "part"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_is_told_at_once(server: HostileServer, folder: Path, workers: int) -> None:
    publish(folder)
    ours = stream(config(server.url + "/", workers, attempts=9))
    for path in folder.glob("*.tar"):
        path.unlink()
    begin = time.monotonic()
    with pytest.raises(ShardsError, match=r"http://.*\.tar: it is not there: correct the name, or upload it\."):
        list(islice(ours, 4))
    assert time.monotonic() - begin < 20


def test_members_read_by_ranges_are_checked_one_by_one(server: HostileServer, folder: Path) -> None:
    publish(folder)
    local = iter(stream(config(str(folder))))
    faults = itertools.cycle(["other_bytes", None])
    server.always = lambda name: next(faults) if name.endswith(".tar") else None
    assert agree(iter(stream(config(server.url + "/", max_gib=0.0))), local, 4)


def test_a_killed_download_is_done_again(server: HostileServer, folder: Path, tmp_path: Path) -> None:
    publish(folder)
    server.always = lambda name: "hang_body" if name.endswith(".tar") else None
    cfg = config(server.url + "/", folder=str(tmp_path / "kept"), timeout=30.0)
    child = os.fork()
    if child == 0:
        list(islice(stream(cfg), 1))
        os._exit(1)
    while not list((tmp_path / "kept").glob("*.part")):
        time.sleep(0.02)
    time.sleep(0.2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    server.always = lambda _: None
    assert agree(iter(stream(cfg)), iter(stream(config(str(folder)))))
    assert not list((tmp_path / "kept").glob("*.part"))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (
            None,
            r"data\.train=http.*/: http.* is a folder without an index\.json, and an HTTP server lists no files: publish one",
        ),
        (b"<html>", r"index\.json is no index of shards"),
        (b'{"format": 1, "shards": []}', "names no tar"),
    ],
)
def test_a_folder_without_a_sound_index_is_told_before_anything_starts(
    server: HostileServer, folder: Path, what: bytes | None, words: str
) -> None:
    if what is not None:
        (folder / INDEX).write_bytes(what)
    [problem] = make_indexes(config(server.url + "/"), part=0, parts=1, needs_test=False)
    with pytest.raises(ValueError, match=words):
        raise ValueError(problem)


def test_an_index_file_that_is_not_the_listed_one_is_told(server: HostileServer, folder: Path) -> None:
    publish(folder)
    for path in folder.glob(f"*{SUFFIX}"):
        path.write_bytes(path.read_bytes()[:-8] + random.Random(0).randbytes(8))
    with pytest.raises(ShardsError, match=r"index\.safetensors is not the file that index\.json lists"):
        next(iter(stream(config(server.url + "/"))))


def test_a_published_index_serves_a_local_folder_without_reading_its_tars(
    folder: Path, index_cache: Path, monkeypatch
) -> None:
    before = stream(config(str(folder)))
    batches = list(islice(before, 5))
    publish(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(index_cache / "new"))
    monkeypatch.setattr("softmoe_train.data.index.make_index", None)
    after = stream(config(str(folder)))
    assert after.fingerprint() == before.fingerprint()
    assert all(same(a, b) for a, b in zip(batches, islice(after, 5), strict=True))


def test_a_stale_index_of_a_local_folder_is_told(folder: Path) -> None:
    publish(folder)

    def problem(spec: str = str(folder)) -> str:
        [said] = make_indexes(config(spec), part=0, parts=1, needs_test=False)
        return said

    (folder / "new.tar").write_bytes((folder / tar(0)).read_bytes())
    assert problem().endswith(
        "index.json does not list new.tar: index the folder again (`softmoe shards index`), or delete its index.json."
    )
    assert make_indexes(config(f"{folder}/*.tar"), part=0, parts=1, needs_test=False) == []  # it is indexed here
    (folder / "new.tar").rename(folder / tar(1))
    assert f"{tar(1)} has 71680 bytes, and {folder}/index.json says 20480" in problem()
    (folder / tar(1)).unlink()
    assert f"index.json lists {tar(1)}, which is not there" in problem()


def test_an_index_that_does_not_match_its_tar_makes_broken_samples_that_are_named(folder: Path) -> None:
    publish(folder)
    data = bytearray((folder / tar(0)).read_bytes())
    at = data.index(b"\x89PNG")
    data[at + 60] ^= 1
    (folder / tar(0)).write_bytes(data)
    cfg = config(str(folder)).model_copy(update={"max_broken": 5})
    [broken] = {one for batch in islice(stream(cfg), 13) for one in batch.broken}
    assert broken[:2] == (tar(0), "sample-000000")
    assert "its picture is not the" in broken.reason and "bytes that were indexed" in broken.reason


def test_a_local_shard_that_vanishes_or_changes_is_told(folder: Path) -> None:
    ours = stream(config(str(folder)))
    (folder / tar(0)).touch()
    with pytest.raises(ShardsError, match=r"train-000000\.tar has changed since this run indexed it"):
        list(islice(ours, 13))
    (folder / tar(0)).unlink()
    with pytest.raises(ShardsError, match=r"train-000000\.tar cannot be read \(No such file"):
        list(islice(ours, 13))


def test_the_data_hash_is_that_of_the_same_tars_on_a_disk(server: HostileServer, folder: Path) -> None:
    here = list(index_shards(sorted(map(str, folder.glob("*.tar")))))
    catalog = Catalog(Remote(config(server.url + "/").cache))
    paths = catalog.paths(f"{server.url}/train-{{000000..000003}}.tar", key="data.train")
    there = list(catalog.shards(paths, fresh=True))
    assert data_hash(there) == data_hash(here)
    assert json.loads(json.dumps([shard[1:4] for shard in there])) == json.loads(
        json.dumps([shard[1:4] for shard in here])
    )
