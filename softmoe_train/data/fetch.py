"""This file owns reading from URLs: with patience, and never for ever.

What may pass (a lost connection, a body that breaks off or stands still, 408, 425, 429, 5xx) is tried again after a wait that
doubles; what will not pass (403, 404, a redirect to another scheme) is told at once. A call that brings next to nothing for
`timeout` seconds is given up, whatever the driver is waiting for.
"""

import asyncio
import hashlib
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

from softmoe_train.data.http import (
    NOT_THERE,
    FetchError,
    Found,
    LaterError,
    MissingError,
    Request,
    Sink,
    get,
    http_driver,
)
from softmoe_train.redact import without_secrets
from softmoe_train.stores import AsyncDriver, own_driver, wait_for

FIRST_WAIT, LONGEST_WAIT, LONGEST_ASKED_WAIT = 0.5, 30.0, 60.0  # seconds; the last is of a Retry-After
SLOWEST = 1024  # bytes a second, below which an answer counts as standing still
PIECE = 8 << 20  # bytes of one request to an object store; what a try must bring for the count of tries to begin again
log = logging.getLogger(__name__)


class Client:
    """Reads http://, https://, s3:// and gs://, each by a driver of its own in each process."""

    def __init__(self, *, attempts: int, timeout: float) -> None:
        self.attempts, self.timeout = attempts, timeout
        self._drivers: dict[tuple[int, str], AsyncDriver] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_drivers": {}}

    def read(self, url: str, *, limit: int) -> bytes:
        """All of a small object; raises FetchError above `limit` bytes."""
        into = Sink(limit)
        self._all(url, into, size=None)
        return into.data()

    def span(self, url: str, start: int, size: int, total: int) -> bytes:
        """`size` bytes from `start` of an object of `total`; raises FetchError, NoRangesError where whole objects alone are given."""
        if not size:
            return b""
        into = Sink(size)

        async def once(driver: AsyncDriver) -> None:
            into.restart()
            if _is_http(url):
                await get(driver, url, into, Request(start=start, stop=start + size, total=total))
            else:
                into.write(await driver._cat_file(driver._strip_protocol(url), start=start, end=start + size))
            _check_size(into, size)

        self._persist(url, once, into)
        return into.data()

    def save(self, url: str, into: Sink, *, size: int | None) -> None:
        """Write all of an object, of `size` bytes if that is known, to `into`, going on where a try broke off."""
        self._all(url, into, size=size)

    def find(self, url: str) -> Found:
        """The size of an object and what tells it from another that may replace it; raises MissingError."""

        async def once(driver: AsyncDriver) -> Found:
            if _is_http(url):
                return await get(driver, url, Sink(0), Request(start=0, stop=1, probe=True))
            return _found(await driver._info(driver._strip_protocol(url)))

        return self._persist(url, once, Sink(0))

    def tars(self, place: str) -> list[str]:
        """The URLs of the tars in a folder, or that match a glob, of s3:// or gs://, sorted."""
        kind = place.partition("://")[0]
        pattern = place if "*" in place else f"{place.rstrip('/')}/*.tar"

        async def once(driver: AsyncDriver) -> list[str]:
            driver.invalidate_cache()
            return [str(path) for path in await driver._glob(driver._strip_protocol(pattern))]

        return sorted(f"{kind}://{path}" for path in self._persist(place, once, Sink(0)) if path.endswith(".tar"))

    def _all(self, url: str, into: Sink, *, size: int | None) -> None:
        seen: list[Found] = []

        async def once(driver: AsyncDriver) -> None:
            if _is_http(url):
                await self._rest(driver, url, into, seen)
            else:
                await self._pieces(driver, url, into, seen)
            if size is not None:
                _check_size(into, size)

        self._persist(url, once, into)

    async def _rest(self, driver: AsyncDriver, url: str, into: Sink, seen: list[Found]) -> None:
        """What `into` lacks, or all where nobody can tell whether it is still the same object."""
        if not (into.at and seen and seen[-1].version):
            into.restart()
        request = Request(start=into.at or None, seen=seen)
        await get(driver, url, into, request)

    async def _pieces(self, driver: AsyncDriver, url: str, into: Sink, seen: list[Found]) -> None:
        path = driver._strip_protocol(url)
        now = _found(await driver._info(path))
        if not seen or now != seen[-1]:
            into.restart()
        seen.append(now)
        assert now.size is not None, url
        while into.at < now.size:
            end = min(now.size, into.at + PIECE)
            before = into.at
            into.write(await driver._cat_file(path, start=into.at, end=end))
            if into.at == before:
                raise ConnectionError(f"it ended after {into.at} of {now.size} bytes")

    def _persist(self, url: str, once: Callable[[AsyncDriver], Awaitable[Any]], into: Sink) -> Any:
        driver = self._driver(url)
        failures, error = 0, None
        while failures < self.attempts:
            high = into.high
            try:
                return wait_for(driver, lambda: self._bounded(once(driver), into))
            except FetchError as final:
                raise type(final)(f"{url}: {final}") from None
            except FileNotFoundError:
                raise MissingError(f"{url}: {NOT_THERE}") from None
            except Exception as failed:  # of aiohttp, botocore, google.auth ...
                if _is_final(failed):
                    raise FetchError(
                        f"{url} cannot be read ({_told(failed)}): mend that, or name other shards."
                    ) from None
                error = failed
            failures = 1 if into.high - high >= PIECE else failures + 1
            if failures < self.attempts:
                seconds = wait_before(failures, url, error)
                if failures > 2:
                    log.warning(
                        "%s: %s; trying again in %.1f s (%d of %d)", url, _told(error), seconds, failures, self.attempts
                    )
                time.sleep(seconds)
        assert error is not None
        raise FetchError(
            f"{url} cannot be read: {self.attempts} tries failed, the last with {_told(error)}; mend the server or the network, or "
            f"raise data.cache.attempts or data.cache.timeout; then start again."
        )

    async def _bounded(self, work: Awaitable[Any], into: Sink) -> Any:
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                came = into.came
                await asyncio.wait({task}, timeout=self.timeout)
                if not task.done() and into.came - came < self.timeout * SLOWEST:
                    raise TimeoutError(f"{into.came - came} bytes in {self.timeout:g} s")
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=1)

    def _driver(self, url: str) -> AsyncDriver:
        kind = url.partition("://")[0]
        key = (os.getpid(), kind)  # the thread that a driver works in does not outlive a fork
        if key not in self._drivers:
            self._drivers[key] = _make_driver(kind, self.timeout)
        return self._drivers[key]


