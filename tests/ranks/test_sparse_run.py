"""Runs with sparse routers: noise goes on after a resume, and groups and measures are those of any layout."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from softmoe_train.config import compose
from softmoe_train.dist import World
from softmoe_train.run import train
from softmoe_train.settings import RunConfig, check
from tests.runs import ROOT, metrics, run_here, same_bits, stored
from tests.under_way import train as run_forked

# Noise, priority and losses are on, tokens are dropped; the last group of 30 held-out images is half padding.
SHORT = [
    "recipe=debug", "steps=6", "schedule.warmup_steps=1", "checkpoint.every=3", "observe.every=1", "observe.wandb.mode=disabled",
    "observe.progress=plain", "data.num_test=30", "evals.upstream.every=3", "evals.upstream.batch_size=8",
    "model.moe.sparse.group_images=4", "model.moe.sparse.capacity_factor=0.5",
]  # fmt: skip
MEASURES = (
    "train/loss",
    "train/auxiliary_loss",
    "router/1/dropped_tokens",
    "router/1/empty_slots",
    "upstream/test/loss",
)


def go(folder: Path, router: str, *more: str) -> Path:
    return run_here(folder, *SHORT, f"model.moe.router={router}", *more)


@pytest.fixture(scope="module", params=["tokens_choice", "experts_choice"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Six steps, and three that were stopped, of one process."""
    folder, router = tmp_path_factory.mktemp(request.param), request.param
    return {"router": router, "whole": go(folder / "whole", router), "cut": go(folder / "cut", router, "stop_after=3")}


def test_noise_goes_on_after_a_resume_bit_for_bit(runs: dict[str, Any], tmp_path: Path) -> None:
    again = Path(shutil.copytree(runs["cut"], tmp_path / "again"))
    go(again, runs["router"])
    assert same_bits(stored(runs["whole"], 6), stored(again, 6))
    for name in MEASURES:
        assert metrics(runs["whole"], name) == metrics(again, name) != {}


def test_what_is_dropped_or_empty_is_reported(runs: dict[str, Any]) -> None:
    dropped, empty = (metrics(runs["whole"], f"router/1/{name}") for name in ("dropped_tokens", "empty_slots"))
    auxiliary = metrics(runs["whole"], "train/auxiliary_loss")
    assert list(dropped) == list(empty) == list(auxiliary) == [1, 2, 3, 4, 5, 6]
    # Half as many slots as tokens.
    assert all(0.5 <= share < 1 for share in dropped.values())
    if runs["router"] == "experts_choice":
        assert set(empty.values()) == set(auxiliary.values()) == {0.0}
    else:
        assert all(abs(dropped[step] - (1 - 0.5 * (1 - empty[step]))) < 1e-6 for step in dropped), "one choice a token"
        assert all(0 < loss < 1 for loss in auxiliary.values())
    assert "router/1/dropped_tokens" in json.loads((runs["whole"] / "summary.json").read_text())["metrics"]


@pytest.mark.parametrize(
    "runs", ["tokens_choice", pytest.param("experts_choice", marks=pytest.mark.full)], indirect=True
)
def test_two_ranks_go_on_with_the_same_groups_noise_and_measures(runs: dict[str, Any], tmp_path: Path) -> None:
    moved = Path(shutil.copytree(runs["cut"], tmp_path / "moved"))
    more = ["processes=2", "micro_batches=2", "parallel.sharding=fsdp", f"run_dir={moved}"]
    idle = "model.moe.slots_per_expert=2"  # as it is
    done = run_forked(*SHORT, f"model.moe.router={runs['router']}", idle, *more, folder=tmp_path)
    assert done.stderr.count("model.moe.slots_per_expert changes nothing") == 1, "told once, by one rank"
    for name in (*MEASURES, "upstream/test/top1"):
        want, got = metrics(runs["whole"], name), metrics(moved, name)
        assert want.keys() == got.keys()
        assert max(abs(want[step] - got[step]) for step in want) < 1e-5, name


def test_the_readme_s_lines_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = (ROOT / "README.md").read_text().split("## Sparse baselines")[1].split("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    for line in re.findall(r"^    softmoe train (.*)$", section, flags=re.MULTILINE):
        overrides = [*shlex.split(line), "observe.wandb.mode=disabled", "observe.progress=plain"]
        config = compose(RunConfig, overrides, lambda c: check(c, 1, 1))
        assert train(config, World(0, 1, 0, 1)) == "complete"
        assert metrics(tmp_path / config.run_dir, "router/1/dropped_tokens").keys() == {5, 10, 15, 20}
