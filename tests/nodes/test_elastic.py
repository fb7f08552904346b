"""Under torchrun a job comes back by itself: on the nodes that are left, in the largest legal world, as if nothing had happened."""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest

from softmoe_train.commands.train import EXIT_SECONDS
from softmoe_train.config import compose
from softmoe_train.settings import RunConfig
from tests.nodes.agents import Agent
from tests.ports import free_ports
from tests.runs import ROOT, metrics, same_bits, stored
from tests.under_way import train

RUN = ["recipe=debug", "observe.every=1", "checkpoint.every=10", "checkpoint.keep_last=3", "evals.upstream.every=0"]
Start = Callable[..., Agent]


@contextmanager
def nodes(folder: Path, overrides: list[str], **common: Any) -> Iterator[Start]:
    """A function that starts the named node; what still runs at the end is killed."""
    started: list[Agent] = []
    endpoint = f"127.0.0.1:{free_ports(1)[0]}"

    def start(name: str, **more: Any) -> Agent:
        started.append(
            Agent(folder, name, overrides, endpoint=endpoint, **{"workers": 1, "hosts": not started, **common, **more})
        )
        return started[-1]

    try:
        yield start
    finally:
        for agent in started:
            agent.kill()


def each_step_once(run: Path, every: int = 1) -> bool:
    """Whether each step that is a multiple of `every` was reported, and once; more are where a run was asked to end."""
    steps = [line["step"] for line in map(json.loads, (run / "metrics.jsonl").open()) if "train/loss" in line]
    due = [step for step in steps if step % every == 0]
    return due == list(range(every, max(steps) + 1, every)) and len(set(steps)) == len(steps)


def test_a_spare_node_takes_over_when_the_one_that_trains_is_lost(tmp_path: Path) -> None:
    run = [*RUN, "steps=150", "batch_size=15", "data.streams=15"]
    with nodes(tmp_path, [*run, "run_dir=elastic"], nodes="1:2", restarts=3) as start:
        stays = start("stays", address="127.0.0.2")
        trains = start("trains", address="127.0.0.1")  # addresses decide who is rank 0
        stays.wait_for("rank 1 waits as a spare: 1 of 2 ranks train")
        trains.wait_for("step  25/150")
        assert "the legal worlds are 1, 3, 5, 15: training on 1, rank 1 waits as a spare" in trains.said
        trains.kill()
        assert stays.end() == 0, stays.said
    assert re.search(r"resumed from elastic/checkpoints/step_000000[1-9]0 ", stays.said)
    assert "complete at step 150 of 150, 2250 images seen" in stays.said
    train(*run, "run_dir=whole", folder=tmp_path)
    assert each_step_once(tmp_path / "elastic")
    assert metrics(tmp_path / "elastic", "train/loss") == metrics(tmp_path / "whole", "train/loss")
    assert same_bits(stored(tmp_path / "elastic", 150), stored(tmp_path / "whole", 150))


@pytest.mark.full
def test_nodes_come_and_go_and_the_losses_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    run = [*RUN, "steps=1500", "checkpoint.every=100"]
    with nodes(tmp_path, [*run, "run_dir=elastic"], nodes="1:2", restarts=5) as start:
        first = start("first")
        first.wait_for("step  100/1500")
        second = start("second", workers=2)  # 3 ranks are not legal
        first.wait_for("training on 2, rank 2 waits as a spare")
        assert "interrupted by SIGTERM: saving step" in first.said  # a node that comes costs no step
        first.wait_for("2 processes, expert axis 2")
        time.sleep(2)
        second.kill()
        first.wait_for("1 process; cpu", times=2)
        time.sleep(1)
        third = start("third")
        first.wait_for("2 processes, expert axis 2", times=2)
        os.kill(third.workers()[0], SIGKILL)
        first.wait_for("2 processes, expert axis 2", times=3)
        assert (first.end(), third.end()) == (0, 0), first.said + third.said
    train(*run, "run_dir=whole", folder=tmp_path)
    assert each_step_once(tmp_path / "elastic")
    ours, theirs = (metrics(tmp_path / name, "train/loss") for name in ("elastic", "whole"))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.full
def test_a_killed_worker_brings_the_job_back_with_torchruns_own_settings(tmp_path: Path) -> None:
    run = [*RUN, "steps=400"]
    shared = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}
    with nodes(tmp_path, [*run, "run_dir=killed"], nodes="1", workers=2, restarts=3, **shared) as start:
        agent = start("agent")
        for times, rank in enumerate((1, 0, 1), start=1):
            agent.wait_for("processes, expert axis 2", times)
            time.sleep(2)
            os.kill(agent.workers()[rank], SIGKILL)
            agent.wait_for(f"{times} of 3 restarts are used")
        assert agent.end() == 0, agent.said
    assert agent.said.count("resumed from killed/checkpoints/") == 3
    train(*run, "run_dir=whole", "processes=2", folder=tmp_path)
    assert each_step_once(tmp_path / "killed")
    assert same_bits(stored(tmp_path / "killed", 400), stored(tmp_path / "whole", 400))


@pytest.mark.full
@pytest.mark.parametrize(
    ("override", "said", "code"),
    [
        ("stepps=3", "there is no key stepps", 2),
        ("optim.clip_norm=null schedule.peak=1e30", "was not finite", 3),
        ("time_limit=0.01", "interrupted by time_limit at step", 75),
    ],
)
def test_torchrun_does_not_start_again_what_would_end_the_same(
    tmp_path: Path, override: str, said: str, code: int
) -> None:
    run = [*RUN, "steps=100000", "schedule.warmup_steps=1", "run_dir=once", *override.split()]
    with nodes(tmp_path, run, nodes="1", workers=3, restarts=9) as start:
        agent = start("agent")
        assert agent.end() == 1
    assert agent.said.count(said) == 1, agent.said
    assert agent.said.count(f"exit code {code}: ending torchrun") == 1
    assert "1 of 9 restarts" not in agent.said


def test_lines_of_the_readme_are_what_the_launch_file_takes() -> None:
    lines = re.findall(r"^    launch/torchrun.sh (.*)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert lines
    for line in lines:
        host, count, *overrides = line.split()
        assert re.fullmatch(r"\d+(:\d+)?", count) and "=" not in host
        compose(RunConfig, overrides, lambda _: [])


@pytest.mark.parametrize(
    "words", [[], ["recipe=debug"], ["recipe=debug", "4"], ["host"], ["host", "many", "recipe=debug"]]
)
def test_the_launch_file_says_what_it_needs(words: list[str]) -> None:
    done = subprocess.run([ROOT / "launch" / "torchrun.sh", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "write launch/torchrun.sh HOST NODES key=value ..." in done.stderr


def test_the_launch_file_leaves_a_save_the_time_that_the_run_gives_it(tmp_path: Path) -> None:
    for name in ("torchrun", "softmoe"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$@"\n')
        (tmp_path / name).chmod(0o755)
    words = [ROOT / "launch" / "torchrun.sh", "node1", "2", "recipe=debug"]
    done = subprocess.run(
        words, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True, check=True
    )
    (seconds,) = re.findall(r"--shutdown-timeout=(\d+)", done.stdout)
    assert int(seconds) > compose(RunConfig, ["recipe=debug"], lambda _: []).checkpoint.grace + EXIT_SECONDS