def wait_before(failures: int, url: str, error: Exception) -> float:
    """Seconds before the next try: what the server asks for, else doubling, and not the same for two processes."""
    if isinstance(error, LaterError) and error.seconds is not None:
        return min(error.seconds, LONGEST_ASKED_WAIT)
    key = hashlib.sha256(f"{url} {failures} {socket.gethostname()} {os.getpid()}".encode()).digest()
    share = int.from_bytes(key[:4], "little") / (1 << 32)
    return min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT) * (0.5 + share / 2)


def _make_driver(kind: str, timeout: float) -> AsyncDriver:
    match kind:
        case "http" | "https":
            return http_driver(timeout)
        case "s3":
            return own_driver("s3", config_kwargs={"connect_timeout": timeout, "read_timeout": timeout})
        case _:
            return own_driver(kind)


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _check_size(into: Sink, size: int) -> None:
    if into.at != size:
        raise ConnectionError(f"it ended after {into.at} of {size} bytes")


def _found(info: dict[str, Any]) -> Found:
    facts = [str(info[name]) for name in ("ETag", "etag", "LastModified", "generation", "md5Hash") if info.get(name)]
    return Found(int(info["size"]), " ".join(facts))


def _is_final(error: Exception) -> bool:
    words = ("Certificate", "Credentials", "ParamValidation")
    return isinstance(error, (PermissionError, ValueError)) or any(word in type(error).__name__ for word in words)


def _told(error: Exception) -> str:
    text = without_secrets(str(error)).replace("\n", " ")[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
