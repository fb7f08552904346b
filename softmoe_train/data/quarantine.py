"""This file owns the quarantine: a file of samples that are never read, a JSON object on each line, named by shard, its hash, and key.

A run's own broken_samples.jsonl is such a file.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from softmoe_train.data.fields import shown

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_LINE = 1 << 16  # characters
_REMEDY = (
    'each is one JSON object like {"shard": "train-000000.tar", "sha256": "of the tar", "key": "00012", "reason": "why"}; '
    "correct or remove it"
)


class Listed(NamedTuple):
    """A sample that is never read: in a tar with these contents, whatever its name is now."""

    shard: str
    sha256: str
    key: str


def read_quarantine(path: str, *, key: str = "data.quarantine") -> list[Listed]:
    """The samples that a file lists, each once; raises ValueError that names `key` and the first line that is no such thing."""
    where, file = f"{key}={path}", Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{where} is not a file; name one with a JSON object on each line, or use null")
    found: dict[tuple[str, str], Listed] = {}
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    listed = _listed(line, f"{where} line {number}")
                    found.setdefault((listed.sha256, listed.key), listed)
    except OSError as error:
        raise ValueError(f"{where} cannot be read ({error}); give a file that can, or use null") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 ({error.reason}); write it in UTF-8") from None
    return list(found.values())


def _listed(line: str, where: str) -> Listed:
    try:
        if len(line) > _MAX_LINE:
            raise ValueError(f"it has {len(line)} characters, more than {_MAX_LINE}")
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}): {_REMEDY}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {shown(value)}, not an object: {_REMEDY}")
    for name in ("shard", "sha256", "key", "reason"):
        if not isinstance(value.get(name), str):
            raise ValueError(f"{where} has no {name}, or one that is no text: {_REMEDY}")
    if not _SHA256.fullmatch(value["sha256"]):
        raise ValueError(f"{where}: {shown(value['sha256'])} is no SHA-256 (64 digits 0 to f): {_REMEDY}")
    return Listed(value["shard"], value["sha256"], value["key"])
