"""This file owns URLs: what one of ours may say, and fsspec's driver for it.

Shards and checkpoints both lie at URLs, and the packages that read them do not know each other: what both need is here.
"""

import re
from collections.abc import Callable, Coroutine
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem, sync

URL = re.compile(r"(?P<kind>[a-zA-Z][a-zA-Z0-9+.-]*):(?P<slashes>/{0,2})(?P<rest>.*)", re.DOTALL)
IN_ENVIRONMENT = "a URL here has no user, key or query; give them as the driver takes them, in environment variables"

Driver = fsspec.AbstractFileSystem
AsyncDriver = AsyncFileSystem


def url_problem(text: str, *, example: str) -> str | None:
    """Why `text` is no URL of one store, whatever its kind, with the remedy: `example` shows how to write one."""
    found = URL.fullmatch(text)
    if found is None or found["slashes"] != "//" or "::" in re.sub(r"^\[[0-9a-fA-F:.]+\]", "", found["rest"]):
        return f"it is no URL of one store; write it as {example}"
    if set("@?#") & set(found["rest"]):
        return IN_ENVIRONMENT
    if not found["rest"].isprintable():
        return f"it has a character that cannot be seen; write it as {example}"
    return None


def is_kind(kind: str) -> bool:
    """Whether fsspec has heard of such URLs."""
    return kind in fsspec.available_protocols()


def driver_problem(text: str) -> str | None:
    """Why this machine cannot use a path or URL that is sound as such; asks no server."""
    if "://" not in text:
        return None
    kind = text.partition("://")[0]
    try:
        fsspec.get_filesystem_class(kind)
    except ImportError as error:
        return f"{kind}:// has no driver here: {error}"
    except ValueError:
        return f"fsspec knows no {kind}://; use one of its object stores, as s3://, gs:// or abfs://"
    return None


def driver_of(url: str) -> tuple[Driver, str]:
    """The driver of a URL, shared by all that use it in this process, and the URL's path in its words."""
    return fsspec.url_to_fs(url)


def own_driver(kind: str, **options: Any) -> AsyncFileSystem:
    """A new driver, set up by `options`, that nothing else uses."""
    driver = fsspec.get_filesystem_class(kind)(skip_instance_cache=True, **options)
    assert isinstance(driver, AsyncFileSystem), kind
    return driver


def wait_for(driver: AsyncFileSystem, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """What `work` returns or raises, done in the thread in which drivers do theirs; `work` bounds its own waits."""
    return sync(driver.loop, work)
