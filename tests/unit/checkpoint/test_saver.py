"""A save goes on in the background while the state changes; one that fails is a warning, and too many end the run."""

import os
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from softmoe_train.checkpoint import CheckpointError, CheckpointStore, NotFiniteError, staging, verify
from softmoe_train.checkpoint.best import Best
from softmoe_train.checkpoint.saver import Saver


def state(value: float) -> dict[str, Tensor]:
    return {"model.weight": torch.full((500, 10), float(value)), "optimizer.updates": torch.tensor([float(value)])}


def loaded(store: CheckpointStore, path: Path) -> float:
    tensors = state(0.0)
    store.load(path, tensors)
    (value,) = {tensor.unique().item() for tensor in tensors.values()}
    return value


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep_last=1, rank=0, world=1, group=None)


class Disk:
    """A disk whose first flush waits until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.may_go_on = threading.Event(), threading.Event()
        fsync = os.fsync

        def slow(file: int) -> None:
            self.reached.set()
            assert self.may_go_on.wait(30)
            fsync(file)

        monkeypatch.setattr(os, "fsync", slow)


def test_training_goes_on_and_changes_the_state_while_the_disk_is_slow(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, disk = state(1.0), Disk(monkeypatch)
    store.begin(1, tensors, {})
    assert disk.reached.wait(30)
    for tensor in tensors.values():
        tensor.fill_(2.0)
    assert not list(store.folder.glob("*/COMPLETE.json"))
    disk.may_go_on.set()
    path = store.settle()
    assert path is not None
    assert (loaded(store, path), verify(path)) == (1.0, [])
    assert store.settle() is None


def test_the_group_of_a_save_under_way_is_left_to_it(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    store.begin(1, state(1.0), {})
    for call in (store.latest, lambda: store.begin(2, state(2.0), {})):
        with pytest.raises(AssertionError, match="settle it first"):
            call()
    disk.may_go_on.set()
    store.settle()


def test_host_memory_is_taken_once_as_large_as_what_is_written(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    class Counted(staging.Staging):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # pyright: ignore[reportArgumentType]
            taken.append(len(self.bytes))

    monkeypatch.setattr("softmoe_train.checkpoint.store.Staging", Counted)
    store.prepare(state(0.0))
    assert taken == [4 * 5001]
    assert [loaded(store, store.save(step, state(step), {})) for step in (1, 2, 3)] == [1, 2, 3]
    assert taken == [4 * 5001]
    more = state(4.0) | {"model.more": torch.full((3,), 4.0, dtype=torch.bfloat16)}
    store.save(4, more, {})  # another state: planned anew
    assert taken == [4 * 5001, 4 * 5001 + 6]


def in_the_way(store: CheckpointStore) -> Path:
    """A file where the checkpoints' folder should be: nothing can be saved while it is there."""
    store.folder.parent.mkdir(exist_ok=True)
    store.folder.touch()
    return store.folder


def test_a_save_that_fails_is_a_warning_until_there_are_too_many_in_a_row(store: CheckpointStore) -> None:
    warnings: list[str] = []
    saver = Saver(store, max_failures=3, warn=warnings.append)
    obstacle = in_the_way(store)
    for step in (1, 2):
        saver.begin(step, state(step), {}, None)
        saver.settle(None)
    assert len(warnings) == 2
    assert "step_00000001 was not saved:\n  - rank 0: NotADirectoryError" in warnings[0]
    assert "the run goes on; there is no checkpoint yet" in warnings[0]
    obstacle.unlink()
    saver.begin(3, state(3), {}, None)
    saver.settle(None)
    path = store.latest()
    assert path is not None
    assert loaded(store, path) == 3
    moved = store.folder.rename(store.folder.with_name("moved"))
    in_the_way(store)
    for step in (4, 5):  # counted from the save that went well
        saver.begin(step, state(step), {}, None)
        saver.settle(None)
    saver.begin(6, state(6), {}, None)
    with pytest.raises(CheckpointError, match=r"that makes 3 saves in a row \(checkpoint.max_failures\); there is no"):
        saver.settle(None)
    assert moved.is_dir()


def test_the_save_at_the_end_of_a_run_is_tried_again(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    obstacle, waits = in_the_way(store), []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        obstacle.unlink()

    monkeypatch.setattr("time.sleep", wait)
    warnings: list[str] = []
    Saver(store, max_failures=2, warn=warnings.append).save(9, state(9), {}, None)
    path = store.latest()
    assert path is not None
    assert (loaded(store, path), len(warnings), waits) == (9, 1, [10.0])


def test_the_best_whose_save_failed_gives_way_to_the_best_before(store: CheckpointStore) -> None:
    saver = Saver(store, max_failures=3, warn=lambda _: None)
    good, lost = Best("highest x", 1, 0.5), Best("highest x", 2, 0.7)
    assert saver.settle(None) is None
    saver.save(1, state(1), {}, good)
    assert saver.settle(good) == good
    saved = store.folder.rename(store.folder.with_name("saved"))
    in_the_way(store)
    saver.begin(2, state(2), {}, lost)
    assert saver.settle(lost) == good
    saver.begin(3, state(3), {}, good)  # not the best, and not saved: the best stands
    assert saver.settle(good) == good
    store.folder.unlink()
    saved.rename(store.folder)
    saver.save(4, state(4), {}, good)
    assert store.holds(1)


def test_a_state_that_is_not_finite_is_never_completed(store: CheckpointStore) -> None:
    saver = Saver(store, max_failures=3, warn=lambda _: None)
    saver.save(1, state(1), {}, None)
    for step, value in ((2, float("nan")), (3, float("inf")), (4, float("-inf"))):
        tensors = state(1.0)
        tensors["model.weight"][499, 9] = value
        saver.begin(step, tensors, {}, None)
        with pytest.raises(NotFiniteError, match=r"rank 0: model.weight hold.*\n.*last checkpoint is step_00000001"):
            saver.settle(None)
    assert [path.name for path in store.folder.iterdir()] == ["step_00000001"]
