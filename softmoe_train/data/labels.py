"""This file owns labels: from the bytes of a sample's label member to class numbers, and the names that a file gives to classes.

Labels are integers, or names where `data.classes` is set: line n of that file (from 0) names class n. A `.cls` member holds integers
between spaces, or a name on each line (names may hold spaces). A field of a `.json` member holds one of either, or a list of them.
Names are compared in Unicode's normal form C, without the spaces around them.
"""

import difflib
import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from softmoe_train.data.decode import UnreadableSampleError
from softmoe_train.data.fields import MAX_JSON_BYTES, field_of, shown, utf8
from softmoe_train.data.records import LabelKind, WebDatasetConfig, path_of

MAX_LABEL_BYTES = 1 << 20
_MAX_CLASSES_BYTES = 1 << 26
_MAX_NAME = 200  # characters of a label for which near names are looked up
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


@dataclass(frozen=True)
class Labels:
    """How the labels of samples are read.

    `places` is where classes go that are renumbered, all others of a sample being left out; None leaves each its number.
    """

    kind: LabelKind
    field: tuple[str, ...] | None  # of the .json; None: the .cls
    names: dict[str, int] | None
    places: dict[int, int] | None
    num_classes: int

    @property
    def part(self) -> Literal["cls", "json"]:
        """The member that holds them."""
        return "cls" if self.field is None else "json"

    @property
    def limit(self) -> int:
        """The most bytes that this member may have."""
        return MAX_LABEL_BYTES if self.field is None else MAX_JSON_BYTES

    def classes_of(self, member: bytes) -> list[int]:
        """The classes of a sample, one where the kind is "hard"; raises UnreadableSampleError."""
        numbers = self.numbers_of(member)
        if self.places is not None:
            numbers = [self.places[number] for number in numbers if number in self.places]
        if not numbers or min(numbers) < 0 or max(numbers) >= self.num_classes:
            limit = f"0 to {self.num_classes - 1} (model.num_classes={self.num_classes})"
            raise UnreadableSampleError(f"label {self._shown(member)} is outside {limit}")
        return numbers

    def numbers_of(self, member: bytes) -> list[int]:
        """The numbers that the member says, whether or not there are such classes; raises UnreadableSampleError."""
        labels = self._words(member) if self.field is None else _listed(field_of(member, self.field))
        if not labels or (self.kind == "hard" and len(labels) > 1):
            raise UnreadableSampleError(
                f"label {self._shown(member)} is not {self._wanted()} (data.labels={self.kind})"
            )
        return [self._number(label, member) for label in labels]

    def _words(self, member: bytes) -> Sequence[object]:
        if self.names is None:
            return member.decode("ascii", "replace").split()
        return [line for line in utf8(member, "label").splitlines() if line.strip()]

    def _number(self, label: object, member: bytes) -> int:
        if self.names is not None:
            return self._named(label)
        if type(label) is int:  # a bool is an int too
            return label
        if isinstance(label, str) and _INTEGER.fullmatch(label.strip()):
            return int(label)
        raise UnreadableSampleError(f"label {self._shown(member)} is not {self._wanted()} (data.labels={self.kind})")

    def _named(self, label: object) -> int:
        assert self.names is not None
        if not isinstance(label, str):
            raise UnreadableSampleError(f"label {shown(label)} is no name, and data.classes makes labels names")
        name = normal(label)
        if name not in self.names:
            near = difflib.get_close_matches(name, self.names, n=3) if len(name) <= _MAX_NAME else []
            legal = f"the nearest are {', '.join(near)}" if near else f"names are like {next(iter(self.names))}"
            raise UnreadableSampleError(f"label {shown(label)} is no name of data.classes; {legal}")
        return self.names[name]

    def _wanted(self) -> str:
        what = "integer" if self.names is None else "name"
        return f"one {what}" if self.kind == "hard" else f"{what}s"

    def _shown(self, member: bytes) -> str:
        value = member[:40].decode(errors="replace") if self.field is None else field_of(member, self.field)
        return shown(value)


