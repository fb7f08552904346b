"""The account of a resume says how the ranks lay and lie, and what was not taken over."""

from pathlib import Path
from typing import Any

import pytest

from softmoe_train.checkpoint.audit import Audit, layout_words
from softmoe_train.checkpoint.reader import Loaded
from softmoe_train.config import compose
from softmoe_train.settings import RunConfig


@pytest.mark.parametrize(
    ("overrides", "size", "words"),
    [
        ([], 1, "1 process, float32"),
        ([], 8, "8 processes, expert axis 4, replicated, float32"),
        (["parallel.sharding=fsdp", "precision=bfloat16"], 3, "3 processes, expert axis 1, fsdp, bfloat16"),
        (
            ["parallel.sharding=hsdp", "parallel.shard_size=2", "parallel.expert_axis=2"],
            8,
            "8 processes, expert axis 2, hsdp over 2, float32",
        ),
        (
            ["engine=deepspeed", "engine.zero_stage=2"],
            2,
            "2 processes, expert axis 2, DeepSpeed ZeRO 2, float32",
        ),
        (["model.moe.blocks=[]"], 2, "2 processes, expert axis 1, replicated, float32"),
    ],
)
def test_a_layout_is_told_from_the_settings_that_were_saved(overrides: list[str], size: int, words: str) -> None:
    config = compose(RunConfig, ["recipe=debug", *overrides], lambda _: [])
    assert layout_words(config.as_saved(), num_experts=config.model.num_experts, size=size) == words


def test_settings_of_another_version_make_no_resume_fail() -> None:
    assert layout_words({}, num_experts=4, size=2) == "2 processes, expert axis 2, unknown sharding, unknown precision"


def audit(**changes: Any) -> Audit:
    values: dict[str, Any] = {
        "path": Path("runs/a/checkpoints/step_00000200"), "before": "4 processes, fsdp", "now": "2 processes, replicated",
        "read": Loaded({"model": 68, "optimizer": 137}, 12 * 2**20, 4, 4), "position": 6400,
        "loop": {"step": 200, "skipped_updates": 3}, "left_out": "", "changed": [], "set_aside": [],
    }  # fmt: skip
    return Audit(**{**values, **changes})


def test_the_account_of_a_resume_is_one_line() -> None:
    assert audit().line(200, 600) == (
        "resumed from runs/a/checkpoints/step_00000200 at step 200 of 600: 4 processes, fsdp -> 2 processes, replicated; "
        "read 68 model and 137 optimizer tensors (12.0 MiB in 4 files), data position 6,400"
    )
    same = audit(before="2 processes, replicated").line(200, 600)
    assert "of 600: 2 processes, replicated, as before; read" in same


def test_what_was_left_out_changed_or_passed_over_is_told() -> None:
    told = audit(left_out="without its averaged weights", changed=["seed=1 (was 0)"], set_aside=["step_00000300"])
    assert told.line(200, 600).endswith(
        "6,400; without its averaged weights; changed: seed=1 (was 0); damaged, set aside: step_00000300"
    )
    facts = told.facts()
    assert facts["loop"]["skipped_updates"] == 3
    assert (facts["tensors"], facts["bytes"]) == ({"model": 68, "optimizer": 137}, 12 * 2**20)
