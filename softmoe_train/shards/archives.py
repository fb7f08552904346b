"""This file owns pictures in tar archives as ImageNet is given out: class tars in a tar or in a folder, or one flat tar and a list of labels.

Nothing is unpacked: a picture is bytes at an offset of the archive, also inside a tar inside a tar.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from softmoe_train.shards.settings import StoppedError
from softmoe_train.shards.source import Item, LeftOut, Stored, shown, suffix_problem

_SYNSET = re.compile(r"n[0-9]{8}")


class Archive(NamedTuple):
    """A tar: a file, or a run of bytes in one. `name` is the class of all in it, or None where their folders are."""

    path: str
    offset: int
    size: int
    name: str | None


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int
    size: int


class ArchiveSource:
    """The pictures of the tars `paths`; `labels` gives the class of each where it is neither tar nor folder that says it."""

    def __init__(self, paths: list[str], labels: dict[str, str] | None) -> None:
        self.paths, self.labels = [os.path.abspath(path) for path in paths], labels

    def parts(self) -> Iterator[Archive]:
        """Each tar, and of a tar of tars each of these."""
        for path in self.paths:
            whole = Archive(path, 0, os.path.getsize(path), None)
            inner = [member for member in _tars_of(whole) if member.name.endswith(".tar")]
            for member in inner:
                yield Archive(path, member.offset, member.size, _stem(member.name))
            if not inner:
                yield whole._replace(name=_stem(path)) if len(self.paths) > 1 else whole

    def class_names(self) -> list[str] | None:
        """The sorted names of the class tars: ImageNet's synsets in their usual order. None where other names decide."""
        if self.labels is not None:
            return None
        names = {archive.name for archive in self.parts()}
        return None if None in names else sorted(str(name) for name in names)

    def facts(self) -> Any:
        """The archives and their sizes, and the labels that were given."""
        named = hashlib.sha256(json.dumps(self.labels, sort_keys=True).encode()).hexdigest()
        return [[os.path.basename(path), os.path.getsize(path)] for path in self.paths], named

    def items(self, part: Archive) -> Iterator[Item | LeftOut]:
        """Every picture of one tar."""
        with open(part.path, "rb") as file:
            for member in members_of(file, part):
                if isinstance(member, LeftOut):
                    yield member
                    continue
                name = shown(member.name.removeprefix("./"))
                classes, problem = self._class(name, part)
                problem = suffix_problem(name) or problem
                if problem is not None:
                    yield LeftOut(name, problem)
                    continue
                folder = f"{part.name}/" if part.name is not None and not name.startswith(f"{part.name}/") else ""
                yield Item(folder + name, Stored(part.path, member.offset, member.size), classes=classes)

    def _class(self, name: str, part: Archive) -> tuple[tuple[str, ...], str | None]:
        if self.labels is not None:
            base = os.path.basename(name).partition(".")[0]
            found = self.labels.get(base)
            return ((found,), None) if found is not None else ((), "labels= has no line for it")
        if part.name is not None:
            return (part.name,), None
        folder, slash, _ = name.partition("/")
        return ((folder,), None) if slash else ((), "neither a folder nor a tar of its class; give labels=FILE")


def members_of(file: BinaryIO, archive: Archive) -> Iterator[Member | LeftOut]:
    """The regular files of a tar at their offsets in `file`; what else it holds but folders is left out. Raises StoppedError where it is damaged."""
    end = archive.offset + archive.size
    where = archive.path if archive.name is None else f"{archive.path} ({archive.name})"
    file.seek(archive.offset)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or it keeps every header in memory
                if member.size < 0 or member.offset_data + member.size > end:
                    raise StoppedError(
                        f"{where}: member {shown(member.name)!r} reaches beyond the archive: copy it again."
                    )
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    yield LeftOut(shown(member.name), "not a regular file of the archive")
                    continue
                yield Member(member.name, member.offset_data, member.size)
            file.seek(tar.offset)  # type: ignore[attr-defined]
            # tarfile takes a damaged or missing header for the end; a whole tar ends in a block of zeros.
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise StoppedError(f"{where} breaks off or is damaged at byte {tar.offset}: copy it again.")  # type: ignore[attr-defined]
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise StoppedError(f"{where} is not a whole, uncompressed tar ({error}): unpack or copy it again.") from None


def _tars_of(archive: Archive) -> list[Member]:
    """The members of a tar if the first of them is a tar; there is no other way to know but to look at all."""
    found: list[Member] = []
    with open(archive.path, "rb") as file:
        for member in members_of(file, archive):
            if isinstance(member, LeftOut):
                continue
            if not found and not member.name.endswith(".tar"):
                return []
            found.append(member)
    return found


def read_labels(path: str, synsets: str | None, names: list[str]) -> dict[str, str]:
    """The class of each picture by its base name, from ImageNet's lists: raises ValueError that says what is wrong with them.

    A line is `NAME,CLASS ...` (Kaggle's LOC_val_solution.csv), `NAME CLASS`, or a class alone for each of `names`, sorted. A class is a
    synset, or a number from 1 on (the development kit's ground truth) that `synsets` translates.
    """
    with open(path, encoding="utf-8") as file:
        lines = [line.replace(",", " ").split() for line in file if line.strip()]
    lines = lines[1:] if lines and lines[0][0] in ("ImageId", "name", "path") else lines
    if not lines:
        raise ValueError(f"labels={path} is empty; give the list of the archive's labels")
    if all(len(words) == 1 for words in lines):
        if len(lines) != len(names):
            raise ValueError(
                f"labels={path} has {len(lines)} lines for {len(names)} pictures; give the list that belongs to them"
            )
        found = dict(zip(sorted(names), (words[0] for words in lines), strict=True))
    else:
        short = [number for number, words in enumerate(lines, 1) if len(words) < 2]
        if short:
            raise ValueError(f"labels={path}: line {short[0]} has no class; write NAME,CLASS on each")
        found = {os.path.basename(words[0]).partition(".")[0]: words[1] for words in lines}
    if synsets is None:
        if all(value.isdecimal() for value in found.values()):
            raise ValueError(
                f"labels={path} holds numbers: the development kit counts classes in an order of its own; give synsets=FILE, a line "
                "`SYNSET NUMBER` for each (its map_clsloc.txt)"
            )
        return found
    known = read_synsets(synsets)
    unknown = sorted({value for value in found.values() if value not in known})
    if unknown:
        raise ValueError(
            f"synsets={synsets} has no line for class {unknown[0]} of labels={path}; give the list that belongs to it"
        )
    return {name: known[value] for name, value in found.items()}


def read_synsets(path: str) -> dict[str, str]:
    """Synsets by number: lines `SYNSET NUMBER ...` or `NUMBER SYNSET ...`, or a synset alone, numbered from 1; raises ValueError."""
    found: dict[str, str] = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            words = line.split()[:2]
            synset = [word for word in words if _SYNSET.fullmatch(word)]
            digits = [word for word in words if word.isdecimal()]
            if words and not synset:
                raise ValueError(f"synsets={path}: line {number} holds no synset such as n01440764")
            if synset:
                found[str(int(digits[0])) if digits else str(len(found) + 1)] = synset[0]
    return found


def _stem(name: str) -> str:
    return os.path.basename(name).removesuffix(".tar")
