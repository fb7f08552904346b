"""`softmoe parity` as people meet it: it holds on what is right, and names the parameter on what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import environment
from tests.under_way import UnderWay

PLANTED = "tests.ranks.planted"


def run(
    *words: str, folder: Path, module: str = "softmoe_train", modules: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    program = UnderWay(*words, folder=folder, module=module, modules=modules)
    out, err = program.communicate()
    print(out, err)
    assert program.returncode is not None
    return subprocess.CompletedProcess(words, program.returncode, out, err)


def test_two_processes_hold_and_programs_can_read_it(tmp_path: Path) -> None:
    overrides = ["recipe=quickstart", "shrink=model", "processes=2", "parallel.expert_axis=2", "out=proof.json"]
    done = run("parity", *overrides, folder=tmp_path)
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
    words = [str(ranks), "2", "1,2,3", PLANTED, fault, "parity", "recipe=debug", *layout]
    done = run(*words, folder=tmp_path, module="tests.launch_program", modules=(PLANTED,))
    assert done.returncode == 1
    assert f"parity FAILS: {first}" in done.stdout
    assert "Traceback" not in done.stderr
    assert "failed first" not in done.stderr
    fails = [line.split("  ")[0] for line in done.stdout.splitlines() if "FAILS" in line]
    assert ("logits" in fails) == (fault == "swapped"), "the losses of the others are right: they prove nothing"


def test_torchrun_starts_it_too(tmp_path: Path) -> None:
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", "--no-python"]
    parity = [sys.executable, "-m", "softmoe_train", "parity"]
    done = subprocess.run(
        [*torchrun, *parity, "recipe=debug", "precision=bfloat16", "parallel.sharding=fsdp"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parity holds") == 1


def test_mistakes_are_told_together_and_need_no_data(tmp_path: Path) -> None:
    mistaken = ["recipe=cifar10", "processes=3", "out=no/folder.json", "parallel.expert_axis=2"]
    done = run("parity", *mistaken, folder=tmp_path)
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
