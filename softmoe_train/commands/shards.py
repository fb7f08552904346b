"""This file owns `softmoe shards`: make shards from pictures, look through shards, and index them."""

import signal
import sys

from softmoe_train.commands.workers import under_a_launcher
from softmoe_train.config import ConfigError, compose, compose_own, split_overrides
from softmoe_train.data import SyntheticConfig
from softmoe_train.data.labels import check_labels
from softmoe_train.settings import RunConfig
from softmoe_train.shards import StoppedError, make_shards
from softmoe_train.shards.build import build_source, read_classes
from softmoe_train.shards.check import check_shards, specs_of
from softmoe_train.shards.histogram import draw_checked
from softmoe_train.shards.index import index_data
from softmoe_train.shards.report import print_checked, read_list, write_document, write_quarantine
from softmoe_train.shards.settings import CheckSettings, IndexSettings, MakeSettings
from softmoe_train.shards.told import told_of

FAILED = 1
TASKS = {
    "make": "pictures in folders, ImageNet's archives, a manifest or parquet files become shards of even size",
    "check": "every byte of shards is read, every picture decoded: what is wrong with which sample, and what they can feed",
    "index": "what each tar holds is published beside it, so that nobody need read it to know; or that index is proved",
}
SIZES = ("shards", "shard_mib")  # either takes the place of samples_per_shard


def shards(what: str, overrides: list[str]) -> int:
    """Do one of TASKS; returns 1 where it had to stop, or found problems. Raises ConfigError before anything is started."""
    try:
        match what:
            case "make":
                return _make(overrides)
            case "check":
                return _check(overrides)
            case "index":
                return _index(overrides)
        raise AssertionError(what)
    except StoppedError as error:
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
    print(told_of(settings, make_shards(source, settings, classes=classes)), flush=True)
    return 0


def _check(overrides: list[str]) -> int:
    ours, others = split_overrides(CheckSettings, RunConfig, overrides)
    settings, problems = compose_own(CheckSettings, "shards_check.yaml", ours)
    problems += _launcher_problems("check") + ([] if settings is None else settings.problems())
    try:
        run = compose(RunConfig, others, lambda run: _check_problems(settings, run))
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if settings is None or problems:
        raise ConfigError(problems)
    assert not isinstance(run.data, SyntheticConfig)
    checked = check_shards(settings, run.data, num_classes=run.model.num_classes, batch_size=run.batch_size)
    print_checked(checked)
    if settings.out is not None:
        write_document(checked, settings.out)
    if settings.picture is not None:
        draw_checked(checked, settings.picture)
    if settings.quarantine is not None:
        new, all_of = write_quarantine(checked, settings.quarantine)
        print(
            f"{settings.quarantine}: {new:,} samples more, {all_of:,} in all; to leave them out: data.quarantine={settings.quarantine}"
        )
    return FAILED if checked.tally.problems else 0


def _check_problems(settings: CheckSettings | None, run: RunConfig) -> list[str]:
    """What keeps these shards from being looked through; what would keep them from being trained on is told by the check."""
    if isinstance(run.data, SyntheticConfig):
        return ["data=synthetic has no shards to check; choose another data"]
    problems = check_labels(run.data, run.model.num_classes)
    try:
        specs_of(run.data)
    except ValueError as error:
        problems.append(str(error))
    try:
        if settings is not None and settings.quarantine is not None:
            read_list(settings.quarantine)
    except (ValueError, OSError) as error:
        problems.append(str(error))
    return problems


def _index(overrides: list[str]) -> int:
    settings, problems = compose_own(IndexSettings, "shards_index.yaml", overrides)
    problems += _launcher_problems("index") + ([] if settings is None else settings.problems())
    if settings is None or problems:
        raise ConfigError(problems)
    done = index_data(settings)
    for problem in done.problems:
        print(f"softmoe shards index: {problem}", file=sys.stderr)
    told = f"{done.shards:,} shards with {done.samples:,} samples"
    if settings.verify:
        print(f"{', '.join(done.indexes)}: {told} read again, {len(done.problems) or 'no'} differences")
    elif done.indexes:
        print(f"{', '.join(done.indexes)}: {told}")
    else:
        print(f"nothing was published: {len(done.problems):,} of the tars are damaged")
    return FAILED if done.problems else 0


def _launcher_problems(what: str) -> list[str]:
    told = f"softmoe shards {what} starts its own processes (processes=N); start it without a launcher"
    return [told] if under_a_launcher() else []
