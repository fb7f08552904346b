"""`softmoe parity` as people meet it: it holds on what is right, and names the parameter on what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import environment

LAUNCH = """
import sys
from softmoe_train.launching.local import launch_local
worker = [sys.executable, "-m", "tests.ranks.planted", *sys.argv[2:]]
sys.exit(launch_local(int(sys.argv[1]), worker, grace_seconds=2, told=(1, 2, 3)))
"""
PARITY = [sys.executable, "-m", "softmoe_train", "parity"]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    print(done.stdout, done.stderr)
    return done


def test_two_processes_hold_and_programs_can_read_it(tmp_path: Path) -> None:
    overrides = ["recipe=quickstart", "shrink=model", "processes=2", "parallel.expert_axis=2", "out=proof.json"]
    done = run([*PARITY, *overrides], tmp_path)
    assert done.returncode == 0
    assert "parity holds" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    proof = json.loads((tmp_path / "proof.json").read_text())
    assert proof["holds"] is True
    errors = next(row["errors"] for row in proof["rows"] if row["what"] == "gradients")
    assert "blocks.3.moe.experts.w1" in errors
    assert all(0 < error < 1e-5 for error in errors.values()), "another order of sums gives other roundings"
    assert [path.name for path in tmp_path.iterdir()] == ["proof.json"]


@pytest.mark.parametrize(
    ("fault", "ranks", "layout", "first"),
    [
        ("upscaled", 1, [], "update 2: weights "),
        pytest.param("undecayed", 1, ["precision=bfloat16"], "update 1: weights ", marks=pytest.mark.full),
        pytest.param("forgetful", 1, [], "update 2: weights ", marks=pytest.mark.full),
        ("rounded", 1, ["precision=bfloat16"], "routing blocks.1.moe.router is off by "),
        pytest.param("permuted", 2, [], "gradients blocks.1.moe.router.", marks=pytest.mark.full),
        pytest.param("drifted", 2, [], "update 1: weights, copies norm.bias is off by 1.0e+00", marks=pytest.mark.full),
        ("swapped", 2, [], "gradients head.bias is off by"),
        (
            "averaged",
            4,
            ["parallel.sharding=fsdp", "parallel.expert_axis=2"],
            "gradients blocks.1.moe.experts.b2 is off by 5.0e-01",
        ),
    ],
)
def test_a_planted_fault_is_caught_by_name(
    tmp_path: Path, fault: str, ranks: int, layout: list[str], first: str
) -> None:
    command = [sys.executable, "-c", LAUNCH, str(ranks), fault, "parity", "recipe=debug", *layout]
    done = run(command, tmp_path)
    assert done.returncode == 1
    assert f"parity FAILS: {first}" in done.stdout
    assert "Traceback" not in done.stderr
    assert "failed first" not in done.stderr
    fails = [line.split("  ")[0] for line in done.stdout.splitlines() if "FAILS" in line]
    assert ("logits" in fails) == (fault == "swapped"), "the losses of the others are right: they prove nothing"


def test_torchrun_starts_it_too(tmp_path: Path) -> None:
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", "--no-python"]
    done = run([*torchrun, *PARITY, "recipe=debug", "precision=bfloat16", "parallel.sharding=fsdp"], tmp_path)
    assert done.returncode == 0
    assert done.stdout.count("parity holds") == 1


def test_mistakes_are_told_together_and_need_no_data(tmp_path: Path) -> None:
    done = run([*PARITY, "recipe=cifar10", "processes=3", "out=no/folder.json", "parallel.expert_axis=2"], tmp_path)
    assert done.returncode == 2
    for said in (
        "out=no/folder.json: ",
        "is not a folder that we may write to",
        "parallel.expert_axis=2 does not divide the 3 ranks of this run",
        "batch_size=100 does not divide into 3 ranks",
        "3 mistakes",
    ):
        assert said in done.stderr
    assert list(tmp_path.iterdir()) == []
