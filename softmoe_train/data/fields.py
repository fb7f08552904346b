"""This file owns what a sample says in words: a field of its JSON, and its text, read within bounds from bytes that nobody vouches for.

A number that JSON spells out with more than 18 digits, NaN and Infinity, a key that is there twice and nesting without end make
a sample broken, as do bytes that are not UTF-8.
"""

import json
from typing import Any, NoReturn

from softmoe_train.data.decode import UnreadableSampleError

MAX_JSON_BYTES = 1 << 20
MAX_TEXT_BYTES = 1 << 16
_MAX_DIGITS = 18
_SHOWN = 40  # characters of a hostile value in a message


def field_of(member: bytes, path: tuple[str, ...]) -> object:
    """The value at `path` of a JSON member: keys of objects, or places in lists; raises UnreadableSampleError."""
    value = _parsed(member)
    for depth, part in enumerate(path):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and len(part) <= _MAX_DIGITS and int(part) < len(value):
            value = value[int(part)]
        else:
            raise UnreadableSampleError(f"its .json has no field {'.'.join(path[: depth + 1])}")
    return value


def text_of(member: bytes, path: tuple[str, ...] | None) -> str:
    """The text of a `.txt` member, or of a field of a `.json` member; raises UnreadableSampleError where there is none."""
    value = utf8(member, "text") if path is None else field_of(member, path)
    if not isinstance(value, str):
        raise UnreadableSampleError(f"its text is no string: {shown(value)}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:  # JSON may spell half a character: "\ud800"
        raise UnreadableSampleError("its text holds half a character, which UTF-8 cannot") from None
    if size > MAX_TEXT_BYTES:
        raise UnreadableSampleError(f"its text is {size} bytes, more than {MAX_TEXT_BYTES}")
    if not value.strip():
        raise UnreadableSampleError("its text is empty")
    return value.strip()


def utf8(member: bytes, what: str) -> str:
    """Bytes as text; raises UnreadableSampleError."""
    try:
        return member.decode()
    except UnicodeDecodeError as error:
        raise UnreadableSampleError(f"its {what} is not UTF-8 (byte {error.start})") from None


def shown(value: object) -> str:
    """A value for a message, cut to what a person wants to see of it."""
    said = repr(value[:_SHOWN] if isinstance(value, str | bytes | list) else value)
    return said if len(said) <= 2 * _SHOWN else f"{said[: 2 * _SHOWN]}..."


def _parsed(member: bytes) -> object:
    try:
        return json.loads(
            utf8(member, ".json"), object_pairs_hook=_unique, parse_int=_integer, parse_constant=_no_number
        )
    except RecursionError:
        raise UnreadableSampleError("its .json is nested too deeply") from None
    except ValueError as error:
        raise UnreadableSampleError(f"its .json cannot be read ({error})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for at, (key, _) in enumerate(pairs) if key in dict(pairs[:at]))
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
