"""This file owns the folders on disk: their names, JSON that is whole or absent, deletion that begins with the mark."""

import logging
import os
import re
import shutil
from pathlib import Path

from softmoe_train.checkpoint.agreement import CheckpointError
from softmoe_train.checkpoint.manifest import MARK

STEP_FOLDER = re.compile(r"step_(\d{8,})")
SET_ASIDE = re.compile(rf"{STEP_FOLDER.pattern}\.damaged(-\d+)?")
log = logging.getLogger(__name__)


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies under `folder`."""
    assert step >= 0, step
    return folder / f"step_{step:08d}"


def step_folders(folder: Path, *, complete: bool) -> list[Path]:
    """The step folders under `folder` with (or without) the completion mark, oldest step first."""
    if not folder.is_dir():
        return []
    found = [
        (int(match[1]), path)
        for path in folder.iterdir()
        if (match := STEP_FOLDER.fullmatch(path.name)) and path.is_dir() and not path.is_symlink()
    ]
    return [path for _, path in sorted(found) if (path / MARK).is_file() == complete]


def step_of(path: Path) -> int:
    """The step in a step folder's name."""
    match = STEP_FOLDER.fullmatch(path.name)
    assert match, path
    return int(match[1])


def set_aside(path: Path) -> Path:
    """Rename a damaged step folder, so that it does not exist for the loader, and return its new place; it keeps all it holds."""
    place, number = path.with_name(f"{path.name}.damaged"), 2
    while place.exists():
        place, number = path.with_name(f"{path.name}.damaged-{number}"), number + 1
    path.rename(place)
    flush_folder(path.parent)
    return place


def folders_set_aside(folder: Path) -> list[Path]:
    """What `set_aside` has left under `folder`."""
    return sorted(path for path in folder.iterdir() if SET_ASIDE.fullmatch(path.name)) if folder.is_dir() else []


def checkpoint_at(path: Path) -> Path:
    """The step folder that `path` means: itself, or the newest complete one of a run; raises CheckpointError with the remedy."""
    if (path / MARK).is_file():
        return path
    for folder in (path / "checkpoints", path):
        complete = step_folders(folder, complete=True)
        if complete:
            return complete[-1]
    if not path.is_dir():
        problem = "there is no such folder; give a run folder or a step folder"
    elif STEP_FOLDER.fullmatch(path.name):
        problem = f"{MARK} is missing: that save never finished, so it is no checkpoint; give another step's folder"
    else:
        problem = "it holds no complete checkpoint; give a run folder or a step folder"
    raise CheckpointError(f"{path} is no checkpoint", [problem])


def write_flushed(path: Path, data: bytes) -> None:
    """Write a file's bytes to the disk; its name is lasting only after `flush_folder`."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a kill at any instant leaves it whole or absent, after all that the folder held before."""
    scratch = path.with_name(path.name + ".tmp")
    write_flushed(scratch, data)
    flush_folder(path.parent)
    scratch.replace(path)
    flush_folder(path.parent)


def folder_bytes(path: Path) -> int:
    """The size of the files in a step folder."""
    return sum(file.stat().st_size for file in path.iterdir())


def has_room(path: Path, needed: int) -> bool:
    """Whether `needed` bytes fit the disk of `path`, which need not exist; True where nobody can tell."""
    there = next((each for each in (path, *path.parents) if each.exists()), None)
    if there is None:
        return True
    try:
        disk = shutil.disk_usage(there)
    except OSError:
        return True
    return disk.total == 0 or disk.free >= needed  # some network file systems tell nothing


def room_fault(folder: Path, needed: int) -> str:
    """What is wrong where there is no room, and what helps."""
    return f"the disk of {folder} has no room for a checkpoint of {needed / 2**20:,.1f} MiB; make room, or lower checkpoint.keep_last"


def flush_folder(path: Path) -> None:
    """Make the names in a folder as lasting as the files they name."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def delete(path: Path) -> None:
    """Delete a step folder, mark first: whatever is left of it after a kill does not exist for the loader."""
    (path / MARK).unlink(missing_ok=True)
    flush_folder(path)
    shutil.rmtree(path)


def delete_or_warn(path: Path) -> None:
    """Delete a step folder that is in nobody's way; a failure is reported, and the next save tries again."""
    try:
        delete(path)
    except OSError as error:
        log.warning("%s could not be deleted: %s", path, error)
