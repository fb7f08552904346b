"""Before its first step a run names the rank that is slow, and refuses what would make its numbers wrong."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from softmoe_train.dist import World
from softmoe_train.launching.preflight import FILE, About, Preflight, PreflightError
from tests.ranks.launch import run_ranks
from tests.runs import command, environment

# A process that stops another one for three quarters of the time, as a hypervisor or a throttled core would.
THROTTLE = "import os, signal, sys, time\nwhile True:\n for s, t in ((signal.SIGSTOP, .06), (signal.SIGCONT, .02)):\n  os.kill(int(sys.argv[1]), s)\n  time.sleep(t)"


def preflight(rank: int, world: int, folder: str, seed: int = 0) -> dict[str, Any]:
    """One preflight of this rank: what it printed, kept and raised."""
    said, refused = io.StringIO(), ""
    group = dist.group.WORLD
    assert group is not None
    about = About(Path(folder), {"optim": {"decay": 0.1}, "seed": seed}, fsdp=False, workers=0, dtype=torch.float32)
    with contextlib.redirect_stdout(said):
        try:
            Preflight(World(rank, world, rank, world), torch.device("cpu"), about).measure(group, 2**16)
        except PreflightError as error:
            refused = str(error)
    dist.barrier()
    return {"said": said.getvalue(), "refused": refused, "kept": json.loads((Path(folder) / FILE).read_text())}


@contextlib.contextmanager
def throttled(active: bool) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", THROTTLE, str(os.getpid())]) if active else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def scenarios(rank: int, world: int, folder: str) -> dict[str, dict[str, Any]]:
    """A clean preflight, and one with each fault on rank 1 alone."""
    found = {"clean": preflight(rank, world, f"{folder}/clean")}
    with throttled(rank == 1):
        found["slow"] = preflight(rank, world, f"{folder}/slow")
    now, swap = time.time, dist.all_to_all_single

    def swapped(got: torch.Tensor, given: torch.Tensor, **more: Any) -> Any:
        done = swap(got, given, **more)
        got.copy_(got.view(2, -1).flip(0).flatten())
        return done

    found["settings"] = preflight(rank, world, f"{folder}/settings", seed=rank)
    if rank == 1:
        time.time = lambda: now() + 7.0
    found["clock"] = preflight(rank, world, f"{folder}/clock")
    time.time = now
    if rank == 1:
        dist.all_to_all_single = swapped
    found["wrong"] = preflight(rank, world, f"{folder}/wrong")
    dist.all_to_all_single = swap
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(scenarios, 2, str(tmp_path_factory.mktemp("preflight")), timeout=200)


def test_a_clean_preflight_passes_and_says_what_it_measured(found: list[dict[str, dict[str, Any]]]) -> None:
    clean = found[0]["clean"]
    assert clean["refused"] == found[1]["clean"]["said"] == ""
    assert clean["said"].startswith("preflight: 2 ranks on 1 host; python 3.")
    assert "all-to-all over the expert axis: 0.06 MiB a rank, " in clean["said"]
    assert "preflight passed in " in clean["said"]
    assert not [line for line in clean["kept"]["warnings"] if "clock" in line or "not the same" in line]
    for rank in clean["kept"]["ranks"]:
        assert rank["alone"]["matmul"] > 1e8 and rank["alone"]["copy"] > 1e7 and rank["pairs"][0]["speed"] > 1e5
        assert [one["wrong"] for one in rank["collectives"]] == [{}, {}, {}]
        assert rank["clock"]["least"] <= 0.01 and rank["clock"]["most"] >= -0.01


def test_a_rank_that_is_stopped_again_and_again_is_named_and_the_other_is_not(
    found: list[dict[str, dict[str, Any]]],
) -> None:
    slow = [line for line in found[0]["slow"]["kept"]["warnings"] if "is slow by itself" in line]
    assert [line for line in slow if line.startswith("rank 1 (") and "its matmul runs at " in line], slow
    assert not [line for line in slow if line.startswith("rank 0 (")]
    assert "preflight warning: rank 1 (" in found[0]["slow"]["said"]  # a warning: the run goes on
    assert found[1]["slow"]["refused"] == ""


def test_a_clock_that_is_off_is_told_with_how_much(found: list[dict[str, dict[str, Any]]]) -> None:
    kept = found[0]["clock"]["kept"]["ranks"][1]["clock"]
    assert 6.5 < kept["least"] <= 7.0 <= kept["most"] < 7.5
    # The two ranks of a test share a host, so its clock is that of its last rank.
    assert [line for line in found[0]["clock"]["kept"]["warnings"] if " is 7.0 s ahead of rank 0's" in line]


def test_settings_that_differ_are_named_with_who_has_which(found: list[dict[str, dict[str, Any]]]) -> None:
    refused = found[0]["settings"]["refused"]
    assert refused == found[1]["settings"]["refused"]
    (line,) = refused.splitlines()[1:]
    assert line.startswith("  - seed must be the same on every rank: rank 0 (") and line.endswith(") has 1")


def test_a_wrong_all_to_all_refuses_the_run_on_every_rank_and_names_who_got_what(
    found: list[dict[str, dict[str, Any]]],
) -> None:
    refused = found[0]["wrong"]["refused"]
    assert refused == found[1]["wrong"]["refused"] != ""
    assert refused.startswith("preflight refuses this run, no step was made:\n")
    assert "all-to-all over the expert axis (bfloat16): rank 1 got wrong values in the part of ranks 0, 1" in refused
    assert "rank 0 got" not in refused
    assert found[0]["wrong"]["kept"]["refused"]


def test_a_rank_with_another_version_ends_the_command_with_2_and_one_message(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as m, os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    version = m.version\n"
        "    m.version = lambda name: '9.9.9' if name == 'simplejpeg' else version(name)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command("recipe=debug", "processes=2", "preflight=true", "run_dir=runs/mixed"),
        cwd=tmp_path,
        env=environment(PYTHONPATH=path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("simplejpeg must be the same on every rank: rank 0 (") == 1
    assert "; rank 1 (" in done.stderr and ") has 9.9.9" in done.stderr and "Traceback" not in done.stderr
    kept = json.loads((tmp_path / "runs/mixed" / FILE).read_text())
    assert kept["refused"] and kept["ranks"][1]["versions"]["simplejpeg"] == "9.9.9"
    assert not (tmp_path / "runs/mixed/metrics.jsonl").exists()
