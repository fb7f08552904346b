"""This file owns how a sweep writes: what a point is called, and an override for any text."""

import hashlib
import re

from hydra.core.override_parser.types import Quote, QuotedString

from softmoe_train.config import ConfigError
from softmoe_train.finetune import key_of
from softmoe_train.report.rows import short_names

PLAIN = re.compile(r"(?!\.\d)[A-Za-z_./][\w./=+-]*", re.ASCII)  # what Hydra's grammar takes for a string as it is
REFERENCE = re.compile(r"(\\*)\$\{")  # what OmegaConf would look up, with the backslashes before it
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # no line of the log or the table bears it
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
    """An override that Hydra's grammar takes for this text, whatever is in it; raises ConfigError for control characters."""
    if CONTROL.search(value):
        raise ConfigError([f"{key}={value!r}: there is a control character in it; give a text without one"])
    if PLAIN.fullmatch(value) and value.lower() not in WORDS:
        return f"{key}={value}"
    text = REFERENCE.sub(r"\1\1\\${", value)
    # Not as JSON: a backslash is itself here, but before a quote or at the end.
    return f"{key}={QuotedString(text, Quote.double).with_quotes()}"


def _safe(value: str) -> str:
    return UNSAFE.sub("-", value.strip(AROUND)) or "none"
