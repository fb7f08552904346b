"""This file owns what an HTTP server may answer: every answer is judged by its head before its body is taken.

fsspec's driver follows redirects anywhere and takes any body for the range asked for; set up as here it asks us first.
"""

import email.utils
import re
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from softmoe_train.data.places import ShardsError
from softmoe_train.redact import without_secrets
from softmoe_train.stores import AsyncDriver, own_driver

MAX_REDIRECTS = 5
_AS_IT_IS = "%/:!$&'()*+,;=~@?#[]"  # of a URL; all else is escaped, and what is escaped stays so
NOT_THERE = "it is not there: correct the name, or upload it."
_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18}|\*)")


class FetchError(ShardsError):
    """What cannot be read from a URL, and that another try would not mend; the message says what helps."""


class MissingError(FetchError):
    """The URL names nothing."""


class NoRangesError(FetchError):
    """The server gives whole objects only."""


class LaterError(Exception):
    """The server asks to come again, after `seconds` if it says so."""

    def __init__(self, status: int, seconds: float | None) -> None:
        super().__init__(f"status {status}")
        self.seconds = seconds


class Found(NamedTuple):
    """An object at a URL: its size where the server tells, and what tells it from another, "" where nothing does."""

    size: int | None
    version: str


class Sink:
    """Where the bytes of an object go: into memory, or wherever `write` takes them. Raises FetchError beyond `limit`."""

    def __init__(self, limit: int | None, write: Callable[[bytes, int], object] | None = None) -> None:
        self.limit = limit
        self.at, self.high, self.came = 0, 0, 0  # bytes in place now, the most there were, bytes that have come in all
        self._kept, self._write = bytearray(), write

    def write(self, data: bytes) -> int:
        """Take bytes at the end of those there are."""
        if self.limit is not None and self.at + len(data) > self.limit:
            raise FetchError(f"more than {self.limit} bytes come, where there should be no more.")
        if self._write is None:
            self._kept += data
        else:
            self._write(data, self.at)
        self.at += len(data)
        self.high, self.came = max(self.high, self.at), self.came + len(data)
        return len(data)

    def restart(self) -> None:
        """Forget all."""
        self.at = 0
        self._kept.clear()

    def data(self) -> bytes:
        """What was kept in memory."""
        return bytes(self._kept)

    def read(self, _: int = -1) -> bytes:
        """Nothing: it is here so that fsspec knows a file."""
        return b""

    def tell(self) -> int:
        """How many bytes are in place."""
        return self.at

    def close(self) -> None:
        """Nothing."""


@dataclass
class Request:
    """What is asked for: bytes from `start` up to `stop` of an object of `total`; or, by `probe`, what there is."""

    start: int | None = None
    stop: int | None = None
    total: int | None = None
    probe: bool = False
    seen: list[Found] = field(default_factory=list)  # what earlier tries found; this one adds to it
    into: Sink = field(default_factory=lambda: Sink(0))

    def headers(self) -> dict[str, str]:
        """The head of the request."""
        if self.start is None:
            return {}
        return {"Range": f"bytes={self.start}-{'' if self.stop is None else self.stop - 1}"}


class _MovedError(Exception):
    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.location = location


class _EnoughError(Exception):
    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found


_asked: ContextVar[Request] = ContextVar("asked")


def http_driver(timeout: float) -> AsyncDriver:
    """fsspec's driver, which lets `_judge` see every answer. It knows https_proxy and ~/.netrc, as other programs do."""
    import aiohttp  # only where a URL is read: it takes a quarter of a second

    limits = aiohttp.ClientTimeout(total=None, connect=timeout, sock_connect=timeout, sock_read=timeout)
    options = {
        "timeout": limits,
        "raise_for_status": _judge,
        "auto_decompress": False,
        "headers": {"Accept-Encoding": "identity"},
        "trust_env": True,
    }
    return own_driver("http", client_kwargs=options, encoded=True)


