"""This file owns pictures that a manifest lists: CSV with a header, or JSON lines, a picture a row."""

import csv
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from softmoe_train.shards.settings import StoppedError
from softmoe_train.shards.source import Item, LeftOut, Stored, shown, suffix_problem
from softmoe_train.shards.table import Columns, as_item

_ROWS = 5_000  # of a part
_CELL = 1 << 24  # bytes of a CSV cell

Rows = list[tuple[int, "dict[str, Any] | str"]]  # each with its number; where it is none, why


class ManifestSource:
    """The pictures that the file `path` lists; theirs are relative to `root`, and must lie in it."""

    def __init__(self, path: str, root: str, columns: Columns) -> None:
        self.path, self.root, self.columns = path, os.path.abspath(root), columns
        self._real = os.path.realpath(root)

    def parts(self) -> Iterator[Rows]:
        """Runs of rows, in the order of the file."""
        rows = iter(read_rows(self.path))
        while part := list(islice(rows, _ROWS)):
            yield part

    def class_names(self) -> None:
        """A manifest does not tell all its classes before it is read."""

    def facts(self) -> Any:
        """The hash of the manifest."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def items(self, part: Rows) -> Iterator[Item | LeftOut]:
        """An item for each row."""
        for number, row in part:
            yield self._item(f"row {number}", row)

    def _item(self, where: str, row: dict[str, Any] | str) -> Item | LeftOut:
        if isinstance(row, str):
            return LeftOut(where, row)
        given = row.get(self.columns.image)
        if not isinstance(given, str) or not given:
            return LeftOut(where, f"it has no {self.columns.image}")
        named = f"{where}: {shown(given)}"
        path = os.path.join(self.root, given)
        try:
            facts = os.stat(path)
            inside = (os.path.realpath(path) + os.sep).startswith(self._real.rstrip(os.sep) + os.sep)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            return LeftOut(named, f"cannot be read ({getattr(error, 'strerror', None) or error})")
        if not inside:
            return LeftOut(named, f"it lies outside root={self.root}")
        problem = suffix_problem(given) if stat.S_ISREG(facts.st_mode) else "not a regular file"
        if problem is not None:
            return LeftOut(named, problem)
        key = row.get(self.columns.key) if self.columns.key is not None else None
        name = os.path.relpath(path, self.root) if key in (None, "") else str(key)
        made = as_item(name, Stored(path, 0, facts.st_size), row, self.columns)
        return made._replace(name=named) if isinstance(made, LeftOut) else made


def read_rows(path: str) -> Iterable[tuple[int, dict[str, Any] | str]]:
    """The rows of a manifest by their line, each as its columns, or as why it is no row; raises StoppedError where it is no text."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            yield from _csv_rows(file) if path.endswith((".csv", ".tsv")) else _json_rows(file)
    except UnicodeDecodeError as error:
        raise StoppedError(f"from={path} is not UTF-8 ({error.reason} at byte {error.start}): convert it.") from None


def _csv_rows(file: Any) -> Iterator[tuple[int, dict[str, Any] | str]]:
    csv.field_size_limit(_CELL)
    reader = csv.DictReader(file, delimiter="\t" if file.name.endswith(".tsv") else ",", strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, f"not a row of CSV ({error})"
            continue
        odd = None in row or None in row.values()
        yield reader.line_num, "more or fewer cells than the header" if odd else row


def _json_rows(file: Any) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"not JSON ({error})"
            continue
        yield number, row if isinstance(row, dict) else "not a JSON object"


def columns_of(path: str) -> list[str]:
    """The columns of the first row; raises ValueError where there is none."""
    for _, row in islice(read_rows(path), 1):
        if isinstance(row, dict):
            return list(row)
        raise ValueError(f"from={path}: its first row is {row}; write a header line (CSV) or a JSON object a line")
    raise ValueError(
        f"from={path} holds no row; write a header line and a row for each picture (CSV), or a JSON object a line"
    )
