"""What a server does wrong is borne with, or told in one message; nothing waits for ever, and no wrong bytes are taken."""

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from softmoe_train.data import fetch
from softmoe_train.data.fetch import Client, wait_before
from softmoe_train.data.http import FetchError, LaterError, MissingError, NoRangesError, Sink
from tests.hostile_server import HostileServer

pytest.importorskip("aiohttp")
BODY = random.Random(0).randbytes(200_000)
PASSING = [
    "refuse", "drop", "truncate", "chunked_cut", "no_length_cut", "lies_short", "lies_long", "hang", "hang_body", "drip",
    408, 425, 429, 500, 502, 503,
]  # fmt: skip


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostileServer]:
    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.01)
    (tmp_path / "a.tar").write_bytes(BODY)
    with HostileServer(tmp_path) as server:
        yield server


def client(attempts: int = 3, timeout: float = 0.25) -> Client:
    return Client(attempts=attempts, timeout=timeout)


def saved(server: HostileServer, who: Client, size: int | None = len(BODY)) -> bytes:
    into = Sink(1 << 20)
    who.save(f"{server.url}/a.tar", into, size=size)
    return into.data()


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_is_tried_again_and_the_same_bytes_come(server: HostileServer, fault: str | int) -> None:
    server.plan("a.tar", fault, fault)
    assert saved(server, client()) == BODY
    assert server.times("a.tar") == 3
    server.plan("a.tar", fault, fault)
    assert client().span(f"{server.url}/a.tar", 1000, 50_000, len(BODY)) == BODY[1000:51_000]


@pytest.mark.parametrize("fault", ["refuse", "drop", "hang", "hang_body", "drip", "lies_short", 503])
def test_what_does_not_pass_is_told_in_one_line_after_as_many_tries_as_allowed(server: HostileServer, fault) -> None:
    server.always = lambda _: fault
    begin = time.monotonic()
    for call in (
        lambda: saved(server, client(2, 0.3)),
        lambda: client(2, 0.3).span(f"{server.url}/a.tar", 0, 50_000, len(BODY)),
    ):
        with pytest.raises(
            FetchError, match=r"a\.tar cannot be read: 2 tries failed, the last with .*raise data\.cache"
        ) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert server.times("a.tar") in (4, 8)  # aiohttp asks twice where a connection is closed without a word
    assert time.monotonic() - begin < 10


def test_a_download_goes_on_where_it_broke_off(server: HostileServer) -> None:
    server.plan("a.tar", "truncate", "drop")
    assert saved(server, client()) == BODY
    assert [one.range for one in server.asked] == [None, "bytes=100000-", "bytes=150000-"]


def test_a_server_without_ranges_is_begun_again(server: HostileServer) -> None:
    server.ranges = False
    server.plan("a.tar", "truncate")
    assert saved(server, client()) == BODY
    with pytest.raises(NoRangesError, match=r"a\.tar: the server sends all of it where a range is asked for"):
        client().span(f"{server.url}/a.tar", 0, 10, len(BODY))


def test_an_object_replaced_between_two_tries_is_begun_again(server: HostileServer, tmp_path: Path) -> None:
    other = BODY[::-1]

    def replace(_: str) -> None:
        (tmp_path / "a.tar").write_bytes(other)

    server.plan("a.tar", "truncate")
    server.always = replace
    assert saved(server, client()) == other


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (404, "it is not there: correct the name"),
        (410, "it is not there: correct the name"),
        (403, r"the server refuses it \(status 403\)"),
        (401, r"the server refuses it \(status 401\)"),
        (304, r"the server refuses it \(status 304\)"),
        ("gzip", r"it comes encoded \(gzip\)"),
        ("to file:///etc/passwd", "redirected to file:///etc/passwd, and a redirect may not change the scheme"),
        ("to ftp://127.0.0.1/a.tar", "may not change the scheme: name the place"),
        ("to https://127.0.0.1/a.tar?key=secret", r"127\.0\.0\.1/a\.tar\?<left out>, and .* write https:// yourself"),
        ("to http://user:secret@127.0.0.1/a.tar", "redirected to what is no plain URL"),
        ("to /a.tar", "redirected more than 5 times"),
    ],
)
def test_what_will_not_pass_is_told_at_once(server: HostileServer, fault: str | int, words: str) -> None:
    server.always = lambda _: fault
    begin = time.monotonic()
    with pytest.raises(FetchError, match=words) as caught:
        saved(server, client(attempts=9, timeout=20))
    assert str(caught.value).startswith(f"{server.url}/a.tar: ")
    assert isinstance(caught.value, MissingError) == (fault in (404, 410))
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert server.times("a.tar") == (6 if fault == "to /a.tar" else 1)
    assert time.monotonic() - begin < 2


