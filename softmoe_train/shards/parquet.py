"""This file owns pictures in parquet files, as bytes in a column or in a struct {bytes, path} of Hugging Face's kind; it alone imports pyarrow."""

import importlib.util
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from softmoe_train.shards.settings import StoppedError
from softmoe_train.shards.source import Item, LeftOut
from softmoe_train.shards.table import Columns, as_item

_ROWS = 64  # read at once
MISSING = 'source=parquet needs pyarrow, which is not installed; pip install "softmoe-train[parquet]"'


class RowGroup(NamedTuple):
    """A row group of a file, and the number of its first row."""

    path: str
    group: int
    first: int


class ParquetSource:
    """The pictures of parquet files; a part is a row group."""

    def __init__(self, paths: list[str], columns: Columns) -> None:
        self.paths, self.columns = [os.path.abspath(path) for path in paths], columns

    def parts(self) -> Iterator[RowGroup]:
        """The row groups of all files."""
        for path in self.paths:
            with _open(path) as file:
                first = 0
                for group in range(file.num_row_groups):
                    yield RowGroup(path, group, first)
                    first += file.metadata.row_group(group).num_rows

    def class_names(self) -> list[str] | None:
        """The names that Hugging Face's `datasets` keeps in the file for a column of class numbers."""
        return None if self.columns.label is None else _names_in(self.paths[0], self.columns.label)

    def facts(self) -> Any:
        """The files and their sizes."""
        return [[os.path.basename(path), os.path.getsize(path)] for path in self.paths]

    def items(self, part: RowGroup) -> Iterator[Item | LeftOut]:
        """An item for each row, with its picture's bytes at hand."""
        wanted = [
            c for c in (self.columns.image, self.columns.label, self.columns.text, self.columns.key) if c is not None
        ]
        stem, number = os.path.basename(part.path).removesuffix(".parquet").replace(".", "_"), part.first
        with _open(part.path) as file:
            batches = file.iter_batches(
                _ROWS, row_groups=[part.group], columns=[*dict.fromkeys([*wanted, *self.columns.extra])]
            )
            for batch in batches:
                for row in batch.to_pylist():
                    key = row.get(self.columns.key) if self.columns.key is not None else None
                    name = f"{stem}-{number:08d}" if key in (None, "") else str(key)
                    yield self._item(name, row)
                    number += 1

    def _item(self, name: str, row: dict[str, Any]) -> Item | LeftOut:
        picture = row[self.columns.image]
        if isinstance(picture, dict):
            picture = picture.get("bytes")
        if not isinstance(picture, bytes):
            return LeftOut(name, f"its column {self.columns.image} holds no bytes of a picture")
        return as_item(name, picture, row, self.columns)


def parquet_problem() -> str | None:
    """Why parquet cannot be read here."""
    return MISSING if importlib.util.find_spec("pyarrow") is None else None


def columns_of(path: str) -> list[str]:
    """The names of a file's columns; raises StoppedError where it is no parquet."""
    with _open(path) as file:
        return list(file.schema_arrow.names)


def _open(path: str) -> Any:
    import pyarrow.parquet  # pyright: ignore[reportMissingImports]  # here: it takes a third of a second, and few need it

    try:
        return pyarrow.parquet.ParquetFile(path)
    except Exception as error:  # pyarrow has its own types for damaged files, not to be imported apart
        raise StoppedError(f"{path} is not a parquet file ({error}); copy it again, or name another") from None


def _rows(file: Any, part: RowGroup, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a row group, a few at a time."""
    try:
        for batch in file.iter_batches(_ROWS, row_groups=[part.group], columns=columns):
            yield from batch.to_pylist()
    except Exception as error:  # as in _open
        raise StoppedError(f"{part.path}: row group {part.group} is damaged ({error}); copy it again.") from None


def _names_in(path: str, column: str) -> list[str] | None:
    """The class names in the metadata of a file that `datasets` wrote."""
    with _open(path) as file:
        metadata = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = json.loads(metadata)["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
