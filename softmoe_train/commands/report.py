"""This file owns `softmoe report`: runs compared in one HTML file."""

import json
import sys
import time
from pathlib import Path

from softmoe_train.commands.workers import under_a_launcher
from softmoe_train.config import ConfigError, compose_own
from softmoe_train.plain import plain
from softmoe_train.report.console import print_report
from softmoe_train.report.make import document, read_report, write_report
from softmoe_train.report.settings import ReportConfig, report_problems

CALM_SECONDS = 5.0  # between two lines of progress


def report(words: list[str]) -> int:
    """Read the runs, write the report; raises ConfigError where a key is wrong or there is no run at all."""
    keys = [word for word in words if _is_key(word)]
    folders = [word for word in words if not _is_key(word)]
    if folders:
        keys.append(f"runs={json.dumps(folders, ensure_ascii=False)}")
    settings, problems = compose_own(ReportConfig, "report.yaml", keys)
    problems += report_problems()
    if sum(key.startswith("runs=") for key in keys) > 1:
        problems.append("runs= is given beside folders; name all of them in one way")
    if under_a_launcher():
        problems.append("softmoe report is one process; start it without a launcher")
    if settings is None or problems:
        raise ConfigError(problems)
    read = read_report([Path(name) for name in settings.runs], _Progress())
    if not read.rows:
        raise ConfigError(
            [
                f"{plain(path)}: {why}; name run folders, or a folder that holds some"
                for path, why in read.left_out.items()
            ]
        )
    if settings.json_out is not None:
        Path(settings.json_out).write_text(json.dumps(document(read), indent=1, default=str) + "\n")
    write_report(read, Path(settings.out))
    print_report(read, settings.out)
    return 0


def _is_key(word: str) -> bool:
    """Whether a word is key=value; a folder of a sweep may be called `seed=1`."""
    return "=" in word and (word.partition("=")[0] in ReportConfig.model_fields or not Path(word).exists())


class _Progress:
    """A line now and then, where reading takes long."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def __call__(self, count: int, total: int) -> None:
        if time.monotonic() - self._told > CALM_SECONDS:
            self._told = time.monotonic()
            print(f"read {count} of {total} runs", file=sys.stderr, flush=True)
