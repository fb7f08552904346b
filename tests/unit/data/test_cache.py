"""A cache of shards is shared by processes, bounded, owner-only, and holds nothing that is not whole."""

import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from softmoe_train.data.cache import CacheError, ShardCache

SIZE = 1000


def cache(folder: Path, entries: float = 3, patience: float = 5) -> ShardCache:
    return ShardCache(folder / "shards", max_bytes=int(entries * SIZE), patience=patience)


def filling(name: str, made: list[str] | None = None) -> Callable[[int], str]:
    def fetch(file: int) -> str:
        os.pwrite(file, name.encode().ljust(SIZE, b"."), 0)
        if made is not None:
            made.append(name)
        return name

    return fetch


def put(where: ShardCache, name: str, made: list[str] | None = None) -> bool:
    return where.add(name, SIZE, lambda: name, filling(name, made))


def content(where: ShardCache, name: str) -> bytes | None:
    file = where.find(name, SIZE)
    if file is None:
        return None
    data = os.pread(file, SIZE + 1, 0)
    os.close(file)
    return data


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "shards").iterdir() if path.name != "lock")


def test_an_entry_is_fetched_once_and_then_found(tmp_path: Path) -> None:
    made: list[str] = []
    one, two = cache(tmp_path), pickle.loads(pickle.dumps(cache(tmp_path)))
    assert content(one, "a") is None
    assert put(one, "a", made) and put(two, "a", made)
    assert made == ["a"]
    assert content(two, "a") == b"a".ljust(SIZE, b".")
    assert (tmp_path / "shards").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "shards" / "a").stat().st_mode & 0o777 == 0o600


def test_what_went_unused_for_longest_is_evicted_and_the_bound_is_kept(tmp_path: Path) -> None:
    where = cache(tmp_path)
    for name in "abc":
        put(where, name)
        time.sleep(0.01)
    assert content(where, "a")
    time.sleep(0.01)
    put(where, "d")
    assert names(tmp_path) == ["a", "c", "d"]
    put(where, "e")
    assert names(tmp_path) == ["a", "d", "e"]


def test_what_is_open_is_never_evicted_and_what_then_does_not_fit_is_not_kept(tmp_path: Path) -> None:
    where = cache(tmp_path)
    for name in "abc":
        put(where, name)
    held = [cache(tmp_path).find(name, SIZE) for name in "abc"]
    assert put(where, "d") is False
    assert names(tmp_path) == ["a", "b", "c"]
    assert held[1] is not None
    os.close(held[1])
    assert put(where, "d")
    assert names(tmp_path) == ["a", "c", "d"]
    assert where.add("large", 4 * SIZE, lambda: "large", filling("large")) is False


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fails(file: int) -> str:
        os.pwrite(file, b"half", 0)
        raise ValueError("lost")

    where = cache(tmp_path)
    with pytest.raises(ValueError, match="lost"):
        where.add("a", SIZE, lambda: "a", fails)
    assert names(tmp_path) == []
    assert put(where, "a")


@pytest.mark.parametrize("bytes_left", [0, 10, SIZE + 1])
def test_an_entry_of_another_size_is_fetched_again(tmp_path: Path, bytes_left: int) -> None:
    where = cache(tmp_path)
    put(where, "a")
    (tmp_path / "shards" / "a").write_bytes(b"x" * bytes_left)
    assert content(where, "a") is None
    put(where, "a")
    assert content(where, "a") == b"a".ljust(SIZE, b".")


def writer(folder: Path, pause: float) -> int:
    """A process of its own that fetches "a" in ten pieces and checks it; it ends with 0 if all is well."""

    def slow(file: int) -> str:
        with (folder / "log").open("a") as log:
            log.write("begun\n")
        for at in range(0, SIZE, 100):
            os.pwrite(file, b"." * 100, at)
            time.sleep(pause)
        return "a"

    child = os.fork()
    if child == 0:
        code = 1
        try:
            where = cache(folder, patience=20)
            if where.add("a", SIZE, lambda: "a", slow) and content(where, "a") == b"." * SIZE:
                code = 0
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def begun(folder: Path) -> int:
    return len((folder / "log").read_text().splitlines()) if (folder / "log").exists() else 0


def test_of_many_processes_at_once_one_fetches_and_all_use_it(tmp_path: Path) -> None:
    many = [writer(tmp_path, 0.03) for _ in range(6)]
    assert [ended(one) for one in many] == [0] * 6
    assert begun(tmp_path) == 1
    assert names(tmp_path) == ["a"]


def test_a_killed_download_leaves_nothing_that_is_taken_for_a_shard_and_no_lock(tmp_path: Path) -> None:
    first = writer(tmp_path, 0.5)
    while not begun(tmp_path):
        time.sleep(0.02)
    os.kill(first, signal.SIGKILL)
    assert ended(first) == -signal.SIGKILL
    assert names(tmp_path) == ["a.part"]
    assert content(cache(tmp_path), "a") is None
    assert put(cache(tmp_path), "b")  # it clears away what the dead left
    assert names(tmp_path) == ["b"]
    assert ended(writer(tmp_path, 0)) == 0


def test_one_that_stands_still_is_told_of_and_not_waited_for_for_ever(tmp_path: Path) -> None:
    first = writer(tmp_path, 30)
    while not begun(tmp_path):
        time.sleep(0.02)
    with pytest.raises(CacheError, match=r"has held .*a\.part for 0\.3 s and written nothing to it: end that process"):
        put(cache(tmp_path, patience=0.3), "a")
    os.kill(first, signal.SIGKILL)
    ended(first)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o777])
def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards").chmod(mode)
    with pytest.raises(
        CacheError, match=r"shards can be entered by others.* chmod 700, or give another data\.cache\.folder"
    ):
        content(cache(tmp_path), "a")


def test_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "elsewhere" / "file").write_bytes(b"x" * SIZE)
    (tmp_path / "shards").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="cannot be used to keep shards"):
        content(cache(tmp_path), "a")
    (tmp_path / "shards").unlink()
    put(cache(tmp_path), "b")
    for name in ("a", "c.part"):
        (tmp_path / "shards" / name).symlink_to(tmp_path / "elsewhere" / "file")
    os.mkfifo(tmp_path / "shards" / "f", 0o600)
    for bad in (
        lambda: content(cache(tmp_path), "a"),
        lambda: put(cache(tmp_path), "c"),
        lambda: content(cache(tmp_path), "f"),
    ):
        with pytest.raises(CacheError, match=r"delete it\."):
            bad()
    assert (tmp_path / "elsewhere" / "file").read_bytes() == b"x" * SIZE


def test_where_no_folder_can_be_the_remedy_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match=r"give another data\.cache\.folder"):
        put(cache(tmp_path / "file"), "a")
