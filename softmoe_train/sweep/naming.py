"""This file owns how a sweep writes: what a point is called, and an override for any text."""

import hashlib
import json
import re

from softmoe_train.finetune import key_of
from softmoe_train.report.rows import short_names

PLAIN = re.compile(r"[A-Za-z_./][\w./=+-]*")  # what Hydra's grammar takes for a string as it is
WORDS = {"true", "false", "null", "nan", "inf"}
UNSAFE = re.compile(r"[^A-Za-z0-9._=+-]+")  # in the name of a folder, or in a line of a shell
AROUND = "'\"[](){} "  # a value
LONGEST = 120  # characters of a label


def label_of(words: list[str], swept: list[str]) -> str:
    """What a point is called: its swept values by the last parts of their keys; the same however many values the keys have."""
    short = short_names(swept)
    values = [(key_of(word), word.partition("=")[2]) for word in words]
    label = "_".join(f"{short[key]}={_safe(value)}" for key, value in values if key in swept)
    if len(label) > LONGEST:
        label = f"{label[:LONGEST]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    return label


def word_of(key: str, value: str) -> str:
    """An override that Hydra's grammar takes for this text, whatever is in it."""
    plain = PLAIN.fullmatch(value) and value.lower() not in WORDS
    return f"{key}={value if plain else json.dumps(value, ensure_ascii=False)}"


def _safe(value: str) -> str:
    return UNSAFE.sub("-", value.strip(AROUND)) or "none"
