"""This file owns which folders are runs, among those that a person names and below them."""

import os
from collections.abc import Iterable
from pathlib import Path

MARKS = ("metrics.jsonl", "summary.json", "config.yaml")  # of a run folder; the first two may be torn, or not there yet
INSIDE = {"checkpoints", "wandb", "pictures", "hangs", ".git", ".venv"}  # no run lies in these
DEPTH = 6  # folders below one that is named


def find_runs(named: Iterable[Path]) -> tuple[list[Path], dict[Path, str]]:
    """The run folders in the order of their names, and the named folders that have none, with the reason.

    A folder without a run of its own stands for all that lie below it (a sweep).
    """
    found: dict[Path, Path] = {}  # by where they are: a folder may be named twice
    left_out: dict[Path, str] = {}
    for folder in named:
        if folder.is_file():
            left_out[folder] = "a file, not a folder"
            continue
        if not folder.is_dir():
            left_out[folder] = "there is no such folder"
            continue
        below = _runs_below(folder, left_out)
        found.update((run.resolve(), run) for run in below)
        if not below:
            left_out.setdefault(folder, f"no run in it (none of {', '.join(MARKS)})")
    return sorted(found.values()), left_out


def _runs_below(folder: Path, left_out: dict[Path, str]) -> list[Path]:
    def told(error: OSError) -> None:
        left_out[Path(error.filename or folder)] = f"cannot be read: {error.strerror}"

    runs = []
    for root, folders, files in os.walk(folder, onerror=told):
        here = Path(root)
        # A folder with nothing but a configuration may be a sweep's own.
        if {"metrics.jsonl", "summary.json"} & set(files) or ("config.yaml" in files and not folders):
            runs.append(here)
        depth = len(here.relative_to(folder).parts)
        # A run may hold others: those that were fine-tuned from it.
        folders[:] = sorted(name for name in folders if name not in INSIDE) if depth < DEPTH else []
    return runs
