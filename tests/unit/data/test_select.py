"""Filters and the quarantine leave samples out of the order as if they were not there, once worked out for every process."""

import json
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from softmoe_train.data import Batch, build_eval_stream, build_stream, left_out, make_indexes
from softmoe_train.data.index import index_shards
from softmoe_train.data.order import Order
from softmoe_train.data.quarantine import read_quarantine
from tests.unit.data.conftest import encoded, numbered_picture, numbers_of, settings, write_tar

ALL = {"labels": None, "keys": None, "renumber": False}


def stream(cfg, rank: int = 0, world: int = 1, *, batch: int = 8):
    return build_stream(cfg, image_size=4, num_classes=10, seed=7, global_batch=batch, rank=rank, world=world)


def held_out(cfg) -> list[int]:
    one = build_eval_stream(cfg, image_size=4, num_classes=10, seed=7, batch_size=4, rank=0, world=1)
    return [number for batch in one for number in numbers_of(batch.images[batch.mask])]


def entries(folder: Path, *numbers: int, **more: object) -> list[dict[str, object]]:
    """Quarantine lines for numbered pictures, wherever in the folder they are."""
    found = []
    for shard in index_shards(sorted(map(str, folder.glob("*.tar")))):
        name = os.path.basename(shard.path)
        found += [
            {"shard": name, "sha256": shard.sha256, "key": f"sample-{number:06d}", "reason": "torn", **more}
            for number in numbers
        ]
    return found


def quarantine(path: Path, lines: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ({"labels": [3, 7]}, [n for n in range(25) if n % 10 in (3, 7)]),
        ({"keys": "00[0-9]$"}, list(range(10))),
        ({"keys": "^sample-0000(1|20)"}, [*range(10, 20), 20]),
        ({"labels": [3], "keys": "1[0-9]$"}, [13]),
    ],
)
def test_an_epoch_and_a_held_out_pass_hold_what_remains_and_no_more(numbered_shards, keep, left: list[int]) -> None:
    folder = str(numbered_shards(7, 5, 13))
    cfg = settings(train=folder, test=folder, keep={**ALL, **keep})
    assert held_out(cfg) == left
    seen = [number for batch in islice(stream(cfg), len(left)) for number in numbers_of(batch.images)]
    for epoch in range(8):
        assert sorted(seen[epoch * len(left) : (epoch + 1) * len(left)]) == left
    assert stream(cfg).fingerprint()["samples"] == len(left)


def test_the_order_of_what_remains_is_that_of_shards_without_the_rest(numbered_shards, tmp_path: Path) -> None:
    folder = numbered_shards(7, 5, 13)
    path = quarantine(tmp_path / "q.jsonl", entries(folder, 2, 9, 20))
    cfg = settings(train=str(folder), quarantine=path)
    order = Order([6, 4, 12], streams=4, window=8, block=4, seed=7)
    rest = [[n for n in part if n not in (2, 9, 20)] for part in (range(7), range(7, 12), range(12, 25))]
    for rank in (0, 1):
        for batch in islice(stream(cfg, rank, 2), 6):
            where = order.locate(batch.sample_ids.numpy())
            assert numbers_of(batch.images) == [rest[s][i] for s, i in zip(where.shard, where.index, strict=True)]
            assert batch.labels.tolist() == [n % 10 for n in numbers_of(batch.images)]
    names = [sample.key for sample in stream(cfg).samples(batch.cursor, 0)]
    assert not {"sample-000002", "sample-000009", "sample-000020"} & set(names)


def test_renumbered_labels_are_places_in_the_list(numbered_shards) -> None:
    folder = str(numbered_shards(25))
    cfg = settings(train=folder, keep={"labels": [7, 3], "keys": None, "renumber": True})
    batch: Batch = next(iter(stream(cfg)))
    assert batch.labels.tolist() == [[7, 3].index(n % 10) for n in numbers_of(batch.images)]


def test_samples_without_a_label_that_can_be_read_do_not_match_and_are_counted(tmp_path: Path) -> None:
    members = []
    for number, label in enumerate([b"1", b"one", b"2", b"", b"1"]):
        members += [(f"{number}.cls", label), (f"{number}.png", encoded(numbered_picture(number)))]
    path = str(write_tar(tmp_path / "s.tar", [*members, ("9.png", encoded(numbered_picture(9)))]))
    cfg = settings(train=path, test=path, keep={**ALL, "labels": [1]})
    assert held_out(cfg) == [0, 4]
    assert left_out(cfg, needs_test=False) == [
        "data.train: 2 of 6 samples remain; 3 have no label that can be read, and are left out too"
    ]