def build_labels(cfg: WebDatasetConfig, num_classes: int) -> Labels | None:
    """How labels are read, None where samples have none; raises ValueError where a file of names is no such file."""
    if cfg.labels == "none":
        return None
    names = None if cfg.classes is None else {name: n for n, name in enumerate(read_classes(cfg.classes))}
    kept = kept_numbers(cfg, names)
    places = {number: place for place, number in enumerate(kept)} if kept is not None and cfg.keep.renumber else None
    return Labels(cfg.labels, path_of(cfg.label), names, places, num_classes)


def check_labels(cfg: WebDatasetConfig, num_classes: int) -> list[str]:
    """Why the classes of the configuration are none of a model with `num_classes`; empty where all is well."""
    if cfg.labels == "none":
        return []
    try:
        names = None if cfg.classes is None else read_classes(cfg.classes)
        kept = kept_numbers(cfg, None if names is None else {name: n for n, name in enumerate(names)})
    except ValueError as error:
        return [str(error)]
    if kept is not None and cfg.keep.renumber:
        if len(kept) <= num_classes:
            return []
        return [
            f"data.keep.labels lists {len(kept)} labels, which data.keep.renumber makes classes, and model.num_classes={num_classes}; list "
            f"no more than the model has classes, or set model.num_classes={len(kept)}"
        ]
    if names is not None and len(names) > num_classes:
        return [
            f"data.classes={cfg.classes} names {len(names)} classes and model.num_classes={num_classes}: each name needs a class; set "
            f"model.num_classes={len(names)}"
        ]
    return [
        f"data.keep.labels lists {number}, and model.num_classes={num_classes}; list labels from 0 to {num_classes - 1}, or have them "
        f"renumbered (data.keep.renumber=true)"
        for number in kept or ()
        if number >= num_classes
    ]


def kept_numbers(cfg: WebDatasetConfig, names: dict[str, int] | None) -> list[int] | None:
    """The labels to keep as numbers, in the order of the configuration; raises ValueError where one is no legal label."""
    if cfg.keep.labels is None:
        return None
    numbers = []
    for label in cfg.keep.labels:
        name = label if isinstance(label, int) else normal(label)
        if isinstance(name, str) and (names is None or name not in names):
            near = difflib.get_close_matches(name, names or (), n=3)
            remedy = f"did you mean {' or '.join(near)}?" if near else "list integers, or names of data.classes"
            raise ValueError(f"data.keep.labels: {label!r} is no name of data.classes={cfg.classes}; {remedy}")
        numbers.append(names[name] if isinstance(name, str) and names is not None else name)
    twice = next((number for at, number in enumerate(numbers) if number in numbers[:at]), None)
    if twice is not None:
        raise ValueError(f"data.keep.labels={cfg.keep.labels} lists label {twice} twice; list each once")
    return numbers


def read_classes(path: str) -> list[str]:
    """The names of a file, one a line, whose number from 0 is the class; raises ValueError where that cannot be."""
    where, rule = f"data.classes={path}", "a line's number from 0 is its class"
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{where} is not a file; name a text file with a class on each line")
    if file.stat().st_size > _MAX_CLASSES_BYTES:
        raise ValueError(
            f"{where} has {file.stat().st_size} bytes, more than {_MAX_CLASSES_BYTES}; name a list of classes"
        )
    try:
        lines = file.read_text("utf-8-sig").rstrip().split("\n")
    except OSError as error:
        raise ValueError(f"{where} cannot be read ({error}); name a text file with a class on each line") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 (byte {error.start}); write it in UTF-8") from None
    first: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name = normal(line)
        if not name:
            raise ValueError(f"{where} line {number} is empty, and {rule}; name the class, or remove the line")
        if name in first:
            raise ValueError(
                f"{where} has {name!r} on lines {first[name]} and {number}, and {rule}; rename or remove one"
            )
        first[name] = number
    return list(first)


def classes_hash(names: Sequence[str]) -> str:
    """A hash of the names in order, wherever the file is."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def normal(name: str) -> str:
    """A name as it is compared."""
    return unicodedata.normalize("NFC", name).strip()


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else [value]
