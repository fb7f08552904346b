"""A run that a signal or its time limit ends saves one step of all ranks, exits with 75, and goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, SIGSTOP, SIGTERM, SIGUSR1
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from softmoe_train.checkpoint.folder import step_folders
from softmoe_train.config import compose
from softmoe_train.dist import World, control_group
from softmoe_train.faults.stop import AgreedStop
from softmoe_train.launching.local import ONE_SIGNAL_SECONDS
from softmoe_train.launching.progress import NOTHING, PROGRESS, SAVED
from softmoe_train.launching.worker import RESUME
from softmoe_train.run import train
from softmoe_train.settings import RunConfig
from tests.ports import free_ports
from tests.ranks.launch import run_ranks
from tests.runs import alive, children_of, command, environment, metrics, same_bits, stored, with_digits
from tests.under_way import UnderWay
from tests.under_way import train as run_forked

STEPS = 200
# Nothing is saved but where the run ends, and every step is reported.
EVERY = [f"steps={STEPS}", "observe.every=1", "checkpoint.every=0", "checkpoint.keep_last=9", "evals.upstream.every=0"]
RUN = ["recipe=debug", *EVERY]
# With decode workers, which get the signals too.
DIGITS = [
    "recipe=quickstart", *EVERY, "schedule.warmup_steps=5", "batch_size=32", "data.workers=1", "model.width=32", "model.depth=3",
    "transform@data.train_transform=padded_crop", "data.train_transform.padding=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the digits' shards."""
    return with_digits(tmp_path_factory.mktemp("interruption"))


Way = tuple[int | None, list[int]]  # a signal, or None for the time limit, and the ranks that get it


