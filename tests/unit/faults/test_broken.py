"""What a run knows of its broken samples, and how many it bears."""

import json
from pathlib import Path

import pytest

from softmoe_train.data.batch import Broken
from softmoe_train.data.quarantine import read_quarantine
from softmoe_train.faults.broken import (
    MOST,
    MOST_SHARDS,
    NONE_BROKEN,
    BrokenSamples,
    BrokenWatch,
    Budget,
    KnownBroken,
    TooManyBrokenError,
    _distinct,
)
from softmoe_train.observe.log import SilentLog


def met(g: int, *, key: str | None = None, shard: str = "a.tar", times: int = 1) -> KnownBroken:
    sha256 = f"{len(shard):064x}"
    return KnownBroken(
        shard=shard, sha256=sha256, key=f"k{g}" if key is None else key, reason="torn", times=times, first_sample=g
    )


@pytest.mark.parametrize(
    ("count", "fraction", "broken", "images", "spent"),
    [
        (3, None, 3, 10, None),
        (3, None, 4, 10, "data.max_broken=3"),
        (0, None, 1, 10**9, "data.max_broken=0"),
        (10**9, 0.01, 500, 999, None),  # 9.99 would be borne: too few to judge
        (10**9, 0.01, 10, 1000, None),
        (10**9, 0.01, 11, 1000, "data.max_broken_fraction=0.01"),
        (10**9, 0.01, 11, 1100, None),
        (5, 0.5, 6, 1000, "data.max_broken=5"),
    ],
)
def test_a_budget_is_spent_by_count_and_by_fraction(count, fraction, broken, images, spent) -> None:
    assert Budget(count=count, fraction=fraction).spent(broken, images) == spent


def test_known_samples_are_told_apart_counted_and_kept_as_first_met() -> None:
    first = NONE_BROKEN.after([met(9), met(4), met(30, key="k4")])
    again = first.after([met(50, key="k9"), met(40, shard="other.tar")])
    assert again.by_shard == {"a.tar": 4, "other.tar": 1}
    assert [(one.key, one.times, one.first_sample) for one in again.samples] == [
        ("k4", 2, 4),
        ("k9", 2, 9),
        ("k40", 1, 40),
    ]
    assert again.measures() == {"data/a.tar/broken_samples": 4, "data/other.tar/broken_samples": 1}


def test_who_met_a_sample_and_when_it_was_told_changes_nothing() -> None:
    everything = [met(n, key=f"k{n % 7}", shard="ab" * (1 + n % 3)) for n in range(40)]
    at_once = NONE_BROKEN.after(everything)
    in_two = NONE_BROKEN.after(everything[:25][::-1]).after(everything[25:])
    assert at_once == in_two
    ranks = [
        _distinct([Broken(o.shard, o.key, o.reason, o.sha256, o.first_sample) for o in everything[r::2]])
        for r in (0, 1)
    ]
    assert NONE_BROKEN.after([*ranks[1], *ranks[0]]) == at_once


def test_a_sick_run_keeps_what_it_knows_within_bounds() -> None:
    known = NONE_BROKEN.after([met(n, shard=f"{n:05d}.tar") for n in range(3 * MOST)])
    assert len(known.samples) == MOST
    assert len(known.by_shard) == MOST + 1
    assert sum(known.by_shard.values()) == 3 * MOST
    assert sum(known.measures().values()) == 3 * MOST
    assert len(known.measures()) == MOST_SHARDS + 1
    told = _distinct([Broken("a.tar", str(n), "x" * 10**5, "0" * 64, n) for n in range(3 * MOST)])
    assert len(told) == MOST + 1
    assert sum(one.times for one in told) == 3 * MOST
    assert max(len(one.reason) for one in told) == 300
    assert sum(NONE_BROKEN.after(told).by_shard.values()) == 3 * MOST


def test_the_file_is_a_quarantine_and_a_resume_repeats_nothing_in_it(tmp_path: Path) -> None:
    file = tmp_path / "broken_samples.jsonl"
    watch = BrokenWatch(None, file, SilentLog(""))
    state = NONE_BROKEN.after([met(3), met(5)])
    for known in (state, state.after([met(8)]), state.after([met(8), met(9, key="k3")])):
        watch._write(known)  # the third is the second come again, after a resume
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["key"], line["times"], line["first_sample"]) for line in lines] == [
        ("k3", 2, 3),
        ("k5", 1, 5),
        ("k8", 1, 8),
    ]
    assert [one.key for one in read_quarantine(str(file))] == ["k3", "k5", "k8"]
    assert BrokenSamples.model_validate(json.loads(state.model_dump_json())) == state


def test_a_folder_that_is_gone_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = []

    class Log(SilentLog):
        def warn(self, text: str) -> None:
            told.append(text)

    BrokenWatch(None, tmp_path / "gone" / "b.jsonl", Log(""))._write(NONE_BROKEN.after([met(1)]))
    assert "b.jsonl cannot be written" in told[0]


def test_the_end_names_shards_samples_and_the_way_on() -> None:
    known = NONE_BROKEN.after([met(n, shard="abcdefgh"[: 1 + n % 8] + ".tar") for n in range(64)])
    with pytest.raises(TooManyBrokenError) as caught:
        BrokenWatch(Budget(count=60, fraction=None), None, SilentLog("")).check(64, 1000, known, 12)
    said = str(caught.value)
    assert said.startswith("64 broken samples among 1000 images are more than data.max_broken=60: a.tar 8, ab.tar 8, ")
    assert " and 3 more shards; the last new ones were\n  " in said
    assert said.count("torn") == 5
    assert "go on from step 12 with a higher data.max_broken, if" in said
