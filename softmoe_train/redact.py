"""This file owns what counts as a secret in a configuration, and leaves it out of what is kept or sent."""

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "<left out>"
# Whole words of a key: `max_tokens` and `tokens` are counts, `hf_token` and `api_key` are secrets.
SECRET_KEY = re.compile(
    r"(^|[_.-])(token|secret|password|passwd|api_?key|access_?key(_id)?|secret_?key|credentials?|authorization)$",
    re.IGNORECASE,
)
URL = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://)(?:[^/\s@]*@)?(?P<rest>[^?#\s]*)(?P<signed>[?#]\S*)?")


def without_secrets(value: Any) -> Any:
    """A copy of a JSON-able value without secrets: values under secret-sounding keys, users and queries of URLs."""
    if isinstance(value, Mapping):
        return {
            key: REDACTED if item is not None and SECRET_KEY.search(str(key)) else without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    if isinstance(value, str) and "://" in value:
        return URL.sub(lambda m: m["scheme"] + m["rest"] + (f"?{REDACTED}" if m["signed"] else ""), value)
    return value
