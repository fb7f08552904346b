"""A run starts warm once, says so, and from then on goes on from its own checkpoints."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from softmoe_train.config import ConfigError, compose
from softmoe_train.dist import World
from softmoe_train.run import train
from softmoe_train.settings import RunConfig, check
from tests.runs import ROOT
from tests.unit.warm.bare import as_run, model_of

ALONE = World(0, 1, 0, 1)
SHORT = ["recipe=debug", "steps=4", "schedule.warmup_steps=1", "checkpoint.every=2", "evals=[]", "observe.every=1"]
QUIET = ["observe.wandb.mode=disabled", "observe.progress=off"]


def config_of(folder: Path, *overrides: str) -> RunConfig:
    return compose(RunConfig, [*SHORT, *QUIET, f"run_dir={folder}", *overrides], lambda c: check(c, 1, 1))


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    config = compose(RunConfig, [*SHORT, "model.moe.blocks=[]"], lambda _: [])
    return as_run(tmp_path / "dense", model_of(config.model))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step_00000004" / "rank_00000.safetensors")


def test_a_run_that_started_warm_resumes_without_the_source(dense: Path, tmp_path: Path) -> None:
    warm = ["warm=weights", f"warm.source={dense}"]
    assert train(config_of(tmp_path / "whole", *warm), ALONE) == "complete"
    assert train(config_of(tmp_path / "cut", *warm, "stop_after=2"), ALONE) == "stopped"
    shutil.rmtree(dense)
    assert train(config_of(tmp_path / "cut", *warm), ALONE) == "complete"
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(t, cut[name]) for name, t in whole.items())
    first, second = json.loads((tmp_path / "cut" / "summary.json").read_text())["history"]["processes"]
    assert first["facts"]["warm"]["counts"] == {"loaded": 31, "copied": 4, "created": 2, "ignored": 1}
    assert "resumed" in second["facts"]
    assert "warm" not in second["facts"]


def test_the_account_names_every_tensor_of_both_sides(dense: Path, tmp_path: Path) -> None:
    train(config_of(tmp_path / "run", "warm=weights", f"warm.source={dense}", "warm.noise=0.1", "stop_after=1"), ALONE)
    told = json.loads((tmp_path / "run" / "warm.json").read_text())
    names = {name.removeprefix("model.") for name in _names(tmp_path / "run") if name.startswith("model.")}
    assert told["tensors"].keys() == names
    used = {name for tensor in told["tensors"].values() for name in tensor["from"]}
    assert used | told["ignored"].keys() == _names(dense)
    assert told["tensors"]["blocks.1.moe.experts.w1"] == {
        "how": "copied",
        "from": ["model.blocks.1.mlp.fc1.weight"],
        "note": "blocks.1.mlp.fc1.weight to 4 experts, each element times 1 + N(0, 0.1²)",
    }
    assert told["tensors"]["blocks.1.moe.router.phi"]["how"] == "created"
    assert told["settings"] == {"moe.blocks": "[] there, last 1 here"}


def _names(run: Path) -> set[str]:
    (path,) = (run / "checkpoints").glob("step_*")
    return set(json.loads((path / "manifest.json").read_text())["tensors"])


def test_a_source_that_does_not_fit_is_refused_before_anything_starts(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it has 2 blocks, and model.depth=3; use model.depth=2"):
        config_of(tmp_path / "run", "warm=weights", f"warm.source={dense}", "model.depth=3")
    with pytest.raises(ConfigError, match=r"is not set; name the weights to start from"):
        config_of(tmp_path / "run", "warm=weights")
    assert not (tmp_path / "run").exists()


def test_a_run_that_did_not_start_warm_is_not_continued_as_if_it_had(dense: Path, tmp_path: Path) -> None:
    train(config_of(tmp_path / "run", "stop_after=1"), ALONE)
    with pytest.raises(ConfigError, match=r"holds a run with other settings: .*warm.source=.* \(was None\)"):
        config_of(tmp_path / "run", "warm=weights", f"warm.source={dense}")


def test_the_readme_s_lines_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "README.md").read_text().split("## Start from other weights")[1].split("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    for line in re.findall(r"^    softmoe train (.*)$", section, flags=re.MULTILINE):
        config = compose(RunConfig, [*shlex.split(line), *QUIET], lambda c: check(c, 1, 1))
        assert train(config, ALONE) == "complete"
    assert (tmp_path / "runs" / "upcycled" / "warm.json").is_file()
