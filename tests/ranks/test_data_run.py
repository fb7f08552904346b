"""A real run over two sources with a filter, a quarantine and broken pictures: killed on two ranks, it goes on alone with the same samples."""

import io
import json
import signal
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softmoe_train.config import compose
from softmoe_train.data import Cursor, build_stream
from softmoe_train.data.index import index_shards
from softmoe_train.settings import RunConfig
from tests.consumed import name_of
from tests.life import BATCH, RUN, Life
from tests.runs import metrics, with_digits
from tests.unit.data.conftest import write_tar

STEPS = 20
DROPPED = 9  # a label


def members_of(folder: Path) -> dict[str, dict[str, bytes]]:
    """The digits that are trained on: suffix and bytes of the members by key, in order."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted((folder / "shards" / "digits").glob("train-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[suffix] = file.read()
    return found


def picture(data: bytes) -> str:
    """What stands for a picture in the record of a run."""
    return name_of(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1).tobytes())


@pytest.mark.parametrize("seed", [3])
def test_a_killed_run_goes_on_at_another_layout_with_the_same_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digits = members_of(with_digits(tmp_path))
    keys = list(digits)[:300]
    suffix = next(s for s in digits[keys[0]] if s != "cls")
    labels = {key: int(digits[key]["cls"]) for key in keys}
    allowed = [key for key in keys if labels[key] != DROPPED]
    banned, torn = allowed[5], allowed[40::50]
    named = {picture(digits[key][suffix]): key for key in keys}

    sources = {"few": keys[:100], "many": keys[100:]}
    for name, own in sources.items():
        members = []
        for key in own:
            members += [(f"{key}.cls", digits[key]["cls"])]
            members += [(f"{key}.{suffix}", b"torn" if key in torn else digits[key][suffix])]
        write_tar(tmp_path / f"{name}.tar", members)
    [few] = index_shards([str(tmp_path / "few.tar")])
    listed = {"shard": "few.tar", "sha256": few.sha256, "key": banned, "reason": "by hand"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(listed) + "\n")

    kept = [label for label in range(10) if label != DROPPED]
    data = [
        "data.train=null", "evals=[]", f"seed={seed}", f"data.keep.labels={kept}", "data.quarantine=bad.jsonl", "data.max_broken=10000",
        "data.mixture={few: {shards: few.tar, weight: 1, seed: 0}, many: {shards: many.tar, weight: 3, seed: 0}}",
    ]  # fmt: skip
    life = Life(tmp_path, "run", STEPS, *data, forked=True)
    life.until(lambda: life.complete() >= 6 and len(life.taken()) > 7, 0.01)
    life.end(life.send(signal.SIGKILL, "all"))
    killed_at, saved = max(life.taken()), life.complete()
    assert saved < killed_at < STEPS, life.said()
    last = Life(tmp_path, "run", STEPS, *data, "processes=1", "parallel.expert_axis=1", forked=True)
    last.until(lambda: False, 0.05)
    assert last.end({}) == 0, last.said()
    assert last.taken()[0] == saved + 1

    monkeypatch.chdir(tmp_path)
    config = compose(RunConfig, [*RUN, f"steps={STEPS}", *data], lambda _: [])
    stream = build_stream(config.data, image_size=8, num_classes=10, seed=seed, global_batch=BATCH, rank=0, world=1)
    wanted = {at: [one.key for one in stream.samples(Cursor(at), 0)] for at in range(0, STEPS * BATCH, BATCH)}
    asked = Counter(key for batch in wanted.values() for key in batch)
    assert not {banned, *(key for key in keys if labels[key] == DROPPED)} & set(asked)
    assert sum(asked[key] for key in sources["few"]) == STEPS * BATCH / 4

    # What each step was given, by rank; the steps that were taken again after the kill were given the same.
    given: list[dict[int, list[str]]] = [{}, {}]
    for at_hand, one in zip(given, (life, last), strict=True):
        for file in one.record.glob("rank_*.jsonl"):
            for line in map(json.loads, file.read_text().splitlines()):
                at_hand.setdefault(line["position"] - BATCH, []).extend(named[p] for p in line["pictures"])
    assert set(given[0]) | set(given[1]) == set(wanted)
    assert set(given[0]) & set(given[1]) == set(range(saved * BATCH, killed_at * BATCH, BATCH))
    for at, batch in wanted.items():
        first, *again = [one[at] for one in given if at in one]
        assert len(first) == BATCH or at >= killed_at * BATCH - BATCH  # the kill may have come between two ranks
        assert not set(torn) & set(first)
        whole = again[0] if again else first
        assert not Counter(first) - Counter(whole)
        assert not Counter(key for key in batch if key not in torn) - Counter(whole)

    broken = sum(asked[key] for key in torn)
    assert broken > 2
    assert metrics(life.run, "data/broken_samples")[STEPS] == broken
    assert metrics(life.run, "data/few/samples")[STEPS] == STEPS * BATCH / 4
    lines = [json.loads(line) for line in (life.run / "broken_samples.jsonl").read_text().splitlines()]
    assert {line["key"]: line["times"] for line in lines} == {key: asked[key] for key in torn if asked[key]}
    first = {key: min(at for at, batch in wanted.items() if key in batch) for key in torn if asked[key]}
    assert all(0 <= line["first_sample"] - first[line["key"]] < BATCH for line in lines)
    assert "lists 1 samples, of which 1 are here and left out: few.tar 1" in last.said()
