"""This file owns how the commands of the README are found, and how each is run as a reader would: in order, in one folder.

Where a line trains for days, reads `/data` or measures for minutes, words are added that make it small; which, `added` says. Everything else
of a line stays as it is written.
"""

import contextlib
import io
import re
import shlex
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from softmoe_train.commands.main import main
from tests.forked import forked
from tests.runs import ROOT, environment

README = (ROOT / "README.md").read_text()
SOFTMOE = [sys.executable, "-m", "softmoe_train"]
# Those of other places: CI's own two; SLURM's and the builders' have tests beside theirs.
ELSEWHERE = re.compile(
    r"(make|sbatch|srun|scontrol|squeue|docker|buildah|kubectl|pip|launch/torchrun\.sh|softmoe train -m hydra/\w+)\b"
)


class Line(NamedTuple):
    """One command as it is written, continued lines joined, and the section that it stands in."""

    section: str
    text: str

    @property
    def words(self) -> list[str]:
        """As a shell would split it."""
        return shlex.split(self.text)


def lines(text: str = README) -> list[Line]:
    """The commands of every indented block that begins with one, in order; other blocks are what programs print."""
    found = []
    for section in re.split(r"(?m)^## ", text)[1:]:
        title, _, body = section.partition("\n")
        for block in re.findall(r"(?m)(?:^    .*\n)+", re.sub(r"\\\n\s*", "", body)):
            commands = [line.strip() for line in block.splitlines()]
            if commands[0].startswith(("softmoe ", "torchrun ", "python ")) or ELSEWHERE.match(commands[0]):
                found += [Line(title, command) for command in commands]
    return found


def added(words: list[str]) -> list[str]:
    """What makes a line small: a laptop's size where it reads `/data`, few steps of each point of a sweep, a small model on many ranks, one round of a measurement."""
    rest = " ".join(words)
    if "softmoe train" in rest and "/data/" in rest:
        steps = ["steps=4", "schedule.warmup_steps=1"]
        shrunk = [] if "shrink=" in rest else ["shrink=laptop"]
        own = [word for word in words if word.startswith("run_dir=")] or [
            f"run_dir=runs/small-{zlib.crc32(rest.encode())}"
        ]
        fewshot = (
            ["evals.fewshot.shots=[1,10]", "evals.fewshot.every=2", "evals.knn.every=2", "evals.probe.every=2"]
            if "fewshot" in rest
            else []
        )
        return [*shrunk, *steps, *own, *fewshot, "checkpoint.every=2", "data.workers=0"]
    if words[:3] == ["softmoe", "train", "-m"]:
        return ["steps=4", "schedule.warmup_steps=1"]
    if words[:2] == ["softmoe", "plan"] and "ranks=64" in words:
        return ["shrink=model"]  # the other line with a published model has its size
    if words[:2] == ["softmoe", "bench"]:
        experts = ["model.moe.num_experts=8"]  # 128 have gigabytes of weights
        sizes = {"layer": ["images=1", "cases=4x1"], "infer": ["images=1", *experts], "stream": ["data.workers=1"]}
        return ["rounds=1", "warmup=0", *sizes.get(words[2], [])]
    return []


def prepare(folder: Path) -> None:
    """Pictures of digits, and the shards that lines find below `/data`."""
    digits = load_digits()
    for number in range(250):
        label = folder / "pictures" / f"digit_{digits.target[number]}"
        label.mkdir(parents=True, exist_ok=True)
        pixels = np.repeat(digits.images[number].astype(np.uint8) * 15, 4, axis=0).repeat(4, axis=1)
        Image.fromarray(pixels).save(label / f"{number:03}.jpg")
    quiet = io.StringIO()
    for name in ("cifar10", "photos", "pets"):
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            code = main(
                ["shards", "make", f"from={folder / 'pictures'}", f"out={folder / 'data' / name}", "test_fraction=0.4"]
            )
        assert code == 0, quiet.getvalue()
        for part in ("train", "test"):
            (folder / "data" / name / part).mkdir()
            for tar in (folder / "data" / name).glob(f"{part}-*.tar"):
                tar.rename(folder / "data" / name / part / tar.name)
    for part in ("train", "test"):
        (folder / "data" / part).symlink_to(f"photos/{part}")


STARTED = [
    next(line.text for line in lines() if line.text.startswith(launcher) and several in line.text)
    for launcher, several in (("softmoe ", "processes=2"), ("torchrun ", ""))
]


class Done(NamedTuple):
    """How a line ended, and what it printed."""

    code: int
    said: str


def run(line: Line, folder: Path) -> Done:
    """Run one line in `folder`: the first of each launcher of several processes as a program, the others from a process that has the imports."""
    words = [word.replace("/data/", f"{folder}/data/") for word in [*line.words, *added(line.words)]]
    changes = {"WANDB_MODE": "disabled", "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    at = words.index("softmoe")
    module, rest = ("torch.distributed.run", [*words[1:at], *SOFTMOE]) if at else ("softmoe_train", [])
    rest += words[at + 1 :]
    if line.text not in STARTED:
        done = forked(*rest, module=module, folder=folder, **changes)
        return Done(done.returncode, done.stdout + done.stderr)
    done = subprocess.run(
        [sys.executable, "-m", module, *rest],
        cwd=folder, env=environment(**changes), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    return Done(done.returncode, done.stdout)
