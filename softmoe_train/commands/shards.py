"""This file owns `softmoe shards`: make shards from pictures, look through shards, and index them."""

import signal
import sys

from softmoe_train.commands.workers import under_a_launcher
from softmoe_train.config import ConfigError, compose_own
from softmoe_train.shards import MakeSettings, ShardsError, make_shards
from softmoe_train.shards.build import build_source, read_classes
from softmoe_train.shards.make import asked_of
from softmoe_train.shards.told import told_of

FAILED = 1
TASKS = {
    "make": "pictures in folders, ImageNet's archives, a manifest or parquet files become shards of even size",
}
SIZES = ("shards", "shard_mib")  # either takes the place of samples_per_shard


def shards(what: str, overrides: list[str]) -> int:
    """Do one of TASKS; returns 1 where it had to stop, or found problems. Raises ConfigError before anything is started."""
    try:
        match what:
            case "make":
                return _make(overrides)
        raise AssertionError(what)
    except ShardsError as error:
        print(f"softmoe shards {what}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"softmoe shards {what}: interrupted; the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT


def _make(overrides: list[str]) -> int:
    keys = [override.partition("=")[0] for override in overrides]
    if "samples_per_shard" not in keys and set(SIZES) & set(keys):
        overrides = ["samples_per_shard=null", *overrides]
    settings, problems = compose_own(MakeSettings, "shards_make.yaml", overrides)
    problems += _launcher_problems("make")
    source, classes = None, None
    if settings is not None:
        problems += settings.problems()
        try:
            classes = read_classes(settings.classes) if not problems else None
            source = build_source(settings) if not problems else None
        except ValueError as error:
            problems += str(error).split("\n")
    if settings is None or source is None or problems:
        raise ConfigError(problems)
    print(told_of(settings, make_shards(source, settings, asked=asked_of(settings), classes=classes)), flush=True)
    return 0


def _launcher_problems(what: str) -> list[str]:
    told = f"softmoe shards {what} starts its own processes (processes=N); start it without a launcher"
    return [told] if under_a_launcher() else []