def trained(rank: int, world: int, folder: str, run: str, ways: list[Way], ports: list[int]) -> list[str]:
    """Why each start of one run ended: those of `ways` are asked after three more steps, the last one is not."""
    dist.barrier()
    dist.destroy_process_group()
    os.chdir(folder)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(world)}
    quiet = [
        "observe.wandb.mode=disabled",
        "observe.progress=off",
        "data.workers=0",
    ]  # a rank here may have no children
    reasons = []
    for (number, asked), port in zip([*ways, (None, [])], ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        limit = "time_limit=0.0001" if number is None and asked else "time_limit=null"
        config = compose(RunConfig, [*DIGITS, *quiet, f"run_dir={run}", limit], lambda _: [])
        if number is not None and rank in asked:
            ask = (config.folder / "metrics.jsonl", number)
            threading.Thread(target=ask_when_under_way, args=ask, daemon=True).start()
        reasons.append(train(config, World(rank, world, rank, world)))
    dist.init_process_group("gloo", store=dist.FileStore(f"{run}/store", world), rank=rank, world_size=world)
    return reasons


def ask_when_under_way(file: Path, number: int) -> None:
    def lines() -> int:
        return file.read_bytes().count(b"\n") if file.exists() else 0

    begun = lines()
    while lines() < begun + 3:
        time.sleep(0.002)
    os.kill(os.getpid(), number)


class Started:
    """A run under way, which takes steps already; `ranks` are its processes. Forked from a process that has the imports, or started `anew`."""

    def __init__(self, folder: Path, program: list[str], *, ranks: int = 2, anew: bool = False, **changes: str) -> None:
        _, _, module, *words = program
        if anew:
            self.launcher = subprocess.Popen(
                program, cwd=folder, env=environment(**changes), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                start_new_session=True,
            )  # fmt: skip
            assert self.launcher.stdout is not None
            self.begun = ""
            for line in self.launcher.stdout:
                self.begun += line
                if line.startswith("step"):
                    break
        else:
            self.launcher = UnderWay(*words, folder=folder, module=module, **changes)
            self.begun = self.launcher.until_printed("\nstep")
        self.ranks = children_of(self.launcher.pid) if ranks > 1 else [self.launcher.pid]
        assert len(self.ranks) == ranks, (self.begun, self.launcher.communicate())

    def end(self) -> int:
        self.out, self.err = self.launcher.communicate(timeout=60)
        assert not any(alive(rank) for rank in self.ranks)
        assert self.launcher.returncode is not None
        return self.launcher.returncode


def as_slurm_does(run: Started) -> None:
    """Every process of the step gets the signal, and the launcher passes it on."""
    decoders = [decoder for rank in run.ranks for decoder in children_of(rank)]
    assert len(decoders) == 2
    for pid in (run.launcher.pid, *decoders, *run.ranks):
        os.kill(pid, SIGTERM)
        time.sleep(0.02)


def at_the_terminal(run: Started) -> None:
    os.killpg(run.launcher.pid, SIGINT)


def by_torchrun(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python", *command(*overrides)]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """All steps on two ranks, without interruption."""
    assert run_ranks(trained, 2, str(folder), "whole", [], free_ports(1)) == [["complete"]] * 2
    return folder / "whole"


def same_runs(one: Path, two: Path) -> bool:
    measures = ("train/loss", "train/grad_norm", "upstream/test/loss")
    same = [metrics(one, measure) == metrics(two, measure) for measure in measures]
    return all(same) and same_bits(stored(one, STEPS), stored(two, STEPS))


def test_whichever_ranks_are_asked_all_save_one_step_and_the_run_goes_on_bit_for_bit(folder: Path, whole: Path) -> None:
    ways: list[Way] = [(number, ranks) for number in (SIGTERM, SIGINT, SIGUSR1) for ranks in ([0, 1], [1])]
    ways.append((None, [0, 1]))
    reasons = [
        f"interrupted by {'time_limit' if number is None else signal.Signals(number).name}" for number, _ in ways
    ]
    ranks = run_ranks(trained, 2, str(folder), "ranks", ways, free_ports(len(ways) + 1))
    assert ranks == [[*reasons, "complete"]] * 2
    assert len(step_folders(folder / "ranks" / "checkpoints", complete=True)) == len(ways) + 1
    assert same_runs(folder / "ranks", whole)


def test_whatever_the_launcher_gets_a_step_is_saved_and_the_same_command_goes_on(folder: Path, whole: Path) -> None:
    # The first is started as a program, the others are forked from a process that has its imports.
    ours, torchruns = (how(*DIGITS, "run_dir=asked") for how in (command, by_torchrun))
    ways: list[tuple[str, list[str], int, Callable[[Started], object]]] = [
        ("SIGTERM", ours, RESUME, as_slurm_does),
        ("SIGINT", ours, RESUME, at_the_terminal),
        ("SIGUSR1", ours, RESUME, lambda run: run.launcher.send_signal(SIGUSR1)),
        ("SIGTERM", torchruns, 1, lambda run: run.launcher.send_signal(SIGTERM)),
    ]
    step = 0
    for name, line, code, ask in ways:
        run = Started(folder, line, anew=not step)
        assert step == 0 or f"resumed from asked/checkpoints/step_{step:08d}" in run.begun
        ask(run)
        assert run.end() == code, (name, run.out, run.err)
        step = step_interrupted(folder / "asked", name, step)
        assert f"interrupted by {name} at step {step} of {STEPS}" in run.out
        assert code != RESUME or run.err == ""
    run_forked(*DIGITS, "run_dir=asked", folder=folder)
    assert same_runs(folder / "asked", whole)
    history = json.loads((folder / "asked" / "summary.json").read_text())["history"]
    assert history["interruptions"] == {f"interrupted by {name}": n for name, n in Counter(w[0] for w in ways).items()}
    assert (history["starts"], history["lost_steps"]) == (len(ways) + 1, 0)


def step_interrupted(run: Path, name: str, earlier: int) -> int:
    """The step at which a run ended, further than `earlier` and saved."""
    summary = json.loads((run / "summary.json").read_text())
    assert summary["ended"] == f"interrupted by {name}"
    step = summary["steps"]
    assert earlier < step < STEPS
    assert (run / "checkpoints" / f"step_{step:08d}" / "COMPLETE.json").is_file()
    return step


def test_ranks_without_a_launcher_of_ours_all_stop_when_one_of_them_is_told(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    other = UnderWay(*command(*RUN)[3:], folder=tmp_path, **world, RANK="1", LOCAL_RANK="1")
    main = Started(tmp_path, command(*RUN), ranks=1, **world, RANK="0", LOCAL_RANK="0")
    other.send_signal(SIGUSR1)
    assert other.communicate(timeout=60) == ("", "")
    assert (main.end(), other.returncode) == (RESUME, RESUME)
    step_interrupted(tmp_path / "runs" / "debug", "SIGUSR1", 0)


def test_a_second_control_c_ends_a_run_that_hangs(tmp_path: Path) -> None:
    run = Started(tmp_path, command(*RUN, "processes=2"))
    os.kill(run.ranks[1], SIGSTOP)  # the other waits for it in a collective, and cannot come to a step's end
    at_the_terminal(run)
    time.sleep(ONE_SIGNAL_SECONDS + 0.1)
    assert run.launcher.poll() is None
    began = time.monotonic()
    at_the_terminal(run)
    assert run.end() == 128 + SIGINT
    assert time.monotonic() - began < 15  # not the grace, which is 120 s
    assert "softmoe train: interrupted before the first checkpoint of runs/debug" in run.err


SLOW_DISK = """
import os, sys, time
from softmoe_train.commands.main import main
fsync = os.fsync

def slow(file):
    path = os.readlink(f"/proc/self/fd/{file}")
    if path.endswith(".safetensors") and "step_00000003" not in path:
        time.sleep(60)
    fsync(file)

os.fsync = slow
sys.exit(main(sys.argv[1:]))
"""


def test_a_save_that_does_not_end_in_its_grace_is_as_if_it_had_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROGRESS, str(tmp_path / "progress"))
    overrides = command(*RUN, "checkpoint.every=3", "checkpoint.grace=2")[3:]
    run = Started(tmp_path, [sys.executable, "-c", SLOW_DISK, *overrides], ranks=1, anew=True)
    checkpoints = tmp_path / "runs/debug/checkpoints"
    told = []
    while not (checkpoints / "step_00000006").exists():
        assert run.launcher.poll() is None
        if (tmp_path / "progress").exists() and (word := (tmp_path / "progress").read_text()):
            told.append(word)
        time.sleep(0.01)
    began = time.monotonic()
    at_the_terminal(run)
    assert run.end() == RESUME
    assert 2 <= time.monotonic() - began < 20  # not the disk, which takes 60 s
    assert "2 s after SIGINT (checkpoint.grace)" in run.err
    assert [path.name for path in step_folders(checkpoints, complete=True)] == ["step_00000003"]
    assert (
        told[0] == NOTHING and (tmp_path / "progress").read_text() == SAVED
    )  # a script that requeues may go on with it


def answers(rank: int, world: int, asked: dict[int, dict[int, Any]]) -> list[str | None]:
    """What `agreed` says, step by step, where ranks begin to be asked at the steps of `asked`; and ranks are not in step."""
    group = control_group(World(rank, world, rank, world))
    ear = SimpleNamespace(asked=None)
    stop = AgreedStop(ear, None, group)  # pyright: ignore[reportArgumentType]
    said: list[str | None] = []
    for step in range(1, 20):
        time.sleep(0.01 * ((rank + step) % 3))
        ear.asked = asked.get(rank, {}).get(step, ear.asked)
        said.append(stop.agreed())
        if said[-1]:
            break
    return said


def test_all_ranks_stop_at_one_step_for_one_reason() -> None:
    wait = [None] * 7
    for asked, said in (
        ({2: {7: SIGUSR1}}, "SIGUSR1"),
        ({0: {7: SIGINT}, 1: {7: SIGTERM}, 2: {8: SIGTERM}}, "SIGTERM"),
        ({0: {7: SIGINT}, 1: {8: SIGTERM}}, "SIGINT"),
    ):
        assert run_ranks(answers, 3, asked) == [[*wait, f"interrupted by {said}"]] * 3
