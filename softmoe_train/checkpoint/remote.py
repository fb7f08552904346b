"""This file owns checkpoints in an object store (s3://, gs://, abfs:// ...): what pathlib is to a disk, over fsspec.

A store has no folders, no rename and nothing to flush: a folder is there while an object in it is, and an object appears whole when it
is closed. No listing is remembered (another process may have saved since), and only what is not there counts as absent: fsspec's own
`isfile` and `isdir` say the same of a store that cannot be reached, which would make a run start over.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from softmoe_train.redact import without_secrets
from softmoe_train.stores import URL, Driver, driver_of, is_kind, url_problem

READ_AHEAD = 16 * 2**20  # bytes of one request


class Stat(NamedTuple):
    """What `pathlib.Path.stat` says that a store knows too."""

    st_size: int


@dataclass(frozen=True, order=True)
class RemotePath:
    """A folder or an object at a URL, with what of `pathlib.Path` checkpoints need; whatever its driver raises becomes OSError."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        """All but the last part."""
        return RemotePath(self.url.rpartition("/")[0])

    def with_name(self, name: str) -> "RemotePath":
        """Another one beside this."""
        return self.parent / name

    def is_file(self) -> bool:
        """Whether there is such an object."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether there is an object below it."""
        return self._kind() == "directory"

    def exists(self) -> bool:
        """Whether it is either."""
        return self._kind() is not None

    def is_symlink(self) -> bool:
        """Never."""
        return False

    def stat(self) -> Stat:
        """The size of an object."""
        with self._driver() as (fs, path):
            return Stat(int(fs.info(path)["size"]))

    def iterdir(self) -> Iterator["RemotePath"]:
        """What lies directly below it."""
        return iter(self._listed(("file", "directory")))

    def folders(self) -> list["RemotePath"]:
        """The folders directly below it, by one request; none where it is not there."""
        try:
            return self._listed(("directory",))
        except FileNotFoundError:
            return []

    def open(self, mode: str) -> io.BufferedIOBase:
        """An object to read from or to write; what is written appears whole, when it is closed."""
        with self._driver() as (fs, path):
            file = fs.open(path, mode, block_size=READ_AHEAD) if mode == "rb" else fs.open(path, mode.replace("x", "w"))
        return cast(io.BufferedIOBase, file)  # what fsspec gives has the methods, and no common type

    def read_bytes(self) -> bytes:
        """All of an object."""
        with self._driver() as (fs, path):
            return cast(bytes, fs.cat_file(path))

    def write_bytes(self, data: bytes) -> None:
        """An object of these bytes, whole or not at all."""
        with self._driver() as (fs, path):
            fs.pipe_file(path, data)

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there with its first object."""

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Delete an object."""
        try:
            with self._driver() as (fs, path):
                fs.rm_file(path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def delete_all(self) -> None:
        """Delete every object below it."""
        if self.is_dir():
            with self._driver() as (fs, path):
                fs.rm(path, recursive=True)

    def copy_beside(self, name: str) -> None:
        """Copy every object directly below it to the folder `name` beside it; the bytes stay inside the store."""
        files = [file.name for file in self.iterdir()]
        with self._driver() as (fs, path):
            beside = f"{path.rpartition('/')[0]}/{name}"
            fs.copy([f"{path}/{file}" for file in files], [f"{beside}/{file}" for file in files])

    def lacks_bucket(self) -> bool:
        """Whether the bucket of its URL is not there; False where we may not know."""
        try:
            with self._driver() as (fs, path):
                fs.info(path.partition("/")[0] or fs.root_marker)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return False

    def _kind(self) -> str | None:
        try:
            with self._driver() as (fs, path):
                return fs.info(path)["type"]
        except FileNotFoundError:
            return None

    def _listed(self, kinds: tuple[str, ...]) -> list["RemotePath"]:
        with self._driver() as (fs, path):
            found = {entry["name"].rstrip("/"): entry["type"] for entry in fs.ls(path, detail=True)}
        # A store may list, as an object, the folder itself.
        return [self / name.rpartition("/")[2] for name in sorted(found) if found[name] in kinds and name != path]

    @contextmanager
    def _driver(self) -> Iterator[tuple[Driver, str]]:
        """The driver, which has forgotten what it listed, and our path in its words; its failures name the URL and no secret."""
        try:
            fs, path = driver_of(self.url)
            fs.invalidate_cache()
            yield fs, path
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.url} is not there") from None
        except Exception as error:  # of botocore, aiohttp, google.auth ...
            raise OSError(f"{self.url}: {type(error).__name__}: {without_secrets(str(error))}") from None


Place = Path | RemotePath  # of a run's checkpoints, one checkpoint, or a file of it


def place_of(text: str) -> Place:
    """The path or URL that a setting gives; `place_problem` must have found nothing wrong with it."""
    return RemotePath(text.rstrip("/")) if "://" in text else Path(text)


def place_problem(text: str) -> str | None:
    """Why no checkpoints can be at this path or URL, whatever the machine, with the remedy."""
    found = URL.fullmatch(text)
    if found is not None and found["slashes"] == "/" and is_kind(found["kind"]):
        # What `Path` makes of a URL; as a path it would be a folder here.
        return f"a URL has two slashes; write {found['kind']}://{found['rest']}"
    if "://" not in text:
        return None if text else "it is empty; give a folder or a URL"
    problem = url_problem(text, example="s3://BUCKET/FOLDER")
    if problem is not None or found is None:
        return problem
    kind, rest = found["kind"], found["rest"]
    if set("*[]{}") & set(rest):
        return "a URL here names one folder; leave out * [ ] { }"
    if not rest.strip("/"):
        return f"it names no bucket; write {kind}://BUCKET/FOLDER"
    if kind in ("file", "local", "memory"):
        return f"{kind}:// is no object store; give a path, as in {rest if kind != 'memory' else 'runs/mine'}"
    return None


def url_of(place: Place) -> str:
    """Where it is for programs elsewhere: a store's URL as it is, a path as file://."""
    return place.resolve().as_uri() if isinstance(place, Path) else place.url
