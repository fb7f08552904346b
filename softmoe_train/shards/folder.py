"""This file owns pictures in a folder a class: `CLASS/FILE`, or deeper, as torchvision's ImageFolder reads them."""

import os
import stat
from collections.abc import Iterator
from typing import Any

from softmoe_train.shards.source import Item, LeftOut, Stored, shown, suffix_problem


class FolderSource:
    """The pictures under `root`; a part is one of its entries, and the name of a folder there is a class."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self._real = os.path.realpath(root)

    def parts(self) -> list[str]:
        """The entries of the root, sorted by their bytes."""
        return sorted(os.listdir(self.root), key=os.fsencode)

    def class_names(self) -> list[str]:
        """The names of the folders, sorted by their bytes; one without a picture keeps its number."""
        return [name for name in self.parts() if self._is_class(name)]

    def facts(self) -> Any:
        """Nothing beside the classes."""

    def items(self, part: str) -> Iterator[Item | LeftOut]:
        """Every file below the entry `part`."""
        yield from self._walk(part, part)

    def _is_class(self, name: str) -> bool:
        facts = os.lstat(os.path.join(self.root, name))
        plain = name.isprintable() and not name.startswith(
            "."
        )  # a surrogate of bytes that are no UTF-8 is not printable
        return stat.S_ISDIR(facts.st_mode) and plain

    def _walk(self, place: str, part: str) -> Iterator[Item | LeftOut]:
        path = os.path.join(self.root, place)
        try:
            facts = os.lstat(path)
            if stat.S_ISDIR(facts.st_mode):
                if place == part and not self._is_class(part):
                    yield LeftOut(shown(place), "a folder whose name cannot be a class")
                    return
                for name in sorted(os.listdir(path), key=os.fsencode):
                    yield from self._walk(f"{place}/{name}", part)
                return
            if stat.S_ISLNK(facts.st_mode):
                facts = os.stat(path)
                if not os.path.realpath(path).startswith(self._real + os.sep):
                    yield LeftOut(shown(place), "a link out of the folder")
                    return
                if stat.S_ISDIR(facts.st_mode):
                    yield LeftOut(shown(place), "a link to a folder")
                    return
        except OSError as error:
            yield LeftOut(shown(place), f"cannot be read ({error.strerror})")
            return
        problem = suffix_problem(place)
        if not stat.S_ISREG(facts.st_mode):
            problem = "not a regular file"
        elif place == part:
            problem = "not in the folder of a class"
        if problem is not None:
            yield LeftOut(shown(place), problem)
        else:
            yield Item(place, Stored(path, 0, facts.st_size), classes=(part,))
