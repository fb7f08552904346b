"""The real program with its checkpoints in a real S3 server on this machine: `pip install s3fs "moto[server]"`, then `pytest -m full`."""

import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import alive, children_of, command, environment, metrics, same_bits, softmoe, stored
from tests.s3 import s3_server

pytestmark = pytest.mark.full
RUN = ["recipe=debug", "processes=2", "steps=60", "checkpoint.every=1", "observe.every=1", "checkpoint.folder=s3://bucket/runs/mine"]  # fmt: skip
KILLS = 8


@pytest.fixture
def server(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which s3:// is a server with one bucket."""
    s3fs = pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with s3_server(tmp_path / "server.log") as names:
        s3fs.S3FileSystem(endpoint_url=names["AWS_ENDPOINT_URL"], key="any", secret="any").mkdir("bucket")
        yield names


def test_a_run_killed_at_random_instants_is_bit_identical_to_one_on_a_disk_that_was_not(
    tmp_path: Path, server: dict[str, str]
) -> None:
    s3fs = pytest.importorskip("s3fs")
    store = s3fs.S3FileSystem(
        endpoint_url=server["AWS_ENDPOINT_URL"], key="any", secret="any", use_listings_cache=False
    )
    softmoe(*RUN, "checkpoint.folder=null", "run_dir=whole", folder=tmp_path)
    told = []
    for kill in range(KILLS):
        begun = time.monotonic()
        process = subprocess.Popen(
            command(*RUN, "run_dir=killed"), cwd=tmp_path, env=environment(**server), stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                break
        time.sleep(random.Random(kill).uniform(0, 2))
        ranks = children_of(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        while any(alive(rank) for rank in ranks):
            assert time.monotonic() - begun < 300
            time.sleep(0.05)
        marks = [name for name in store.find("bucket/runs/mine") if name.endswith("COMPLETE.json")]
        told.append(max(marks, default="none"))
    done = softmoe(*RUN, "run_dir=killed", folder=tmp_path, **server)
    assert "resumed from s3://bucket/runs/mine/step_" in done.stdout
    print(f"killed {KILLS} times, the newest checkpoint each time: {[Path(name).parent.name for name in told]}")
    (tmp_path / "killed" / "checkpoints").mkdir()
    store.get("bucket/runs/mine/", str(tmp_path / "killed" / "checkpoints"), recursive=True)
    assert same_bits(stored(tmp_path / "killed", 60), stored(tmp_path / "whole", 60))
    assert metrics(tmp_path / "killed", "train/loss") == metrics(tmp_path / "whole", "train/loss")
