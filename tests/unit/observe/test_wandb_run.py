"""W&B offline, for real: the pieces are read back with wandb's own record types."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from softmoe_train.observe.log import SilentLog, build_log
from softmoe_train.observe.wandb_file import BLOCK, HEADER, records_of
from softmoe_train.observe.wandb_run import RowNumbers
from tests.unit.observe.test_log import config, lines_of

wandb = pytest.importorskip("wandb")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in [key for key in os.environ if key.startswith("WANDB_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))


def open_log(
    run_dir: Path,
    mode: str = "offline",
    resume_step: int = 0,
    wandb_id: str | None = None,
    taken_back: Sequence[tuple[int, int]] = (),
) -> SilentLog:
    return build_log(
        config(mode),
        run_dir,
        name="digits",
        run_config={"seed": 1, "hf_token": "hunter2"},
        total_steps=100,
        main=True,
        wandb_id=wandb_id,
        resume_step=resume_step,
        taken_back=taken_back,
    )


def history_of(run_dir: Path) -> list[dict]:
    """Every history row of every piece, in the order of writing, read with wandb's reader where it has one."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for path in sorted((run_dir / "wandb").glob("*run-*-*/run-*.wandb"), key=lambda path: path.parent.name):
        for raw in whole_records(path):
            record = wandb_internal_pb2.Record.FromString(raw)
            if record.WhichOneof("record_type") == "history":
                row = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
                values = {key: json.loads(text) for key, text in row.items() if key != "_timestamp"}
                values = {key: math.nan if value == "NaN" else value for key, value in values.items()}
                rows.append({key: value for key, value in values.items() if key not in ("_runtime", "_wandb")})
    return rows


def ids_of(run_dir: Path) -> list[str]:
    """The run's id that each piece says of itself."""
    from wandb.proto import wandb_internal_pb2

    pieces = (run_dir / "wandb").glob("*run-*-*/run-*.wandb")
    records = [wandb_internal_pb2.Record.FromString(raw) for path in pieces for raw in whole_records(path)]
    return [record.run.run_id for record in records if record.WhichOneof("record_type") == "run"]


def whole_records(path: Path) -> list[bytes]:
    """LevelDB's log, written down a second time from its specification: fragments per block, then joined by type."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    fragments = []
    for start in range(0, len(content), BLOCK):
        block = content[start : start + BLOCK]
        at = HEADER if start == 0 else 0
        while at + 7 <= len(block):
            size, kind = block[at + 4] + 256 * block[at + 5], block[at + 6]
            if kind == 0 or at + 7 + size > len(block):
                break
            fragments.append((kind, block[at + 7 : at + 7 + size]))
            at += 7 + size
    records: list[bytes] = []
    for kind, data in fragments:
        if kind in (1, 2):
            records.append(data)
        else:
            records[-1] += data
    return records


def test_offline_every_metric_is_there_with_its_step(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in range(0, 50, 10):
        log.report(step, step * 64, {"train/loss": 1 / (step + 1), "router/3/entropy": 0.5})
    log.report(40, 2560, {"upstream/val/top1": 0.25})
    log.close("finished", failed=False)
    rows = history_of(tmp_path)
    expected = [
        {"_step": s, "step": s, "images_seen": s * 64, "train/loss": 1 / (s + 1), "router/3/entropy": 0.5}
        for s in range(0, 50, 10)
    ]
    expected[-1]["upstream/val/top1"] = 0.25
    assert rows == expected


def test_across_a_resume_no_step_is_doubled_or_missing(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in (10, 20, 30, 40):
        log.report(step, step, {"train/loss": 1 / step})
    log.close("stopped", failed=False)
    log = open_log(tmp_path, resume_step=20, wandb_id=log.wandb_id)
    for step in (30, 40, 50, 60):
        log.report(step, step, {"train/loss": 1 / step})
    log.close("finished", failed=False)
    assert [(row["step"], row["train/loss"]) for row in history_of(tmp_path)] == [(s, 1 / s) for s in range(10, 70, 10)]
    assert ids_of(tmp_path) == [log.wandb_id] * 2


@pytest.mark.parametrize("seconds", [0.0, 3.0], ids=["before-a-flush", "after-a-flush"])
def test_across_a_kill_no_step_is_doubled_or_missing(tmp_path: Path, seconds: float) -> None:
    program = f"""
        import os, signal, time
        from pathlib import Path
        from tests.unit.observe.test_wandb_run import open_log
        log = open_log(Path({str(tmp_path)!r}))
        for step in (10, 20, 30, 40):
            log.report(step, step, {{"train/loss": 1 / step}})
        time.sleep({seconds})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    log = open_log(tmp_path, resume_step=20)
    for step in (30, 40, 50):
        log.report(step, step, {"train/loss": 1 / step})
    log.close("finished", failed=False)
    assert [row["step"] for row in history_of(tmp_path)] == [10, 20, 30, 40, 50]
    assert set(ids_of(tmp_path)) == {log.wandb_id}


