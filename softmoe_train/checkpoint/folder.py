"""This file owns the folders of checkpoints: their names, files that are whole or absent, deletion that begins with the mark.

They are on a disk, where names and bytes are flushed and a rename is atomic, or in an object store, which has neither.
"""

import io
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import yaml

from softmoe_train.checkpoint.agreement import CheckpointError
from softmoe_train.checkpoint.manifest import MARK
from softmoe_train.checkpoint.remote import Place, RemotePath, place_of
from softmoe_train.config import load_yaml

STEP_FOLDER = re.compile(r"step_(\d{8,})")
SET_ASIDE = re.compile(rf"{STEP_FOLDER.pattern}\.damaged(-\d+)?")
log = logging.getLogger(__name__)


def step_folder(folder: Place, step: int) -> Place:
    """Where the checkpoint of `step` lies under `folder`."""
    assert step >= 0, step
    return folder / f"step_{step:08d}"


def step_folders(folder: Place, *, complete: bool) -> list[Place]:
    """The step folders under `folder` with (or without) the completion mark, oldest step first."""
    return [path for path in sorted(_folders(folder), key=step_of) if (path / MARK).is_file() == complete]


def step_of(path: Place) -> int:
    """The step in a step folder's name."""
    match = STEP_FOLDER.fullmatch(path.name)
    assert match, path
    return int(match[1])


def set_aside(path: Place) -> Place:
    """Rename a damaged step folder, so that it does not exist for the loader, and return its new place; it keeps all it holds."""
    place, number = path.with_name(f"{path.name}.damaged"), 2
    while place.exists():
        place, number = path.with_name(f"{path.name}.damaged-{number}"), number + 1
    if isinstance(path, RemotePath):
        path.copy_beside(place.name)  # a kill before the end leaves it to be found damaged, and copied, again
        delete(path)
    else:
        path.rename(path.with_name(place.name))
        flush_folder(path.parent)
    return place


def folders_set_aside(folder: Place) -> list[Place]:
    """What `set_aside` has left under `folder`."""
    return _folders(folder, SET_ASIDE)


def checkpoint_at(path: Place) -> Place:
    """The step folder that `path` means: itself, or the newest complete one of a run; raises CheckpointError with the remedy."""
    if (path / MARK).is_file():
        return path
    for folder in (checkpoints_of(path), path):
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


def checkpoints_of(run: Place) -> Place:
    """Where the checkpoints of a run folder are, as its configuration says."""
    try:
        checkpoint = load_yaml(run / "config.yaml").get("checkpoint") if isinstance(run, Path) else None
    except (OSError, ValueError, yaml.YAMLError):  # no run, or one that was killed at its start
        checkpoint = None
    folder = checkpoint.get("folder") if isinstance(checkpoint, dict) else None
    return place_of(folder) if isinstance(folder, str) else run / "checkpoints"


@contextmanager
def lasting(path: Place, mode: Literal["wb", "xb"]) -> Iterator[io.BufferedIOBase]:
    """A file to write, whose bytes are on the disk (or all in the store) when the block ends; its name is, after `flush_folder`."""
    with path.open(mode) as file:
        yield file
        if isinstance(path, Path):
            file.flush()
            os.fsync(file.fileno())


def write_flushed(path: Place, data: bytes) -> None:
    """Write a file's bytes to the disk; its name is lasting only after `flush_folder`. In a store it is whole or absent."""
    if isinstance(path, RemotePath):
        path.write_bytes(data)
        return
    with lasting(path, "wb") as file:
        file.write(data)


def write_whole(path: Place, data: bytes) -> None:
    """Write a file so that a kill at any instant leaves it whole or absent, after all that the folder held before."""
    if isinstance(path, RemotePath):
        path.write_bytes(data)
        return
    scratch = path.with_name(path.name + ".tmp")
    write_flushed(scratch, data)
    flush_folder(path.parent)
    scratch.replace(path)
    flush_folder(path.parent)


def folder_bytes(path: Place) -> int:
    """The size of the files in a step folder."""
    return sum(file.stat().st_size for file in path.iterdir())


def has_room(path: Place, needed: int) -> bool:
    """Whether `needed` bytes fit the disk of `path`, which need not exist; True where nobody can tell, as of a store."""
    if isinstance(path, RemotePath):
        return True
    there = next((each for each in (path, *path.parents) if each.exists()), None)
    if there is None:
        return True
    try:
        disk = shutil.disk_usage(there)
    except OSError:
        return True
    return disk.total == 0 or disk.free >= needed  # some network file systems tell nothing


def room_fault(folder: Place, needed: int) -> str:
    """What is wrong where there is no room, and what helps."""
    return f"the disk of {folder} has no room for a checkpoint of {needed / 2**20:,.1f} MiB; make room, or lower checkpoint.keep_last"


def flush_folder(path: Place) -> None:
    """Make the names in a folder as lasting as the files they name; in a store they are."""
    if isinstance(path, RemotePath):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def delete(path: Place) -> None:
    """Delete a step folder, mark first: whatever is left of it after a kill does not exist for the loader."""
    (path / MARK).unlink(missing_ok=True)
    flush_folder(path)
    if isinstance(path, RemotePath):
        path.delete_all()
    else:
        shutil.rmtree(path)


def delete_or_warn(path: Place) -> None:
    """Delete a step folder that is in nobody's way; a failure is reported, and the next save tries again."""
    try:
        delete(path)
    except OSError as error:
        log.warning("%s could not be deleted: %s", path, error)


def _folders(folder: Place, names: re.Pattern[str] = STEP_FOLDER) -> list[Place]:
    """The folders directly under `folder` whose names are of this kind, sorted."""
    if isinstance(folder, RemotePath):
        return [path for path in folder.folders() if names.fullmatch(path.name)]
    found = (path for path in folder.iterdir() if names.fullmatch(path.name)) if folder.is_dir() else ()
    return [path for path in sorted(found) if path.is_dir() and not path.is_symlink()]
