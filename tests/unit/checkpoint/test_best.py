"""The best checkpoint is the first with the best finite value of what the rule names, and its record resumes."""

import math

import pytest

from softmoe_train.checkpoint import CheckpointError
from softmoe_train.checkpoint.best import Best, best_of
from softmoe_train.data.batch import Cursor
from softmoe_train.faults.bad_steps import NONE_YET
from softmoe_train.loop import TrainState

TOP1, LOSS = "highest upstream/test/top1", "lowest upstream/test/loss"


def after(rule: str | None, values: list[float | None]) -> int | None:
    """The step of the best after checkpoints at steps 1, 2, ... with these values; None was not measured."""
    best = None
    for step, value in enumerate(values, 1):
        measured = {} if value is None else {"upstream/test/top1": value, "upstream/test/loss": value}
        best = best_of(rule, best, step, measured)
    return None if best is None else best.step


@pytest.mark.parametrize(
    ("rule", "values", "step"),
    [
        (TOP1, [0.1, 0.3, 0.2], 2),
        (LOSS, [0.1, 0.3, 0.2], 1),
        (TOP1, [0.3, 0.3], 1),
        (TOP1, [0.3, None, 0.4, None], 3),
        (LOSS, [2.0, math.nan, -math.inf], 1),
        (TOP1, [None, math.nan], None),
        (None, [0.1], None),
    ],
)
def test_the_best_is_the_first_with_the_best_finite_value(
    rule: str | None, values: list[float | None], step: int | None
) -> None:
    assert after(rule, values) == step


def test_a_record_of_another_rule_is_forgotten() -> None:
    best = Best(TOP1, 5, 0.9)
    assert best_of(LOSS, best, 6, {"upstream/test/loss": 2.0}) == Best(LOSS, 6, 2.0)
    assert best_of(LOSS, best, 6, {}) is None


def state(best: Best | None) -> TrainState:
    return TrainState(None, 0, 0, Cursor(0), "", best=best)  # pyright: ignore[reportArgumentType]


def test_the_record_resumes_and_a_state_from_before_there_was_one_loads() -> None:
    for best in (Best(TOP1, 20, 0.5), None):
        document, there = state(best).loop_document(), state(Best(LOSS, 1, 1.0))
        there.restore(document)
        assert there.best == best
    del document["best"], document["bad_steps"]
    there.restore(document)
    assert there.best is None
    assert there.bad_steps == NONE_YET


@pytest.mark.parametrize("change", [{"best": {"step": 1}}, {"best": [1]}, {"bad_steps": {"streak": 1}}, {"unknown": 1}])
def test_a_loop_state_of_another_version_is_refused_with_its_keys(change: dict) -> None:
    with pytest.raises(CheckpointError, match=next(iter(change))):
        state(None).restore({**state(None).loop_document(), **change})
    with pytest.raises(CheckpointError, match="of another version"):
        state(None).restore([])
