"""A run that changes its engine on the way, by the real command, goes on as if it had not."""

from pathlib import Path

from tests.runs import metrics
from tests.under_way import train

DEBUG = [
    "recipe=debug", "processes=2", "observe.every=1", "evals.upstream.every=0", "model.moe.expert_init=independent",
]  # fmt: skip


def test_a_run_that_changes_its_engine_twice_keeps_its_losses(tmp_path: Path) -> None:
    train(*DEBUG, "run_dir=whole", "processes=1", folder=tmp_path)
    legs = [
        ["engine=deepspeed", "engine.zero_stage=2", "micro_batches=2", "stop_after=7"],
        ["engine=torch", "processes=1", "stop_after=14"],
        ["engine=deepspeed", "engine.zero_stage=1"],
    ]
    said = [train(*DEBUG, "run_dir=moved", *leg, folder=tmp_path) for leg in legs]
    assert "expert axis 2, DeepSpeed ZeRO 2, gradients summed at every micro-batch" in said[0].stdout
    assert "resumed from moved/checkpoints/step_00000014 at step 14 of 20" in said[2].stdout
    assert all("deepspeed" not in done.stderr.lower() and "deprecated" not in done.stderr for done in said), said
    for name in ("train/loss", "train/grad_norm"):
        want, got = metrics(tmp_path / "whole", name), metrics(tmp_path / "moved", name)
        assert want.keys() == got.keys() == set(range(1, 21))
        worst = max(abs(want[step] - got[step]) for step in want)
        print(f"{name}: {worst:.1e}")
        assert worst < 1e-5, name
    # Both moved far: equal losses of a standstill would prove nothing.
    losses = metrics(tmp_path / "whole", "train/loss")
    assert losses[1] - losses[20] > 0.05
