"""This file owns which code a run was made by: the version of the package, and its commit where it is run from a checkout."""

import os
import subprocess
from pathlib import Path

import softmoe_train

SECONDS = 5.0  # a file system that hangs is worth no run


def checkout() -> Path | None:
    """The checkout that this package is run from, or None where it is installed."""
    root = Path(softmoe_train.__file__).resolve().parent.parent
    return root if (root / ".git").exists() else None


def code_version() -> dict[str, str | None]:
    """The version, and the commit, which ends in `-dirty` where files that git knows were changed since; None without one."""
    return {"version": softmoe_train.__version__, "commit": _commit()}


def _commit() -> str | None:
    root = checkout()
    if root is None:
        return None
    here = {
        name: value for name, value in os.environ.items() if not name.startswith("GIT_")
    }  # they may name another one
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        told = subprocess.run(command, env=here, capture_output=True, text=True, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or one that does not trust the folder's owner
        return None
    return told.stdout.strip() or None
