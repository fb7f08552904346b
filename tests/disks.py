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


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Nothing can be written to a file system of `small_disk` inside: permission is lost even for the superuser."""
    assert _run("mount", "-o", "remount,ro", str(disk)).returncode == 0
    try:
        yield
    finally:
        assert _run("mount", "-o", "remount,rw", str(disk)).returncode == 0


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
