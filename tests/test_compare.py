"""The comparison of routers, with two variants and four steps: it trains, counts and draws, and repeats nothing that is complete."""

import json
from pathlib import Path

import pytest

from softmoe_train.model.count import forward_flops
from tests.forked import forked
from tests.studies.compare import VARIANTS, main, planned

TINY = [
    "data=synthetic", "data.num_test=16", "data.streams=8", "steps=4", "schedule.warmup_steps=1", "batch_size=16", "observe.every=1",
    "evals.upstream.every=2", "evals.upstream.batch_size=8",
]  # fmt: skip
PAIR = ["Soft MoE", "Tokens Choice"]


def words_of(out: Path) -> list[str]:
    """What asks for two variants, a seed each."""
    return [*TINY, f"out={out}", "seeds=1", f"variants={','.join(PAIR)}"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it has left."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("compare")
    done = forked(*words_of(folder), module="tests.studies.compare", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_variant_has_a_row_of_measures(out: Path) -> None:
    soft, sparse = json.loads((out / "compare.json").read_text())
    assert [soft["variant"], sparse["variant"]] == PAIR
    assert soft["dropped"] is None
    # C = 1: there are as many slots as choices, so a choice that is dropped leaves one empty.
    assert 0 < sparse["dropped"] == pytest.approx(sparse["empty"])
    for row in (soft, sparse):
        assert [step for step, _ in row["curves"][0]] == [2, 4]
        assert 0 <= row["top1"][0] <= 1 and row["images_per_second"] > 0 and row["train_loss"][0] > 0
    assert (out / "compare.md").read_text().count("\n| ") == 2
    assert (out / "compare.png").stat().st_size > 10_000


def test_what_is_complete_is_not_repeated(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = {path: path.stat().st_mtime_ns for path in out.glob("*/*/metrics.jsonl")}
    assert len(written) == 2
    assert main(words_of(out)) == 0
    assert "2 runs of 4 steps, 2 complete already" in capsys.readouterr().out
    assert written == {path: path.stat().st_mtime_ns for path in out.glob("*/*/metrics.jsonl")}


def test_a_folder_of_other_settings_is_refused(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words_of(out), "steps=5"]) == 1
    assert "soft_moe/seed0 holds a run with other settings: steps=5 (was 4)" in capsys.readouterr().out


def test_variants_cost_the_same_to_a_few_percent(tmp_path: Path) -> None:
    """And have the same experts and slots: routers alone differ."""
    runs = planned(tmp_path, VARIANTS, 1, TINY)
    costs = {run.variant: forward_flops(run.config.model) for run in runs}
    assert max(costs.values()) / min(costs.values()) < 1.04, costs
    for run in runs:
        model = run.config.model
        if model.has_experts:
            assert (
                model.num_experts * model.capacity == model.num_tokens * model.group_images == 16 * model.group_images
            )
