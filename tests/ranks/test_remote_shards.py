"""The real program over an HTTP server that drops, truncates, hangs and turns away ends with the metrics of local files."""

import itertools
from pathlib import Path

import pytest

from softmoe_train.data.index import index_shards
from softmoe_train.data.published import publish_index
from tests.hostile_server import HostileServer
from tests.runs import metrics, softmoe, with_digits

pytestmark = pytest.mark.full
pytest.importorskip("aiohttp")
RUN = ["recipe=quickstart", "processes=2", "steps=40", "observe.every=5", "checkpoint.every=0"]
PATIENCE = ["data.cache.timeout=2", "data.cache.attempts=12"]
FAULTS = [
    "drop",
    "truncate",
    None,
    503,
    429,
    "hang",
    None,
    "lies_short",
    "other_bytes",
    "chunked_cut",
    "hang_body",
    None,
]


def test_a_run_over_a_hostile_server_ends_as_one_over_local_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards = with_digits(tmp_path) / "shards" / "digits"
    softmoe(*RUN, "run_dir=near", folder=tmp_path)
    publish_index(list(index_shards(sorted(map(str, shards.glob("*.tar"))))), str(shards))
    faults = itertools.cycle(FAULTS)
    with HostileServer(shards) as server:
        server.always = lambda _: next(faults)
        names = sorted(path.name for path in shards.glob("*.tar"))
        train, test = (
            ",".join(f"{server.url}/{name}" for name in names if name.startswith(part)) for part in ("train", "test")
        )
        softmoe(*RUN, *PATIENCE, "run_dir=far", f"data.train=[{train}]", f"data.test=[{test}]", folder=tmp_path)
        wrong = [one.fault for one in server.asked if one.fault is not None]
    assert len(wrong) >= 5
    for name in ("train/loss", "upstream/test/top1", "upstream/test/loss"):
        assert metrics(tmp_path / "far", name) == metrics(tmp_path / "near", name) != {}
    print(f"{len(server.asked)} requests, of which {len(wrong)} went wrong: {wrong}")


def test_a_run_that_cannot_have_its_shards_says_why_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards = with_digits(tmp_path) / "shards" / "digits"
    publish_index(list(index_shards(sorted(map(str, shards.glob("*.tar"))))), str(shards))
    with HostileServer(shards) as server:
        where = [f"data.train={server.url}/", f"data.test={server.url}/"]
        for fault, words in (
            (403, "the server refuses it (status 403)"),
            ("to file:///etc", "a redirect may not change the scheme"),
        ):
            server.always = lambda _, fault=fault: fault
            done = softmoe(*RUN, "run_dir=never", *where, folder=tmp_path, ok=False)
            assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
        server.always = lambda name: 503 if name.endswith(".tar") else None
        done = softmoe(
            *RUN, *where, "data.cache.timeout=1", "data.cache.attempts=2", "run_dir=later", folder=tmp_path, ok=False
        )
    assert done.returncode not in (0, 2)
    assert "tar cannot be read: 2 tries failed, the last with LaterError: status 503; mend the server" in done.stderr, (
        done.stderr
    )
