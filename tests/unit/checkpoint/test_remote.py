"""Checkpoints in an object store: the same promises as on a disk, with neither rename nor flush, over whatever fsspec drives."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import Tensor

from softmoe_train.checkpoint import CheckpointError, CheckpointStore, verify
from softmoe_train.checkpoint.folder import step_folders
from softmoe_train.checkpoint.remote import RemotePath, place_of, place_problem
from softmoe_train.checkpoint.saver import Saver
from softmoe_train.commands.main import main
from softmoe_train.config import ConfigError, compose, save_yaml
from softmoe_train.settings import RunConfig, check
from softmoe_train.stores import driver_problem
from tests.unit.checkpoint import elsewhere
from tests.unit.checkpoint.cut import CONFIG, LOOP, values

DRIVER = elsewhere.__name__  # the import registers it


class Killed(BaseException):
    """What nothing catches, as nothing catches SIGKILL."""


@pytest.fixture
def bucket() -> Iterator[RemotePath]:
    """A folder in a store that lives in this process."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield RemotePath("memory://bucket/run")
    MemoryFileSystem.store.clear()


def store_in(folder: RemotePath, keep_last: int = 1) -> CheckpointStore:
    return CheckpointStore(folder, keep_last=keep_last, rank=0, world=1, group=None)


def state(value: float) -> dict[str, Tensor]:
    return {"model.weight": torch.full((500, 10), value), "loop.step": torch.tensor(value)}


def loaded(store: CheckpointStore) -> float:
    """The value that the newest checkpoint holds, from its document and every tensor alike."""
    path, tensors = store.latest(), state(0.0)
    assert path is not None
    store.load(path, tensors)
    (value,) = {store.read_documents(path)["loop"], *(tensor.unique().item() for tensor in tensors.values())}
    return value


def raising(error: Exception) -> Callable[..., None]:
    """A method that fails so."""

    def fails(*_: Any, **__: Any) -> None:
        raise error

    return fails


def names_in(folder: RemotePath) -> list[str]:
    return sorted(path.name for path in folder.folders())


def test_what_is_saved_loads_bit_equal_and_only_the_newest_are_kept(bucket: RemotePath) -> None:
    store = store_in(bucket, keep_last=2)
    store.prepare(state(1.0))
    for step in (1, 2, 3):
        assert store.save(step, state(float(step)), {"loop": float(step)}) == bucket / f"step_{step:08d}"
    assert loaded(store_in(bucket)) == 3.0
    assert verify(bucket / "step_00000003") == []
    assert names_in(bucket) == ["step_00000002", "step_00000003"]
    with pytest.raises(CheckpointError, match="step_00000003 is newer than step_00000001"):
        store.save(1, state(1.0), {})


