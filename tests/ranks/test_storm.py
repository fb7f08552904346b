"""The storm in short: a run killed in the middle of saves and between them ends as if it had never been."""

import json
from pathlib import Path

from tests.runs import with_digits
from tests.storm import storm


def test_a_run_killed_again_and_again_is_the_run_that_was_not(tmp_path: Path) -> None:
    small = ["model.width=32", "model.mlp_dim=64", "model.moe.num_experts=8"]
    # All in a save, the launcher in the training, rank 0 in a save; on a disk where saves last long enough to be met.
    found = storm(with_digits(tmp_path), *small, kills=3, steps=16, seed=39, say=print, slow_disk=0.3)
    assert found["mid_saves"] >= 2, found["kills"]
    assert {what: same for what, same in found["equal"].items() if not same} == {}
    history = json.loads((tmp_path / "stormy/summary.json").read_text())["history"]
    assert (history["starts"], history["interruptions"]) == (4, {"killed": 3})
    assert [one["from_step"] for one in history["processes"]] == [0, *(kill["complete"] for kill in found["kills"])]
    assert [one["ended"] for one in history["processes"]] == ["killed", "killed", "killed", "complete"]
