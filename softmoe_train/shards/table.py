"""This file owns how a row of a table becomes an item: which column is what, and how a label is written."""

import json
import re
from typing import Any, NamedTuple

from softmoe_train.shards.source import Item, LeftOut, Stored

_INTEGERS = re.compile(r"[+-]?[0-9]{1,18}(\s+[+-]?[0-9]{1,18})*")
LABEL_COLUMNS = ("label", "labels", "class")  # looked for in this order
_NOTHING = (None, "")


class Columns(NamedTuple):
    """The names of the columns; None: there is no such."""

    image: str
    label: str | None
    text: str | None
    key: str | None
    extra: tuple[str, ...]


def choose_columns(
    given: dict[str, str | None], extra: list[str], there: list[str], image: str, what: str
) -> tuple[Columns | None, list[str]]:
    """The columns of a table that has the columns `there`, and what is wrong with those that were given."""
    problems = [
        f"{key}={column}: {what} has no such column; it has {', '.join(there)}"
        for key, column in [*given.items(), *[("extra", column) for column in extra]]
        if column is not None and column not in there
    ]
    image = given["image_column"] or image
    if image not in there and given["image_column"] is None:
        problems.append(
            f"{what} has no column {image}; name the pictures' with image_column=, one of {', '.join(there)}"
        )
    label = given["label_column"] or next((column for column in LABEL_COLUMNS if column in there), None)
    text = given["text_column"] or ("text" if "text" in there else None)
    if label is None and text is None:
        problems.append(
            f"{what} has neither labels nor text: no column is named {', '.join(LABEL_COLUMNS)} or text; name one with label_column= or text_column="
        )
    key = given["key_column"] or ("key" if "key" in there else None)
    return (None if problems else Columns(image, label, text, key, tuple(extra))), problems


def as_item(name: str, picture: Stored | bytes, row: dict[str, Any], columns: Columns) -> Item | LeftOut:
    """The item of a row whose picture was found; LeftOut where its label or text is nothing that we can read."""
    labels: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    if columns.label is not None:
        try:
            labels, classes = _labels(row.get(columns.label), named=columns.label == "class")
        except ValueError as error:
            return LeftOut(name, str(error))
    text = row.get(columns.text) if columns.text is not None else None
    if text is not None and not isinstance(text, str):
        return LeftOut(name, f"its text is {type(text).__name__}, not a string")
    extra = {column: row.get(column) for column in columns.extra} or None
    if extra is not None:
        try:
            json.dumps(extra, allow_nan=False)
        except (TypeError, ValueError) as error:
            return LeftOut(name, f"a column of extra= is nothing that JSON holds ({error})")
    return Item(name, picture, labels, classes, text, extra)


def _labels(value: Any, *, named: bool) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Class numbers or class names of a cell: a number, a name, numbers with spaces between them, or a list of either."""
    if isinstance(value, str) and value.startswith("[") and not named:
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"label {value[:40]!r} is no list") from None
    values = value if isinstance(value, list | tuple) else [value]
    if not values or any(one in _NOTHING for one in values):
        raise ValueError("it has no label")
    if not named and len(values) == 1 and isinstance(values[0], str) and _INTEGERS.fullmatch(values[0].strip()):
        values = [int(word) for word in values[0].split()]
    numbers = [one for one in values if type(one) is int]  # a bool is an int too
    if len(numbers) == len(values):
        if min(numbers) < 0:
            raise ValueError(f"label {min(numbers)} is below 0")
        return tuple(numbers), ()
    if all(isinstance(one, str) for one in values):
        return (), tuple(values)
    raise ValueError(f"label {str(value)[:40]!r} is neither a number nor a name")
