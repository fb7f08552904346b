"""This file owns published indexes: what lies beside shards so that no reader need read a tar to know what it holds.

A folder of shards, on a disk or behind a URL, may hold `index.json`, which names its tars with their counts, sizes and
hashes, and for each NAME.tar the file NAME.tar.index.safetensors: the tensors of `index.Samples`. What is read here may
come from anyone: nothing of it is believed before it is checked.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from softmoe_train.config import Record
from softmoe_train.data.index import PARTS, Samples, Shard, samples_of
from softmoe_train.data.places import ShardsError

INDEX = "index.json"
SUFFIX = ".index.safetensors"  # after the name of a tar
MAX_INDEX = 256 << 20  # bytes of an index.json: a million shards
_SLACK = 1 << 20  # bytes that an index may have beyond those of its tar, which holds a header of 512 for each sample


def _plain(name: str) -> str:
    if len(name.encode()) > 200 or not name.endswith(".tar") or name.startswith("."):
        raise ValueError("is not the name of a tar")
    if not name.isprintable() or set(name) & set("/\\?#*[]{}") or "::" in name:
        raise ValueError("is not a plain file name")
    return name


Name = Annotated[str, AfterValidator(_plain)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0, lt=1 << 50)]  # bytes


class Entry(Record):
    """What an `index.json` says of one tar: its size and content, and those of its index file."""

    name: Name
    count: Annotated[int, Field(ge=0, lt=1 << 40)]
    size: Size
    sha256: Sha256
    index_size: Size
    index_sha256: Sha256

    def shard(self, path: str, mtime_ns: int) -> Shard:
        """The tar at `path` as it is described here."""
        return Shard(path, self.count, self.sha256, self.size, mtime_ns, self.index_sha256, self.index_size)


class _Published(Record):
    format: Literal[1]
    shards: list[Entry]


def publish_index(shards: Sequence[Shard], folder: str) -> str:
    """Write into `folder` the index of each of `shards` (indexed, local), then `index.json`; returns its path.

    The bytes depend on the tars and their base names alone. A kill leaves what was published before, or all of this.
    """
    entries = []
    for shard in shards:
        name = os.path.basename(shard.path)
        data = _pack(samples_of(shard))
        try:
            entry = Entry(
                name=name,
                count=shard.count,
                size=shard.size,
                sha256=shard.sha256,
                index_size=len(data),
                index_sha256=hashlib.sha256(data).hexdigest(),
            )
        except ValidationError as error:
            raise ShardsError(f"{shard.path} cannot be published: {_first(error)}; rename it.") from None
        entries.append(entry)
        _write_whole(Path(folder, name + SUFFIX), data)
    twice = _twice([entry.name for entry in entries])
    if twice is not None:
        raise ShardsError(f"two shards are named {twice}: an index lists a folder, so names must differ; rename one.")
    published = _Published(format=1, shards=sorted(entries, key=lambda entry: entry.name))
    lines = ",\n".join(json.dumps(entry.model_dump()) for entry in published.shards)
    path = Path(folder, INDEX)
    _write_whole(path, f'{{"format": 1, "shards": [\n{lines}\n]}}\n'.encode())
    return str(path)


def parse_index(data: bytes, origin: str) -> dict[str, Entry]:
    """What the `index.json` read from `origin` lists, by name; raises ValueError where it is none."""
    try:
        entries = _Published.model_validate_json(data).shards
    except ValidationError as error:
        raise ShardsError(f"{origin} is no index of shards ({_first(error)}): {_REMEDY}") from None
    twice = _twice([entry.name for entry in entries])
    if twice is not None:
        raise ShardsError(f"{origin} lists {twice} twice: {_REMEDY}")
    for entry in entries:
        if entry.count * 512 > entry.size or entry.index_size > entry.size + _SLACK:
            raise ShardsError(f"{origin}: {entry.name} of {entry.size} bytes cannot hold what it says: {_REMEDY}")
    return {entry.name: entry for entry in entries}


def unpack(data: bytes, shard: Shard, origin: str) -> Samples:
    """The samples of `shard` from the bytes of its index file; raises ValueError where they cannot be its."""
    try:
        tensors = load(data)
        problem = _problem(tensors, shard)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        raise ShardsError(f"{origin} is no index of {os.path.basename(shard.path)} ({problem}): {_REMEDY}")
    return Samples(tensors)


_REMEDY = "make it again with `softmoe shards index`, or delete the published index."


def _pack(samples: Samples) -> bytes:
    return save(samples.tensors)


def _problem(tensors: dict[str, torch.Tensor], shard: Shard) -> str | None:
    shapes = {"keys": (torch.uint8, None), "key_ends": (torch.int64, (shard.count,))}
    for part in PARTS:
        shapes[part] = (torch.int64, (shard.count, 2))
        shapes[f"{part}_sums"] = (torch.int64, (shard.count,))
    if tensors.keys() != shapes.keys():
        return f"it holds {', '.join(sorted(tensors))[:200]}"
    for name, (dtype, shape) in shapes.items():
        if (
            tensors[name].dtype != dtype
            or tensors[name].ndim < 1
            or tuple(tensors[name].shape) != (shape or tuple(tensors[name].shape))
        ):
            return f"{name} is {tensors[name].dtype} {tuple(tensors[name].shape)}"
    for part in PARTS:
        offset, size = tensors[part].unbind(1)
        absent = (offset == -1) & (size == -1)
        if not bool(
            (absent | ((offset >= 0) & (offset <= shard.size) & (size >= 0) & (size <= shard.size - offset))).all()
        ):
            return f"{part} reaches outside the tar"
    keys, ends = tensors["keys"].numpy(), tensors["key_ends"].numpy()
    if keys.ndim != 1 or (len(ends) and (ends[0] < 0 or ends[-1] > len(keys) or (ends[1:] < ends[:-1]).any())):
        return "its keys have no order"
    starts = ends[:-1][ends[:-1] < len(keys)]
    if ((keys[starts] & 0xC0) == 0x80).any():
        return "its keys are no text"
    bytes(keys[: int(ends[-1]) if len(ends) else 0]).decode()
    return None


def _twice(names: list[str]) -> str | None:
    return next((name for name, times in Counter(names).items() if times > 1), None)


def _first(error: ValidationError) -> str:
    detail = error.errors(include_url=False)[0]
    place = ".".join(map(str, detail["loc"]))
    return f"{place}: {detail['msg']}"[:300] if place else detail["msg"][:300]


def _write_whole(path: Path, data: bytes) -> None:
    scratch = path.with_name(f".{path.name}.part")
    with scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
