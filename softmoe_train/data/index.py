"""This file owns the index of a tar: its samples, where the bytes of their members lie, and what those bytes are.

An index is made once for each tar (path, size and modification time), in one reading of it, and kept as safetensors in an
owner-only cache folder, never beside the shard. Members are grouped into samples by webdataset's own rules on names
alone; a member is only ever read as bytes at an offset. `webdataset.gopen` is never called: it runs `pipe:` commands
and follows GOPEN_REWRITE.

Letters: N samples of a shard.
"""

import hashlib
import json
import os
import re
import stat
import tarfile
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from webdataset.tariterators import group_by_keys
from xxhash import xxh3_64

from softmoe_train.data.places import ShardsError
from softmoe_train.plain import plain

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "pnm")
# What a sample may consist of, by the suffixes of its members, the first of which counts.
PARTS = {"image": IMAGE_SUFFIXES, "cls": ("cls",), "json": ("json",), "txt": ("txt",)}
_MAKE_A_SAMPLE = {*IMAGE_SUFFIXES, "cls"}  # a key with none of these, a README say, is no sample

_FORMAT = 2  # part of a cache file's name: raise it when the index changes
_META = re.compile(r"__[^/]*__($|/)")  # names that webdataset keeps for itself
_BLOCK = 1 << 20  # bytes of one read
_LONGEST_HEADER = 1 << 20  # bytes of a long name or a PAX header, which tarfile holds in memory whole
# tarfile's patterns take the square of a number's digits to find that it is none; a name has at most 255 characters.
_LONG_NUMBER = re.compile(rb"[0-9]{256}")
_MOST_GLOBALS = 1000  # PAX records that hold for all members behind them, which tarfile copies for each
_AHEAD = 16  # blocks that may wait to be hashed


class Shard(NamedTuple):
    """One tar: where it is, how many samples it holds, and what tells it from another."""

    path: str
    count: int
    sha256: str
    size: int
    mtime_ns: int  # 0 where it is at a URL
    index_sha256: str | None = None  # of its published index file; None where the index was made here
    index_size: int = 0  # bytes


class Samples:
    """The samples of one shard, by number: keys, and of each part where its bytes lie and their hash.

    `where[part]` (N x 2) holds (offset, bytes), (-1, -1) where there is none, and `sums[part]` (N) the xxh3-64 of those
    bytes as a signed integer. All of it lies in a mapped file: processes of one host share the memory.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self._keys, self._ends = tensors["keys"].numpy(), tensors["key_ends"].numpy()
        self.where: dict[str, NDArray[np.int64]] = {part: tensors[part].numpy() for part in PARTS}
        self.sums: dict[str, NDArray[np.int64]] = {part: tensors[f"{part}_sums"].numpy() for part in PARTS}

    def __len__(self) -> int:
        return len(self._ends)

    def key(self, index: int) -> str:
        """The key of a sample; a byte that is not UTF-8 is written as an escape."""
        start = int(self._ends[index - 1]) if index else 0
        return bytes(self._keys[start : int(self._ends[index])]).decode()

    def keys(self) -> list[str]:
        """Every key, in the order of the tar."""
        return [self.key(index) for index in range(len(self))]


def sum_of(data: bytes) -> int:
    """The hash of a member's bytes as an index holds it: xxh3-64 as a signed integer."""
    return _signed(xxh3_64(data).intdigest())


def index_shards(paths: Iterable[str]) -> Iterator[Shard]:
    """One indexed shard after the other, so that the caller can show progress; raises ValueError at a damaged tar."""
    for path in paths:
        yield _load(path, with_samples=False)[0]


def samples_of(shard: Shard) -> Samples:
    """What `shard` holds; raises ValueError where the file has changed since `shard` was made."""
    now, samples = _load(shard.path, with_samples=True)
    if now != shard or samples is None:
        raise ShardsError(
            f"{shard.path} has changed since this run indexed it: shards must stay as they are; start again."
        )
    return samples


