"""What the settings of a fine-tuning may not say, told without a checkpoint."""

import pytest

from softmoe_train.config import ConfigError, compose
from softmoe_train.settings import RunConfig, check


def refused(*overrides: str) -> str:
    """What is told instead of a run on two processes."""
    with pytest.raises(ConfigError) as caught:
        compose(RunConfig, ["recipe=debug", *overrides], lambda c: check(c, 2, 2))
    return "\n".join(caught.value.problems)


def test_held_out_images_judge_a_checkpoint_only_where_some_are_held_out() -> None:
    words = ["evals=[finetune]", "evals.finetune.every=7", "checkpoint.best=highest finetune/val/top1"]
    assert "nothing measures finetune/val/top1; no evaluator is on" in refused(*words)
    assert "it is measured every 7 steps" in refused(*words, "data.holdout=0.2")


def test_a_fine_tuning_that_would_be_measured_by_nothing_is_refused_of_any_data() -> None:
    assert "it would measure nothing" in refused("evals=[finetune]", "evals.finetune.test=false")


def test_zero_is_refused_where_every_expert_over_ranks_is_frozen() -> None:
    words = ["engine=deepspeed", "engine.zero_stage=1", "checkpoint.best=lowest x", 'optim.frozen=["*.experts.*"]']
    assert "every expert is frozen, and ZeRO refuses" in refused(*words, "parallel.expert_axis=2")
    for other in ("engine.zero_stage=0", "parallel.expert_axis=1", 'optim.frozen=["*.experts.w1"]'):
        assert "every expert" not in refused(*words, other)
