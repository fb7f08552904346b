"""This file owns how a point becomes a job of SLURM: what submitit is told, and the folder in which it keeps its pickles."""

import grp
import importlib
import os
import pwd
import shlex
import stat
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from softmoe_train.config import ConfigError
from softmoe_train.dist import World
from softmoe_train.plain import plain
from softmoe_train.sweep.submitted import SubmittedPoint

FOLDER = ".submitit"  # of the sweep
OURS = ("submitit_folder", "name", "_target_", "additional_parameters", "setup", "array_parallelism", "max_num_timeout")
SHARED = ("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "stderr_to_stdout")


def world_of_jobs(settings: dict[str, Any]) -> World:
    """The world in which each job trains: a rank a task."""
    nodes, tasks = int(settings["nodes"] or 1), int(settings["tasks_per_node"] or 1)
    return World(0, nodes * tasks, 0, tasks)


def submit(point: SubmittedPoint, name: str, folder: Path, settings: dict[str, Any]) -> str:
    """Submit a job called `name`, with the settings of Hydra's launcher and what we need of it; returns its number.

    Raises ConfigError where SLURM does not take it, or the folder is not ours alone.
    """
    keep_private(folder)
    # Not a folder for each job, which submitit makes after SLURM may have started it.
    executor = importlib.import_module("submitit").AutoExecutor(folder=folder, cluster="slurm")
    shared = {key: settings[key] for key in SHARED}
    slurm = {f"slurm_{key}": value for key, value in settings.items() if key not in (*SHARED, *OURS)}
    # To the tasks, not the script: ranks save at SIGUSR1, submitit's own SIGUSR2 would have them requeued before.
    more = {
        "signal": f"USR1@{settings['signal_delay_s']}",
        "requeue": True,
        **(settings["additional_parameters"] or {}),
    }
    executor.update_parameters(
        name=name,
        slurm_additional_parameters=more,
        slurm_setup=[*_setup(folder), *(settings["setup"] or [])],
        **shared,
        **slurm,
    )
    try:
        return str(executor.submit(point).job_id)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise ConfigError([f"SLURM does not take the job {name}: {plain(error)}"]) from None


def keep_private(folder: Path) -> None:
    """Make submitit's folder, or see that nobody else can have put anything there; raises ConfigError.

    It holds pickles, which run when they are read: the only ones of this project. No checkpoint, cache or run folder is in it, and
    we read none of them; jobs do.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _check_parents(folder)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            [
                f"{folder} belongs to user {found.st_uid} and has mode {stat.S_IMODE(found.st_mode):o}: it holds pickles, which run when a "
                f"job reads them, so it must be a folder of your own with mode 700; look who has written there, then delete it or chmod 700"
            ]
        )


def _check_parents(folder: Path) -> None:
    """Whoever may write in a folder may put another in the place of what is in it, unless it is sticky."""
    own = _own_group()
    where = folder.parent.resolve()
    for parent in (where, *where.parents):
        found = parent.stat()
        by_group = found.st_mode & stat.S_IWGRP and found.st_gid != own
        if found.st_mode & stat.S_ISVTX or not (found.st_mode & stat.S_IWOTH or by_group):
            continue
        who, mend = ("everybody", "go-w") if found.st_mode & stat.S_IWOTH else (f"group {found.st_gid}", "g-w")
        raise ConfigError(
            [
                f"{parent} has mode {stat.S_IMODE(found.st_mode):o}: {who} may put another folder in the place of {folder}, which holds "
                f"pickles that run when a job reads them; chmod {mend} {parent}, or chmod +t, or give a run_dir where only you write"
            ]
        )


def _own_group() -> int | None:
    """The group that has the name of the user, and nobody else in it; None where there is none.

    Under umask 002, which sites set because of such groups, every folder is writable for one, and that is for its user alone.
    """
    try:
        user = pwd.getpwuid(os.getuid())
        group = grp.getgrgid(user.pw_gid)
    except KeyError:
        return None
    return group.gr_gid if group.gr_name == user.pw_name and {*group.gr_mem} <= {user.pw_name} else None


def _setup(folder: Path) -> list[str]:
    """What the script of a job does before a task of it reads a pickle, at each start."""
    where = shlex.quote(str(folder))
    return [
        f'[ "$(stat -c "%u %a" {where})" = "$(id -u) 700" ] || {{ echo {where} is not a folder of mode 700 of our own >&2; exit 2; }}',
        "export SLURM_KILL_BAD_EXIT=${SLURM_KILL_BAD_EXIT:-1}",  # a rank that fails ends the others
        "export SLURM_EXPORT_ENV=ALL",
        '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK',
    ]