def test_a_label_that_a_disk_does_not_give_ends_the_start_and_is_not_left_out_for_ever(
    tmp_path: Path, numbered_shards
) -> None:
    folder = numbered_shards(7)
    [tar] = folder.glob("*.tar")
    cfg = settings(train=str(folder), test=str(folder), keep={**ALL, "labels": [3]})
    make_indexes(settings(train=str(folder)), part=0, parts=1, needs_test=False)
    sound, facts = tar.read_bytes(), tar.stat()
    at = sound.index(b"sample-000003.cls") + 512
    tar.write_bytes(sound[:at] + b"9" + sound[at + 1 :])
    os.utime(tar, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    [problem] = make_indexes(cfg, part=0, parts=1, needs_test=False)
    assert problem.startswith("data.train: data.keep.labels: sample sample-000003 of ")
    path = quarantine(tmp_path / "q.jsonl", entries(folder, 3))
    kept_without = cfg.model_copy(update={"quarantine": path, "keep": cfg.keep.model_copy(update={"labels": [2]})})
    assert held_out(kept_without) == [2]
    tar.write_bytes(sound)
    os.utime(tar, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert held_out(cfg) == [3]


def test_a_filter_that_leaves_nothing_is_refused_with_what_is_there(numbered_shards) -> None:
    folder = str(numbered_shards(12))
    for cfg in (
        settings(train=folder, keep={**ALL, "labels": [99]}),
        settings(train=folder, keep={**ALL, "labels": [3], "keys": "x"}),
    ):
        with pytest.raises(ValueError, match=r"data\.train=.*by label there are 0: 2, 1: 2, 2: 1, ") as caught:
            stream(cfg)
        assert "leave none of the 12 samples" in str(caught.value)
    with pytest.raises(ValueError, match=r"data\.test=.*; keep labels and keys that are there"):
        held_out(settings(test=folder, keep={**ALL, "keys": "nowhere"}))


def test_labels_are_read_once_whoever_asks(numbered_shards, index_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(numbered_shards(7, 5, 13))
    cfg = settings(train=folder, test=folder, keep={**ALL, "labels": [3]})
    assert [make_indexes(cfg, part=part, parts=2, needs_test=True) for part in (0, 1)] == [[], []]
    kept = sorted(index_cache.rglob("kept-*"))
    assert len(kept) == 3
    assert all(file.stat().st_mode & 0o077 == 0 for file in kept)
    with monkeypatch.context() as no_reading:
        no_reading.setattr(os, "pread", None)
        stream(cfg)
        left_out(cfg, needs_test=True)
    assert sorted(index_cache.rglob("kept-*")) == kept
    kept[0].write_bytes(kept[0].read_bytes()[:20])  # cut off by a full disk
    assert held_out(cfg) == [3, 13, 23]
    stream(settings(train=folder, keep={**ALL, "labels": [4]}))
    assert len(list(index_cache.rglob("kept-*"))) == 6


def test_without_filters_nothing_is_worked_out_and_the_fingerprint_is_as_it_was(
    numbered_shards, tmp_path, index_cache
) -> None:
    folder = numbered_shards(5)
    plain = stream(settings(train=str(folder))).fingerprint()
    assert not list(index_cache.rglob("kept-*"))
    other = quarantine(tmp_path / "other.jsonl", [{"shard": "x", "sha256": "0" * 64, "key": "y", "reason": "z"}])
    assert stream(settings(train=str(folder), quarantine=other)).fingerprint() == plain
    first, second = (quarantine(tmp_path / f"{n}.jsonl", entries(folder, n)) for n in (1, 2))
    marks = [
        stream(settings(train=str(folder), **change)).fingerprint()
        for change in (
            {"quarantine": first},
            {"quarantine": second},
            {"keep": {**ALL, "labels": [1, 2]}},
            {"keep": {**ALL, "keys": "s"}},
        )
    ]
    assert all(mark != other for at, mark in enumerate(marks) for other in [plain, *marks[:at]])


def test_the_start_tells_how_many_are_in_quarantine_and_which_are_nowhere(numbered_shards, tmp_path: Path) -> None:
    folder = numbered_shards(4, 4)
    lines = [*entries(folder, 1, 2, 6, times=3), *entries(folder, 1)]
    lines.append({"shard": "gone.tar", "sha256": "0" * 64, "key": "k", "reason": "r"})
    cfg = settings(train=str(folder), test=str(folder), quarantine=quarantine(tmp_path / "q.jsonl", lines))
    *sides, both, listed, unmatched = left_out(cfg, needs_test=True)
    assert "are trained on too" in both
    assert sides == ["data.train: 5 of 8 samples remain", "data.test: 5 of 8 samples remain"]
    assert listed.endswith("lists 7 samples, of which 3 are here and left out: train-000000.tar 2, train-000001.tar 1")
    assert unmatched.endswith(
        "4 match no sample here (3 of them name a tar that is here and a key that is not): "
        "train-000000.tar sample-000006, train-000001.tar sample-000001, train-000001.tar sample-000002, gone.tar k"
    )
    assert held_out(cfg) == [0, 3, 4, 5, 7]


def test_a_tar_that_is_trained_on_and_held_out_is_told(tmp_path: Path) -> None:
    for name in ("train-0", "test-0"):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.png", encoded(numbered_picture(1))), (f"{name}.cls", b"1")])
    apart = settings(train=f"{tmp_path}/train-0.tar", test=f"{tmp_path}/test-0.tar")
    assert left_out(apart, needs_test=True) == []
    [told] = left_out(settings(train=str(tmp_path), test=f"{tmp_path}/test-0.tar"), needs_test=True)
    assert told.startswith("data.test: test-0.tar of 1 tars are trained on too")


def test_a_key_that_a_tar_has_twice_is_two_samples_and_both_are_left_out(tmp_path: Path) -> None:
    members = []
    for number, key in enumerate(["a", "b", "a"]):  # only neighbours make one sample, as webdataset has it
        members += [(f"{key}.cls", b"1"), (f"{key}.png", encoded(numbered_picture(number)))]
    path = write_tar(tmp_path / "s.tar", members)
    assert held_out(settings(test=str(path))) == [0, 1, 2]
    [shard] = index_shards([str(path)])
    listed = quarantine(tmp_path / "q", [{"shard": "s.tar", "sha256": shard.sha256, "key": "a", "reason": "r"}])
    assert held_out(settings(test=str(path), quarantine=listed)) == [1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 3 is not JSON"),
        ('{"shard": "a", "sha256": "' + "0" * 64 + '", "key": "k"', "line 3 is not JSON"),
        ("[1]", "line 3 is [1], not an object"),
        ('{"shard": "a", "sha256": "' + "0" * 64 + '", "key": "k"}', "line 3 has no reason"),
        ('{"shard": "a", "sha256": "' + "0" * 64 + '", "key": 5, "reason": "r"}', "line 3 has no key"),
        ('{"shard": "a", "sha256": "ABC", "key": "k", "reason": "r"}', "line 3: 'ABC' is no SHA-256"),
        ("[" * 60_000, "line 3 is not JSON"),
        ("[" * 70_000, "line 3 is not JSON (it has 7000"),
    ],
    ids=["torn", "torn later", "list", "no reason", "number", "hash", "nested", "long"],
)
def test_a_malformed_quarantine_is_refused_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    good = json.dumps({"shard": "a", "sha256": "0" * 64, "key": "k", "reason": "r", "times": 2})
    (tmp_path / "q.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(ValueError, match=r"data\.quarantine=") as caught:
        read_quarantine(str(tmp_path / "q.jsonl"))
    assert said in str(caught.value)
    assert len(str(caught.value)) < 500


def test_pairs_bring_their_texts_and_a_pair_without_one_is_broken(tmp_path: Path) -> None:
    texts = [b"one", None, b"three \n", b"\xff", b"", b"six"]
    members = []
    for number, text in enumerate(texts):
        members += [(f"{number}.png", encoded(numbered_picture(number)))]
        members += [] if text is None else [(f"{number}.txt", text)]
    path = str(write_tar(tmp_path / "pairs.tar", members))
    cfg = settings(train=path, test=path, labels="none", text="txt", max_broken=100)
    one = build_eval_stream(cfg, image_size=4, num_classes=10, seed=7, batch_size=8, rank=0, world=1)
    [batch] = list(one)
    assert batch.texts == ("one", "", "three", "", "", "six", "", "")
    assert batch.mask.tolist() == [True, False, True, False, False, True, False, False]
    assert {b.key: b.reason for b in batch.broken} == {
        "1": "it has no text (.txt)", "3": "its text is not UTF-8 (byte 0)", "4": "its text is empty",
    }  # fmt: skip
    assert batch.labels.tolist() == [-1] * 8
    for trained in islice(stream(cfg), 4):
        named = dict(enumerate(["one", None, "three", None, None, "six"]))
        assert trained.texts == tuple(named[n] for n in numbers_of(trained.images))
        parts = trained.to("cpu").split(4)
        assert [text for part in parts for text in part.texts or ()] == list(trained.texts or ())
    assert stream(cfg).fingerprint()["text"] == "txt"


def test_real_pairs_are_read_from_txt_and_from_json(shared: Path) -> None:
    path = str(shared / "coco-captions-000000.tar")
    batches = []
    for text in ("txt", "json:captions.0"):
        cfg = settings(train=path, labels="none", text=text, streams=8)
        batches.append(
            next(iter(build_stream(cfg, image_size=32, num_classes=1, seed=7, global_batch=8, rank=0, world=1)))
        )
    first, second = batches
    assert first.texts == second.texts
    assert len(set(first.texts)) == 8
    assert all(len(text.split()) > 3 for text in first.texts)
    assert torch.equal(first.images, second.images)
    assert np.unique(first.images.numpy()).size > 100