async def get(driver: AsyncDriver, url: str, into: Sink, request: Request) -> Found:
    """Write what `request` asks of `url` to `into`, through redirects of the same scheme; what it found there."""
    request.into = into
    _asked.set(request)
    here = url
    for _ in range(MAX_REDIRECTS + 1):
        try:
            await driver._get_file(quote(here, safe=_AS_IT_IS), into, headers=request.headers(), allow_redirects=False)
            return request.seen[-1]
        except _MovedError as moved:
            here = _moved_to(url, here, moved.location)
        except _EnoughError as enough:
            return enough.found
    raise FetchError(f"it is redirected more than {MAX_REDIRECTS} times: name the place where the shards are.")


def _moved_to(url: str, here: str, location: str) -> str:
    target = urljoin(here, location)
    old, new = urlsplit(url), urlsplit(target)
    if new.scheme != old.scheme:
        remedy = f"write {new.scheme}:// yourself" if new.scheme == "https" else "name the place where the shards are"
        raise FetchError(
            f"it is redirected to {without_secrets(target)[:300]}, and a redirect may not change the scheme: {remedy}."
        )
    if not new.hostname or new.username is not None:
        raise FetchError("it is redirected to what is no plain URL: name the place where the shards are.")
    return target


async def _judge(response: Any) -> None:
    """Raise unless the body of `response` is what was asked for; the body is then never read."""
    try:
        request = _asked.get()
        _judge_head(response.status, response.headers, request)
        if request.probe:
            raise _EnoughError(request.seen[-1])
    except BaseException:
        response.close()
        raise


def _judge_head(status: int, headers: Any, request: Request) -> None:
    if status in (301, 302, 303, 307, 308) and headers.get("Location"):
        raise _MovedError(headers["Location"])
    if status in (408, 425, 429) or status >= 500:
        raise LaterError(status, _seconds(headers.get("Retry-After")))
    if status in (404, 410):
        raise MissingError(NOT_THERE)
    if status not in (200, 206, 416) or (status == 416 and request.start is None):
        raise FetchError(
            f"the server refuses it (status {status}): see to it that it can be read without more than a URL."
        )
    if headers.get("Content-Encoding", "identity") != "identity":
        raise FetchError(f"it comes encoded ({headers['Content-Encoding']}): have the server send files as they are.")
    version = " ".join(filter(None, (headers.get("ETag"), headers.get("Last-Modified"))))
    length = headers.get("Content-Length", "")
    if status == 200:
        found = Found(int(length) if re.fullmatch(r"\d{1,18}", length) else None, version)
        _take_whole(found, request)
    else:
        _take_range(status, headers.get("Content-Range", ""), version, request)


def _take_whole(found: Found, request: Request) -> None:
    request.seen.append(found)
    if request.start is None or request.probe:
        return
    if request.stop is not None:
        raise NoRangesError("the server sends all of it where a range is asked for.")
    request.into.restart()  # it begins again where we would go on


def _take_range(status: int, told: str, version: str, request: Request) -> None:
    match = _RANGE.fullmatch(told)
    total = int(match[3]) if match and match[3] != "*" else None
    if request.probe and match:
        request.seen.append(Found(total, version))
        return
    if request.total is not None and (status == 416 or (total is not None and total != request.total)):
        raise FetchError(f"it has {total} bytes, and its index says {request.total}: it has changed; start again.")
    if (
        match is None
        or match[1] is None
        or int(match[1]) != request.start
        or request.stop not in (None, int(match[2]) + 1)
    ):
        request.seen.clear()  # the next try begins again
        raise ConnectionError(f"it answers with the range {told[:60]!r}")
    if request.stop is None and version != request.seen[-1].version:
        request.into.restart()
        request.seen.clear()
        raise ConnectionError("it has been replaced between two tries")
    request.seen.append(Found(total, version))


def _seconds(told: str | None) -> float | None:
    """The seconds that a Retry-After asks for, a number or a date."""
    if told is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}\s*", told):
        return float(told)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(told).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