def data_hash(shards: list[Shard]) -> str:
    """A hash of the data set: the shards' base names, contents and counts in order, wherever they are stored."""
    facts = [[os.path.basename(shard.path), shard.sha256, shard.count] for shard in shards]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _load(path: str, *, with_samples: bool) -> tuple[Shard, Samples | None]:
    """The shard and, if wanted, its samples: from the cache, or else made now and cached."""
    try:
        facts = os.stat(path)
    except OSError as error:
        raise ShardsError(
            f"{path} cannot be read ({error.strerror}): shards must stay where they are; bring it back and start again."
        ) from None
    if not stat.S_ISREG(facts.st_mode):
        raise ShardsError(f"{path} is not a regular file: a shard is a tar file; name another.")
    name = json.dumps([_FORMAT, os.path.abspath(path), facts.st_size, facts.st_mtime_ns])
    cached = index_folder() / f"{hashlib.sha256(name.encode()).hexdigest()}.safetensors"
    try:
        shard, samples = _read_index(cached, with_samples=with_samples)
        if (shard.size, shard.mtime_ns) == (facts.st_size, facts.st_mtime_ns):
            return shard._replace(path=path), samples
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):  # absent, damaged, or cut off by a full disk
        pass
    shard, tensors = make_index(path, facts)
    write_index(cached, tensors, {"shard": json.dumps(shard._asdict()), "sum": _sum_of_all(tensors)})
    return shard, Samples(tensors) if with_samples else None


def _read_index(file: Path, *, with_samples: bool) -> tuple[Shard, Samples | None]:
    with safe_open(file, framework="pt") as index:
        shard = Shard(**json.loads(index.metadata()["shard"]))
        if not with_samples:
            return shard, None
        tensors = {name: index.get_tensor(name) for name in list(index.keys())}  # mapped, not copied
        if index.metadata()["sum"] != _sum_of_all(tensors):
            raise ValueError(f"{file} is damaged")
    return shard, Samples(tensors)


def _sum_of_all(tensors: dict[str, torch.Tensor]) -> str:
    digest = xxh3_64()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()