def test_a_redirect_of_the_same_scheme_is_followed_as_it_is_written(server: HostileServer) -> None:
    server.plan("a.tar", "to moved/a.tar", "to moved/a.tar")
    assert saved(server, client()) == BODY
    assert client().span(f"{server.url}/a.tar", 5, 7, len(BODY)) == BODY[5:12]
    server.plan("a.tar", f"to {server.url}/moved/b%2Fc?sig=%2B%3d")
    with pytest.raises(MissingError):
        saved(server, client())
    assert server.asked[-1].name == "moved/b%2Fc?sig=%2B%3d"


@pytest.mark.parametrize("fault", ["wrong_range", "whole"])
def test_a_range_is_taken_only_from_an_answer_with_that_range(server: HostileServer, fault: str) -> None:
    server.always = lambda _: fault
    with pytest.raises(FetchError, match=r"it answers with the range 'bytes 11-110/200000'|where a range is asked for"):
        client(2).span(f"{server.url}/a.tar", 10, 100, len(BODY))


def test_an_object_of_another_size_has_changed(server: HostileServer) -> None:
    with pytest.raises(FetchError, match=r"a\.tar: it has 200000 bytes, and its index says 200001: it has changed"):
        client().span(f"{server.url}/a.tar", 10, 100, len(BODY) + 1)
    with pytest.raises(FetchError, match="it has 200000 bytes, and its index says 900000: it has changed"):
        client().span(f"{server.url}/a.tar", 800_000, 100, 900_000)


def test_no_more_is_taken_than_there_may_be(server: HostileServer) -> None:
    assert client().read(f"{server.url}/a.tar", limit=len(BODY)) == BODY
    with pytest.raises(FetchError, match=r"a\.tar: more than 199999 bytes come"):
        client().read(f"{server.url}/a.tar", limit=len(BODY) - 1)


def test_size_and_version_are_found_without_reading(server: HostileServer, tmp_path: Path) -> None:
    (tmp_path / "empty.tar").touch()
    first = client().find(f"{server.url}/a.tar")
    assert first.size == len(BODY) and first.version
    assert client().find(f"{server.url}/empty.tar").size == 0
    (tmp_path / "a.tar").write_bytes(BODY[::-1])
    assert client().find(f"{server.url}/a.tar").version != first.version
    server.ranges = False
    assert client().find(f"{server.url}/a.tar").size == len(BODY)


def test_a_client_works_on_both_sides_of_a_fork(server: HostileServer) -> None:
    who = client()
    assert saved(server, who) == BODY
    child = os.fork()
    if child == 0:
        os._exit(0 if saved(server, who) == BODY else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert saved(server, who) == BODY


def test_a_wait_doubles_to_a_bound_differs_between_urls_and_is_what_the_server_asks_up_to_a_bound() -> None:
    lost = ConnectionError()
    waits = [wait_before(n, "http://x/a", lost) for n in range(1, 30)]
    assert all(0.5 <= wait / min(0.5 * 2**n, 30) <= 1 for n, wait in enumerate(waits))
    assert waits == [wait_before(n, "http://x/a", lost) for n in range(1, 30)]
    assert wait_before(1, "http://x/b", lost) != waits[0]
    assert wait_before(1, "http://x/a", LaterError(429, 7.0)) == 7
    assert wait_before(1, "http://x/a", LaterError(429, 3600.0)) == 60


def test_a_retry_after_is_honoured(server: HostileServer) -> None:
    server.plan("a.tar", "later 1")
    begin = time.monotonic()
    assert saved(server, client()) == BODY
    assert time.monotonic() - begin >= 1


def test_nobody_there_is_told(tmp_path: Path) -> None:
    with HostileServer(tmp_path) as gone:
        pass
    with pytest.raises(FetchError, match=r"a\.tar cannot be read: 2 tries failed, the last with ClientConnectorError"):
        client(2).read(f"{gone.url}/a.tar", limit=10)
