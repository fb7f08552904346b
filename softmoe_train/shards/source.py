"""This file owns what a source of pictures is: parts that are listed one beside another, items, and what is left out and why.

A program with pictures of its own writes a class with these four names and gives it to `make_shards`.
"""

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

from softmoe_train.data.index import IMAGE_SUFFIXES

P = TypeVar("P")

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_META = re.compile(r"__[^/]*__(/|$)")  # names that webdataset keeps for itself, and passes over
_LONGEST = 1000  # characters of a key: no file system has longer paths that mean well


class Stored(NamedTuple):
    """Bytes that lie in a file, read when they are needed."""

    path: str
    offset: int
    size: int


class Item(NamedTuple):
    """A picture on its way into a shard: class numbers or class names, or neither; a text and more facts if there are any.

    `name` says which it is, as `CLASS/FILE.jpg`; the sample's key is made of it. Bytes at hand are kept in the folder of the make until
    their shard is written.
    """

    name: str
    picture: Stored | bytes
    labels: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    text: str | None = None
    extra: dict[str, Any] | None = None


class LeftOut(NamedTuple):
    """What goes into no shard, and why."""

    name: str
    reason: str


class Source(Protocol[P]):
    """Pictures that can be listed in parts, by processes beside one another; it is sent to them."""

    def parts(self) -> Iterable[P]:
        """The parts in an order that is always the same; each is listed by one process."""
        ...

    def items(self, part: P) -> Iterator[Item | LeftOut]:
        """All of a part in an order that is always the same; nothing is passed over without a LeftOut."""
        ...

    def class_names(self) -> list[str] | None:
        """The names of classes 0, 1 ... if they are known beforehand; None: the sorted names of the items."""
        ...

    def facts(self) -> Any:
        """What tells this source from another under the same name, as JSON: a make that goes on needs the same."""
        ...


def key_of(name: str) -> str:
    """The key of a sample in its shard: the name without its suffix; raises ValueError where webdataset could not give it back."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError("its name is not UTF-8") from None
    folder, slash, base = name.rpartition("/")
    if base.startswith("."):
        raise ValueError("a hidden file")
    stem, dot, suffix = base.rpartition(".")
    stem = stem if dot and suffix.lower() in IMAGE_SUFFIXES else base
    key = f"{folder}{slash}{stem.replace('.', '_')}"  # a key ends at the first dot of the base name
    if _CONTROL.search(key):
        raise ValueError("its name holds a control character")
    if not stem.strip() or key.startswith("/") or {"", ".", ".."} & set(folder.split("/") if folder else ()):
        raise ValueError("its name is no plain path")
    if _META.match(key):
        raise ValueError("webdataset passes over names that begin with __...__")
    if len(key) > _LONGEST:
        raise ValueError(f"its name is longer than {_LONGEST} characters")
    return key


def suffix_problem(name: str) -> str | None:
    """Why a file of this name is taken for no picture."""
    base = os.path.basename(name)
    if base.startswith("."):
        return "a hidden file"
    suffix = base.rpartition(".")[2].lower() if "." in base else ""
    if suffix in IMAGE_SUFFIXES:
        return None
    told = f"unknown suffix .{suffix}" if suffix else "no suffix"
    return f"{told} (a picture is one of {', '.join(IMAGE_SUFFIXES)})"


def shown(name: str) -> str:
    """A name as it can be written into a file of UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()
