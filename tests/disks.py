"""This file owns small file systems of their own, for tests of disks that fill or fail."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """A file system of `mib` MiB at `folder`; skips the test where none can be mounted."""
    folder.mkdir()
    mounted = _run("mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder))
    if mounted.returncode:
        pytest.skip(f"a file system of its own cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        assert _run("umount", "--lazy", str(folder)).returncode == 0  # files in it may be open still


def forbid(folder: Path) -> None:
    """Have nothing written under `folder` any more, by the superuser either: what is open already stays open."""
    assert _run("mount", "--bind", str(folder), str(folder)).returncode == 0
    assert _run("mount", "-o", "remount,bind,ro", str(folder)).returncode == 0


def permit(folder: Path) -> None:
    """Take back `forbid`."""
    assert _run("umount", "--lazy", str(folder)).returncode == 0


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be written under `folder` inside."""
    forbid(folder)
    try:
        yield
    finally:
        permit(folder)


def fill(path: Path) -> None:
    """Write into a file until its file system is full."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
