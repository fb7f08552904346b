"""The samples of a bad step are written down by number, shard and key, once, and not without end."""

import json
import math
from pathlib import Path

import pytest

from softmoe_train.data import Cursor
from softmoe_train.data.batch import StoredSample
from softmoe_train.faults import bad_batches
from softmoe_train.faults.bad_batches import BadBatches
from softmoe_train.faults.bad_steps import BadStep


class Two:
    """A stream of two ranks, of two samples a batch each."""

    def samples(self, cursor: Cursor, rank: int) -> list[StoredSample]:
        first = cursor.position + rank
        return [StoredSample(number, "a.tar", f"key {number}") for number in (first, first + 2)]


def bad(step: int, ranks: list[int], loss: float = math.nan) -> BadStep:
    return BadStep(step, 4 * (step - 1), "loss", ranks, loss, "the loss was not finite")


def written(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def file(path: Path) -> BadBatches:
    return BadBatches(path, Two())  # pyright: ignore[reportArgumentType]


def test_a_line_holds_the_samples_of_the_bad_ranks_and_a_warning_names_the_first(tmp_path: Path) -> None:
    path = tmp_path / "bad_batches.jsonl"
    (one,), (all_,) = file(path).write(bad(2, [1])), file(path).write(bad(3, [0, 1], 2.5))
    assert one == f"step 2: the loss was not finite; its samples are in {path}: 5 (a.tar key 5), 7 (a.tar key 7)"
    assert all_.endswith("8 (a.tar key 8), 9 (a.tar key 9), 10 (a.tar key 10) and 1 more")
    first, second = written(path)
    samples = [{"number": n, "shard": "a.tar", "key": f"key {n}"} for n in (5, 7)]
    assert first == {"step": 2, "first_sample": 4, "why": "loss", "loss": None, "ranks": [1], "samples": samples}
    assert (second["loss"], [sample["number"] for sample in second["samples"]]) == (2.5, [8, 9, 10, 11])


def test_what_comes_again_after_a_kill_is_not_repeated_and_a_torn_line_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "bad_batches.jsonl"
    file(path).write(bad(2, [1]))
    with path.open("a") as torn:
        torn.write('{"step": 3, "first_sa')
    again = file(path)
    assert again.write(bad(2, [1])) == []
    assert len(again.write(bad(3, [1]))) == 1
    first, torn_line, third = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in (first, third)] == [2, 3]
    assert torn_line == '{"step": 3, "first_sa'


def test_a_disk_that_does_not_take_a_line_is_told_and_ends_nothing(tmp_path: Path) -> None:
    (said,) = file(tmp_path / "gone" / "bad_batches.jsonl").write(bad(2, [1]))
    assert "step 2: the loss was not finite; its samples could not be written to " in said
    assert said.endswith("5 (a.tar key 5), 7 (a.tar key 7)")


def test_the_file_has_an_end_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_batches, "MOST", 3)
    path = tmp_path / "bad_batches.jsonl"
    said = [text for step in range(1, 9) for text in file(path).write(bad(step, [0]))]
    assert len(written(path)) == 3
    one = file(path)
    assert len([text for step in range(9, 20) for text in one.write(bad(step, [0]))]) == 1
    assert said[3] == f"{path} holds 3 bad batches: no more are written down or named"
