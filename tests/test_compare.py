"""The comparison of routers, with two variants and four steps: it trains, counts and draws, and repeats nothing that is complete."""

from pathlib import Path

import pytest

from softmoe_train.model.count import model_flops
from tests.studies.compare import VARIANTS, Row, planned, study, table

TINY = [
    "data=synthetic", "data.num_test=16", "data.streams=8", "steps=4", "schedule.warmup_steps=1", "batch_size=16", "observe.every=1",
    "evals.upstream.every=2", "evals.upstream.batch_size=8",
]  # fmt: skip
PAIR = ["Soft MoE", "Tokens Choice"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    """A study of two variants with a seed each, and its rows."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("compare")
    return out, study(out, PAIR, 1, 2, TINY)


def test_every_variant_has_a_row_of_measures(done: tuple[Path, list[Row]]) -> None:
    out, (soft, sparse) = done
    assert (soft.variant, sparse.variant) == tuple(PAIR)
    assert soft.dropped is None and sparse.dropped is not None and sparse.empty is not None
    # C = 1: there are as many slots as choices, so a choice that is dropped leaves one empty.
    assert sparse.dropped == pytest.approx(sparse.empty)
    for row in (soft, sparse):
        assert [step for step, _ in row.curves[0]] == [2, 4]
        assert 0 <= row.top1[0] <= 1 and row.images_per_second > 0 and row.train_loss[0] > 0
    assert (out / "compare.md").read_text() == table([soft, sparse]) + "\n"
    assert (out / "compare.png").stat().st_size > 10_000


def test_what_is_complete_is_not_repeated(done: tuple[Path, list[Row]]) -> None:
    out, rows = done
    written = {path: path.stat().st_mtime_ns for path in out.glob("*/*/metrics.jsonl")}
    assert len(written) == 2
    assert study(out, PAIR, 1, 2, TINY) == rows
    assert written == {path: path.stat().st_mtime_ns for path in out.glob("*/*/metrics.jsonl")}


def test_a_folder_of_other_settings_is_refused(done: tuple[Path, list[Row]]) -> None:
    with pytest.raises(ValueError, match=r"soft_moe/seed0 holds a run with other settings: steps=5 \(was 4\)"):
        planned(done[0], PAIR, 1, [*TINY, "steps=5"])


def test_variants_cost_the_same_to_a_few_percent(tmp_path: Path) -> None:
    """And have the same experts and slots: routers alone differ."""
    runs = planned(tmp_path, VARIANTS, 1, TINY)
    costs = {run.variant: model_flops(run.config.model).forward for run in runs}
    assert max(costs.values()) / min(costs.values()) < 1.04, costs
    for run in runs:
        model = run.config.model
        if model.has_experts:
            assert (
                model.num_experts * model.capacity == model.num_tokens * model.group_images == 16 * model.group_images
            )
