"""The storm in short: a run killed in the middle of saves and between them ends as if it had never been."""

import json
from itertools import pairwise
from pathlib import Path

from tests.runs import with_digits
from tests.storm import storm


def test_a_run_killed_again_and_again_is_the_run_that_was_not(tmp_path: Path) -> None:
    small = ["model.width=32", "model.mlp_dim=64", "model.moe.num_experts=8"]
    # All in a save, the launcher in the training, rank 0 in a save; on a disk where saves last long enough to be met.
    found = storm(with_digits(tmp_path), *small, kills=3, steps=16, seed=39, say=print, slow_disk=0.3, forked=True)
    assert found["mid_saves"] >= 2, found["kills"]
    assert {what: same for what, same in found["equal"].items() if not same} == {}
    history = json.loads((tmp_path / "stormy" / "summary.json").read_text())["history"]
    assert (history["interruptions"], history["starts"]) == ({"killed": 3}, 4)
    lives = history["processes"]
    assert [life["ended"] for life in lives] == [*["killed"] * 3, "complete"]
    assert [life["from_step"] for life in lives] == [0, *(kill["complete"] for kill in found["kills"])]
    assert history["lost_steps"] == sum(before["to_step"] - after["from_step"] for before, after in pairwise(lives))
