"""A disk without room, one for real (a small tmpfs): what gives way, what does not, and what is said in time."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from softmoe_train.checkpoint import CheckpointError, CheckpointStore, verify
from softmoe_train.checkpoint.saver import Saver
from tests.disks import read_only, small_disk

MIB = 2**20


def state(value: float, mib: int = 4) -> dict[str, Tensor]:
    return {"model.weight": torch.full((mib, MIB // 4), float(value))}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 14 MiB: it holds three states of 4 MiB."""
    with small_disk(tmp_path / "disk", 14) as folder:
        yield folder


def kept(store: CheckpointStore) -> list[int]:
    assert all(verify(path) == [] for path in store.folder.iterdir())
    return sorted(int(path.name.removeprefix("step_")) for path in store.folder.iterdir())


def test_a_checkpoint_that_would_go_anyway_makes_room_before_but_the_newest_never_does(disk: Path) -> None:
    store = CheckpointStore(disk / "checkpoints", keep_last=3, rank=0, world=1, group=None)
    for step in range(5):
        store.save(step, state(step), {})
    assert kept(store) == [2, 3, 4], "the disk never held four"
    one = CheckpointStore(disk / "checkpoints", keep_last=1, rank=0, world=1, group=None)
    (disk / "of_others").write_bytes(bytes(MIB))
    one.save(5, state(5), {})
    assert kept(one) == [5]
    (disk / "of_others").write_bytes(bytes(8 * MIB))
    with pytest.raises(
        CheckpointError, match=r"disk of .*checkpoints has no room for a checkpoint of 4.0 MiB; make room"
    ):
        one.save(6, state(6), {})
    assert kept(one) == [5]


def test_milestones_and_the_best_make_no_room(disk: Path) -> None:
    store = CheckpointStore(disk / "checkpoints", keep_last=1, keep_every=2, rank=0, world=1, group=None)
    store.save(1, state(1), {}, best=1)
    store.save(2, state(2), {}, best=1)
    store.save(3, state(3), {}, best=1)
    assert kept(store) == [1, 2, 3]
    with pytest.raises(CheckpointError, match="no room"):
        store.save(4, state(4), {}, best=1)
    assert kept(store) == [1, 2, 3]


def test_a_run_is_warned_a_save_ahead_and_goes_on_when_there_is_room_again(disk: Path) -> None:
    warnings: list[str] = []
    store = CheckpointStore(disk / "checkpoints", keep_last=1, rank=0, world=1, group=None)
    saver = Saver(store, max_failures=2, warn=warnings.append)
    saver.save(1, state(1), {}, None)
    assert warnings == []
    others = disk / "of_others"
    others.write_bytes(bytes(4 * MIB))
    saver.save(2, state(2), {}, None)  # in the room that the first leaves
    assert warnings == []
    others.write_bytes(bytes(8 * MIB))
    saver.look_ahead()
    assert len(warnings) == 1
    assert warnings[0].startswith("the next save will fail: the disk of ")
    saver.begin(3, state(3), {}, None)
    saver.settle(None)
    assert "the run goes on; the last checkpoint is step_00000002" in warnings[1]
    others.unlink()
    saver.begin(4, state(4), {}, None)
    saver.settle(None)
    assert (kept(store), len(warnings)) == ([4], 2)


def test_a_disk_that_fills_while_a_save_writes_loses_nothing(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(disk / "checkpoints", keep_last=1, rank=0, world=1, group=None)
    store.save(1, state(1), {})
    monkeypatch.setattr("softmoe_train.checkpoint.store.has_room", lambda path, needed: True)
    (disk / "of_others").write_bytes(bytes(8 * MIB))
    with pytest.raises(CheckpointError, match=r"OSError.*No space left on device"):
        store.save(2, state(2), {})
    assert kept(store) == [1], "what was written of the second has gone"


def test_a_disk_that_turns_read_only_is_a_warning_until_it_is_mended(disk: Path) -> None:
    warnings: list[str] = []
    store = CheckpointStore(disk / "checkpoints", keep_last=1, rank=0, world=1, group=None)
    saver = Saver(store, max_failures=2, warn=warnings.append)
    saver.save(1, state(1), {}, None)
    with read_only(disk):
        saver.begin(2, state(2), {}, None)
        saver.settle(None)
    assert "Read-only file system" in warnings[0]
    saver.begin(3, state(3), {}, None)
    saver.settle(None)
    assert (kept(store), len(warnings)) == ([3], 1)


def test_a_folder_that_is_deleted_in_mid_run_is_made_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep_last=1, rank=0, world=1, group=None)
    store.save(1, state(1), {})
    shutil.rmtree(tmp_path / "run")
    store.save(2, state(2), {})
    assert kept(store) == [2]