def index_folder() -> Path:
    """Where indexes are kept: a folder of the user's own; raises ValueError where there cannot be one."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "softmoe_train", "index")
    remedy = "set XDG_CACHE_HOME to a folder of your own."
    try:
        folder = folder.expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        raise ShardsError(
            f"{folder} cannot be made ({error}), and the shard indexes are kept there: {remedy}"
        ) from None
    facts = folder.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise ShardsError(f"{folder} can be written by others, and what it says of shards is trusted: {remedy}")
    return folder


def write_index(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write an index, whole or not at all; raises ShardsError where there is no room."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except (OSError, SafetensorError) as error:  # a full disk, say
        raise ShardsError(
            f"an index of shards cannot be kept in {path.parent} ({error}): make room there, or set XDG_CACHE_HOME to a folder of your own."
        ) from None


def make_index(path: str, facts: os.stat_result, *, opened: int | None = None) -> tuple[Shard, dict[str, torch.Tensor]]:
    """Read a tar, which may be `opened` already, to its end; raises ValueError, which names `path`, where it is damaged."""
    source = path if opened is None else opened
    try:
        # Not to wait for somebody to write, where a pipe has taken the place of the file.
        with (
            open(source, "rb", buffering=0, closefd=opened is None, opener=_open_without_waiting) as file,
            ThreadPoolExecutor(1) as hashing,
        ):
            reading = _Reading(file, hashing)
            groups = [
                group for group in group_by_keys(_members(reading, facts.st_size)) if _MAKE_A_SAMPLE & group.keys()
            ]
            digest, now = reading.finish(), os.fstat(file.fileno())
    except (tarfile.TarError, ValueError, EOFError, OverflowError, LookupError) as error:
        reason = plain(error.args[0] if error.args else error)  # webdataset appends arguments of its own
        raise ShardsError(
            f"{path} is not a whole, uncompressed tar of samples ({reason}): copy or write it again."
        ) from None
    except RecursionError:
        raise ShardsError(f"{path} has headers before headers without end: copy or write it again.") from None
    except OSError as error:
        raise ShardsError(f"{path} cannot be read ({error.strerror}): check its permissions and disk.") from None
    if (now.st_size, now.st_mtime_ns) != (facts.st_size, facts.st_mtime_ns):
        raise ShardsError(f"{path} changed while it was indexed: shards must stay as they are; start again.")
    return Shard(path, len(groups), digest, facts.st_size, facts.st_mtime_ns), _as_tensors(groups)


def _open_without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK)


def _as_tensors(groups: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    keys = [group["__key__"].encode("utf-8", "backslashreplace") for group in groups]
    tensors = {
        "keys": torch.frombuffer(bytearray(b"".join(keys)) or bytearray(1), dtype=torch.uint8),
        "key_ends": torch.tensor(np.cumsum([len(key) for key in keys], dtype=np.int64)),
    }
    for part, suffixes in PARTS.items():
        members = [next((group[s] for s in suffixes if s in group), (-1, -1, 0)) for group in groups]
        columns = torch.tensor(members, dtype=torch.int64).reshape(-1, 3)
        tensors[part], tensors[f"{part}_sums"] = columns[:, :2].contiguous(), columns[:, 2].contiguous()
    return tensors


def _members(reading: "_Reading", size: int) -> Iterator[dict[str, object]]:
    """Each file member as webdataset's `tar_file_iterator` would name it, with (offset, bytes, sum) in place of its data."""
    with tarfile.open(fileobj=reading, mode="r:") as tar:  # type: ignore[arg-type]  # it reads, tells and seeks
        end = 0
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # or it keeps every header of the tar in memory
            if member.offset_data <= end or member.size < 0 or member.offset_data + member.size > size:
                raise ValueError(f"member '{plain(member.name)}' reaches outside the file")
            end = member.offset_data
            if len(tar.pax_headers) > _MOST_GLOBALS:
                raise ValueError(f"it has more than {_MOST_GLOBALS} global PAX records")
            if member.isdir() or _META.match(member.name):
                continue
            if not member.isreg():  # a link, say: a sample that consists of these is there, without the parts
                yield {"fname": member.name, "data": (-1, -1, 0), "__url__": reading.name}
                continue
            if member.issparse():
                raise ValueError(f"member '{plain(member.name)}' is stored sparse")
            where = (member.offset_data, member.size, reading.sum_of_next(member.size))
            yield {"fname": member.name, "data": where, "__url__": reading.name}
        # tarfile takes a damaged or missing header for the end; a whole tar ends in blocks of zeros, and nothing follows.
        if reading.at(tar.offset, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # type: ignore[attr-defined]
            raise ValueError(f"it breaks off or is damaged at byte {tar.offset}")  # type: ignore[attr-defined]
        if not reading.rest_is_zero():
            raise ValueError(f"it goes on behind its end at byte {tar.offset}: damaged, or two tars in one file")  # type: ignore[attr-defined]


class _Reading:
    """A file that tarfile reads from its beginning to its end, and what all of its bytes hash to.

    Blocks are hashed by a thread of their own (SHA-256 takes longer than all the rest) while headers are parsed.
    """

    def __init__(self, file: FileIO, hashing: ThreadPoolExecutor) -> None:
        self._file, self._hashing, self.name = file, hashing, file.name
        self._sha256, self._pending = hashlib.sha256(), deque[Future[None]]()
        self._block, self._at, self._end = (
            memoryview(b""),
            0,
            0,
        )  # bytes, how far they are read, where they end in the file

    def tell(self) -> int:
        return self._end - len(self._block) + self._at

    def read(self, size: int) -> bytes:
        """Bytes of headers: what members hold is passed over."""
        if size > _LONGEST_HEADER:
            raise ValueError(f"a header at byte {self.tell()} says that it is {size} bytes long")
        data = b"".join(self._views(size))
        if size > tarfile.BLOCKSIZE and _LONG_NUMBER.search(data):
            raise ValueError(f"a header before byte {self.tell()} holds a number without end")
        return data

    def rest_is_zero(self) -> bool:
        """Read what is left; whether all of it is zeros."""
        return not any(np.frombuffer(view, np.uint8).any() for view in self._views(1 << 62))

    def seek(self, offset: int) -> None:
        """Read up to `offset`, or to the end of the file; tarfile never goes back."""
        if offset < self.tell():
            raise ValueError(f"its headers lead back from byte {self.tell()} to {offset}")
        for _ in self._views(offset - self.tell()):
            pass

    def sum_of_next(self, size: int) -> int:
        """The sum of the next `size` bytes."""
        digest = xxh3_64()
        for view in self._views(size):
            digest.update(view)
        return _signed(digest.intdigest())

    def at(self, offset: int, size: int) -> bytes:
        """Bytes at an offset, whatever has been read."""
        return os.pread(self._file.fileno(), size, offset)

    def finish(self) -> str:
        """Read what is left; the SHA-256 of the file."""
        while self._next():
            pass
        while self._pending:
            self._pending.popleft().result()
        return self._sha256.hexdigest()

    def _views(self, size: int) -> Iterator[memoryview]:
        while size > 0 and (self._at < len(self._block) or self._next()):
            view = self._block[self._at : self._at + size]
            self._at += len(view)
            size -= len(view)
            yield view

    def _next(self) -> bool:
        self._block, self._at = memoryview(self._file.read(_BLOCK)), 0
        self._end += len(self._block)
        if len(self._pending) == _AHEAD:
            self._pending.popleft().result()
        self._pending.append(self._hashing.submit(self._sha256.update, self._block))
        return len(self._block) > 0


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
