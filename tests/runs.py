"""This file owns how tests start the real program and read what it leaves."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from softmoe_train.config import compose
from softmoe_train.dist import World
from softmoe_train.run import train
from softmoe_train.settings import RunConfig, check

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SOFTMOE_SHARED", ROOT.parent / "shared")) / "data"


def command(*overrides: str) -> list[str]:
    """`softmoe train` with this interpreter, without W&B and without a bar."""
    quiet = ["observe.wandb.mode=disabled", "observe.progress=plain"]
    return [sys.executable, "-m", "softmoe_train", "train", *quiet, *overrides]


def environment(**changes: str) -> dict[str, str]:
    """Ours, with this checkout on the path and one thread a process."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **changes}


def softmoe(*overrides: str, folder: Path, ok: bool = True, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run `softmoe train` in `folder` to its end; `ok` insists on exit code 0."""
    done = subprocess.run(
        command(*overrides),
        cwd=folder,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def run_here(folder: Path, *overrides: str) -> Path:
    """Train in this process, as one rank, into `folder`; returns it."""
    config = compose(RunConfig, [*overrides, f"run_dir={folder}"], lambda config: check(config, 1, 1))
    train(config, World(rank=0, size=1, local_rank=0, local_size=1))
    return folder


def children_of(pid: int) -> list[int]:
    """The processes of ours that `pid` started: the ranks of a launcher."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    found = [int(child) for child in text.split()]
    return [child for child in found if b"softmoe_train" in Path(f"/proc/{child}/cmdline").read_bytes()]


def ending(work: Callable[[], None]) -> tuple[int, float]:
    """The exit code of a forked child that does `work`, or minus the signal that ended it, and how many seconds it took."""
    begin, child = time.monotonic(), os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - begin


def alive(pid: int) -> bool:
    """Whether a process runs still; one that only waits to be collected does not."""
    try:
        os.kill(pid, 0)
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):  # gone before the one, or between the two
        return False


def metrics(run: Path, name: str) -> dict[int, float]:
    """One metric of a run by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def stored(run: Path, step: int) -> dict[str, Tensor]:
    """Every rank file's tensors of a checkpoint, by file and name, exactly as they lie on the disk."""
    files = sorted((run / "checkpoints" / f"step_{step:08d}").glob("*.safetensors"))
    assert files
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def with_digits(folder: Path) -> Path:
    """`folder` with the digits' shards, where the quickstart looks for them; skips where scikit-learn is not installed."""
    pytest.importorskip("sklearn")
    shutil.copytree(_digits().name, folder / "shards" / "digits", dirs_exist_ok=True)
    return folder


@cache
def _digits() -> tempfile.TemporaryDirectory[str]:
    """The shards, made once a process: to import scikit-learn takes seconds."""
    made = tempfile.TemporaryDirectory(prefix="softmoe_digits_")
    maker = [sys.executable, str(ROOT / "data" / "make_digits.py"), "--out", made.name]
    subprocess.run(maker, check=True, capture_output=True, env=environment())
    return made