def test_a_save_cut_off_at_any_change_in_the_store_leaves_a_whole_checkpoint_and_the_next_save_works(
    bucket: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, kill_at = 0, -1

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def once(self: MemoryFileSystem, path: str, *args: Any, **options: Any) -> Any:
            nonlocal changes
            reads = change.__name__ == "_open" and args[:1] == ("rb",)
            if changes == kill_at and not reads:
                raise Killed
            changes += not reads
            return change(self, path, *args, **options)

        return once

    for name in ("_open", "rm_file"):  # all that changes the store goes through them
        monkeypatch.setattr(MemoryFileSystem, name, counted(getattr(MemoryFileSystem, name)))
    seen = []
    for at in range(100):
        MemoryFileSystem.store.clear()
        kill_at = -1
        store_in(bucket).save(1, state(1.0), {"loop": 1.0})
        changes, kill_at, killed = 0, at, False
        try:
            store_in(bucket).save(2, state(2.0), {"loop": 2.0})
        except Killed:
            killed = True
        kill_at = -1
        assert [verify(path) for path in step_folders(bucket, complete=True) if verify(path)] == []
        seen.append(loaded(store_in(bucket)))
        store_in(bucket).save(3, state(3.0), {"loop": 3.0})
        assert (loaded(store_in(bucket)), names_in(bucket)) == (3.0, ["step_00000003"])
        if not killed:
            break
    # Owner, the rank's file, document, manifest, mark; then the older one's objects, its mark first.
    assert seen == [1.0] * 5 + [2.0] * (len(seen) - 5)
    assert len(seen) >= 10


def test_a_store_that_does_not_answer_is_not_an_empty_one(bucket: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    store, warnings = store_in(bucket), []
    store.save(1, state(1.0), {})

    fails = raising(ConnectionError("cannot reach https://host/bucket?sig=hidden"))
    for name in ("info", "ls"):
        with monkeypatch.context() as broken:
            broken.setattr(MemoryFileSystem, name, fails)
            with pytest.raises(CheckpointError, match=r"memory://bucket/run.*: ConnectionError: cannot reach") as error:
                store.latest()
        assert "hidden" not in str(error.value)
    with monkeypatch.context() as broken:
        broken.setattr(MemoryFileSystem, "ls", fails)
        saver = Saver(store, max_failures=3, warn=warnings.append)
        saver.begin(2, state(2.0), {}, None)
        saver.settle(None)
    (warning,) = warnings
    assert "the run goes on; the checkpoints cannot be listed" in warning
    store.save(3, state(3.0), {"loop": 3.0})
    assert loaded(store) == 3.0


def test_what_is_set_aside_keeps_its_bytes_and_its_step_can_be_saved_again(
    bucket: RemotePath, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_in(bucket)
    for count in (1, 2):
        path = store.save(300, state(3.0), {})
        before = {file.name: file.read_bytes() for file in path.iterdir()}
        with caplog.at_level(logging.WARNING):
            store.set_aside(path, ["rank_00000.safetensors is missing"])
        assert store.latest() is None
        place = store.folders_set_aside()[-1]
        assert place == bucket / ("step_00000300.damaged" + ("" if count == 1 else "-2"))
        assert {file.name: file.read_bytes() for file in place.iterdir()} == before
    assert "memory://bucket/run/step_00000300 is damaged" in caplog.text


def test_damage_is_named(bucket: RemotePath) -> None:
    store = store_in(bucket)
    path = store.save(1, state(1.0), {})
    file = path / "rank_00000.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (fault,) = verify(path)
    assert fault.startswith("rank_00000.safetensors: the bytes of ")
    file.write_bytes(data[:-1])
    assert verify(path)[0].startswith(f"rank_00000.safetensors has {len(data) - 1} bytes, not {len(data)}")
    file.unlink()
    assert verify(path)[0].startswith("rank_00000.safetensors is missing")


def test_the_run_that_started_last_has_the_folder_and_the_other_is_told(bucket: RemotePath) -> None:
    first, second = store_in(bucket), store_in(bucket)
    first.prepare(state(1.0))
    first.save(1, state(1.0), {"loop": 1.0})
    second.prepare(state(1.0))
    with pytest.raises(CheckpointError, match=r"memory://bucket/run has been another run's since process .* started"):
        first.save(2, state(9.0), {"loop": 9.0})
    second.save(2, state(2.0), {"loop": 2.0})
    assert loaded(second) == 2.0


def test_a_store_that_takes_nothing_is_told_before_the_first_step(
    bucket: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", raising(PermissionError("Access Denied")))
    with pytest.raises(
        CheckpointError, match=r"no checkpoint can be saved:\n.*OWNER.json: PermissionError: Access Denied"
    ):
        store_in(bucket).prepare(state(1.0))


def test_no_listing_from_before_another_process_s_save_is_believed(tmp_path: Path) -> None:
    folder = RemotePath(f"elsewhere://{tmp_path}/run")
    here = store_in(folder)
    here.save(1, state(1.0), {"loop": 1.0})
    assert loaded(here) == 1.0
    there = CheckpointStore(
        tmp_path / "run", keep_last=1, rank=0, world=1, group=None
    )  # past the driver and its memory
    there.save(2, state(2.0), {"loop": 2.0})
    assert loaded(here) == 2.0
    assert names_in(folder) == ["step_00000002"]


def test_inspect_and_export_read_a_url_and_a_run_folder_that_names_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"elsewhere://{tmp_path}/far"
    config = {**CONFIG, "checkpoint": {"folder": url}}
    store_in(RemotePath(url)).save(20, values(), {"config": config, "loop": LOOP})
    run = tmp_path / "run"
    run.mkdir()
    save_yaml(config, run / "config.yaml")
    for ckpt in (url, f"{url}/step_00000020", str(run)):
        assert main(["inspect", f"ckpt={ckpt}", "verify=true", f"out={tmp_path}/out.json"]) == 0
        assert json.loads((tmp_path / "out.json").read_text())["path"] == f"{url}/step_00000020"
        assert "every hash holds" in capsys.readouterr().out
    assert main(["export", f"ckpt={url}", f"out={tmp_path}/weights.safetensors"]) == 0
    assert main(["inspect", f"ckpt={url}/step_00000021"]) == 2
    assert "step_00000021: there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("s3://key:secret@bucket/x", "has no user, key or query"),
        ("s3://bucket/x?versionId=1", "has no user, key or query"),
        ("s3://bucket/lr=[1]", "names one folder"),
        ("simplecache::s3://bucket/x", "no URL of one store"),
        ("s3:/bucket/x", "write s3://bucket/x"),
        ("s3:///", "write s3://BUCKET/FOLDER"),
        ("file:///data/x", "give a path, as in /data/x"),
        ("s4://bucket/x", "fsspec knows no s4://"),
        ("", "it is empty"),
        ("runs/mine", None),
        ("runs/lr=1e-3:x", None),
        ("elsewhere:///data/x", None),
    ],
)
def test_what_is_no_place_for_checkpoints_is_told_with_the_remedy(text: str, words: str | None) -> None:
    problem = place_problem(text) or driver_problem(text)
    assert (problem is None) if words is None else (problem is not None and words in problem), problem
    assert "secret" not in (problem or "")


def test_a_plain_path_stays_one() -> None:
    assert place_of("runs/mine") == Path("runs/mine")
    assert place_of("s3://bucket/runs/mine/") == RemotePath("s3://bucket/runs/mine")


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        compose(RunConfig, ["recipe=debug", *overrides], lambda config: check(config, 1, 1))
    (problem,) = error.value.problems
    return problem


def test_a_store_that_cannot_be_used_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (f"run_dir={tmp_path}/run", f"checkpoint.folder=elsewhere://{tmp_path}/far")
    with monkeypatch.context() as absent:
        absent.setattr(elsewhere.Elsewhere, "info", raising(FileNotFoundError("404")))
        assert refusal(*given).endswith("the store says that there is no such bucket; make it, or check the name")
    with monkeypatch.context() as away:
        away.setattr(elsewhere.Elsewhere, "ls", raising(ConnectionError("no route")))
        assert "cannot be read: elsewhere://" in refusal(*given)
        assert "ConnectionError: no route; mend that, or give another checkpoint.folder" in refusal(*given)
    with monkeypatch.context() as bare:
        bare.setattr("fsspec.get_filesystem_class", raising(ImportError("Install s3fs to access S3")))
        assert refusal(*given).endswith("elsewhere:// has no driver here: Install s3fs to access S3")


def test_a_run_does_not_take_another_s_checkpoints_nor_lose_its_own(tmp_path: Path) -> None:
    url = f"elsewhere://{tmp_path}/far"
    run = f"run_dir={tmp_path}/run"
    theirs = compose(RunConfig, ["recipe=debug", "seed=7"], lambda _: []).as_saved()
    store_in(RemotePath(url)).save(4, values(), {"config": theirs})
    assert refusal(run, f"checkpoint.folder={url}").startswith(
        f"checkpoint.folder={url} holds a run with other settings: seed=0 (was 7); give another checkpoint.folder"
    )
    ours = compose(RunConfig, ["recipe=debug", f"checkpoint.folder={url}"], lambda _: []).as_saved()
    (tmp_path / "run").mkdir()
    save_yaml(ours, tmp_path / "run/config.yaml")
    assert f"there is no checkpoint, but run_dir={tmp_path}/run has some in {url}; copy them there" in refusal(run)
    assert "is a URL; give a folder, and checkpoint.folder=URL" in refusal(f"run_dir={url}")
    assert refusal(run, "checkpoint.folder=s3://u:secret@bucket/x").startswith(
        "checkpoint.folder=s3://bucket/x: a URL here"
    )
    (tmp_path / "file").write_text("")
    assert "is not a folder that we may write to" in refusal(run, f"checkpoint.folder={tmp_path}/file/x")
