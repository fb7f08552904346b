"""Shards in a real S3 server on this machine: `pip install s3fs "moto[server]"`, then `pytest -m full`. No test has gs://."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from softmoe_train.data import fetch, make_indexes
from softmoe_train.data.index import index_shards
from softmoe_train.data.places import ShardsError
from softmoe_train.data.published import publish_index
from tests.s3 import s3_server
from tests.unit.data.test_remote import agree, config, stream

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an S3 server, which the environment names."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    log = tmp_path_factory.mktemp("moto") / "log"
    with s3_server(log) as names, pytest.MonkeyPatch.context() as environment:
        for name, value in names.items():
            environment.setenv(name, value)
        yield names["AWS_ENDPOINT_URL"]


@pytest.fixture
def bucket(server: str, numbered_shards: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A folder of shards, and the same in a bucket of its own."""
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.01)
    folder = numbered_shards(30, 7, 23)
    store, name = (
        s3fs.S3FileSystem(endpoint_url=server, key="any", secret="any", skip_instance_cache=True),
        f"b{os.urandom(4).hex()}",
    )
    store.mkdir(name)
    store.put(f"{folder}/", f"{name}/shards", recursive=True)
    return folder, f"s3://{name}/shards"


def upload(folder: Path, url: str, server: str) -> None:
    s3fs = pytest.importorskip("s3fs")
    store = s3fs.S3FileSystem(endpoint_url=server, key="any", secret="any", skip_instance_cache=True)
    for path in folder.iterdir():
        store.put_file(str(path), f"{url.removeprefix('s3://')}/{path.name}")


@pytest.mark.parametrize("pattern", ["", "/", "/train-*.tar", "/train-{000000..000002}.tar"])
def test_a_folder_a_glob_and_a_brace_pattern_give_the_batches_of_local_files(
    bucket: tuple[Path, str], pattern: str
) -> None:
    folder, url = bucket
    assert make_indexes(config(url + pattern), part=0, parts=1, needs_test=False) == []
    assert agree(iter(stream(config(url + pattern, 2))), iter(stream(config(str(folder)))), 12)


@pytest.mark.parametrize("max_gib", [1.0, 0.0])
def test_with_a_published_index_copies_and_ranges_give_the_same(
    bucket: tuple[Path, str], server: str, max_gib: float
) -> None:
    folder, url = bucket
    here = stream(config(str(folder)))
    publish_index(list(index_shards(sorted(map(str, folder.glob("*.tar"))))), str(folder))
    upload(folder, url, server)
    there = stream(config(url, max_gib=max_gib))
    assert there.fingerprint() == here.fingerprint()
    assert agree(iter(there), iter(here), 8)


def test_what_is_not_there_is_told(bucket: tuple[Path, str]) -> None:
    _, url = bucket
    for spec, words in (
        (f"{url}/train-{{000000..000003}}.tar", r"train-000003\.tar: it is not there: correct the name"),
        (f"{url}/none", "names no tar"),
        (f"{url}/none-*.tar", "names no tar"),
        ("s3://no-such-bucket/x", "not there|names no tar"),
    ):
        problems = make_indexes(config(spec), part=0, parts=1, needs_test=False)
        assert len(problems) == 1
        with pytest.raises(ShardsError, match=words):
            raise ShardsError(problems[0])


def test_an_object_that_is_replaced_is_indexed_again(bucket: tuple[Path, str], server: str) -> None:
    folder, url = bucket
    before = make_indexes(config(url), part=0, parts=1, needs_test=False) or stream(config(url)).fingerprint()
    (folder / "train-000000.tar").write_bytes((folder / "train-000001.tar").read_bytes())
    upload(folder, url, server)
    assert make_indexes(config(url), part=0, parts=1, needs_test=False) == []
    assert stream(config(url)).fingerprint() == stream(config(str(folder))).fingerprint() != before
