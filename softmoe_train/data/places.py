"""This file owns which tars a specification names: folders, globs, brace patterns and single files, on a disk or at a URL.

URLs are http://, https://, s3:// and gs://, and nothing else: a chain (`::`) or `pipe:` would run what a name says.
"""

import glob
import os
import re
from collections import Counter
from typing import Protocol

from braceexpand import braceexpand

from softmoe_train.plain import plain, the_first
from softmoe_train.redact import without_secrets
from softmoe_train.stores import URL, driver_problem, url_problem

KINDS = ("http", "https", "s3", "gs")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:")
_LONGEST_MESSAGE = 4000  # characters
_EXAMPLE = "https://HOST/train-{0000..0099}.tar or s3://BUCKET/FOLDER"


class ShardsError(ValueError):
    """What is wrong with shards, in one line that says what helps; names that could steer a terminal are shown escaped."""

    def __str__(self) -> str:
        return plain(self.args[0], _LONGEST_MESSAGE)


class UselessShardsError(RuntimeError):
    """Shards that can be read and do not hold what the configuration says; the message ends with what helps."""


class Listing(Protocol):
    """What knows the tars of a folder, or of a glob, at a URL."""

    def tars(self, place: str) -> list[str]:
        """Their URLs, in a fixed order; raises ShardsError."""
        ...


def is_url(path: str) -> bool:
    """Whether a shard lies at a URL."""
    return path.partition("://")[0] in KINDS and "://" in path


def names_url(spec: str | list[str] | None) -> bool:
    """Whether some of it lies at a URL."""
    return any(is_url(one) for one in ([spec] if isinstance(spec, str) else spec or []))


def expand_shards(spec: str | list[str] | None, *, key: str, listing: Listing | None = None) -> list[str]:
    """The absolute paths and URLs of the tars that `spec` names: folders, globs, brace patterns or files, in a fixed order.

    `key` names the configuration value in messages. Raises ValueError where nothing is named or something is missing. Only
    `listing` asks a server; without it, what a folder or glob at a URL holds cannot be told, and is refused.
    """
    paths = [path for one in _checked(spec, key) for path in _expand(one, key, listing)]
    twice = [path for path, times in Counter(paths).items() if times > 1]
    if twice:
        raise ShardsError(f"{key}={spec} names {twice[0]} twice: a shard is read once an epoch; name it once.")
    return paths


def check_places(spec: str | list[str] | None, *, key: str) -> None:
    """Raise ValueError at every mistake in `spec` that shows without asking a server."""
    for one in _checked(spec, key):
        if not _SCHEME.match(one):
            _expand_local(one, key)
        elif all(not _is_open(url) for url in _urls(one, key)):
            expand_shards(one, key=key)


def _checked(spec: str | list[str] | None, key: str) -> list[str]:
    specs = [spec] if isinstance(spec, str) else spec or []
    if not specs or not all(specs):
        raise ShardsError(
            f"{key} is not set: name a folder, a glob or a brace pattern of tar shards, as in {key}=FOLDER (data=synthetic needs none)."
        )
    return specs


def _expand(spec: str, key: str, listing: Listing | None) -> list[str]:
    if not _SCHEME.match(spec):
        return [os.path.abspath(path) for path in _expand_local(spec, key)]
    paths = []
    for url in _urls(spec, key):
        if not _is_open(url):
            paths.append(url)
        elif listing is None:
            raise ShardsError(
                f"{key}={spec} is a folder or a glob at a URL, which only training lists: name its tars by a brace pattern."
            )
        else:
            paths += listing.tars(url)
    return paths


def _urls(spec: str, key: str) -> list[str]:
    """The URLs of a brace pattern; raises ShardsError where one cannot be read, whatever its server would say."""
    shown = f"{key}={without_secrets(spec)}"
    found = URL.fullmatch(spec)
    kind = found["kind"] if found else ""
    if kind not in KINDS or found is None or found["slashes"] != "//":
        raise ShardsError(
            f"{shown} is not a local path, nor an http://, https://, s3:// or gs:// URL: shards are read from these alone; write it as "
            f"{_EXAMPLE}, or mount or copy them."
        )
    problem = url_problem(spec, example=_EXAMPLE) or _url_problem(kind, found["rest"]) or driver_problem(spec)
    if problem is not None:
        raise ShardsError(f"{shown}: {problem}.")
    urls = _braces(spec, key)
    if not all(url.startswith(f"{kind}://") and not url_problem(url, example=_EXAMPLE) for url in urls):
        raise ShardsError(f"{shown}: a brace pattern may stand in the path alone; write it as {_EXAMPLE}.")
    return urls


def _url_problem(kind: str, rest: str) -> str | None:
    where, _, path = rest.partition("/")
    if not where or set(where) & set("{}*"):
        return f"it names no {'host' if kind.startswith('http') else 'bucket'}; write it as {_EXAMPLE}"
    if "\\" in rest or ".." in path.split("/"):
        return "a URL here has no .. and no backslash; write the place itself"
    if "[" in path or "]" in path:
        return "a URL here has no [ ]; write * or a brace pattern"
    if kind.startswith("http") and "*" in rest:
        return "an HTTP server lists no files, so nothing can match *; name them by a brace pattern, or publish an index.json beside them (`softmoe shards index`) and name the folder"
    return None


def _is_open(url: str) -> bool:
    """Whether a URL is a folder or a glob, so that only its server knows what it names."""
    return "*" in url or not url.endswith(".tar")


def _braces(spec: str, key: str) -> list[str]:
    try:
        return list(braceexpand(spec))
    except ValueError as error:
        raise ShardsError(
            f"{key}={spec} is not a brace pattern ({error}); write it as train-{{0000..0099}}.tar."
        ) from None


def _expand_local(spec: str, key: str) -> list[str]:
    spec = os.path.expanduser(spec)
    if os.path.isdir(spec):
        found = sorted(glob.glob(os.path.join(glob.escape(spec), "*.tar")))
        if not found:
            raise ShardsError(f"{key}={spec} holds no *.tar file: name the folder that the shards lie in.")
        return found
    if os.path.exists(spec):
        return [spec]
    found, missing = [], []
    for pattern in _braces(spec, key):
        matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern] * os.path.exists(pattern)
        found += matches
        missing += [] if matches else [pattern]
    if missing:
        raise ShardsError(
            f"{key}={spec}: {the_first(missing, 3)} cannot be found: every named shard must exist; correct the "
            f"path or the pattern (relative paths start at {os.getcwd()})."
        )
    return found
