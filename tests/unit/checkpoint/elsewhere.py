"""This file owns an object store for tests, `elsewhere:///PATH`: the files under PATH, through fsspec, seen by every process."""

import os
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Elsewhere(LocalFileSystem):
    """A driver that remembers its listings, as those of real stores do, until it is told to forget them."""

    protocol = "elsewhere"

    def __init__(self, **options: Any) -> None:
        super().__init__(auto_mkdir=True, **options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).removeprefix("elsewhere://"))

    def ls(self, path: str, detail: bool = False, **options: Any) -> list:
        path = self._strip_protocol(path)
        if path not in self.dircache:
            self.dircache[path] = super().ls(path, detail=True)
        return self.dircache[path] if detail else [entry["name"] for entry in self.dircache[path]]

    def info(self, path: str | os.DirEntry, **options: Any) -> dict:
        if isinstance(path, os.DirEntry):
            return super().info(path)
        path = self._strip_protocol(path)
        for entry in self.dircache.get(self._parent(path), []):
            if entry["name"] == path:
                return entry
        return super().info(path)

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.clear()


fsspec.register_implementation("elsewhere", Elsewhere, clobber=True)
