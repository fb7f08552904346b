"""This file owns labels: from the bytes of a label member to class numbers."""

import re

from softmoe_train.data.decode import UnreadableSampleError

MAX_LABEL_BYTES = 1 << 20
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


def classes_of(label: bytes, *, labels: str, num_classes: int) -> list[int]:
    """The classes that a `.cls` member names, one where `labels` is "hard"; raises UnreadableSampleError."""
    words = label[:MAX_LABEL_BYTES].decode("ascii", "replace").split()
    if not words or not all(_INTEGER.fullmatch(word) for word in words) or (labels == "hard" and len(words) > 1):
        wanted = "one integer" if labels == "hard" else "integers"
        raise UnreadableSampleError(
            f"label {label[:40].decode(errors='replace')!r} is not {wanted} (data.labels={labels})"
        )
    classes = [int(word) for word in words]
    if min(classes) < 0 or max(classes) >= num_classes:
        limit = f"0 to {num_classes - 1} (model.num_classes={num_classes})"
        raise UnreadableSampleError(f"label {label[:40].decode(errors='replace')!r} is outside {limit}")
    return classes
