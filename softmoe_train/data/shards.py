"""This file owns which tar files a specification names, and the index of what each of them holds.

An index is made once for each tar (path, size and modification time) and kept as JSON in an owner-only cache folder,
never beside the shard. Members are grouped into samples by webdataset's own rules on names alone; a member is only
ever read as bytes at an offset, and only if it is a picture or a label. `webdataset.gopen` is never called: it runs
`pipe:` commands and follows GOPEN_REWRITE.
"""

import glob
import hashlib
import json
import os
import re
import stat
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray
from webdataset.tariterators import group_by_keys

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "pnm")
LABEL_SUFFIX = "cls"
_KNOWN = {*IMAGE_SUFFIXES, LABEL_SUFFIX}  # a key with none of these, a README say, is no sample

_FORMAT = 1  # part of a cache file's name: raise it when the index changes
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:")
_META = re.compile(r"__[^/]*__($|/)")  # names that webdataset keeps for itself


class Shard(NamedTuple):
    """One tar: where it is, how many samples it holds, and what tells it from another."""

    path: str
    count: int
    sha256: str
    size: int
    mtime_ns: int


class Samples(NamedTuple):
    """The samples of one shard: keys, and (offset, bytes) of picture and label, (-1, -1) where there is none."""

    keys: list[str]
    images: NDArray[np.int64]
    labels: NDArray[np.int64]


def expand_shards(spec: str | list[str] | None, *, key: str) -> list[str]:
    """The absolute paths of the tars that `spec` names: folders, globs, brace patterns or files, in a fixed order.

    `key` names the configuration value in messages. Raises ValueError where nothing is named or something is missing.
    """
    specs = [spec] if isinstance(spec, str) else spec or []
    if not specs or not all(specs):
        raise ValueError(
            f"{key} is not set: name a folder, a glob or a brace pattern of tar shards, as in {key}=FOLDER (data=synthetic needs none)."
        )
    paths = [os.path.abspath(path) for one in specs for path in _expand(one, key)]
    twice = [path for path, times in Counter(paths).items() if times > 1]
    if twice:
        raise ValueError(f"{key}={spec} names {twice[0]} twice: a shard is read once an epoch; name it once.")
    return paths


def index_shards(paths: Iterable[str]) -> Iterator[Shard]:
    """One indexed shard after the other, so that the caller can show progress; raises ValueError at a damaged tar."""
    for path in paths:
        yield _load(path, with_samples=False)[0]


def samples_of(shard: Shard) -> Samples:
    """What `shard` holds; raises ValueError where the file has changed since `shard` was made."""
    now, columns = _load(shard.path, with_samples=True)
    if now != shard:
        raise ValueError(
            f"{shard.path} has changed since this run indexed it: shards must stay as they are; start again."
        )
    images, labels = (np.asarray(columns[name], np.int64).reshape(-1, 2) for name in ("images", "labels"))
    return Samples(columns["keys"], images, labels)


def data_hash(shards: list[Shard]) -> str:
    """A hash of the data set: the shards' base names, contents and counts in order, wherever they are stored."""
    facts = [[os.path.basename(shard.path), shard.sha256, shard.count] for shard in shards]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _expand(spec: str, key: str) -> list[str]:
    if _SCHEME.match(spec):
        raise ValueError(
            f"{key}={spec} is not a local path: shards are read from local or mounted folders; mount or copy them."
        )
    spec = os.path.expanduser(spec)
    if os.path.isdir(spec):
        found = sorted(glob.glob(os.path.join(glob.escape(spec), "*.tar")))
        if not found:
            raise ValueError(f"{key}={spec} holds no *.tar file: name the folder that the shards lie in.")
        return found
    if os.path.exists(spec):
        return [spec]
    try:
        patterns = list(braceexpand(spec))
    except ValueError as error:
        raise ValueError(
            f"{key}={spec} is not a brace pattern ({error}); write it as train-{{0000..0099}}.tar."
        ) from None
    found, missing = [], []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern] * os.path.exists(pattern)
        found += matches
        missing += [] if matches else [pattern]
    if missing:
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{key}={spec}: {', '.join(missing[:3])}{rest} cannot be found: every named shard must exist; correct the "
            f"path or the pattern (relative paths start at {os.getcwd()})."
        )
    return found


def _load(path: str, *, with_samples: bool) -> tuple[Shard, dict[str, list]]:
    """The shard and, if wanted, the columns of its samples: from the cache, or else made now and cached."""
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError(f"{path} is not a regular file: a shard is a tar file; name another.")
    name = json.dumps([_FORMAT, os.path.abspath(path), facts.st_size, facts.st_mtime_ns])
    cached = _cache_folder() / f"{hashlib.sha256(name.encode()).hexdigest()}.jsonl"
    try:
        with cached.open() as file:
            return Shard(**json.loads(file.readline())), json.loads(file.readline()) if with_samples else {}
    except (FileNotFoundError, ValueError, TypeError):  # absent, or cut off by a full disk: make it again
        pass
    shard, columns = _make_index(path, facts)
    _write_atomically(cached, f"{json.dumps(shard._asdict())}\n{json.dumps(columns)}\n")
    return shard, columns


def _cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "softmoe_train", "index")
    remedy = "set XDG_CACHE_HOME to a folder of your own."
    try:
        folder = folder.expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        raise ValueError(f"{folder} cannot be made ({error}), and the shard indexes are kept there: {remedy}") from None
    facts = folder.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise ValueError(f"{folder} can be written by others, and what it says of shards is trusted: {remedy}")
    return folder


def _write_atomically(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _make_index(path: str, facts: os.stat_result) -> tuple[Shard, dict[str, list]]:
    try:
        with open(path, "rb") as file:
            groups = [group for group in group_by_keys(_members(file, facts.st_size)) if _KNOWN & group.keys()]
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (tarfile.TarError, ValueError, EOFError, OverflowError, LookupError) as error:
        reason = error.args[0] if error.args else error  # webdataset appends arguments of its own
        raise ValueError(
            f"{path} is not a whole, uncompressed tar of samples ({reason}): copy or write it again."
        ) from None
    columns = {
        "keys": [group["__key__"].encode("utf-8", "backslashreplace").decode() for group in groups],
        "images": [next((group[s] for s in IMAGE_SUFFIXES if s in group), (-1, -1)) for group in groups],
        "labels": [group.get(LABEL_SUFFIX, (-1, -1)) for group in groups],
    }
    return Shard(path, len(groups), digest, facts.st_size, facts.st_mtime_ns), columns


def _members(file: BinaryIO, size: int) -> Iterator[dict[str, object]]:
    """Each file member as webdataset's `tar_file_iterator` would name it, with (offset, bytes) in place of its data."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        end = 0
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # or it keeps every header of the tar in memory
            if member.offset_data <= end or member.size < 0 or member.offset_data + member.size > size:
                raise ValueError(f"member {member.name!r} reaches outside the file")
            end = member.offset_data
            if not member.isreg() or _META.match(member.name):
                continue
            if member.issparse():
                raise ValueError(f"member {member.name!r} is stored sparse")
            yield {"fname": member.name, "data": (member.offset_data, member.size), "__url__": file.name}
        # tarfile takes a damaged or missing header for the end; a whole tar ends in a block of zeros.
        file.seek(tar.offset)  # type: ignore[attr-defined]
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"it breaks off or is damaged at byte {tar.offset}")  # type: ignore[attr-defined]