def test_a_run_that_goes_to_wandb_only_later_brings_its_past(tmp_path: Path) -> None:
    log = open_log(tmp_path, mode="disabled")
    log.report(10, 10, {"train/loss": 0.1})
    log.report(20, 20, {"train/loss": float("nan")})
    log.close("stopped", failed=False)
    log = open_log(tmp_path, resume_step=20)
    log.report(30, 30, {"train/loss": 0.3})
    log.close("finished", failed=False)
    losses = [row["train/loss"] for row in history_of(tmp_path)]
    assert (losses[0], losses[2], len(losses)) == (0.1, 0.3, 3)
    assert math.isnan(losses[1])


def test_secrets_are_not_in_the_folder(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.report(10, 10, {"train/loss": 0.1})
    log.close("finished", failed=False)
    pieces = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert any(b"digits" in path.read_bytes() for path in pieces)
    assert not any(b"hunter2" in path.read_bytes() for path in pieces)


def test_auto_is_offline_when_not_logged_in_and_prints_nothing_of_its_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = open_log(tmp_path, mode="auto")
    log.close("finished", failed=False)
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert capfd.readouterr() == ("", "")


def test_auto_follows_the_environment_that_switches_wandb_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    open_log(tmp_path, mode="auto").close("finished", failed=False)
    assert not (tmp_path / "wandb").exists()


def test_online_without_a_login_warns_and_writes_offline(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    open_log(tmp_path, mode="online").close("finished", failed=False)
    out = capfd.readouterr().out
    assert out.count("warning:") == 1
    assert "not logged in" in out
    assert list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("where", ["environment", "netrc"])
def test_with_a_login_and_the_service_down_it_warns_once_and_writes_offline(tmp_path: Path, where: str) -> None:
    """In a process of its own: wandb keeps credentials for the life of a process."""
    environment = os.environ | {"WANDB_BASE_URL": "http://127.0.0.1:9", "NETRC": str(tmp_path / "netrc")}
    if where == "environment":
        environment["WANDB_API_KEY"] = "0" * 40
    else:
        (tmp_path / "netrc").write_text(f"machine 127.0.0.1:9 login user password {'0' * 40}\n")
    program = f"""
        from pathlib import Path
        import softmoe_train.observe.wandb_start as wandb_start
        wandb_start.INIT_SECONDS = 2.0
        from tests.unit.observe.test_wandb_run import open_log
        log = open_log(Path({str(tmp_path)!r}), mode="auto")
        log.report(10, 10, {{"train/loss": 0.5}})
        log.close("finished", failed=False)
    """
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 30
    assert done.stdout.count("warning:") == 1, done.stdout
    assert "W&B online did not start" in done.stdout
    assert [row["step"] for row in history_of(tmp_path)] == [10]
    assert done.stderr == ""


def test_without_the_library_training_goes_on_after_one_warning(tmp_path: Path) -> None:
    program = f"""
        import sys
        sys.modules["wandb"] = None  # Python's own way of saying that a module cannot be imported
        from pathlib import Path
        from tests.unit.observe.test_log import config
        from softmoe_train.observe.log import build_log
        log = build_log(config("offline"), Path({str(tmp_path)!r}), name="r", run_config={{}}, total_steps=9, main=True,
                        wandb_id=None, resume_step=0)
        log.report(1, 1, {{"train/loss": 0.5}})
        log.close("finished", failed=False)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("warning: W&B is off") == 1
    assert len(lines_of(tmp_path)) == 1


def test_when_wandb_fails_in_the_middle_training_goes_on_after_one_warning(tmp_path: Path) -> None:
    program = f"""
        import os, signal, time
        from pathlib import Path
        from tests.unit.observe.test_wandb_run import open_log
        log = open_log(Path({str(tmp_path)!r}))
        log.report(1, 1, {{"train/loss": 0.5}})
        children = Path(f"/proc/self/task/{{os.getpid()}}/children").read_text().split()
        for child in children:  # wandb's service, and nothing else, is our child
            os.kill(int(child), signal.SIGKILL)
        time.sleep(0.5)
        for step in range(2, 6):
            log.report(step, step, {{"train/loss": 0.5}})
        log.close("finished", failed=False)
    """
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 30
    assert done.stdout.count("warning:") == 1, done.stdout
    assert len(lines_of(tmp_path)) == 5


def test_wandb_leaves_no_process_behind_a_killed_trainer_and_holds_no_pipe_open(tmp_path: Path) -> None:
    program = f"""
        import os, signal
        from pathlib import Path
        from tests.unit.observe.test_wandb_run import open_log
        log = open_log(Path({str(tmp_path)!r}))
        print("service", Path(f"/proc/self/task/{{os.getpid()}}/children").read_text(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert time.monotonic() - begin < 30  # run() returns when the last holder of the pipe is gone
    service = int(done.stdout.split()[-1])
    assert not is_running(service)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_our_standard_output_is_not_wrapped(tmp_path: Path) -> None:
    before = sys.stdout.write
    log = open_log(tmp_path)
    assert sys.stdout.write == before
    log.close("finished", failed=False)
    assert not list((tmp_path / "wandb").rglob("output.log"))


def test_records_that_span_blocks_are_whole_and_a_torn_end_is_left_out() -> None:
    def fragment(kind: int, data: bytes) -> bytes:
        return b"\0\0\0\0" + len(data).to_bytes(2, "little") + bytes([kind]) + data

    small, large = b"a" * 100, bytes(range(256)) * 400
    content = b":W&B\0\0\0" + fragment(1, small)
    room = BLOCK - len(content) - HEADER
    content += fragment(2, large[:room]) + fragment(3, large[room : room + BLOCK - HEADER])
    rest = large[room + BLOCK - HEADER :]
    content += fragment(3, rest[: BLOCK - HEADER]) + fragment(4, rest[BLOCK - HEADER :])
    content += fragment(1, b"x" * (BLOCK - len(content) % BLOCK - HEADER - 3)) + b"\0\0\0" + fragment(1, b"end")
    found = list(records_of(content + fragment(1, b"torn")[:-1]))
    assert found[:2] == [small, large]
    assert found[-1] == b"end"
    assert len(found) == 4


def test_the_library_is_not_imported_when_disabled(tmp_path: Path) -> None:
    program = f"""
        import sys
        from pathlib import Path
        from tests.unit.observe.test_log import open_log
        open_log(Path({str(tmp_path)!r})).close("finished", failed=False)
        assert "wandb" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, check=True)


def test_a_piece_that_is_not_wandbs_stops_wandb_and_not_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    piece = tmp_path / "wandb/offline-run-20260101_000000-abc/run-abc.wandb"
    piece.parent.mkdir(parents=True)
    piece.write_bytes(b":W&B\0\0\0" + b"\0\0\0\0\x03\0\x01\xff\xff\xff")
    log = open_log(tmp_path, wandb_id="abc")
    log.report(1, 1, {"train/loss": 0.5})
    log.close("finished", failed=False)
    assert capsys.readouterr().out.count("warning: W&B offline did not start") == 1
    assert len(lines_of(tmp_path)) == 1


def reports(log: SilentLog, steps: range, losses: float) -> None:
    for step in steps:
        log.report(step, step, {"train/loss": losses})


def test_what_a_rollback_takes_back_stays_and_what_differs_is_sent_once_above_it(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    reports(log, range(1, 8), 1.0)
    log.close(
        "rolled back from step 8 to 4", failed=False
    )  # the steps 6 to 8 were bad, the last of which nobody heard of
    back = {"resume_step": 4, "wandb_id": log.wandb_id, "taken_back": [(6, 8)]}
    log = open_log(tmp_path, **back)
    log.alert("rolled back", "the steps 6 to 8 were bad")
    reports(log, range(5, 6), 1.0)
    reports(log, range(6, 8), 2.0)
    log.close("killed", failed=True)
    # The next start finds no checkpoint from after the rollback: it comes to the bad steps again, and goes back again.
    log = open_log(tmp_path, resume_step=4, wandb_id=log.wandb_id)
    reports(log, range(5, 8), 1.0)
    log.close("rolled back from step 8 to 4", failed=False)
    log = open_log(tmp_path, **back)
    reports(log, range(5, 6), 1.0)
    reports(log, range(6, 12), 2.0)
    log.close("finished", failed=False)
    rows = history_of(tmp_path)
    assert [(row["step"], row["train/loss"]) for row in rows] == [
        *((step, 1.0) for step in range(1, 8)), *((step, 2.0) for step in range(6, 12)),
    ]  # fmt: skip
    numbers = [row["_step"] for row in rows]
    assert numbers == sorted(set(numbers))
    assert [line["train/loss"] for line in lines_of(tmp_path)] == [1.0] * 5 + [2.0] * 6
    assert alerts_of(tmp_path) == [("rolled back", "the steps 6 to 8 were bad")]


def alerts_of(run_dir: Path) -> list[tuple[str, str]]:
    from wandb.proto import wandb_internal_pb2

    paths = sorted((run_dir / "wandb").glob("*run-*-*/run-*.wandb"))
    records = [wandb_internal_pb2.Record.FromString(raw) for path in paths for raw in whole_records(path)]
    return [(r.alert.title, r.alert.text) for r in records if r.WhichOneof("record_type") == "alert"]


@pytest.mark.parametrize(
    "taken_back",
    [[(6, 8)], [(6, 8), (6, 8)], [(6, 8), (20, 25)], [(20, 25), (6, 8)], [(6, 8), (7, 12)], [(6, 30), (2, 40), (3, 3)]],
)
def test_row_numbers_grow_through_every_rollback(taken_back: list[tuple[int, int]]) -> None:
    sent = []  # by a run that reports every step
    for part, (_, last) in enumerate([*taken_back, (50, 51)]):
        rows = RowNumbers(taken_back[:part])
        begin = 1 if part == 0 else taken_back[part - 1][0]
        if part:
            before = RowNumbers(taken_back[: part - 1])
            assert [rows.number(step) for step in range(begin)] == [before.number(step) for step in range(begin)]
        sent += [rows.number(step) for step in range(begin, last)]
    assert sent == sorted(set(sent))
