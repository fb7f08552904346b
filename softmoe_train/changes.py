"""This file owns what may change under a run: which settings shape its numbers, and which a continued run takes as they are now."""

import re
from typing import Any

from softmoe_train.config import flat

# What a continued run may change freely: where and how it computes, what it reports. All else shapes the numbers, and so does
# the one of `parallel` that rounds.
SHAPING = {"parallel.exchange_dtype"}
FREE = {
    "name", "run_dir", "stop_after", "time_limit", "hang_limit", "micro_batches", "processes", "elastic", "preflight", "device", "compile",
    "allow_changes", "parallel", "engine", "checkpoint", "bad_steps", "observe", "evals", "finetune", "data.train", "data.test", "data.cache", "data.workers",
    "data.prefetch", "data.max_broken", "data.max_broken_fraction",
    "data.classes", "data.quarantine",
}  # fmt: skip
# What a setting did before it could be set, where that is not null: a run of that time goes on.
ONCE = {
    "data.label": "cls",
    "data.keep.renumber": False,
    "data.scaled_decode": False,
    "optim.frozen": [],
    "data.train_transform.arithmetic": "float32",
    "data.test_transform.arithmetic": "float32",
}
# Files may be moved (as data.classes and data.quarantine, data.train): what they hold is in the stream's fingerprint.
SHARDS_OF_A_SOURCE = re.compile(r"data\.mixture\.[^.]+\.shards")


def changed_settings(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that shape a run's numbers and differ between two saved configurations, each with both values."""
    old, new = {**{key: value for key, value in ONCE.items() if key in flat(now)}, **flat(saved)}, flat(now)
    return [
        f"{key}={new.get(key)} (was {old.get(key)})"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and not is_free(key)
    ]


def is_free(key: str) -> bool:
    """Whether a continued run takes this setting as it is now."""
    if key in SHAPING:
        return False
    return key in FREE or key.startswith(tuple(f"{one}." for one in FREE)) or bool(SHARDS_OF_A_SOURCE.fullmatch(key))
